"""Which latents each row uses: the sparsity pattern of a matrix [N, F], by rows, by latents and in blocks."""

from __future__ import annotations

import itertools
from functools import cached_property

import torch
from torch import Tensor


class Choice:
    """Which latents each row uses: row i those at ``indices[offsets[i]:offsets[i + 1]]``.

    indices: int32 [nnz]; offsets: int32 [N + 1]; n_latents: F. The values of the entries, [nnz] in the same order, are
    kept apart because gradients flow through them alone.
    """

    def __init__(self, indices: Tensor, offsets: Tensor, n_latents: int) -> None:
        self.indices, self.offsets, self.n_latents = indices.int(), offsets.int(), n_latents
        self._by_rows: dict[int, list[tuple[slice, slice, Choice]]] = {}
        self._by_latents: dict[int, tuple[Tensor, list[tuple[slice, slice, Choice]]]] = {}

    @classmethod
    def uniform(cls, indices: Tensor, n_latents: int) -> Choice:
        """The same number of latents in every row, indices [N, k]."""
        n, k = indices.shape
        return cls(indices.reshape(-1), torch.arange(0, n * k + 1, k, device=indices.device), n_latents)

    @property
    def n_rows(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def rows(self) -> Tensor:
        """The row of each entry, int32 [nnz]."""
        numbers = torch.arange(self.n_rows, dtype=torch.int32, device=self.offsets.device)
        return numbers.repeat_interleave(self.offsets.diff().long(), output_size=len(self.indices))

    @cached_property
    def by_latent(self) -> tuple[Tensor, Choice]:
        """The same entries sorted by latent: their order, int64 [nnz], and the transposed choice [F, N]."""
        # Small integers are sorted by radix, an order of magnitude faster than 64-bit ones.
        keys = self.indices.short() if self.n_latents < 2**15 else self.indices
        order = torch.argsort(keys, stable=True)
        counts = torch.bincount(self.indices, minlength=self.n_latents)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return order, Choice(self.rows.index_select(0, order), offsets, self.n_rows)

    def row_blocks(self, size: int) -> list[tuple[slice, slice, Choice]]:
        """The choice cut into blocks of ``size`` rows: each one's rows, entries, and the choice that they make."""
        if size not in self._by_rows:
            ends = self.offsets[::size].tolist() + ([] if self.n_rows % size == 0 else [len(self.indices)])
            pieces = []
            for number, (first, last) in enumerate(itertools.pairwise(ends)):
                rows = slice(number * size, min((number + 1) * size, self.n_rows))
                offsets = self.offsets[rows.start : rows.stop + 1] - first
                pieces.append((rows, slice(first, last), Choice(self.indices[first:last], offsets, self.n_latents)))
            self._by_rows[size] = pieces
        return self._by_rows[size]

    def latent_blocks(self, size: int) -> tuple[Tensor, list[tuple[slice, slice, Choice]]]:
        """The choice cut into blocks of ``size`` latents: the order of entries, int64 [nnz], in which blocks follow one
        another, and each one's latents, entries in that order, and the choice that they make.
        """
        if size not in self._by_latents:
            block = self.indices.div(size, rounding_mode="floor")
            count = -(-self.n_latents // size)
            order = torch.argsort(block.to(torch.uint8) if count <= 256 else block, stable=True)
            # How many entries each row has in each block, and where each block begins.
            cells = self.rows.long() + block.long().mul_(self.n_rows)
            ends = torch.bincount(cells, minlength=count * self.n_rows).cumsum(0).view(count, self.n_rows)
            firsts = [0, *ends[:, -1].tolist()]
            indices, pieces = self.indices.index_select(0, order), []
            for number, (first, last) in enumerate(itertools.pairwise(firsts)):
                latents = slice(number * size, min((number + 1) * size, self.n_latents))
                offsets = torch.cat([ends.new_zeros(1), ends[number] - first])
                part = Choice(indices[first:last] - latents.start, offsets, latents.stop - latents.start)
                pieces.append((latents, slice(first, last), part))
            self._by_latents[size] = order, pieces
        return self._by_latents[size]

    def dense(self, values: Tensor) -> Tensor:
        """The matrix [N, F] with these values; entries of one row and latent add up."""
        out = values.new_zeros(self.n_rows, self.n_latents)
        return out.index_put((self.rows.long(), self.indices.long()), values, accumulate=True)
