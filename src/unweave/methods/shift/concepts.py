"""Concept bottleneck probing, a baseline that knows the task's words (Marks et al. 2024, app. E.2).

1. Each keyword's vector is the model's activation at its last token, at the classifier's site, minus the mean over all
   keywords, at unit length.
2. A text is described by its pooled activation's product with each vector, and by nothing else.
3. A linear probe is trained on these descriptions.

The keywords stand behind a neutral word, since the first token of a text is an attention sink in many models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unweave.core.site import Site
from unweave.lm.model import LM

KEYWORDS = (
    "nurse", "healthcare", "hospital", "patient", "medical", "clinic", "triage", "medication", "emergency", "surgery",
    "professor", "academia", "research", "university", "tenure", "faculty", "dissertation", "sabbatical", "publication",
    "grant",
)  # fmt: skip
"""The paper's words for the two professions."""
_BEFORE = "The"


def concept_vectors(lm: LM, site: Site, keywords: Sequence[str] = KEYWORDS) -> Tensor:
    """Unit vectors [K, D], on the CPU."""
    tokens = lm.tokenize([f"{_BEFORE} {word}" for word in keywords])
    with lm.taps(read=[site], stop=site) as seen:
        lm(tokens)
    last = tokens.mask.sum(1) - 1
    x = seen[site][torch.arange(len(keywords)), last].float().cpu()
    vectors = x - x.mean(0)
    return vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-12)


def describe(pooled: Tensor, vectors: Tensor) -> Tensor:
    """What the bottleneck lets through of pooled activations [N, D]: [N, K]."""
    return pooled @ vectors.to(pooled.dtype).T
