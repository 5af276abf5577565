"""The three activations that every published kind of SAE folds into, and none: pre-activations to latents [..., F]."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unweave.core.errors import UnweaveError


class ReLU(nn.Module):
    """f = max(z, 0)."""

    def forward(self, pre: Tensor) -> Tensor:
        return torch.relu(pre)


class JumpReLU(nn.Module):
    """f = max(z, 0) where z > threshold, else 0. threshold [F]; Gated and BatchTopK SAEs become this."""

    threshold: Tensor

    def __init__(self, threshold: Tensor) -> None:
        super().__init__()
        self.register_buffer("threshold", threshold)

    def forward(self, pre: Tensor) -> Tensor:
        return torch.relu(pre) * (pre > self.threshold)


class TopK(nn.Module):
    """f = max(z, 0) at each row's k largest pre-activations, else 0."""

    def __init__(self, k: int) -> None:
        super().__init__()
        if k < 1:
            raise UnweaveError(f"k must be at least 1, not {k}")
        self.k = k

    def forward(self, pre: Tensor) -> Tensor:
        values, indices = pre.topk(min(self.k, pre.shape[-1]), dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, indices, torch.relu(values))

    def extra_repr(self) -> str:
        return f"k={self.k}"


class Identity(nn.Module):
    """f = z: no SAE, but neurons as latents (``sae/neurons.py``)."""

    def forward(self, pre: Tensor) -> Tensor:
        return pre


Activation = ReLU | JumpReLU | TopK | Identity
