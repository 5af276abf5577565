"""A sparse set of entries of a matrix [N, F], or all of them: whatever is written for one form runs on the other.

Every kind of SAE selects entries of its pre-activations by a rule (the k largest of a row, the k N largest of a batch,
those above a bound of their latent), and everything it does afterwards is zero at all other entries. Where few are
selected, they alone are kept; where many are, dense matrices are faster.

``largest_of_rows``, ``largest_of_batch`` and ``above_bound`` select.

Shapes: N rows, F latents, nnz selected entries. "Laid out like the entries" is [nnz] in sparse form, [N, F] in dense.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from unweave.core.dist import Group
from unweave.methods.train.state import State
from unweave.methods.train.weights import Weights
from unweave.sae.sparse import kernels, products
from unweave.sae.sparse.kernels import Choice

SPARSE_BELOW = 0.1
"""share of entries up to which those above a bound are handled sparsely"""
_TRY_AGAIN = 16
"""steps to stay dense after sparse handling was tried in vain"""


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


def largest_of_rows(w: Weights, x: Tensor, k: int) -> Entries:
    """The k largest pre-activations of each row of x [N, D], with a graph to x, W_enc and b_enc."""
    return _attached(w, x, *kernels.choose_topk(x.detach(), w.W_enc.detach(), w.b_enc.detach(), k))


def largest_of_batch(w: Weights, x: Tensor, k: int, guess: float, group: Group) -> Entries:
    """The k N largest of the batch in all processes; ``guess`` is a value near the smallest of them, 0: none."""
    W, b = w.W_enc.detach(), w.b_enc.detach()
    return _attached(w, x, *kernels.choose_batch_topk(x.detach(), W, b, k, guess=guess, group=group))


def above_bound(w: Weights, x: Tensor, bound: Tensor, state: State, group: Group) -> Entries | None:
    """Those above their latent's ``bound`` [F]; None where too many are, in this process or in another of the group."""
    selected = None
    if state.density <= SPARSE_BELOW and state.wait == 0:
        W, b = w.W_enc.detach(), w.b_enc.detach()
        selected = kernels.choose_above(x.detach(), W, b, bound, limit=SPARSE_BELOW)
        if group.size > 1 and int(group.max(torch.tensor(int(selected is None), device=x.device))):
            selected = None  # all do the same, so that all remember the same
        state.wait = 0 if selected is not None else _TRY_AGAIN
    return None if selected is None else _attached(w, x, *selected)


def every(w: Weights, x: Tensor) -> Entries:
    """All pre-activations of x [N, D], dense."""
    return Entries(torch.addmm(w.b_enc, x, w.W_enc.T))


def _attached(w: Weights, x: Tensor, values: Tensor, choice: Choice) -> Entries:
    return Entries(kernels.attach(x, w.W_enc, w.b_enc, values, choice), choice)
