"""Where training starts: decoder directions, and the centre that the data is measured from."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

InitKind = Literal["data", "random", "kaiming"]
CentreKind = Literal["mean", "median", "none"]


def unit_rows(W: Tensor) -> Tensor:
    """W [F, D] with rows of norm 1, in place; rows of zeros stay."""
    return W.div_(W.norm(dim=1, keepdim=True).clamp_min_(torch.finfo(W.dtype).tiny))


def decoder_rows(kind: InitKind, n_latents: int, width: int, x: Tensor, generator: torch.Generator) -> Tensor:
    """Unit decoder rows [F, D] to begin with, on x's device.

    data: directions of centred activations drawn from x [N, D], each with a little noise so that no two rows are equal
    even when latents outnumber them. random: directions uniform on the sphere. kaiming: uniform entries as in
    ``nn.Linear``, before normalisation.
    """
    device = generator.device
    if kind == "kaiming":
        rows = torch.rand(n_latents, width, generator=generator, device=device).mul_(2).sub_(1)
    else:
        rows = unit_rows(torch.randn(n_latents, width, generator=generator, device=device))
    if kind == "data":
        # Without replacement as long as there are enough.
        rounds = -(-n_latents // len(x))
        chosen = torch.cat([torch.randperm(len(x), generator=generator, device=device) for _ in range(rounds)])
        drawn = unit_rows(x[chosen[:n_latents].to(x.device)].float().clone())
        rows = drawn.add_(rows.to(x.device), alpha=0.1)
    return unit_rows(rows.to(x.device))


def geometric_median(x: Tensor, *, iterations: int = 100, tolerance: float = 1e-6, eps: float = 1e-4) -> Tensor:
    """The point with the least summed distance to the rows of x [N, D], by Weiszfeld's iteration: [D].

    Distances are clamped at eps of the data's spread, so that an estimate that lands on a data point neither divides by
    zero nor sticks there (a much smaller clamp would let that point outweigh all others), at the price of an error of
    that order; the iteration ends when the estimate moves by less than ``tolerance`` of the spread. Data that are all
    one point give that point.
    """
    x = x.double()
    estimate = x.mean(0)
    spread = float((x - estimate).norm(dim=1).mean())
    if spread == 0:
        return estimate.float()
    for _ in range(iterations):
        weights = (x - estimate).norm(dim=1).clamp_min_(eps * spread).reciprocal_()
        moved = (weights @ x) / weights.sum()
        step = float((moved - estimate).norm())
        estimate = moved
        if step <= tolerance * spread:
            break
    return estimate.float()


def centre(kind: CentreKind, x: Tensor) -> Tensor:
    """The point [D] that activations x [N, D] are measured from."""
    if kind == "mean":
        return x.double().mean(0).float()
    return geometric_median(x) if kind == "median" else x.new_zeros(x.shape[1], dtype=torch.float32)
