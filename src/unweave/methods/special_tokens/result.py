"""What measuring special tokens, and steering with their latents, gives. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from unweave.core.intervals import Interval
from unweave.core.result import Result
from unweave.inputs.subject import Subject

METRIC_SET = "unweave.special/1"
"""Name and version of the definitions; raised whenever a number would change."""

KINDS = ("system", "user", "assistant", "text", "special", "template")
"""Of every token one: the words of a role, plain text, the special tokens, and what else a chat template wrote."""
Group = Literal["all", "special", "other", "system", "user", "assistant", "text", "template"]
GROUPS: tuple[Group, ...] = ("all", "special", "other", "system", "user", "assistant", "text", "template")
"""What errors are given for: every token, the special ones, all but those, and each other kind on its own."""


# -- errors -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GroupErrors:
    """Reconstruction of one group of tokens; None where there are no such tokens, or no such number."""

    tokens: int
    sequences: int
    """Sequences that hold at least one such token; the others are left out of ``mse``."""
    mse: float | None
    """The paper's error (equation 7): mean over sequences of the mean over their tokens and dimensions."""
    log2_mse: float | None
    mse_tokens: float | None
    """The plain mean over all tokens and dimensions: long sequences weigh more."""
    log2_mse_tokens: float | None
    unexplained_variance: float | None
    """Squared error over the spread around these tokens' own mean; None where they do not vary."""
    l0: float | None
    """How many latents are above zero on a token."""


@dataclass(frozen=True)
class ByGroup:
    """The errors of every group of ``GROUPS``, by its name."""

    all: GroupErrors
    special: GroupErrors
    other: GroupErrors
    system: GroupErrors
    user: GroupErrors
    assistant: GroupErrors
    text: GroupErrors
    template: GroupErrors

    def of(self, group: Group) -> GroupErrors:
        """The errors of one group."""
        return getattr(self, group)


@dataclass(frozen=True)
class TokenErrors:
    """What was measured of one SAE."""

    metric_set: str
    site: str
    """Where the SAE writes, and is compared."""
    site_read: str
    """Where it reads: the same, but for transcoders."""
    sequences: int
    special_ids: tuple[int, ...]
    """The ids that were taken for special,"""
    special_where: Literal["template", "anywhere"]
    """and where: only where the chat template wrote them, or anywhere."""
    everything: ByGroup
    without_outliers: ByGroup
    """The same without tokens longer than ``max_norm``."""
    sequences_without_special: int
    """They are left out of the special tokens' ``mse``."""
    median_norm: float
    """Of the activations that the SAE reads."""
    median_norm_write: float | None
    """Of those that a transcoder writes; None for an SAE."""
    median_norm_special: float | None
    median_norm_first: float
    """Of the first tokens of the sequences, often attention sinks."""
    max_norm: float
    """Longer tokens are outliers: the limit of the SAE's policy, or 10 medians."""
    max_norm_write: float | None
    """The same where a transcoder writes; None for an SAE."""
    outliers: int
    outliers_special: int
    """How many of the outliers are special tokens."""
    untrained: int
    """Measured tokens whose ids the SAE's policy excludes: it was not trained on them."""
    untrained_special: int
    alive_fraction: float
    """Share of latents that are above zero on at least one token."""
    notes: tuple[str, ...]
    """What a reader must know about these numbers."""

    @property
    def median_norm_edited(self) -> float:
        """Of the activations that adding a latent moves: those where the SAE writes."""
        return self.median_norm if self.median_norm_write is None else self.median_norm_write


# -- latents of special tokens ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenMaxima:
    """The latents with the largest average maximum at one special token."""

    id: int
    text: str
    tokens: int
    conversations: int
    """How many conversations hold the token; the averages are over these."""
    top: tuple[tuple[int, float], ...]
    """(latent, average maximum), largest first."""
    outliers: int
    """How many of the tokens are longer than ``max_norm``."""
    conversations_without_outliers: int
    top_without_outliers: tuple[tuple[int, float], ...]
    """The same without those: an attention sink's values would decide the average."""


# -- answers along alpha ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What the model answered to one question at one alpha."""

    question: str
    alpha: float
    latent: int
    text: str
    n_tokens: int
    distinct: float
    """distinct 3-grams over all 3-grams"""
    perplexity: float | None
    """under the unedited model; None for an empty answer"""
    words_changed: float
    """share of the words, of this answer and the unedited one together, that have no partner in the other"""


@dataclass(frozen=True)
class Level:
    """All answers at one alpha. Losses and ratios are taken question by question against alpha 0; intervals are over
    questions."""

    alpha: float
    length: float
    """by how much every position is moved, in the activation's own units"""
    distinct: Interval
    distinct_loss: Interval
    """how much lower ``distinct`` is than at alpha 0"""
    perplexity: Interval | None
    """geometric mean; None where every answer is empty"""
    perplexity_ratio: Interval | None
    """geometric mean of perplexity over perplexity at alpha 0"""
    answers_changed: Interval
    """share of answers that differ at all from those at alpha 0"""
    words_changed: Interval
    empty: float
    """share of empty answers"""


@dataclass(frozen=True)
class SweetSpot:
    """The alphas at which answers change and do not degrade more than was tolerated; see ``sweet_spot``."""

    alphas: tuple[float, ...]
    certain: bool
    """whether the whole interval, and not only the mean, of every loss lies within the tolerance at all of them"""
    max_distinct_loss: float
    max_perplexity_ratio: float
    min_answers_changed: float


@dataclass(frozen=True)
class AlphaSweep:
    """Answers with a latent, and with latents drawn at random, moved by the same lengths at every position."""

    latent: int
    controls: tuple[int, ...]
    unit: float
    """what an alpha of 1 moves every position by"""
    answers: tuple[Answer, ...]
    control_answers: tuple[Answer, ...]
    levels: tuple[Level, ...]
    """by rising alpha, from 0"""
    control_levels: tuple[Level, ...]
    """likewise; each question's values are first averaged over the random latents. Empty without controls."""


@dataclass(frozen=True)
class Steering:
    """Answers along alpha, and where they change without falling apart."""

    sweep: AlphaSweep
    token: int | None
    """the special token's id whose strongest latent it is; None where the latent was named"""
    unit: Literal["absolute", "median"]
    """what alpha counts: the activation's own units, or median norms where the SAE writes"""
    sweet_spot: SweetSpot
    control_sweet_spot: SweetSpot | None
    """of the random latents; None without any"""


@dataclass(frozen=True)
class SpecialTokenResult(Result):
    """How well an SAE describes special tokens, which latents answer to them, and what adding one does."""

    schema: ClassVar[int] = 2

    subject: Subject
    errors: TokenErrors
    maxima: tuple[TokenMaxima, ...]
    steering: Steering
