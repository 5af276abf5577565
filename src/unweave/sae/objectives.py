"""The terms of training objectives: a kind of SAE is an activation and a sum of these, none of them a class of its own.

Shapes: N tokens, D width, F latents. Every term is a mean over tokens (of a sum over dimensions or latents), so that it
does not change with the size of the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unweave.sae import kernels


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


def reconstruction(y: Tensor, target: Tensor) -> Tensor:
    """Squared error: the sum over dimensions, averaged over tokens. y, target [N, D]."""
    return _MeanSquare.apply(y, target)  # type: ignore[no-any-return]


def variance(x: Tensor) -> Tensor:
    """Squared distance to the batch's mean, averaged over tokens. x [N, D]."""
    centred_at = x.mean(0)
    return (torch.linalg.vector_norm(x).square() / len(x) - centred_at.square().sum()).clamp_min(0)


def fvu(y: Tensor, target: Tensor) -> Tensor:
    """Fraction of the batch's variance left unexplained: squared error over squared distance to the batch's mean."""
    return (y - target).square().sum() / (target - target.mean(0)).square().sum()


def l1(f: Tensor, W_dec: Tensor) -> Tensor:
    """Sum of latents weighted by their decoder rows' norms, averaged over tokens; f [N, F] not negative, W_dec [F, D].

    The norms (Anthropic, April 2024) keep the penalty from being dodged by small latents and large rows.
    """
    return (f @ W_dec.norm(dim=1)).mean()


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
    z [N, F], threshold [F] not negative.
    """
    return _JumpReLU.apply(z, threshold, bandwidth)  # type: ignore[no-any-return]


def l0(z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Latents above their threshold, averaged over tokens, with a straight-through gradient (eq. 12 of the same paper).

    d/dthreshold = -(1 / bandwidth) 1[|z - threshold| < bandwidth / 2], none to z. It is taken on pre-activations z
    [N, F], not on thresholded ones, so that the window sees both sides of the threshold.
    """
    return _Step.apply(z, threshold, bandwidth).sum(1).mean()  # type: ignore[no-any-return]


def l0_target(z: Tensor, threshold: Tensor, bandwidth: float, target: float) -> Tensor:
    """(L0 / target - 1)^2: asks for a number of active latents rather than for as few as possible."""
    return (l0(z, threshold, bandwidth) / target - 1).square()


def auxk(x: Tensor, residual: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, dead: Tensor, k_aux: int) -> Tensor:
    """Dead latents are taught to explain what the others leave over (Gao et al. 2024, section A.2).

    The k_aux largest pre-activations among the dead latents, after ReLU and decoded without bias, reconstruct the
    residual; the term is their squared error over the squared residual, which is 1 when they say nothing.

    Implementations differ: some use raw pre-activations, some divide by the variance of the data, one lets no gradient
    reach the encoder. Here latents are what they will be in use (after ReLU), the ratio keeps one weight right at every
    stage and scale, and both encoder and decoder rows of the dead latents learn; the residual is a constant.

    x [N, D] inputs, residual [N, D_out] = target - reconstruction, W_enc [F, D], W_dec [F, D_out], dead int64 indices.
    """
    residual = residual.detach()
    rows_enc, biases, rows_dec = W_enc.index_select(0, dead), b_enc.index_select(0, dead), W_dec.index_select(0, dead)
    if len(dead) <= k_aux:
        said = torch.relu(torch.addmm(biases, x, rows_enc.T)) @ rows_dec
    else:
        values, choice = kernels.choose_topk(x, rows_enc.detach(), biases.detach(), k_aux)
        values = kernels.attach(x, rows_enc, biases, values, choice)
        said = kernels.decode(torch.relu(values), choice, rows_dec)
    return (residual - said).square().sum() / residual.square().sum().clamp_min(torch.finfo(x.dtype).tiny)
