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

from unweave.core.dist import SOLO, Group

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


def _chunks(x: Tensor, W: Tensor, b: Tensor | None, visit: Callable[[int, Tensor], bool], rows: int | None) -> None:
    """Calls ``visit(first row, pre-activations)`` on chunks of x W^T + b in one buffer, for as long as it says true."""
    rows = rows or chunk_rows(W.shape[0], x.element_size())
    buffer = x.new_empty(min(rows, len(x)), W.shape[0])
    for first in range(0, len(x), rows):
        part = x[first : first + rows]
        out = buffer[: len(part)]
        if not visit(first, torch.mm(part, W.T, out=out) if b is None else torch.addmm(b, part, W.T, out=out)):
            return


@torch.no_grad()
def choose_topk(x: Tensor, W: Tensor, b: Tensor | None, k: int, *, chunk: int | None = None) -> tuple[Tensor, Choice]:
    """Each row's k largest pre-activations of x W^T + b, as they are (they may be negative).

    x [N, D], W [F, D], b [F] or None. Returns values [N * k] and the choice. ``chunk`` rows of dense latents exist at
    a time.
    """
    k = min(k, W.shape[0])
    values = x.new_empty(len(x), k)
    indices = torch.empty(len(x), k, dtype=torch.int32, device=x.device)

    def visit(first: int, z: Tensor) -> bool:
        found, where = topk_rows(z, k)
        values[first : first + len(z)] = found
        indices[first : first + len(z)] = where
        return True

    _chunks(x, W, b, visit, chunk)
    return values.view(-1), Choice.uniform(indices, W.shape[0])


class _Finds:
    """Entries above a bound, collected chunk by chunk in the order of rows and, within a row, of latents."""

    def __init__(self, n_latents: int) -> None:
        self.n_latents, self.n_rows, self.count = n_latents, 0, 0
        self._places: list[Tensor] = []
        self._values: list[Tensor] = []

    def add(self, z: Tensor, bound: Tensor) -> None:
        """Looks through further rows z [n, F]; bound is a scalar or [F]."""
        found = _places(z > bound)
        self._values.append(z.view(-1).index_select(0, found))
        self._places.append(found.add_(self.n_rows * self.n_latents))
        self.n_rows += len(z)
        self.count += len(found)

    def finish(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values, int32 indices and int64 offsets of all rows of x."""
        places = torch.cat([*self._places, torch.empty(0, dtype=torch.int64, device=x.device)])
        ends = torch.arange(0, len(x) * self.n_latents + 1, self.n_latents, device=x.device)
        values = torch.cat([*self._values, x.new_empty(0)])
        return values, places.remainder(self.n_latents).int(), torch.searchsorted(places, ends)


def _places(mask: Tensor) -> Tensor:
    """Where a contiguous boolean tensor is true, as int64 places in its flattened form, ascending.

    Eight flags are looked at as one integer first, so that only words that hold something are opened.
    """
    mask = mask.view(-1)
    if len(mask) % 8:
        return mask.nonzero().squeeze(1)
    words = mask.view(torch.int64)
    hit = words.nonzero().squeeze(1)
    inner = words.index_select(0, hit).view(torch.bool).nonzero().squeeze(1)
    return (hit * 8).index_select(0, inner >> 3).add_(inner.bitwise_and_(7))


@torch.no_grad()
def choose_above(
    x: Tensor, W: Tensor, b: Tensor | None, bound: Tensor, *, limit: float, chunk: int | None = None
) -> tuple[Tensor, Choice] | None:
    """All pre-activations of x W^T + b above their latent's bound [F], or None where they are too many to be sparse.

    ``limit`` is the largest share of entries, between 0 and 1, that is still worth a sparse step. It is looked at after
    every chunk, so that a caller who has to go dense has lost little. Returns values [nnz] and the choice, latents
    ascending within a row.
    """
    finds, sparse = _Finds(W.shape[0]), True

    def visit(first: int, z: Tensor) -> bool:
        nonlocal sparse
        finds.add(z, bound)
        sparse = finds.count <= limit * (first + len(z)) * W.shape[0]
        return sparse

    _chunks(x, W, b, visit, chunk)
    if not sparse:
        return None
    values, indices, offsets = finds.finish(x)
    return values, Choice(indices, offsets, W.shape[0])


@torch.no_grad()
def choose_batch_topk(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    k: int,
    *,
    guess: float | None = None,
    chunk: int | None = None,
    group: Group = SOLO,
) -> tuple[Tensor, Choice]:
    """The k N largest positive pre-activations of a batch (BatchTopK): exactly k N wherever so many are positive.

    ``guess`` is a lower bound tried first (a fraction of the last batch's threshold, say): entries above it are
    collected and the largest kept; if it leaves too few, it is halved, and at last 0 is used. It changes the work, not
    the result. Returns values [nnz] and the choice, latents ascending within a row.

    With several processes x is one's own part of the batch, N counts the rows of all, and one gets one's own entries of
    the choice for the whole. Among equal values the first in the order of processes and rows win, so that the choice
    does not depend on how a batch is divided.
    """
    wanted = k * int(group.sum(torch.tensor([len(x)], device=x.device)))
    bound = guess if guess is not None and guess > 0 else _first_guess(x, W, b, k)
    bound = -float(group.max(torch.tensor([-bound], dtype=torch.float64, device=x.device)))
    while True:
        finds = _Finds(W.shape[0])
        limit = x.new_tensor(bound)

        def visit(first: int, z: Tensor, finds: _Finds = finds, limit: Tensor = limit) -> bool:
            finds.add(z, limit)
            return True

        _chunks(x, W, b, visit, chunk)
        found = int(group.sum(torch.tensor([finds.count], device=x.device)))
        if found >= wanted or bound <= 0:
            break
        bound = bound / 2 if bound > 1e-3 else 0.0
    values, indices, offsets = finds.finish(x)
    if found > wanted:
        kept = _largest(values, wanted, group)
        counts = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)])
        values, indices, offsets = values[kept], indices[kept], counts[offsets]
    return values, Choice(indices, offsets, W.shape[0])


def _largest(values: Tensor, wanted: int, group: Group) -> Tensor:
    """Which of one's own values [n] are among the ``wanted`` largest of all processes' (of which there are more)."""
    parts = group.gather(values)
    lowest = torch.cat(parts).topk(wanted, sorted=False).values.min()
    kept = values >= lowest
    ties = [int((part == lowest).sum()) for part in parts]
    above = sum(int((part > lowest).sum()) for part in parts)
    room = wanted - above - sum(ties[: group.rank])
    if ties[group.rank] > room:
        equal = (values == lowest).nonzero().squeeze(1)
        kept[equal[max(0, room) :]] = False
    return kept


def _first_guess(x: Tensor, W: Tensor, b: Tensor | None, k: int) -> float:
    """A bound from a few rows spread over the batch: a little below what would keep k of each on average."""
    if len(x) == 0:
        return math.inf
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
