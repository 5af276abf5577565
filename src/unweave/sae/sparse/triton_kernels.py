"""The sparse products of ``products`` as Triton kernels, for GPUs: sums in a fixed order, so that runs repeat exactly.

One program makes a tile of one row of the result and walks that row's entries in their order; nothing is added by
several programs at once. Transposed products are the same kernel on the choice sorted by latent. Sums are in float32
(float64 for float64) whatever the tables hold.

This module imports Triton: only ``products`` does so, and only for tensors that are on a GPU.
Shapes: N rows, D width, F latents, nnz chosen entries.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

_WIDTH = 128
"""columns of a tile"""
_ENTRIES = 16
"""entries that a program looks at together"""


@triton.jit
def _weighted_rows(
    values, indices, offsets, table, out, width,
    TILE: tl.constexpr, STEP: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = columns < width
    first, last = tl.load(offsets + row), tl.load(offsets + row + 1)
    total = tl.zeros((TILE,), dtype=SUM)
    for start in range(first, last, STEP):
        entries = start + tl.arange(0, STEP)
        some = entries < last
        weight = tl.load(values + entries, mask=some, other=0.0).to(SUM)
        latent = tl.load(indices + entries, mask=some, other=0).to(tl.int64)
        rows = tl.load(
            table + latent[:, None] * width + columns[None, :], mask=some[:, None] & inside[None, :], other=0.0
        )
        total += tl.sum(weight[:, None] * rows.to(SUM), axis=0)
    tl.store(out + row * width + columns, total, mask=inside)


@triton.jit
def _dot_rows(
    g, rows, indices, table, out, count, width,
    TILE: tl.constexpr, STEP: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    entries = tl.program_id(0) * STEP + tl.arange(0, STEP)
    some = entries < count
    row = tl.load(rows + entries, mask=some, other=0).to(tl.int64)
    latent = tl.load(indices + entries, mask=some, other=0).to(tl.int64)
    total = tl.zeros((STEP,), dtype=SUM)
    for start in range(0, width, TILE):
        columns = start + tl.arange(0, TILE)
        inside = some[:, None] & (columns < width)[None, :]
        a = tl.load(g + row[:, None] * width + columns[None, :], mask=inside, other=0.0)
        b = tl.load(table + latent[:, None] * width + columns[None, :], mask=inside, other=0.0)
        total += tl.sum(a.to(SUM) * b.to(SUM), axis=1)
    tl.store(out + entries, total, mask=some)


def _options(table: Tensor) -> dict[str, Any]:
    total = tl.float64 if table.dtype == torch.float64 else tl.float32
    return {"TILE": min(_WIDTH, triton.next_power_of_2(table.shape[1])), "STEP": _ENTRIES, "SUM": total}


def weighted_rows(values: Tensor, indices: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
    """out_i = sum over entries offsets[i] to offsets[i + 1] of value * table[index]: [N, D].

    values [nnz], indices int32 [nnz], offsets int32 [N + 1], table [F, D]; all contiguous and on one device.
    """
    rows, width = len(offsets) - 1, table.shape[1]
    out = table.new_empty(rows, width)
    options = _options(table)
    if rows and width:
        grid = (rows, triton.cdiv(width, options["TILE"]))
        run: Any = _weighted_rows
        run[grid](values, indices, offsets, table, out, width, **options)
    return out


def dot_rows(g: Tensor, rows: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """For each entry the dot product of its row of g [N, D] and its latent's row of table [F, D]: [nnz].

    rows, indices int32 [nnz]; all contiguous and on one device.
    """
    out = g.new_empty(len(indices))
    options = _options(table)
    if len(indices):
        grid = (triton.cdiv(len(indices), options["STEP"]),)
        run: Any = _dot_rows
        run[grid](g, rows, indices, table, out, len(indices), table.shape[1], **options)
    return out
