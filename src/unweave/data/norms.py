"""The norms of activations before training: above which norm a token is an outlier, per site (trap 7)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.progress import task
from unweave.core.site import Site
from unweave.data.stream import ActivationSource


@dataclass(frozen=True)
class Norms:
    """The norms of activations at a site before training, over counted tokens."""

    tokens: int
    median: float
    quantiles: dict[str, float]
    gamma: float
    """||mean|| / ||standard deviation||: far above 1, many latents die early unless the mean is taken off (trap 7)"""
    max_norm: float | None
    outliers: int


def calibrate(source: ActivationSource, ratio: float | None, tokens: int = 32768) -> dict[Site, Norms]:
    """Norm quantiles, gamma and the outlier limit ``ratio`` x median (None: none), from the first chunks (trap 7)."""
    parts: dict[Site, list[Tensor]] = {site: [] for site in source.sites}
    count = 0
    with task("norms of activations", total=min(tokens, source.store.n_tokens), unit="tokens") as progress:
        for index in range(source.n_chunks):
            chunk = source.chunk(index)
            count += len(chunk.where)
            progress.advance(len(chunk.where))
            for site, x in chunk.x.items():
                parts[site].append(x)
            if count >= tokens:
                break
    if count == 0:
        raise UnweaveError("no token is left to count", remedy="give more text, or exclude fewer token ids")
    return {site: _norms(torch.cat(xs), ratio) for site, xs in parts.items()}


def _norms(x: Tensor, ratio: float | None) -> Norms:
    norms = x.norm(dim=-1)
    median = float(norms.median())
    limit = None if ratio is None else ratio * median
    inside = x if limit is None else x[norms <= limit]
    spread = float(inside.var(dim=0).sum().sqrt()) if len(inside) > 1 else 0.0
    quantiles = {str(q): float(norms.quantile(q)) for q in (0.01, 0.25, 0.75, 0.99)} | {"max": float(norms.max())}
    gamma = float(inside.mean(0).norm()) / spread if spread > 0 else 0.0
    return Norms(len(x), median, quantiles, gamma, limit, len(x) - len(inside))
