"""How alike two models are, by what fixed tokens do at a site; see ``LM.fingerprint``."""

from __future__ import annotations

import torch


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
