"""Gradients that arrive at an upstream site become edges: products with the directions of what changes there.

1. ``Changes`` holds what changes at a site from clean to patch, sparsely: few of a site's latents change at a token.
2. ``Arrivals`` takes rows of gradients, multiplies them with the changing latents' decoder rows, and adds up the
   products over examples (and over positions where they are summed). Where most latents that change at all change at
   every token the product is dense; otherwise each token's rows meet that token's latents alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from unweave.circuits.paths import Rows
from unweave.sae.module import SAE

_NUMBERS = 1 << 23
"""how many numbers one step of a product may hold beside its result"""


@dataclass(frozen=True)
class Changes:
    """What changes at one site. T tokens (example by example), S latents that change at any of them.

    ``slots`` int64 [S], ``directions`` [S, D]; token t's changes are ``delta[first[t]:first[t + 1]]`` of the latents
    ``slots[which[...]]``, with first int64 [T + 1]. ``error`` [T, D] is the error's change, zero where nothing counts.
    ``error_slot`` is F.
    """

    slots: Tensor
    directions: Tensor
    first: Tensor
    which: Tensor
    delta: Tensor
    error: Tensor
    error_slot: int
    n_positions: int

    @property
    def width(self) -> int:
        """How many slots can have edges here: the changing latents and the error."""
        return self.slots.shape[0] + 1

    def dense(self) -> Tensor:
        """The latents' changes, [T, S]."""
        out = self.delta.new_zeros(len(self.first) - 1, len(self.slots))
        token = torch.arange(len(out), device=out.device).repeat_interleave(self.first.diff())
        out[token, self.which] = self.delta
        return out


def changes_of(
    sae: SAE, token: Tensor, latents: Tensor, x: Tensor, shape: torch.Size, allowed: Tensor | None
) -> Changes:
    """A site's changes at ``token`` int64 [n], ascending (no other token changes), of a batch of ``shape`` [B, P].

    ``latents`` [n, F] and ``x`` [n, D] are the patch values minus the clean ones; the error's change is what latents
    leave of x's. Only ``allowed`` slots (bool [P or 1, F + 1]) are kept where that is given.
    """
    dtype = torch.promote_types(sae.W_dec.dtype, torch.float32)
    n_tokens, n_positions = shape[0] * shape[1], shape[1]
    row, latent = latents.nonzero().unbind(1)
    delta = latents[row, latent]
    if len(row) * 8 < latents.numel():
        ends = _ends(row, len(token))
        written = F.embedding_bag(
            latent, sae.W_dec, ends, mode="sum", per_sample_weights=delta, include_last_offset=True
        )
    else:
        written = latents @ sae.W_dec
    error = torch.zeros(n_tokens, sae.d_out, dtype=dtype, device=x.device)
    error[token] = (x.to(written.dtype) - written).to(dtype)
    if allowed is not None:
        allowed = allowed.to(x.device).expand(n_positions, -1)
        error *= allowed[:, -1].repeat(shape[0]).unsqueeze(1)
        kept = allowed[token[row] % n_positions, latent]
        row, latent, delta = row[kept], latent[kept], delta[kept]
    slots, which = latent.unique(return_inverse=True)
    directions = sae.W_dec if len(slots) == sae.d_sae else sae.W_dec[slots]
    return Changes(
        slots, directions.to(dtype), _ends(token[row], n_tokens), which, delta.to(dtype), error, sae.d_sae, n_positions
    )


def _ends(rows: Tensor, n: int) -> Tensor:
    """Where the entries of each of ``n`` rows begin, and where the last's end, int64 [n + 1]; ``rows`` ascend."""
    return F.pad(torch.bincount(rows, minlength=n).cumsum(0), (1, 0))


