"""Sparse training kernels: a step that pays one dense product and otherwise touches only the chosen latents.

1. Pre-activations are made for one chunk of rows at a time; each chunk's winners are found and the chunk is reused.
2. Winners are found exactly without sorting rows: cut a row's F entries into groups, take each group's maximum (one
   vectorised pass), keep the k groups with the largest maxima, and take the k largest of what those hold. Were an entry
   of the true top k in a group left out, k groups would hold an entry at least as large: only ties can differ. They
   show in the entry after the k-th, and their rows are looked through again: the first of equal entries wins.
3. What follows works on the chosen entries alone: see ``choice`` and ``products``, whose names are also here.

Everything is plain PyTorch and runs on any device. Shapes: N rows, D width, F latents, nnz chosen entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from unweave.core.dist import SOLO, Group
from unweave.sae.sparse.pattern import Choice
from unweave.sae.sparse.products import attach, decode, dot_rows, latent_sums, transposed_rows, weighted_rows

CHUNK_BYTES = 20 << 20
"""Dense latents alive at a time: large enough for an efficient product, small enough for the last-level cache."""


def topk_rows(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row of z [N, F]: values and int64 indices [N, k], in no particular order.

    Exact: the values equal ``torch.topk``'s as a multiset. Among equal entries the first win, whatever the device, the
    dtype or the number of rows: in 16 bits most rows have a tie at the k-th place.
    """
    n, width = z.shape
    k = min(k, width)
    if k == width:
        return z, torch.arange(width, device=z.device).expand(n, -1)
    more = k + 1  # one more than asked for: where it equals the k-th there may be further ties
    size = max(2, 2 ** round(math.log2(max(1.0, math.sqrt(width / more)))))
    groups = width // size
    if groups < 2 * more:  # hardly fewer candidates than entries
        values, indices = z.topk(more, dim=1)
        return _first_of_ties(z, values, indices)
    # Group j holds entries j, j + groups, j + 2 groups, ...: its maximum is then taken along contiguous memory.
    maxima = z[:, : groups * size].view(n, size, groups).amax(1)
    best = maxima.topk(more, dim=1, sorted=False).indices
    steps = torch.arange(0, groups * size, groups, device=z.device)
    candidates = (best[:, :, None] + steps).view(n, more * size)
    if groups * size < width:  # the entries that fill no group are all candidates
        rest = torch.arange(groups * size, width, device=z.device).expand(n, -1)
        candidates = torch.cat([candidates, rest], dim=1)
    values, places = z.gather(1, candidates).topk(more, dim=1)
    return _first_of_ties(z, values, candidates.gather(1, places))


