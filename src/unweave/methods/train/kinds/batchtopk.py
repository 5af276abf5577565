"""BatchTopK: the largest pre-activations of the whole batch are its latents, k per token on average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unweave.methods.train.kinds.base import OverBatch


@dataclass(frozen=True, kw_only=True)
class BatchTopKSpec(OverBatch):
    """k per token on average, chosen over the batch (Bussmann et al. 2024)"""

    kind: Literal["batchtopk"] = "batchtopk"
