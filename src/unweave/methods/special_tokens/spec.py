"""What measuring special tokens can be asked. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from unweave.core.command import Command
from unweave.core.rules import at_least, rule, share
from unweave.core.spec import Spec, operational
from unweave.data.spec import DataSpec
from unweave.inputs.spec import UseSpec
from unweave.methods.special_tokens.result import SpecialTokenResult

_MOVES = rule("at least 0, one of them above", lambda alphas: min(alphas, default=-1) >= 0 < max(alphas))


@dataclass(frozen=True, kw_only=True)
class Tolerance(Spec):
    """What answers may lose, against the unedited ones, and still count as changed but not degraded."""

    max_distinct_loss: Annotated[float, at_least(0)] = 0.1
    """How much lower the share of distinct 3-grams may be."""
    max_perplexity_ratio: Annotated[float, at_least(1)] = 1.25
    """By what factor perplexity under the unedited model may be higher."""
    min_answers_changed: Annotated[float, share()] = 0.5
    """What share of the answers must differ for an alpha to count as having done something."""


@dataclass(frozen=True, kw_only=True)
class SpecialTokensSpec(UseSpec):
    """Measuring an SAE on special tokens and by role, and steering with a latent of a special token."""

    data: DataSpec | None = None
    """Other conversations to measure on; by default held-out ones of the training text, each on its own."""
    tokens: Annotated[int | None, at_least(1)] = None
    """How many tokens to read; by default as many as the text's heldout_tokens. Only conversations count."""
    batch_tokens: Annotated[int, at_least(1)] = operational(1024)
    """Tokens that go through the model at once."""
    special_ids: tuple[int, ...] = ()
    """Which ids are special; by default the tokenizer's special ids and the template's words for who speaks."""
    where: Literal["template", "anywhere"] = "template"
    """Whether such an id counts only where the chat template wrote it, or wherever it stands."""
    samples: Annotated[int, at_least(1)] = 1000
    """Over how many conversations at most a latent's largest activations are averaged."""
    token: str | None = None
    """The special token whose strongest latent is steered with; by default the one that opens a turn."""
    latent: int | None = None
    """The latent to steer with; by default the token's strongest, by its average largest activation."""
    questions: tuple[str, ...] = ()
    """What to ask the model; by default ten questions of different kinds."""
    alphas: Annotated[tuple[float, ...], _MOVES] = (0.0, 15.0, 25.0, 50.0, 100.0, 150.0, 200.0)
    """How far to move every position along the latent's direction; the default is the FAST paper's."""
    unit: Literal["absolute", "median"] = "absolute"
    """What alpha counts: the activation's own units, or multiples of its median norm where the SAE writes."""
    controls: Annotated[int, at_least(0)] = 3
    """With how many latents drawn at random to do the same beside it."""
    max_new_tokens: Annotated[int, at_least(1)] = 60
    """Length of the answers."""
    sweet_spot: Tolerance = Tolerance()
    """The alphas at which answers change and are not degraded."""
    seed: int = 0
    """Choice of the random latents."""


COMMAND = Command(
    words="special-tokens",
    spec=SpecialTokensSpec,
    result=SpecialTokenResult,
    stage="unweave.methods.special_tokens.stage:run",
    summary="Measure an SAE on special tokens and by role, and steer with a special token's latent.",
    about="Reconstruction errors as the FAST paper defines them, over whole held-out conversations: on special tokens, "
    "by role, with and without norm outliers. Then the latents that answer to each special token, and the model's "
    "answers with the strongest one added at every position, beside latents drawn at random.",
    examples=(
        "unweave special-tokens --sae runs/train-0123456789ab/sae",
        "unweave special-tokens --sae runs/train-0123456789ab/sae --unit median --alphas 0.1 0.2 0.5 1",
    ),
)
