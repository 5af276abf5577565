"""Do the effects of a site's nodes add up to what moving all of them really does?

Integrated gradients promise it in the limit of many steps. With few it can fail badly, above all where the path ends at
the zero vector (neurons ablated to zero, or an SAE without a decoder bias): normalisation makes gradients explode
there. Equal steps, however many, then miss the sum. Many that grow shorter towards the end find it in most places,
and the mean activation as an end point has no such edge (docs/circuits.md has the measurement).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unweave.attribute.attribution import SiteEffects
from unweave.attribute.result import TOLERANCE, SiteSum, incomplete
from unweave.core.errors import UnweaveWarning
from unweave.core.site import Site


@dataclass
class Completeness:
    """Sums over examples by site: of the effects, of the measured change, and of its size; and how many examples."""

    sums: dict[Site, list[float]] = field(default_factory=dict)

    def add(self, site: Site, effects: SiteEffects) -> None:
        """Further examples; nothing where the change was not measured."""
        values = sums_of(effects)
        if values is not None:
            self.add_sums(site, values)

    def add_sums(self, site: Site, values: Tensor) -> None:
        """What ``sums_of`` gave."""
        old = self.sums.get(site, [0.0] * 4)
        self.sums[site] = [a + b for a, b in zip(old, values.tolist(), strict=True)]

    def rows(self) -> tuple[SiteSum, ...]:
        """Means over examples, in the order of the model."""
        rows = []
        for site, (total, change, size, n) in sorted(self.sums.items()):
            complete = abs(total - change) <= TOLERANCE * size
            rows.append(SiteSum(site, total / n, change / n, complete, int(n)))
        return tuple(rows)

    def warn(self) -> None:
        """Warns where sums and changes differ."""
        if problem := incomplete(self.rows()):
            warnings.warn(problem, UnweaveWarning, stacklevel=3)


def sums_of(effects: SiteEffects) -> Tensor | None:
    """Summed over examples: effects, measured change, its size, and how many examples; float64 [4] on the CPU."""
    if effects.measured is None:
        return None
    latents, error = effects.over_positions()
    total, change = float(latents.double().sum() + error.double().sum()), effects.measured.double()
    return torch.tensor([total, float(change.sum()), float(change.abs().sum()), len(change)], dtype=torch.float64)
