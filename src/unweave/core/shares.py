"""How many of how many, with the interval that so few allow."""

from __future__ import annotations

import math
from dataclasses import dataclass

_Z = 1.959964  # of a two-sided 95 % interval


@dataclass(frozen=True)
class Share:
    """How many of how many."""

    right: int
    of: int

    @property
    def value(self) -> float:
        return self.right / self.of

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share."""
        p, n = self.value, self.of
        middle, half = p + _Z**2 / (2 * n), _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n))
        scale = 1 + _Z**2 / n
        return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)
