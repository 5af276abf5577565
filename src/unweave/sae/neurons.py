"""Neurons as latents: the baseline that a site's coordinates are its features."""

from __future__ import annotations

import torch

from unweave.core.site import Site
from unweave.data.policy import TokenPolicy
from unweave.lm.model import LM
from unweave.sae.activations import Identity
from unweave.sae.module import SAE


def neurons(lm: LM, site: str | Site) -> SAE:
    """An SAE whose latents are the coordinates of a site and whose error is 0: f = x, x_hat = f."""
    parsed = lm.site(site)
    width = lm.width(parsed)
    eye = torch.eye(width, device=lm.device)
    zero = torch.zeros(width, device=lm.device)
    return SAE(eye, zero, eye, zero, Identity(), read=parsed, policy=TokenPolicy())
