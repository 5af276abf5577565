"""TopK: each token's k largest pre-activations are its latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from unweave.core.rules import at_least
from unweave.methods.train.kinds.base import SAESpec

if TYPE_CHECKING:
    from unweave.methods.train.kinds.base import Entries, Group, State, Tensor, Weights


_WIDER = 4
"""how many times k the second reconstruction has"""


@dataclass(frozen=True, kw_only=True)
class TopKSpec(SAESpec):
    """k latents per token (Gao et al. 2024)"""

    kind: Literal["topk"] = "topk"
    multi_topk: Annotated[float, at_least(0)] = 0.0
    """weight of a second reconstruction, from 4k latents (1/8 in Gao et al. 2024)"""

    @property
    def nested(self) -> bool:
        return self.multi_topk > 0

    def select(self, w: Weights, x: Tensor, state: State, group: Group) -> Entries:
        from unweave.methods.train.entries import largest_of_rows

        return largest_of_rows(w, x, self.k if self.multi_topk == 0 else min(_WIDER * self.k, len(w.W_enc)))

    def narrowed(self, wide: Entries) -> Entries:
        return wide.largest(self.k) if self.multi_topk > 0 else wide

    def reconstructions(
        self, w: Weights, x: Tensor, wide: Entries, entries: Entries, f: Tensor
    ) -> list[tuple[float, Tensor]]:
        if wide is entries:
            return super().reconstructions(w, x, wide, entries, f)
        base = w.base(x)
        y = entries.decode(f, w.W_dec) + base
        return [(self.multi_topk, wide.decode(wide.values.relu(), w.W_dec) + base), (1.0, y)]

    def topk(self) -> int:
        return self.k
