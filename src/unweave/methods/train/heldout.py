"""How well SAEs explain held-out activations, summed batch by batch: no more rows are held than one pass makes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.sae.module import SAE


@dataclass
class Heldout:
    """The sums that one SAE's reference numbers are made of, in float64."""

    sae: SAE
    rows: int = 0
    active: int = 0
    missed: float = 0.0
    """squared error of the reconstructions"""
    spread: float = 0.0
    """squared distance of the targets to their mean"""
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, x: Tensor, goal: Tensor) -> None:
        """Counts activations x [N, d_in] and what they should become, [N, d_out]."""
        n = len(x)
        if n == 0:
            return
        codes = self.sae.codes(x)
        self.active += len(codes.values)
        self.missed += float((goal - self.sae.explained(codes, x)).double().square().sum())
        mean = goal.double().mean(0)
        apart = mean - self.mean.to(mean)
        self.spread += float((goal.double() - mean).square().sum())
        self.spread += float(apart.square().sum()) * self.rows * n / (self.rows + n)  # from two means to the common one
        self.mean = self.mean.to(mean) + apart * (n / (self.rows + n))
        self.rows += n

    def reference(self) -> dict[str, float]:
        """Unexplained variance, L0, and on how many tokens. UnweaveError where none counted."""
        if self.rows == 0:
            raise UnweaveError(
                "no held-out token is left to measure on", where="data.heldout_tokens", remedy="hold out more text"
            )
        return {
            "unexplained_variance": self.missed / self.spread if self.spread else float(self.missed > 0),
            "l0": self.active / self.rows,
            "tokens": self.rows,
        }
