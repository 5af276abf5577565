"""The three activations that every published kind of SAE folds into, and none: pre-activations to latents [..., F]."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unweave.core.errors import UnweaveError
from unweave.sae.sparse.kernels import topk_rows


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
    """f = max(z, 0) at each row's k largest pre-activations, else 0. Of equal ones the first win."""

    def __init__(self, k: int) -> None:
        super().__init__()
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise UnweaveError(f"k is {k!r}, not a whole number of at least 1", remedy="check the SAE's settings")
        self.k = k

    def forward(self, pre: Tensor) -> Tensor:
        values, indices = topk_rows(pre.reshape(-1, pre.shape[-1]), self.k)
        shape = (*pre.shape[:-1], values.shape[-1])
        return torch.zeros_like(pre).scatter(-1, indices.reshape(shape), torch.relu(values).reshape(shape))


class Identity(nn.Module):
    """f = z: no SAE, but neurons as latents (``sae/neurons.py``)."""

    def forward(self, pre: Tensor) -> Tensor:
        return pre


Activation = ReLU | JumpReLU | TopK | Identity
