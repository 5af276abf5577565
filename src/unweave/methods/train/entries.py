"""A sparse set of entries of a matrix [N, F], or all of them: whatever is written for one form runs on the other.

Every kind of SAE selects entries of its pre-activations by a rule (the k largest of a row, the k N largest of a batch,
those above a bound of their latent), and everything it does afterwards is zero at all other entries. Where few are
selected, they alone are kept; where many are, dense matrices are faster.

Shapes: N rows, F latents, nnz selected entries. "Laid out like the entries" is [nnz] in sparse form, [N, F] in dense.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from unweave.sae.sparse import kernels, products
from unweave.sae.sparse.kernels import Choice


class Entries:
    """``values`` laid out like the entries, with a graph to where they come from; ``choice`` is None in dense form."""

    def __init__(self, values: Tensor, choice: Choice | None = None) -> None:
        self.values, self.choice = values, choice

    @property
    def n_rows(self) -> int:
        return len(self.values) if self.choice is None else self.choice.n_rows

    @property
    def n_latents(self) -> int:
        return self.values.shape[1] if self.choice is None else self.choice.n_latents

    def of(self, per_latent: Tensor) -> Tensor:
        """What each entry's latent has in ``per_latent`` [F], laid out like the entries (or broadcast over them)."""
        return per_latent if self.choice is None else products.of_latents(per_latent, self.choice)

    def decode(self, values: Tensor, W: Tensor) -> Tensor:
        """``values``, laid out like the entries and zero elsewhere, times W [F, D]: [N, D]."""
        return values @ W if self.choice is None else kernels.decode(values, self.choice, W)

    def fired(self, values: Tensor) -> Tensor:
        """Latents with an entry above zero, bool [F]."""
        if self.choice is None:
            return (values > 0).any(0)
        out = torch.zeros(self.n_latents, dtype=torch.bool, device=values.device)
        out[self.choice.indices[values > 0].long()] = True
        return out

    def split(self, values: Tensor, sizes: Sequence[int]) -> list[tuple[Entries, Tensor]]:
        """The same entries by ranges of latents: for each range its entries, numbered from 0, and their ``values``."""
        if self.choice is None:
            pairs = zip(self.values.split(list(sizes), 1), values.split(list(sizes), 1), strict=True)
            return [(Entries(z), v) for z, v in pairs]
        out, first = [], 0
        for size in sizes:
            inside = (self.choice.indices >= first) & (self.choice.indices < first + size)
            offsets = F.pad(inside.cumsum(0), (1, 0))[self.choice.offsets.long()]
            choice = Choice(self.choice.indices[inside] - first, offsets, size)
            out.append((Entries(self.values[inside], choice), values[inside]))
            first += size
        return out

    def largest(self, k: int) -> Entries:
        """The k largest of each row, of a choice with the same number of entries in every row."""
        assert self.choice is not None
        latents = self.choice.indices.view(self.n_rows, -1)
        order = latents.argsort(1)  # of equal entries the first latents win
        table, latents = self.values.view(self.n_rows, -1).gather(1, order), latents.gather(1, order)
        _, places = kernels.topk_rows(table.detach(), k)
        return Entries(table.gather(1, places).view(-1), Choice.uniform(latents.gather(1, places), self.n_latents))
