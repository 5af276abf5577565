"""ReLU with an L1 penalty."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from unweave.methods.train.kinds.base import Part, Penalised

if TYPE_CHECKING:
    from unweave.methods.train.kinds.base import State, Tensor


@dataclass(frozen=True, kw_only=True)
class ReLUSpec(Penalised):
    """every positive latent, with an L1 penalty"""

    kind: Literal["relu"] = "relu"

    def sums(self, part: Part) -> dict[str, Tensor]:
        from unweave.methods.train import objectives

        return {"l1": objectives.l1(part.f, part.rows)}

    def terms(self, sums: Mapping[str, Tensor], state: State, tokens_seen: int) -> Tensor:
        return self.weight(state, tokens_seen) * sums["l1"]

    def continues(self, threshold: Tensor) -> bool:
        return not bool(threshold.any())
