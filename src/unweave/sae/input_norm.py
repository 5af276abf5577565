"""Inputs that are normalised token by token. That does not fold into weights, so an SAE keeps it as a field.

    layer_norm       n(x) = (x - mean x) / (std x + 1e-5)     x_hat = y std x + mean x     (std with n - 1)
    constant_norm    n(x) = x sqrt(d) / |x|                   x_hat = y |x| / sqrt(d)

Here y is what the decoder gives for the normalised input. So a latent with value f writes f d_j times the token's
own scale: std x, or |x| / sqrt(d).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError

InputNorm = Literal["layer_norm", "constant_norm"]
INPUT_NORMS: tuple[str, ...] = get_args(InputNorm)

_EPSILON = 1e-5


class Normalised(NamedTuple):
    """A token's input in the SAE's units, and the way back: x_hat = y * scale + shift; scale, shift [..., 1]."""

    x: Tensor
    scale: Tensor
    shift: Tensor


def normalise(x: Tensor, kind: InputNorm) -> Normalised:
    """Activations x [..., d] in the SAE's units. Raises UnweaveError for a kind that is not known."""
    if kind == "layer_norm":
        mean = x.mean(dim=-1, keepdim=True)
        centred = x - mean
        std = x.std(dim=-1, keepdim=True)  # of x, which a backward pass holds anyway
        return Normalised(centred / (std + _EPSILON), std, mean)
    if kind == "constant_norm":
        scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # nothing to normalise: zero stays zero
        return Normalised(x / scale, scale, torch.zeros_like(scale))
    raise UnweaveError(f"unknown input normalisation {kind!r}", remedy=f"use one of {', '.join(INPUT_NORMS)}, or None")
