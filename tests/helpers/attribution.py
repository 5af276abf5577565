"""Small SAEs, pairs of inputs and a metric, for attribution in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unweave.core.site import Site
from unweave.lm.model import LM, Tokens
from unweave.sae.activations import TopK
from unweave.sae.module import SAE

F = 24


def make_sae(lm: LM, site: str, seed: int = 0, activation: Any = None, read: str | None = None, **options: Any) -> SAE:
    """Random and float64, with no parameter at zero; most tokens have some of the 24 latents active."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    d_in, d_out = lm.width(read or site), lm.width(site)
    weights = (draw(d_in, F) / d_in**0.5, draw(F) * 0.3, draw(F, d_out) * 0.3, draw(d_out) * 0.2)
    return SAE(*weights, activation or TopK(6), read=Site.parse(read or site), write=Site.parse(site), **options)


def make_pair(n: int = 3, width: int = 6, changed: int = 2) -> tuple[Tokens, Tokens]:
    """Inputs that differ in one token in the middle."""
    clean = torch.randint(3, 97, (n, width), generator=torch.Generator().manual_seed(7))
    patch = clean.clone()
    patch[:, changed] = (patch[:, changed] + 11) % 90 + 3
    return Tokens.of(clean), Tokens.of(patch)


def difference(out: Tensor, rows: Tensor) -> Tensor:
    """A metric that is not the same for every example."""
    return out[:, 5] - (1.0 + rows.to(out.device)) * out[:, 7]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
