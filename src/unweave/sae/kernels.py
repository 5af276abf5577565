"""Sparse training kernels: a step that pays one dense product and otherwise touches only the chosen latents.

1. Pre-activations are made for one chunk of rows at a time; each chunk's winners are found and the chunk is reused.
2. Winners are found exactly without sorting rows: cut a row's F entries into groups, take each group's maximum (one
   vectorised pass), keep the k groups with the largest maxima, and take the k largest of what those hold. Were an entry
   of the true top k in a group left out, k groups would hold an entry at least as large: only ties can differ.
3. A choice of latents is a sparse matrix [N, F] stored by rows; decoding is a weighted sum of decoder rows
   (``embedding_bag``), the gradient of a value one dot product, and the gradient of the weights the transposed sum,
   again an ``embedding_bag``, over the same choice stored by columns.

Everything is plain PyTorch and runs on any device. Shapes: N rows, D width, F latents, nnz chosen entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_BYTES = 20 << 20
"""Dense latents alive at a time: large enough for an efficient product, small enough for the last-level cache."""


class Choice:
    """Which latents each row uses: row i those at ``indices[offsets[i]:offsets[i + 1]]``.

    indices: int32 [nnz]; offsets: int32 [N + 1]; n_latents: F. The values of the entries, [nnz] in the same order, are
    kept apart because gradients flow through them alone.
    """

    def __init__(self, indices: Tensor, offsets: Tensor, n_latents: int) -> None:
        self.indices, self.offsets, self.n_latents = indices.int(), offsets.int(), n_latents

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
        return order, Choice(self.rows[order], offsets, self.n_rows)

    def dense(self, values: Tensor) -> Tensor:
        """The matrix [N, F] with these values; entries of one row and latent add up."""
        out = values.new_zeros(self.n_rows, self.n_latents)
        return out.index_put((self.rows.long(), self.indices.long()), values, accumulate=True)


# -- finding the winners --------------------------------------------------------------------------------------------


def topk_rows(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row of z [N, F]: values and int64 indices [N, k], in no particular order.

    Exact: the values equal ``torch.topk``'s as a multiset; among equal entries either may be chosen.
    """
    n, width = z.shape
    k = min(k, width)
    size = max(2, 2 ** round(math.log2(max(1.0, math.sqrt(width / k)))))
    groups = width // size
    if groups < 2 * k:  # hardly fewer candidates than entries
        found = z.topk(k, dim=1, sorted=False)
        return found.values, found.indices
    # Group j holds entries j, j + groups, j + 2 groups, ...: its maximum is then taken along contiguous memory.
    maxima = z[:, : groups * size].view(n, size, groups).amax(1)
    best = maxima.topk(k, dim=1, sorted=False).indices
    steps = torch.arange(0, groups * size, groups, device=z.device)
    candidates = (best[:, :, None] + steps).view(n, k * size)
    if groups * size < width:  # the entries that fill no group are all candidates
        rest = torch.arange(groups * size, width, device=z.device).expand(n, -1)
        candidates = torch.cat([candidates, rest], dim=1)
    values, places = z.gather(1, candidates).topk(k, dim=1, sorted=False)
    return values, candidates.gather(1, places)


