"""The terms of training objectives: a kind of SAE is an activation and a sum of these, none of them a class of its own.

Shapes: N tokens, D width, F latents. Every term is a mean over tokens (of a sum over dimensions or latents), so that it
does not change with the size of the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unweave.core.dist import SOLO, Group
from unweave.methods.train.entries import Entries
from unweave.sae.sparse import kernels


class _MeanSquare(torch.autograd.Function):
    """Mean over rows of the squared norm, in two passes forward and one backward: large batches are memory-bound."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, target: Tensor) -> Tensor:
        error = y - target
        ctx.save_for_backward(error)
        return torch.linalg.vector_norm(error).square() / len(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (error,) = ctx.saved_tensors
        to_y = error * (grads[0] * (2 / len(error)))
        return to_y, -to_y if ctx.needs_input_grad[1] else None


def total(share: Tensor, group: Group) -> Tensor:
    """The sum over processes in value; in gradient one's own share, as gradients are summed over processes later.

    The value is the same to the last bit in all processes, since what it is added to is 0.
    """
    if group.size == 1:
        return share
    return (share - share.detach()) + group.sum(share.detach().clone())


def reconstruction(y: Tensor, target: Tensor) -> Tensor:
    """Squared error: the sum over dimensions, averaged over tokens. y, target [N, D]."""
    return _MeanSquare.apply(y, target)  # type: ignore[no-any-return]


def l1(f: Tensor, rows: int) -> Tensor:
    """Sum of latents, averaged over tokens; f not negative, of any shape, over ``rows`` tokens.

    Decoder rows have norm 1, so that this is also the sum weighted by their norms (Anthropic, April 2024), which keeps
    the penalty from being dodged by small latents and large rows.
    """
    return f.sum() / rows


P_SMALL = 1e-3
"""how far from 0, in units of scaled activations, the slope of x^p stops growing"""


def lp(f: Tensor, p: float, rows: int) -> Tensor:
    """Sum of latents to the power p, averaged over tokens (p-annealing, Karvonen et al. 2024); f not negative.

    The slope of x^p is infinite at 0 for p < 1. Here the term is (x + s)^p - s^p with a small s, which is 0 at 0, has a
    slope of at most p s^(p - 1), and for p = 1 is L1 exactly.
    """
    if p == 1:
        return l1(f, rows)
    return ((f + P_SMALL).pow(p) - P_SMALL**p).sum() / rows


def tanh(f: Tensor, scale: float, rows: int) -> Tensor:
    """Sum of tanh(scale f), averaged over tokens (Anthropic, January 2025; decoder rows of norm 1): a smooth L0."""
    return torch.tanh(scale * f).sum() / rows


def _window(z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return ((z - threshold).abs() < bandwidth / 2).to(z.dtype)


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return torch.relu(z) * (z > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        z, threshold = ctx.saved_tensors
        # z can only pass where it is positive too; thresholds are not negative, so z > threshold says both.
        to_z = g * (z > threshold) * (z > 0)
        to_threshold = -(threshold / ctx.bandwidth) * _window(z, threshold, ctx.bandwidth) * g
        return to_z, to_threshold.sum_to_size(threshold.shape), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        z, threshold = ctx.saved_tensors
        to_threshold = -_window(z, threshold, ctx.bandwidth) / ctx.bandwidth * g
        return None, to_threshold.sum_to_size(threshold.shape), None


def jump_relu(z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """relu(z) 1[z > threshold] with a straight-through gradient to the threshold (Rajamanoharan et al. 2024, eq. 11).

    d/dz = 1[z > threshold];  d/dthreshold = -(threshold / bandwidth) 1[|z - threshold| < bandwidth / 2].
    z and threshold of shapes that broadcast; threshold not negative.
    """
    return _JumpReLU.apply(z, threshold, bandwidth)  # type: ignore[no-any-return]


def l0(z: Tensor, threshold: Tensor, bandwidth: float, rows: int) -> Tensor:
    """Latents above their threshold, averaged over tokens, with a straight-through gradient (eq. 12 of the same paper).

    d/dthreshold = -(1 / bandwidth) 1[|z - threshold| < bandwidth / 2], none to z. It is taken on pre-activations z, not
    on thresholded ones, so that the window sees both sides of the threshold.
    """
    return _Step.apply(z, threshold, bandwidth).sum() / rows  # type: ignore[no-any-return]


def off_target(l0: Tensor, target: float) -> Tensor:
    """(L0 / target - 1)^2: asks for a number of active latents rather than for as few as possible."""
    return (l0 / target - 1).square()


def below_threshold(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, entries: Entries, only: Tensor | None, rows: int
) -> Tensor:
    """Sum over latents of relu(threshold - z), averaged over tokens: silent latents are drawn towards firing.

    ``entries`` hold at least the z above their thresholds; at all others relu(a) = a, and the sum of all z over tokens
    is one product with the summed inputs. So it costs no dense z. ``only`` bool [F] says of which latents, None: of
    all. (Anthropic, January 2025: of all latents; SAELens: of dead ones.)
    """
    every = threshold * len(x) - (W_enc @ x.sum(0) + b_enc * len(x))
    above = torch.relu(entries.values - entries.of(threshold))
    if only is not None:
        every, above = every * only, above * entries.of(only.to(above.dtype))
    return (every.sum() + above.sum()) / rows


def auxk(
    x: Tensor, residual: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, dead: Tensor, k_aux: int,
    group: Group = SOLO,
) -> Tensor:  # fmt: skip
    """Dead latents are taught to explain what the others leave over (Gao et al. 2024, section A.2).

    The k_aux largest pre-activations among the dead latents, after ReLU and decoded without bias, reconstruct the
    residual; the term is their squared error over the squared residual, which is 1 when they say nothing.

    Implementations differ: some use raw pre-activations, some divide by the variance of the data, one lets no gradient
    reach the encoder. Here latents are what they will be in use (after ReLU), the ratio keeps one weight right at every
    stage and scale, and both encoder and decoder rows of the dead latents learn; the residual is a constant.

    x [N, D] inputs, residual [N, D_out] = target - reconstruction, W_enc [F, D], W_dec [F, D_out], dead int64 indices.
    With several processes both squares are of all rows, and the gradient is that of one's own.
    """
    residual = residual.detach()
    rows_enc, biases, rows_dec = W_enc.index_select(0, dead), b_enc.index_select(0, dead), W_dec.index_select(0, dead)
    if len(dead) <= k_aux:
        explained = torch.relu(torch.addmm(biases, x, rows_enc.T)) @ rows_dec
    else:
        values, choice = kernels.choose_topk(x, rows_enc.detach(), biases.detach(), k_aux)
        values = kernels.attach(x, rows_enc, biases, values, choice)
        explained = kernels.decode(torch.relu(values), choice, rows_dec)
    whole = group.sum(residual.square().sum())
    return total((residual - explained).square().sum(), group) / whole.clamp_min(torch.finfo(x.dtype).tiny)
