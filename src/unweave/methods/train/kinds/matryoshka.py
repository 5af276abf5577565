"""Matryoshka: BatchTopK whose first groups of latents must also reconstruct without the others."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Literal

from unweave.core.errors import UnweaveError
from unweave.core.rules import rule
from unweave.methods.train.kinds.base import OverBatch

if TYPE_CHECKING:
    from unweave.methods.train.kinds.base import Entries, Tensor, Weights


_whole = rule(
    "shares above 0 that sum to 1", lambda groups: bool(groups) and min(groups) > 0 and abs(sum(groups) - 1) < 1e-6
)


@dataclass(frozen=True, kw_only=True)
class MatryoshkaSpec(OverBatch):
    """batchtopk whose first latents must reconstruct alone (Bussmann et al. 2025)"""

    kind: Literal["matryoshka"] = "matryoshka"
    groups: Annotated[tuple[float, ...], _whole] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)
    """shares of the latents that each nested reconstruction adds"""

    @property
    def nested(self) -> bool:
        return True

    def group_sizes(self, n_latents: int) -> list[int]:
        """How many latents each group adds, from the shares. UnweaveError where a group would have none."""
        ends = [round(share * n_latents) for share in list(accumulate(self.groups))[:-1]] + [n_latents]
        sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        if min(sizes) < 1:
            what = f"of {n_latents} latents, groups {self.groups} have {sizes}: one has none"
            raise UnweaveError(what, where="groups", remedy="use fewer or larger shares, or more latents")
        return sizes

    def refuse_size(self, n_latents: int) -> None:
        super().refuse_size(n_latents)
        self.group_sizes(n_latents)

    def reconstructions(
        self, w: Weights, x: Tensor, wide: Entries, entries: Entries, f: Tensor
    ) -> list[tuple[float, Tensor]]:
        sizes = self.group_sizes(len(w.W_enc))
        ys = [w.base(x)]
        for (group, values), rows in zip(entries.split(f, sizes), w.W_dec.split(sizes), strict=True):
            ys.append(group.decode(values, rows) + ys[-1])
        return [(1 / len(sizes), y) for y in ys[1:]]
