"""How training sees activations: measured from a centre, in units of their usual size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.methods.train import init

_OUTLIER = 10.0
"""rows longer than this many medians are attention sinks and the like, which say nothing about the usual size"""


@dataclass(frozen=True)
class Affine:
    """(x - centre) * scale; ``back`` undoes it."""

    centre: Tensor
    scale: float

    @classmethod
    def measure(cls, x: Tensor, kind: init.CentreKind, normalise: bool) -> Affine:
        """From a sample x [N, D] of at least one row: mean squared norm 1 of what is not an outlier.

        A handful of tokens can be hundreds of times longer than all others (trap 7); were they counted, the others
        would be scaled to nearly nothing. Rows whose norm is above 10 medians are left out of the centre, rows whose
        distance to it is above 10 medians out of the scale.
        """
        if not bool(torch.isfinite(x).all()):
            raise UnweaveError(
                "the activations to start from hold NaN or infinity", remedy="look at the model and data"
            )
        point = init.centre(kind, _usual(x, x.norm(dim=1)))
        distances = (x - point).norm(dim=1)
        mean_square = float(_usual(distances, distances).square().double().mean())
        if normalise and mean_square == 0:
            raise UnweaveError("all activations to start from are the same", remedy="look at the site and the data")
        return cls(point, 1 / math.sqrt(mean_square) if normalise else 1.0)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.add(self.centre * -self.scale, x.to(self.centre), alpha=self.scale)

    def back(self, y: Tensor) -> Tensor:
        return torch.add(self.centre, y, alpha=1 / self.scale)


def _usual(x: Tensor, norms: Tensor) -> Tensor:
    """The rows of x whose norm is at most 10 medians; all where the median is 0."""
    limit = _OUTLIER * norms.median()
    return x[norms <= limit] if bool(limit > 0) else x
