"""Sparse latent activations of many tokens: the rows of a matrix [N, F] of which few entries are not zero (CSR)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.memory import refuse_if_memory
from unweave.core.writing import atomic_write


@dataclass(frozen=True)
class Codes:
    """Row i holds ``values[offsets[i]:offsets[i+1]]`` at latents ``indices[offsets[i]:offsets[i+1]]``.

    offsets: int64 [N+1]; indices: int64 [nnz]; values: float [nnz], none of them zero; n_latents: F.
    """

    offsets: Tensor
    indices: Tensor
    values: Tensor
    n_latents: int

    @property
    def n_rows(self) -> int:
        return len(self.offsets) - 1

    @property
    def shape(self) -> tuple[int, int]:
        return self.n_rows, self.n_latents

    @classmethod
    def from_dense(cls, f: Tensor) -> Self:
        """From dense latents [N, F]."""
        rows, indices = f.nonzero(as_tuple=True)
        return cls(_offsets(torch.bincount(rows, minlength=len(f))), indices, f[rows, indices], f.shape[1])

    @classmethod
    def from_topk(cls, values: Tensor, indices: Tensor, n_latents: int) -> Self:
        """From the k largest of each row, values and indices [N, k]; zeros are dropped."""
        nonzero = values != 0
        return cls(_offsets(nonzero.sum(1)), indices[nonzero].long(), values[nonzero], n_latents)

    @classmethod
    def cat(cls, parts: Sequence[Codes]) -> Self:
        """The rows of several codes one below the other."""
        lengths = torch.cat([part.offsets.diff() for part in parts])
        indices = torch.cat([part.indices for part in parts])
        return cls(_offsets(lengths), indices, torch.cat([part.values for part in parts]), parts[0].n_latents)

    def rows(self, start: int, stop: int) -> Codes:
        """Rows start..stop as codes of their own; nothing is copied but the offsets."""
        offsets = self.offsets[start : stop + 1]
        first, last = int(offsets[0]), int(offsets[-1])
        return Codes(offsets - first, self.indices[first:last], self.values[first:last], self.n_latents)

    def take(self, rows: Tensor) -> Codes:
        """Some rows, int64 [n], in the order given."""
        lengths = self.offsets.diff()[rows]
        offsets = _offsets(lengths)
        places = torch.arange(int(offsets[-1]), device=rows.device)
        places += torch.repeat_interleave(self.offsets[rows] - offsets[:-1], lengths)
        return Codes(offsets, self.indices[places], self.values[places], self.n_latents)

    def cpu(self) -> Codes:
        """The same on the CPU, in float32."""
        return Codes(self.offsets.cpu(), self.indices.cpu(), self.values.float().cpu(), self.n_latents)

    def of(self, latents: Tensor) -> Codes:
        """Only some latents (ascending numbers), which are numbered anew from 0; the rows stay."""
        place = self.indices.new_full((self.n_latents,), -1)
        place[latents.to(place.device)] = torch.arange(len(latents), device=place.device)
        columns = place[self.indices]
        keep = columns >= 0
        lengths = torch.bincount(self.row_of_each()[keep], minlength=self.n_rows)
        return Codes(_offsets(lengths), columns[keep], self.values[keep], len(latents))

    def row_of_each(self) -> Tensor:
        """The row of each stored value, int64 [nnz]."""
        return torch.repeat_interleave(torch.arange(self.n_rows, device=self.offsets.device), self.offsets.diff())

    def dense(self) -> Tensor:
        """The matrix [N, F]."""
        out = self.values.new_zeros(self.n_rows, self.n_latents)
        out[self.row_of_each(), self.indices] = self.values
        return out

    def counts(self) -> Tensor:
        """In how many rows each latent is above zero, int64 [F]."""
        return torch.bincount(self.indices[self.values > 0], minlength=self.n_latents)

    def maxima(self) -> Tensor:
        """Each latent's largest value, 0 where it never fires, [F]."""
        out = self.values.new_zeros(self.n_latents)
        return out.scatter_reduce_(0, self.indices, self.values, "amax")

    def save(self, path: Path) -> None:
        """Writes one safetensors file."""
        from safetensors.torch import save_file

        tensors = {"offsets": self.offsets, "indices": self.indices.int(), "values": self.values}
        with atomic_write(path) as temporary:
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, {"n_latents": str(self.n_latents)})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what ``save`` wrote. UnweaveError when it is missing or damaged."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as handle:
                tensors = {name: handle.get_tensor(name) for name in ("offsets", "indices", "values")}
                n_latents = int(handle.metadata()["n_latents"])
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            refuse_if_memory(error, path)
            raise UnweaveError(
                f"cannot read sparse codes: {error}", where=str(path), remedy="collect them again"
            ) from error
        return cls(tensors["offsets"], tensors["indices"].long(), tensors["values"], n_latents)


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1, dtype=torch.int64), lengths.cumsum(0)])
