"""Latents that are linear: neurons, the baseline that a site's coordinates are its features; and given directions."""

from __future__ import annotations

import torch
from torch import Tensor

from unweave.core.site import Site
from unweave.data.policy import TokenPolicy
from unweave.lm.model import LM
from unweave.sae.activations import Identity
from unweave.sae.module import SAE


def linear_latents(rows: Tensor, site: Site, policy: TokenPolicy) -> SAE:
    """An SAE whose latents are products with ``rows`` [C, D] and write along them: f = rows x, x_hat = f rows."""
    n, width = rows.shape
    zeros = rows.new_zeros(n + width)
    return SAE(rows.T.contiguous(), zeros[:n], rows, zeros[n:], Identity(), read=site, policy=policy)


def neurons(lm: LM, site: str | Site) -> SAE:
    """An SAE whose latents are the coordinates of a site and whose error is 0: f = x, x_hat = f."""
    parsed = lm.site(site)
    return linear_latents(torch.eye(lm.width(parsed), device=lm.device), parsed, TokenPolicy())
