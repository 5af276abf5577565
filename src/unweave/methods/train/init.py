"""Where training starts: decoder directions, and the centre and the scale that the data is measured with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError

InitKind = Literal["data", "random", "kaiming", "independent"]
CentreKind = Literal["mean", "median", "none"]
_BLOCK_BYTES = 1 << 20
"""What is gone through more than once is gone through in blocks of this size, which a core's cache keeps."""
_OUTLIER = 10.0
"""Rows longer than this many medians are attention sinks and the like, which say nothing about the usual size."""


def blocks(W: Tensor) -> tuple[Tensor, ...]:
    """W [F, D] in blocks of rows; on a GPU, which gains nothing by it, in one."""
    size = _BLOCK_BYTES // (W.element_size() * W.shape[1]) if W.device.type == "cpu" else len(W)
    return W.split(max(1, size))


def unit_rows(W: Tensor) -> Tensor:
    """W [F, D] with rows of norm 1, in place; rows of zeros stay."""
    for rows in blocks(W):
        rows.div_(rows.norm(dim=1, keepdim=True).clamp_min_(torch.finfo(W.dtype).tiny))
    return W


def drawn_rows(kind: InitKind, n_latents: int, width: int, x: Tensor, generator: torch.Generator) -> Tensor:
    """Decoder rows [F, D] as they are drawn, before their norms become 1, on x's device.

    data: directions of centred activations drawn from x [N, D], each with a little noise so that no two rows are equal
    even when latents outnumber them. random: directions uniform on the sphere. kaiming, independent: uniform entries in
    +-1, which ``kaiming`` of the width scales to PyTorch's Kaiming-uniform of the matrix [F, D].
    """
    device = generator.device
    if kind in ("kaiming", "independent"):
        rows = _uniform(n_latents, width, generator)
    else:
        rows = unit_rows(torch.randn(n_latents, width, generator=generator, device=device))
    if kind == "data":
        # Without replacement as long as there are enough.
        rounds = -(-n_latents // len(x))
        chosen = torch.cat([torch.randperm(len(x), generator=generator, device=device) for _ in range(rounds)])
        drawn = unit_rows(x[chosen[:n_latents].to(x.device)].float().clone())
        rows = drawn.add_(rows.to(x.device), alpha=0.1)
    return rows.to(x)


def kaiming(fan_in: int) -> float:
    """The bound of PyTorch's Kaiming-uniform entries, of a matrix whose second dimension is ``fan_in``."""
    return math.sqrt(6 / fan_in)


def encoder_rows(n_latents: int, width: int, x: Tensor, generator: torch.Generator) -> Tensor:
    """Encoder rows [F, D] drawn apart from the decoder's, as SAELens 5 does: entries uniform in +-sqrt(6 / F).

    That is PyTorch's Kaiming-uniform of the matrix [D, F], which takes its second dimension for the fan-in; a row's
    norm is then about sqrt(2 D / F) whatever the width.
    """
    return _uniform(n_latents, width, generator).mul_(kaiming(n_latents)).to(x)


def _uniform(n_latents: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n_latents, width, generator=generator, device=generator.device).mul_(2).sub_(1)


def skip_weights(kind: Literal["zero", "fit"], x: Tensor, target: Tensor) -> Tensor:
    """A linear map [D, D_out] from inputs x [N, D] to targets [N, D_out] to begin with: nothing, or least squares.

    The fit is of inputs and targets measured from their means, with a ridge of a thousandth of the inputs' mean
    variance so that fewer rows than dimensions give something tame.
    """
    if kind == "zero":
        return x.new_zeros(x.shape[1], target.shape[1])
    x0, t0 = (x - x.mean(0)).double(), (target - target.mean(0)).double()
    gram = x0.T @ x0
    ridge = 1e-3 * gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    gram.diagonal().add_(ridge)
    return torch.linalg.solve(gram, x0.T @ t0).to(x.dtype)


def geometric_median(x: Tensor, *, iterations: int = 100, tolerance: float = 1e-6, eps: float = 1e-4) -> Tensor:
    """The point with the least summed distance to the rows of x [N, D], by Weiszfeld's iteration: [D], in x's dtype.

    Distances are clamped at eps of the data's spread, so that an estimate that lands on a data point neither divides by
    zero nor sticks there (a much smaller clamp would let that point outweigh all others), at the price of an error of
    that order; the iteration ends when the estimate moves by less than ``tolerance`` of the spread. Data that are all
    one point give that point.
    """
    dtype, x = x.dtype, x.double()
    estimate = x.mean(0)
    spread = float((x - estimate).norm(dim=1).mean())
    if spread == 0:
        return estimate.to(dtype)
    for _ in range(iterations):
        weights = (x - estimate).norm(dim=1).clamp_min_(eps * spread).reciprocal_()
        moved = (weights @ x) / weights.sum()
        step = float((moved - estimate).norm())
        estimate = moved
        if step <= tolerance * spread:
            break
    return estimate.to(dtype)


def centre(kind: CentreKind, x: Tensor) -> Tensor:
    """The point [D] that activations x [N, D] are measured from."""
    if kind == "mean":
        return x.double().mean(0).to(x.dtype)
    return geometric_median(x) if kind == "median" else x.new_zeros(x.shape[1])


@dataclass(frozen=True)
class Affine:
    """(x - centre) * scale; ``back`` undoes it."""

    centre: Tensor
    scale: float

    @classmethod
    def measure(cls, x: Tensor, kind: CentreKind, normalise: bool) -> Affine:
        """From a sample x [N, D] of at least one row: mean squared norm 1 of what is not an outlier.

        A handful of tokens can be hundreds of times longer than all others (trap 7); were they counted, the others
        would be scaled to nearly nothing. Rows whose norm is above 10 medians are left out of the centre, rows whose
        distance to it is above 10 medians out of the scale.
        """
        if not bool(torch.isfinite(x).all()):
            raise UnweaveError(
                "the activations to start from hold NaN or infinity", remedy="look at the model and data"
            )
        point = centre(kind, _usual(x, x.norm(dim=1)))
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
