"""What ``methods/special_tokens/errors.py`` found, in numbers that say what they mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

METRIC_SET = "unweave.special/1"
"""Name and version of the definitions; raised whenever a number would change."""

KINDS = ("system", "user", "assistant", "text", "special", "template")
"""Of every token one: the words of a role, plain text, the special tokens, and what else a chat template wrote."""
GROUPS = ("all", "special", "other", *(kind for kind in KINDS if kind != "special"))
"""What errors are given for: every token, the special ones, all but those, and each other kind on its own."""


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
class TokenErrors:
    """What was measured of one SAE; ``everything[group]`` and ``without_outliers[group]`` for each of ``GROUPS``."""

    metric_set: str
    site: str
    """Where the SAE writes, and is compared."""
    site_read: str
    """Where it reads: the same, but for transcoders."""
    sequences: int
    special_ids: tuple[int, ...]
    """The ids that were taken for special,"""
    special_where: str
    """and where: only where the chat template wrote them, or anywhere."""
    everything: dict[str, GroupErrors]
    without_outliers: dict[str, GroupErrors]
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
    notes: tuple[str, ...] = ()
    """What a reader must know about these numbers."""
    firing_counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64), repr=False, compare=False)
    """On how many tokens each latent is above zero, int64 [F]. Not part of ``to_dict``."""

    @property
    def median_norm_edited(self) -> float:
        """Of the activations that adding a latent moves: those where the SAE writes."""
        return self.median_norm if self.median_norm_write is None else self.median_norm_write

    @property
    def mse(self) -> float | None:
        """The paper's error over all tokens."""
        return self.everything["all"].mse

    @property
    def log2_mse(self) -> float | None:
        """Its logarithm, as the paper's tables show it."""
        return self.everything["all"].log2_mse

    @property
    def mse_special(self) -> float | None:
        """The paper's error over special tokens."""
        return self.everything["special"].mse

    @property
    def log2_mse_special(self) -> float | None:
        """Its logarithm, as the paper's tables show it."""
        return self.everything["special"].log2_mse

    @property
    def unexplained_variance(self) -> float | None:
        """Over all tokens."""
        return self.everything["all"].unexplained_variance

    @property
    def l0(self) -> float | None:
        """Over all tokens."""
        return self.everything["all"].l0

    def to_dict(self) -> dict[str, Any]:
        """Everything but the firing counts, as JSON-able values."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "firing_counts"}
        for name in ("everything", "without_outliers"):
            plain[name] = {group: asdict(errors) for group, errors in plain[name].items()}
        return plain | {"special_ids": list(self.special_ids), "notes": list(self.notes)}


@dataclass(frozen=True)
class Sums:
    """Sums in float64 over tokens, by sequence and kind (R sequences, K kinds of ``KINDS``, width D).

    counts, errors (squared, summed over dimensions) and l0: [R, K]; first [K, D] and second [K] moments of the
    activations around ``shift`` [D].
    """

    counts: Tensor
    errors: Tensor
    l0: Tensor
    first: Tensor
    second: Tensor
    shift: Tensor

    def groups(self, flat: float) -> dict[str, GroupErrors]:
        """The errors of every group. Tokens whose spread is below ``flat`` of their mean square do not vary."""
        special = KINDS.index("special")
        members = {kind: [KINDS.index(kind)] for kind in KINDS} | {
            "all": list(range(len(KINDS))),
            "other": [place for place in range(len(KINDS)) if place != special],
        }
        return {group: self._group(members[group], flat) for group in GROUPS}

    def _group(self, kinds: Sequence[int], flat: float) -> GroupErrors:
        chosen = list(kinds)
        counts, errors = self.counts[:, chosen].sum(1), self.errors[:, chosen].sum(1)
        n, width = float(counts.sum()), len(self.shift)
        if n == 0:
            return GroupErrors(0, 0, None, None, None, None, None, None)
        some = counts > 0
        mse = float((errors[some] / counts[some]).mean()) / width
        total = float(errors.sum())
        offset = self.first[chosen].sum(0) / n
        spread = float(self.second[chosen].sum()) - n * float(offset.square().sum())
        length = float((self.shift + offset).square().sum())
        varies = spread > flat * n * length and n > 1
        return GroupErrors(
            tokens=int(n),
            sequences=int(some.sum()),
            mse=mse,
            log2_mse=log2(mse),
            mse_tokens=total / (n * width),
            log2_mse_tokens=log2(total / (n * width)),
            unexplained_variance=total / spread if varies else None,
            l0=float(self.l0[:, chosen].sum()) / n,
        )


def log2(value: float) -> float | None:
    """The logarithm to base 2; None for 0, which has none."""
    return math.log2(value) if value > 0 else None