def chunk_rows(n_latents: int, itemsize: int = 4) -> int:
    """How many rows of dense latents one chunk holds."""
    return max(32, CHUNK_BYTES // (itemsize * max(1, n_latents)) // 32 * 32)


def _chunks(x: Tensor, W: Tensor, b: Tensor | None, visit: Callable[[int, Tensor], None], rows: int | None) -> None:
    """Calls ``visit(first row, pre-activations)`` on the chunks of x W^T + b, which share one buffer."""
    rows = rows or chunk_rows(W.shape[0], x.element_size())
    buffer = x.new_empty(min(rows, len(x)), W.shape[0])
    for first in range(0, len(x), rows):
        part = x[first : first + rows]
        out = buffer[: len(part)]
        visit(first, torch.mm(part, W.T, out=out) if b is None else torch.addmm(b, part, W.T, out=out))


@torch.no_grad()
def choose_topk(x: Tensor, W: Tensor, b: Tensor | None, k: int, *, chunk: int | None = None) -> tuple[Tensor, Choice]:
    """Each row's k largest pre-activations of x W^T + b, as they are (they may be negative).

    x [N, D], W [F, D], b [F] or None. Returns values [N * k] and the choice. ``chunk`` rows of dense latents exist at
    a time.
    """
    k = min(k, W.shape[0])
    values = x.new_empty(len(x), k)
    indices = torch.empty(len(x), k, dtype=torch.int32, device=x.device)

    def visit(first: int, z: Tensor) -> None:
        found, where = topk_rows(z, k)
        values[first : first + len(z)] = found
        indices[first : first + len(z)] = where

    _chunks(x, W, b, visit, chunk)
    return values.view(-1), Choice.uniform(indices, W.shape[0])


def _above(z: Tensor, bound: Tensor, size: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, indices and values of the entries of z [n, F] above a bound, looking only into groups that reach it."""
    n, width = z.shape
    groups = width // size
    if groups * size < width or groups < 2:
        rows, indices = (z > bound).nonzero(as_tuple=True)
        return rows, indices, z[rows, indices]
    blocks = z.view(n, size, groups)
    rows, group = (blocks.amax(1) > bound).nonzero(as_tuple=True)
    steps = torch.arange(0, width, groups, device=z.device)
    entries = (rows * width + group)[:, None] + steps
    values = z.view(-1)[entries]
    kept = values > bound
    flat = entries[kept]
    return flat // width, flat % width, values[kept]


@torch.no_grad()
def choose_batch_topk(
    x: Tensor, W: Tensor, b: Tensor | None, k: int, *, guess: float | None = None, chunk: int | None = None
) -> tuple[Tensor, Choice]:
    """The k N largest positive pre-activations of a batch (BatchTopK): exactly k N wherever so many are positive.

    ``guess`` is a lower bound tried first (a fraction of the last batch's threshold, say): entries above it are
    collected and the largest kept; if it leaves too few, it is halved, and at last 0 is used. It changes the work, not
    the result. Returns values [nnz] and the choice.
    """
    wanted = k * len(x)
    bound = guess if guess is not None and guess > 0 else _first_guess(x, W, b, k)
    while True:
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        limit = x.new_tensor(bound)

        def visit(first: int, z: Tensor, found: list[Any] = found, limit: Tensor = limit) -> None:
            rows, indices, values = _above(z, limit)
            found.append((rows + first, indices, values))

        _chunks(x, W, b, visit, chunk)
        rows, indices, values = (torch.cat(part) for part in zip(*found, strict=True))
        if len(values) >= wanted or bound <= 0:
            break
        bound = bound / 2 if bound > 1e-3 else 0.0
    if len(values) > wanted:
        kept = values.topk(wanted, sorted=False).indices
        rows, indices, values = rows[kept], indices[kept], values[kept]
    order = torch.argsort(rows * W.shape[0] + indices)
    counts = torch.bincount(rows, minlength=len(x))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return values[order], Choice(indices[order], offsets, W.shape[0])


def _first_guess(x: Tensor, W: Tensor, b: Tensor | None, k: int) -> float:
    """A bound from a few rows spread over the batch: a little below what would keep k of each on average."""
    sample = x[:: max(1, len(x) // 64)]
    z = sample @ W.T if b is None else torch.addmm(b, sample, W.T)
    value = float(z.flatten().topk(min(z.numel(), 2 * k * len(z))).values[-1])
    return value if math.isfinite(value) and value > 0 else 0.0


# -- sparse products ------------------------------------------------------------------------------------------------


def _has_bags(table: Tensor) -> bool:
    return table.dtype in (torch.float32, torch.float64) and table.device.type in ("cpu", "cuda")


def weighted_rows(values: Tensor, choice: Choice, table: Tensor) -> Tensor:
    """The sparse matrix times a table: out_i = sum over row i's entries of value * table[index], [N, D].

    table: [F, D]. No gradient: see ``decode``.
    """
    if _has_bags(table):
        return F.embedding_bag(
            choice.indices, table, choice.offsets, per_sample_weights=values, mode="sum", include_last_offset=True
        )
    out = table.new_zeros(choice.n_rows, table.shape[1])
    for part in _pieces(len(values), table.shape[1]):
        out.index_add_(0, choice.rows[part], table[choice.indices[part].long()] * values[part, None])
    return out


def dot_rows(g: Tensor, choice: Choice, table: Tensor) -> Tensor:
    """For each entry the dot product of its row of g [N, D] with its latent's row of table [F, D]: [nnz]."""
    out = g.new_empty(len(choice.indices))
    for part in _pieces(len(out), table.shape[1]):
        out[part] = (g[choice.rows[part].long()] * table[choice.indices[part].long()]).sum(1)
    return out


def _pieces(n: int, width: int) -> list[slice]:
    step = max(1, CHUNK_BYTES // (4 * width))
    return [slice(first, first + step) for first in range(0, n, step)]


def transposed_rows(values: Tensor, choice: Choice, table: Tensor) -> Tensor:
    """The transposed sparse matrix times a table [N, D]: what each latent gathers, [F, D]."""
    order, by_latent = choice.by_latent
    return weighted_rows(values[order], by_latent, table)


def latent_sums(values: Tensor, choice: Choice) -> Tensor:
    """The sum of each latent's values, [F]."""
    return values.new_zeros(choice.n_latents).index_add_(0, choice.indices, values)


class _Encode(torch.autograd.Function):
    """Attaches values that were found without a graph to the weights and inputs they came from."""

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
        if ctx.needs_input_grad[0] and _has_bags(W):
            # A weighted bag's gradient to its weights is ``dot_rows`` without gathering either side: keep its graph.
            with torch.enable_grad():
                weights = values.detach().requires_grad_()
                out = weighted_rows(weights, choice, W.detach())
            ctx.bags = (weights, out)
        ctx.save_for_backward(values, W)
        return weighted_rows(values, choice, W) if ctx.bags is None else out.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        values, W = ctx.saved_tensors
        choice: Choice = ctx.choice
        need_values, need_W = ctx.needs_input_grad[:2]
        to_values = None
        if need_values and ctx.bags is not None:
            weights, out = ctx.bags
            (to_values,) = torch.autograd.grad(out, weights, g.contiguous(), retain_graph=True)
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