class Arrivals:
    """Edges from one upstream site to ``n_columns`` downstream nodes, as they add up.

    With ``by_position`` upstream positions are kept apart. ``entries`` gives what is not exactly zero.
    """

    def __init__(self, changes: Changes, n_columns: int, by_position: bool) -> None:
        self.changes, self.by_position = changes, by_position
        self.n_places = changes.n_positions if by_position else 1
        self.sums = changes.directions.new_zeros(n_columns * self.n_places, changes.width)
        self._dense: Tensor | None = None

    def add(self, rows: Rows) -> None:
        """Adds the edges of gradients that arrived."""
        at = rows.column.unsqueeze(1) * self.n_places + (rows.position if self.by_position else 0)
        at = at.expand_as(rows.position).flatten()
        token = (rows.example.unsqueeze(1) * self.changes.n_positions + rows.position).flatten()
        cot = rows.cot.flatten(0, 1).to(self.sums.dtype)
        if rows.spread:  # attention looks back only: later tokens have gradient 0
            nonzero = cot.any(-1).nonzero()[:, 0]
            at, token, cot = at[nonzero], token[nonzero], cot[nonzero]
        if not len(cot):
            return
        self.sums[:, -1].index_add_(0, at, (cot * self.changes.error[token]).sum(-1))
        if not len(self.changes.slots):
            return
        used, place, sharing = token.unique(return_inverse=True, return_counts=True)
        counts = self.changes.first.diff()[used]
        if self._prefers_dense(len(cot), counts):
            self._add_dense(cot, token, at)
        else:
            self._add_sparse(cot, at, used, place, sharing, counts)

    def _prefers_dense(self, n_rows: int, counts: Tensor) -> bool:
        """Gathering a decoder row costs about as much as sixteen products with one in place."""
        return len(self.changes.slots) * len(counts) <= int(counts.sum()) * (2 + 16 * len(counts) / n_rows)

    def _add_dense(self, cot: Tensor, token: Tensor, at: Tensor) -> None:
        if self._dense is None:
            self._dense = self.changes.dense()
        latents = self.sums[:, :-1]
        for part in torch.arange(len(cot), device=cot.device).split(max(1, _NUMBERS // self.changes.width)):
            latents.index_add_(0, at[part], cot[part] @ self.changes.directions.T * self._dense[token[part]])

    def _add_sparse(
        self, cot: Tensor, at: Tensor, used: Tensor, place: Tensor, sharing: Tensor, counts: Tensor
    ) -> None:
        """The rows of each used token (``place`` says whose) with the directions that change there."""
        by_token = place.argsort(stable=True)
        begin = sharing.cumsum(0) - sharing
        flat = self.sums.view(-1)
        for part in _alike(sharing, counts, cot.shape[1]):
            row, is_row = _ragged(begin[part], sharing[part])
            entry, is_entry = _ragged(self.changes.first[used[part]], counts[part])
            row = by_token[row]
            which, delta = self.changes.which[entry], self.changes.delta[entry] * is_entry
            products = (cot[row] * is_row.unsqueeze(-1)) @ self.changes.directions[which].transpose(1, 2)
            target = (at[row] * self.changes.width).unsqueeze(2) + which.unsqueeze(1)
            flat.index_add_(0, target.flatten(), (products * delta.unsqueeze(1)).flatten())

    def entries(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Column, upstream position (0 unless kept), upstream slot, and weight, of every edge that is not 0."""
        at, slot = self.sums.nonzero().unbind(1)
        slots = torch.cat([self.changes.slots, self.changes.slots.new_tensor([self.changes.error_slot])])
        weight = self.sums[at, slot]
        return at // self.n_places, at % self.n_places, slots[slot], weight


def _alike(sharing: Tensor, counts: Tensor, width: int) -> Iterator[Tensor]:
    """Tokens with alike numbers of rows and of latents, so that little is padded; those without are left out."""
    some = counts.nonzero()[:, 0]
    if not len(some):
        return
    size = sharing[some].double().log2().ceil() * (counts.max() + 1) + counts[some]
    order = some[size.argsort()]
    largest = int(torch.maximum(counts, sharing).max()) * width + int(counts.max()) * int(sharing.max())
    yield from order.split(max(1, _NUMBERS // largest))


def _ragged(begin: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Indices begin, begin + 1, ... of every group, [n, longest], and where they count (elsewhere they are 0)."""
    steps = torch.arange(int(lengths.max()), device=begin.device)
    counts = steps < lengths.unsqueeze(1)
    return torch.where(counts, begin.unsqueeze(1) + steps, 0), counts
