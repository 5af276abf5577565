"""Products of a sparse matrix and a table, forward and backward, touching only the chosen entries.

A choice of latents is a sparse matrix [N, F] stored by rows. Decoding is a weighted sum of decoder rows
(``embedding_bag``), the gradient of a value one dot product, and the gradient of the weights the transposed sum: again
an ``embedding_bag``, over the same choice stored by columns. Where rows have many entries, tables are gone through in
blocks that a core's cache keeps. On a GPU with Triton, kernels of our own do the same (``triton_kernels``).

Shapes: N rows, D width, F latents, nnz chosen entries.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unweave.sae.sparse.pattern import Choice

CACHE_BYTES = 2 << 20
"""What one core keeps close at hand: the part of a table that many entries are gathered from at a time."""
BLOCK_ENTRIES = 16
"""Entries per row of a sparse product and block of its table from which blocks pay."""
_PIECE_BYTES = 20 << 20
"""What gathering may hold at a time where there are no weighted bags."""


def _has_bags(table: Tensor) -> bool:
    return table.dtype in (torch.float32, torch.float64) and table.device.type in ("cpu", "cuda")


@lru_cache(maxsize=1)
def _imported() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from unweave.sae.sparse import triton_kernels

    return triton_kernels


def _triton(table: Tensor) -> ModuleType | None:
    """Our own kernels where they can work on this table: on a GPU, with Triton installed."""
    return _imported() if table.is_cuda and table.is_floating_point() else None


def _bag(values: Tensor, choice: Choice, table: Tensor) -> Tensor:
    return F.embedding_bag(
        choice.indices, table, choice.offsets, per_sample_weights=values, mode="sum", include_last_offset=True
    )


def _block(entries: int, results: int, table: Tensor) -> int:
    """How many rows of a table to gather from at a time: as many as a core's cache keeps, or 0 for all of them.

    Gathering from a table that fits is several times faster, but every block goes through the ``results`` rows once
    more: it pays where there are several entries for each row and block.
    """
    size = CACHE_BYTES // (table.element_size() * max(1, table.shape[1]))
    if table.device.type != "cpu" or size < 1 or len(table) <= 2 * size:
        return 0
    return size if entries * size > BLOCK_ENTRIES * results * len(table) else 0


def weighted_rows(values: Tensor, choice: Choice, table: Tensor) -> Tensor:
    """The sparse matrix times a table: out_i = sum over row i's entries of value * table[index], [N, D].

    table: [F, D]. No gradient: see ``decode``.
    """
    gpu = _triton(table)
    if gpu is not None:
        return gpu.weighted_rows(values.contiguous(), choice.indices, choice.offsets, table.contiguous())
    if _has_bags(table):
        size = _block(len(values), choice.n_rows, table)
        if size == 0:
            return _bag(values, choice, table)
        order, blocks = choice.latent_blocks(size)
        return _bags(values.index_select(0, order), blocks, table)
    out = table.new_zeros(choice.n_rows, table.shape[1])
    for part in _pieces(len(values), table.shape[1]):
        out.index_add_(0, choice.rows[part], table[choice.indices[part].long()] * values[part, None])
    return out


def _bags(values: Tensor, blocks: list[tuple[slice, slice, Choice]], table: Tensor) -> Tensor:
    """The same by blocks of latents, values in their order."""
    out = None
    for latents, entries, part in blocks:
        product = _bag(values[entries], part, table[latents])
        out = product if out is None else out.add_(product)
    assert out is not None
    return out


def dot_rows(g: Tensor, choice: Choice, table: Tensor) -> Tensor:
    """For each entry the dot product of its row of g [N, D] with its latent's row of table [F, D]: [nnz]."""
    gpu = _triton(table)
    if gpu is not None:
        return gpu.dot_rows(g.contiguous(), choice.rows, choice.indices, table.contiguous())
    out = g.new_empty(len(choice.indices))
    for part in _pieces(len(out), table.shape[1]):
        out[part] = (g[choice.rows[part].long()] * table[choice.indices[part].long()]).sum(1)
    return out


