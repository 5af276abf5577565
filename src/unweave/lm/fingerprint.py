"""What recognises a model's weights: what a few fixed tokens do at a site (trap 12)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from unweave.core.errors import UnweaveError
from unweave.core.site import Site

if TYPE_CHECKING:
    from unweave.lm.model import LM


def fingerprint(lm: LM, site: Site) -> dict[str, list[float]]:
    """What 16 fixed tokens do at a site: each one's norm and its products with four fixed directions.

    Two models with the same weights agree to rounding; folded, fine-tuned or shifted ones do not.
    """
    if lm.sessions:
        raise UnweaveError(
            "a model cannot be recognised while taps are open on it", remedy="call sae.verify(lm) before"
        )
    with lm.taps(read=[site], stop=site) as seen:
        lm(lm.probe())
    x = seen[site][0].double().cpu()
    directions = torch.randn(x.shape[-1], 4, generator=torch.Generator().manual_seed(0)).double()
    return {"norms": x.norm(dim=-1).tolist(), "products": (x @ directions / directions.norm(dim=0)).flatten().tolist()}


def fingerprint_distance(a: dict[str, list[float]], b: dict[str, list[float]]) -> float:
    """How far two fingerprints are apart, relative to their size: 0 for equal models, about 1 for unrelated ones.

    The median over tokens, so that one attention sink's huge norm neither hides nor makes a difference.
    """
    if len(a["norms"]) != len(b["norms"]) or len(a["products"]) != len(b["products"]):
        return float("inf")
    norms = torch.tensor([a["norms"], b["norms"]], dtype=torch.float64)
    products = torch.tensor([a["products"], b["products"]], dtype=torch.float64).view(2, len(a["norms"]), -1)
    gap = ((norms[0] - norms[1]).square() + (products[0] - products[1]).square().sum(-1)).sqrt()
    return float((gap / norms.max(dim=0).values.clamp(min=1e-30)).median())