def _first_of_ties(z: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The first k of the k + 1 largest ``values`` of z [N, F], which are in descending order, and their ``indices``.

    Where the last two are equal, the places of all that equal them go to the first entries of z that do. NaN is the
    largest and equals itself, as it does for torch.
    """
    k = values.shape[1] - 1
    last, next_one = values[:, k - 1], values[:, k]
    tied = ((last == next_one) | next_one.isnan()).nonzero().squeeze(1)
    values, indices = values[:, :k], indices[:, :k]
    if not len(tied):
        return values, indices
    rows, bound = z.index_select(0, tied), last.index_select(0, tied)
    equal = rows == bound[:, None]
    if bool(bound.isnan().any()):
        equal |= rows.isnan() & bound.isnan()[:, None]
    places = _places(equal)
    row = places.div(z.shape[1], rounding_mode="floor")
    counts = torch.bincount(row, minlength=len(tied))
    # What is above the bound stays; after it come the first of what equals it.
    above = (~(values.index_select(0, tied) <= bound[:, None]) & ~bound.isnan()[:, None]).sum(1)
    slot = torch.arange(len(places), device=z.device) + (above - counts.cumsum(0) + counts).index_select(0, row)
    fits = slot < k
    indices = indices.index_put((tied[row[fits]], slot[fits]), places[fits] % z.shape[1])
    return z.gather(1, indices), indices  # equal to the values, but gradients must reach those that won


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
        top, where = topk_rows(z, k)
        values[first : first + len(z)] = top
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
        places = _places(z > bound)
        self._values.append(z.view(-1).index_select(0, places))
        self._places.append(places.add_(self.n_rows * self.n_latents))
        self.n_rows += len(z)
        self.count += len(places)

    def lowest_of(self, largest: int) -> Tensor:
        """The lowest of the given number of largest values."""
        return torch.cat(self._values).topk(largest, sorted=False).values.min()

    def above(self, bound: Tensor) -> int:
        """How many values are above a bound."""
        return sum(int((values > bound).sum()) for values in self._values)

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
    collected and the largest kept. Where the first chunk has far more than its share the bound rises; where too few are
    left in the end it is halved, and at last 0 is used. It changes the work, not the result. Returns values [nnz] and
    the choice, latents ascending within a row.

    With several processes x is one's own part of the batch, N counts the rows of all, and one gets one's own entries of
    the choice for the whole. Among equal values the first in the order of processes and rows win, so that the choice
    does not depend on how a batch is divided.
    """
    n = k * int(group.sum(torch.tensor([len(x)], device=x.device)))
    bound = guess if guess is not None and guess > 0 else _first_guess(x, W, b, k, chunk)
    bound = -float(group.max(torch.tensor([-bound], dtype=torch.float64, device=x.device)))
    may_rise = True
    while True:
        finds, limit = _Finds(W.shape[0]), x.new_tensor(bound)

        def visit(
            first: int, z: Tensor, finds: _Finds = finds, limit: Tensor = limit, may_rise: bool = may_rise
        ) -> bool:
            finds.add(z, limit)
            if first == 0 and may_rise and finds.count > 3 * k * len(z):
                limit.copy_(finds.lowest_of(2 * k * len(z)))
            return True

        _chunks(x, W, b, visit, chunk)
        # What is above every process's last bound has been collected wherever it is.
        reached = group.max(limit)
        n_above = int(group.sum(torch.tensor([finds.above(reached)], device=x.device)))
        if n_above >= n:
            break
        if float(reached) > float(x.new_tensor(bound)):  # the first chunk was not like the others
            may_rise = False
        elif bound <= 0:
            break
        else:
            bound = bound / 2 if bound > 1e-3 else 0.0
    values, indices, offsets = finds.finish(x)
    if int(group.sum(torch.tensor([finds.count], device=x.device))) > n:
        keep = _largest(values, n, group)
        counts = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.cumsum(0)])
        values, indices, offsets = values[keep], indices[keep], counts[offsets]
    return values, Choice(indices, offsets, W.shape[0])


def _largest(values: Tensor, n: int, group: Group) -> Tensor:
    """Which of one's own values [n] are among the ``n`` largest of all processes' (of which there are more)."""
    parts = group.gather(values)
    lowest = torch.cat(parts).topk(n, sorted=False).values.min()
    keep = values >= lowest
    ties = [int((part == lowest).sum()) for part in parts]
    above = sum(int((part > lowest).sum()) for part in parts)
    room = n - above - sum(ties[: group.rank])
    if ties[group.rank] > room:
        equal = (values == lowest).nonzero().squeeze(1)
        keep[equal[max(0, room) :]] = False
    return keep


def _first_guess(x: Tensor, W: Tensor, b: Tensor | None, k: int, chunk: int | None) -> float:
    """A bound from a few rows spread over the batch: a little below what would keep k of each on average."""
    if len(x) == 0:
        return math.inf
    rows = min(64, chunk or chunk_rows(W.shape[0], x.element_size()))
    sample = x[:: -(-len(x) // rows)]
    z = sample @ W.T if b is None else torch.addmm(b, sample, W.T)
    value = float(z.flatten().topk(min(z.numel(), 2 * k * len(z))).values[-1])
    return value if math.isfinite(value) and value > 0 else 0.0


__all__ = [
    "Choice", "attach", "choose_above", "choose_batch_topk", "choose_topk", "chunk_rows", "decode", "dot_rows",
    "latent_sums", "topk_rows", "transposed_rows", "weighted_rows",
]  # fmt: skip
