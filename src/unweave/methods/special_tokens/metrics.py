"""Errors with every latent's count, and the sums that they are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from unweave.methods.special_tokens.result import GROUPS, KINDS, ByGroup, GroupErrors, TokenErrors


@dataclass(frozen=True)
class MeasuredErrors(TokenErrors):
    """What ``special_token_errors`` measured, with the count of every latent."""

    firing_counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64), repr=False, compare=False)
    """On how many tokens each latent is above zero, int64 [F]."""

    def plain(self) -> TokenErrors:
        """Everything but the firing counts."""
        return TokenErrors(**{f.name: getattr(self, f.name) for f in fields(TokenErrors)})


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

    def groups(self, flat: float) -> ByGroup:
        """The errors of every group. Tokens whose spread is below ``flat`` of their mean square do not vary."""
        members = {kind: [kind] for kind in KINDS} | {"all": KINDS, "other": [k for k in KINDS if k != "special"]}
        return ByGroup(**{group: self._group(members[group], flat) for group in GROUPS})

    def _group(self, kinds: Sequence[str], flat: float) -> GroupErrors:
        chosen = [KINDS.index(kind) for kind in kinds]
        counts, errors = self.counts[:, chosen].sum(1), self.errors[:, chosen].sum(1)
        n, width = float(counts.sum()), len(self.shift)
        if n == 0:
            return GroupErrors(0, 0, None, None, None, None, None, None)
        holds_any = counts > 0
        mse = float((errors[holds_any] / counts[holds_any]).mean()) / width
        total = float(errors.sum())
        offset = self.first[chosen].sum(0) / n
        spread = float(self.second[chosen].sum()) - n * float(offset.square().sum())
        length = float((self.shift + offset).square().sum())
        varies = spread > flat * n * length and n > 1
        return GroupErrors(
            tokens=int(n),
            sequences=int(holds_any.sum()),
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