def _pieces(n: int, width: int) -> list[slice]:
    step = max(1, _PIECE_BYTES // (4 * width))
    return [slice(first, first + step) for first in range(0, n, step)]


def transposed_rows(values: Tensor, choice: Choice, table: Tensor) -> Tensor:
    """The transposed sparse matrix times a table [N, D]: what each latent gathers, [F, D]."""
    size = _block(len(values), choice.n_latents, table) if _has_bags(table) else 0
    if size == 0:
        order, by_latent = choice.by_latent
        return weighted_rows(values.index_select(0, order), by_latent, table)
    out = None
    for rows, entries, part in choice.row_blocks(size):
        order, by_latent = part.by_latent
        product = _bag(values[entries].index_select(0, order), by_latent, table[rows])
        out = product if out is None else out.add_(product)
    assert out is not None
    return out


def latent_sums(values: Tensor, choice: Choice) -> Tensor:
    """The sum of each latent's values, [F]."""
    if _triton(values) is not None:  # without additions in an order that differs from run to run
        return transposed_rows(values, choice, values.new_ones(choice.n_rows, 1)).squeeze(1)
    return values.new_zeros(choice.n_latents).index_add_(0, choice.indices, values)


class _Of(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, per_latent: Tensor, choice: Choice) -> Tensor:
        ctx.choice = choice
        return per_latent.index_select(0, choice.indices)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return latent_sums(grads[0], ctx.choice), None


def of_latents(per_latent: Tensor, choice: Choice) -> Tensor:
    """What each entry's latent has in ``per_latent`` [F]: [nnz], with the gradient to it, as repeatable as
    ``latent_sums`` (that of indexing adds up in any order on a GPU).
    """
    return _Of.apply(per_latent, choice)  # type: ignore[no-any-return]


class _Encode(torch.autograd.Function):
    """Attaches values computed without a graph to the weights and inputs they came from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, values: Tensor, choice: Choice) -> Tensor:
        ctx.save_for_backward(x, W)
        ctx.choice = choice
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        x, W = ctx.saved_tensors
        choice: Choice = ctx.choice
        need_x, need_W, need_b = ctx.needs_input_grad[:3]
        return (
            weighted_rows(g, choice, W) if need_x else None,
            transposed_rows(g, choice, x) if need_W else None,
            latent_sums(g, choice) if need_b else None,
            None,
            None,
        )


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W: Tensor, choice: Choice) -> Tensor:
        ctx.choice, ctx.bags = choice, None
        ctx.save_for_backward(values, W)
        if not ctx.needs_input_grad[0] or not _has_bags(W) or _triton(W) is not None:
            return weighted_rows(values, choice, W)
        # A weighted bag's gradient to its weights is ``dot_rows`` without gathering either side: keep its graph.
        size = _block(len(values), choice.n_rows, W)
        order, blocks = choice.latent_blocks(size) if size else (None, [])
        with torch.enable_grad():
            weights = (values if order is None else values.index_select(0, order)).detach().requires_grad_()
            table = W.detach()
            out = _bag(weights, choice, table) if order is None else _bags(weights, blocks, table)
        ctx.bags = (weights, out, order)
        return out.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        values, W = ctx.saved_tensors
        choice: Choice = ctx.choice
        need_values, need_W = ctx.needs_input_grad[:2]
        to_values = None
        if need_values and ctx.bags is not None:
            weights, out, order = ctx.bags
            (to_values,) = torch.autograd.grad(out, weights, g.contiguous(), retain_graph=True)
            if order is not None:
                to_values = torch.empty_like(to_values).index_copy_(0, order, to_values)
        elif need_values:
            to_values = dot_rows(g, choice, W)
        return to_values, transposed_rows(values, choice, g.contiguous()) if need_W else None, None


def attach(x: Tensor, W: Tensor, b: Tensor | None, values: Tensor, choice: Choice) -> Tensor:
    """Chosen pre-activations (values [nnz] of x W^T + b) with gradients to x [N, D], W [F, D] and b [F].

    The choice itself is constant, as in the dense top-k.
    """
    return _Encode.apply(x, W, b, values, choice)  # type: ignore[no-any-return]


def decode(values: Tensor, choice: Choice, W: Tensor) -> Tensor:
    """The sum of decoder rows W [F, D] that each row's latents stand for, [N, D], with gradients to values and W."""
    return _Decode.apply(values, W, choice)  # type: ignore[no-any-return]
