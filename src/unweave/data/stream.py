"""From stored tokens to mixed batches of activations, at many sites from one forward pass.

1. ``ActivationSource`` cuts the token store into chunks of whole rows and runs each through the model once, stopping
   at the last site that is asked for. Padding and excluded ids never reach its output. With a cache folder a computed
   chunk is kept on disk, so that later epochs and interrupted runs do not compute it again. Several processes divide
   a chunk's forward passes among them, and all of them get the whole chunk.
2. ``MixingBuffer`` holds the tokens of many chunks, serves half of them in random order, and refills. Its state is
   a list of indices, so that a checkpoint is small and the stream goes on exactly where it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from unweave.core.dist import SOLO, Group
from unweave.core.errors import UnweaveError
from unweave.core.lock import remove_stale, turn
from unweave.core.memory import refuse_if_memory
from unweave.core.progress import task
from unweave.core.site import Site
from unweave.core.writing import atomic_write, friendly_io, make_folder
from unweave.data.policy import TokenPolicy
from unweave.data.tokens import TokenStore
from unweave.lm.model import LM, Tokens


@dataclass(frozen=True)
class Chunk:
    """Activations of counted tokens: x[site] float32 [n, D], and where each lies in the token store, int64 [n].

    ``nonfinite`` tokens of the chunk had NaN or infinite activations and are not in it.
    """

    x: dict[Site, Tensor]
    where: Tensor
    nonfinite: int = 0


class ActivationSource:
    """Chunks of activations of a token store, in a fixed order, from the model or from the cache.

    ``chunk_tokens`` is about how many tokens a chunk holds (whole rows), ``batch_tokens`` about how many go through the
    model at once. The chunks do not depend on ``batch_tokens``, nor on the number of processes in ``group``, which must
    all ask for the same chunks in the same order. Tokens with NaN or infinite activations stop the work, or are left
    out and counted (``nonfinite="drop"``).
    """

    def __init__(
        self,
        lm: LM,
        store: TokenStore,
        sites: Sequence[Site],
        *,
        chunk_tokens: int = 16384,
        batch_tokens: int = 2048,
        exclude_ids: Sequence[int] = (),
        cache: Path | None = None,
        nonfinite: Literal["stop", "drop"] = "stop",
        group: Group = SOLO,
    ) -> None:
        if not sites:
            raise UnweaveError("no site was named", remedy="name at least one, e.g. resid_post.9")
        self.lm, self.store = lm, store
        self.sites = sorted({lm.site(site) for site in sites})
        if any(site.point == "path" for site in self.sites):
            raise UnweaveError("activations of module paths cannot be harvested", remedy="use a named site")
        self.exclude_ids = tuple(exclude_ids)
        self.batch_tokens, self.cache = batch_tokens, cache
        self.nonfinite: Literal["stop", "drop"] = nonfinite
        self.group = group
        ends = torch.from_numpy(store.starts[1:].astype("int64"))
        self._bounds = torch.unique_consecutive((ends - 1) // chunk_tokens, return_counts=True)[1].cumsum(0).tolist()

    @property
    def n_chunks(self) -> int:
        return len(self._bounds)

    def rows_of(self, index: int) -> range:
        """The rows of the token store that chunk ``index`` holds."""
        return range(self._bounds[index - 1] if index else 0, self._bounds[index])

    def chunk(self, index: int) -> Chunk:
        """Chunk ``index``: read from the cache where it is there, computed (and cached) otherwise."""
        if self.cache is None:
            return self._harvest(index)
        path = self.cache / f"{index:05d}.safetensors"
        with self._turn(path):
            if not bool(self.group.broadcast(torch.tensor(int(path.exists())))):  # all do the same, whatever each sees
                chunk = self._harvest(index)
                if self.group.rank == 0:
                    self._store(path, chunk)
                return chunk
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            refuse_if_memory(error, path)
            raise UnweaveError(
                f"cached activations are damaged: {error}", where=str(path), remedy="delete this file and run again"
            ) from error
        return Chunk({site: tensors[str(site)] for site in self.sites}, tensors["where"], int(tensors["nonfinite"]))

    @contextlib.contextmanager
    def _turn(self, path: Path) -> Iterator[None]:
        """Inside, no other run computes a chunk that is not there yet: who comes second waits, and finds it made."""
        if self.group.rank > 0 or path.exists():
            yield
            return
        with contextlib.ExitStack() as lock:
            make_folder(path.parent)
            with friendly_io(path):
                lock.enter_context(turn(path))
            remove_stale(path.parent)
            yield

    def _store(self, path: Path, chunk: Chunk) -> None:
        from safetensors.torch import save_file

        tensors = {str(site): x.contiguous() for site, x in chunk.x.items()}
        with atomic_write(path) as temporary:
            save_file(tensors | {"where": chunk.where, "nonfinite": torch.tensor(chunk.nonfinite)}, temporary)

    def batches_of(self, index: int) -> list[list[int]]:
        """The rows of a chunk, those of like length together, so that little padding is computed."""
        starts = self.store.starts
        batches: list[list[int]] = []
        longest = 0
        for row in sorted(self.rows_of(index), key=lambda r: int(starts[r + 1] - starts[r]), reverse=True):
            if not batches or (len(batches[-1]) + 1) * longest > self.batch_tokens:
                batches.append([])
                longest = int(starts[row + 1] - starts[row])
            batches[-1].append(row)
        return batches

    def _harvest(self, index: int) -> Chunk:
        return self._together(self.batches_of(index)[self.group.rank :: self.group.size])

    def passes(self, index: int) -> Iterator[Chunk]:
        """A chunk as it comes from the model, one batch of every process at a time: never from the cache, nor into it.

        So no more is held than the rows of one pass. Together they are ``chunk(index)``, in another order.
        """
        batches, size = self.batches_of(index), self.group.size
        for first in range(0, len(batches), size):
            yield self._together(batches[first : first + size][self.group.rank :][:1])

    def _together(self, batches: Sequence[Sequence[int]]) -> Chunk:
        """This process's batches of rows and those of all others, in the order of the token store.

        Trap 1, 2: what counts is decided by mask and id, whatever the padding side; padding never counts.
        """
        counted = TokenPolicy(self.exclude_ids)
        parts: dict[Site, list[Tensor]] = {site: [] for site in self.sites}
        places = [torch.zeros(0, dtype=torch.int64)]
        nonfinite = torch.zeros(1, dtype=torch.int64)
        for rows in batches:
            tokens, where = self.store.batch(rows, self.lm.pad_id)
            with self.lm.taps(read=self.sites, stop=self.sites[-1]) as seen:
                self.lm(tokens)
            keep = counted.keep(seen[self.sites[0]], tokens.ids, tokens.mask)
            finite = keep.clone()
            for site in self.sites:
                finite &= torch.isfinite(seen[site]).all(-1).to(keep.device)
            if self.nonfinite == "stop":
                self._refuse_nan(keep & ~finite, where)
            nonfinite += int((keep & ~finite).sum())
            places.append(where[finite])
            for site in self.sites:
                parts[site].append(seen[site][finite.to(seen[site].device)].float().cpu())
        where = torch.cat(self.group.gather(torch.cat(places)))
        order = where.argsort()
        x: dict[Site, Tensor] = {}
        for site, xs in parts.items():
            own = torch.cat(xs) if xs else torch.zeros(0, self.lm.width(site))  # fewer batches than processes
            x[site] = torch.cat(self.group.gather(own))[order]
        return Chunk(x, where[order], int(self.group.sum(nonfinite)))

    def _refuse_nan(self, bad: Tensor, where: Tensor) -> None:
        if bool(bad.any()):
            row = int(self.store.starts[1:].searchsorted(int(where[bad][0]), side="right"))
            raise UnweaveError(
                f"the activations of {int(bad.sum())} tokens are NaN or infinite",
                where=f"row {row} of the token store (document {int(self.store.documents[row])})",
                remedy="load the model in float32 or bfloat16, leave that document out, or have such tokens dropped "
                "and counted (stream.nonfinite: drop)",
            )


def _shuffled(n: int, seed: int, epoch: int) -> Tensor:
    """The order of n chunks, or rows, in an epoch."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


class MixingBuffer:
    """Endless random batches {site: [batch, D]} over the chunks of a source, many epochs long.

    Holds about ``capacity`` tokens; when half are served it takes in the next chunks, whose order is drawn anew every
    epoch. A token that is a norm outlier at any of the sites is left out at all of them. The same seed gives the same
    batches; ``state_dict`` holds indices and the generator, and loading it continues exactly.
    """

    def __init__(
        self, source: ActivationSource, *, batch: int, capacity: int, seed: int, policies: dict[Site, TokenPolicy]
    ) -> None:
        if capacity < 2 * batch:
            what = f"a mixing buffer of {capacity} tokens cannot serve batches of {batch}"
            raise UnweaveError(what, remedy=f"use at least {2 * batch}")
        self.source, self.batch, self.capacity, self.policies = source, batch, capacity, policies
        self.seed, self.generator = seed, torch.Generator().manual_seed(seed)
        self.epoch, self.position = 0, 0  # the next chunk is the position-th of this epoch's order
        self.outliers, self.nonfinite = 0, 0  # left out of what was drawn into the pool
        self._rows = torch.zeros(0, 2, dtype=torch.int64)  # chunk and row of each token in the pool
        self._order = torch.zeros(0, dtype=torch.int64)
        self._cursor = 0
        self._pool: dict[Site, Tensor] = {}

    def _filtered(self, index: int) -> tuple[dict[Site, Tensor], int, int]:
        """Activations of a chunk without outliers; how many those were, and how many tokens were not finite."""
        chunk = self.source.chunk(index)
        keep = torch.ones(len(chunk.where), dtype=torch.bool)
        for site, x in chunk.x.items():
            keep &= TokenPolicy(max_norm=self.policies[site].max_norm).keep(x)
        dropped = len(keep) - int(keep.sum())
        return ({site: x[keep] for site, x in chunk.x.items()} if dropped else chunk.x), dropped, chunk.nonfinite

    def _next_chunk(self) -> int:
        if self.position == self.source.n_chunks:
            self.epoch, self.position = self.epoch + 1, 0
        self.position += 1
        return int(_shuffled(self.source.n_chunks, self.seed, self.epoch)[self.position - 1])

    def _fill(self) -> None:
        total = min(self.capacity, self.source.store.n_tokens)
        with task("fill the mixing buffer", total=total, unit="tokens") as progress:  # minutes on a CPU
            self._refill(progress.advance)

    def _refill(self, taken_in: Callable[[int], None] = lambda count: None) -> None:
        unserved = self._order[self._cursor :]
        rows = [self._rows[unserved]]
        pools = {site: [x[unserved]] for site, x in self._pool.items()} or {site: [] for site in self.source.sites}
        held, taken = len(unserved), 0
        while held < self.capacity and taken < self.source.n_chunks:
            index = self._next_chunk()
            x, dropped, nonfinite = self._filtered(index)
            count = len(next(iter(x.values())))
            self.outliers, self.nonfinite = self.outliers + dropped, self.nonfinite + nonfinite
            rows.append(torch.stack([torch.full((count,), index), torch.arange(count)], 1))
            for site in self.source.sites:
                pools[site].append(x[site])
            held, taken = held + count, taken + 1
            taken_in(count)
        if held < self.batch:
            what = f"the text has {held} tokens that count, fewer than one batch of {self.batch}"
            raise UnweaveError(what, remedy="give more text or a smaller batch")
        self._rows = torch.cat(rows)
        self._pool = {site: torch.cat(xs) for site, xs in pools.items()}
        self._order = torch.randperm(held, generator=self.generator)
        self._cursor = 0

    def next(self) -> dict[Site, Tensor]:
        """The next batch, {site: float32 [batch, D]}."""
        if not len(self._order):
            self._fill()
        elif len(self._order) - self._cursor < max(self.batch, len(self._order) // 2):
            self._refill()
        chosen = self._order[self._cursor : self._cursor + self.batch]
        self._cursor += self.batch
        return {site: x[chosen] for site, x in self._pool.items()}

    def peek(self, n: int) -> dict[Site, Tensor]:
        """n of the tokens that are next (all, where fewer are held), without taking them: to initialise from.

        Where fewer than n are left to serve, the last ones served make up the number.
        """
        if not len(self._order):
            self._fill()
        first = max(0, min(self._cursor, len(self._order) - n))
        chosen = self._order[first : first + n]
        return {site: x[chosen] for site, x in self._pool.items()}

    def left_out(self, served: int) -> tuple[int, int]:
        """Norm outliers and tokens not finite that belong to ``served`` tokens, which is how many were taken so far.

        What was drawn into the pool and not served yet does not count: of all that was left out, the share served.
        """
        share = served / max(1, served + len(self._order) - self._cursor)
        return round(self.outliers * share), round(self.nonfinite * share)

    def state_dict(self) -> dict[str, Tensor]:
        """Where the stream is; a few integers per token in the pool."""
        counters = torch.tensor([self.epoch, self.position, self._cursor, self.outliers, self.nonfinite])
        state = {"counters": counters, "rows": self._rows.int(), "order": self._order.int()}
        return state | {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continues where ``state`` was taken; its tokens are read again from the source."""
        self.epoch, self.position, self._cursor, self.outliers, self.nonfinite = (int(v) for v in state["counters"])
        self._rows, self._order = state["rows"].long(), state["order"].long()
        self.generator.set_state(state["generator"])
        self._pool = {}
        if not len(self._rows):
            return
        with task("restore the mixing buffer", total=len(self._rows), unit="tokens") as progress:
            for index in self._rows[:, 0].unique().tolist():
                x, _, _ = self._filtered(index)
                places = (self._rows[:, 0] == index).nonzero().squeeze(1)
                for site in self.source.sites:
                    if site not in self._pool:
                        self._pool[site] = x[site].new_empty(len(self._rows), x[site].shape[1])
                    self._pool[site][places] = x[site][self._rows[places, 1]]
                progress.advance(len(places))


class RowBatches:
    """Endless batches of whole rows of a token store, in an order drawn anew every epoch: for training end to end.

    A batch holds as many rows as fit into about ``batch_tokens`` real tokens, but at least ``min_rows``: one for each
    process. The same seed gives the same batches. ``outliers`` and ``nonfinite`` are for whoever uses them: how many
    tokens of the batches so far did not count, and why.
    """

    def __init__(self, store: TokenStore, pad_id: int, *, batch_tokens: int, seed: int, min_rows: int = 1) -> None:
        self.store, self.pad_id, self.batch_tokens, self.seed = store, pad_id, batch_tokens, seed
        self.min_rows = min_rows
        self.epoch, self.position = 0, 0
        self.outliers, self.nonfinite = 0, 0
        self._drawn: tuple[int, Tensor] | None = None

    def _order(self) -> Tensor:
        if self._drawn is None or self._drawn[0] != self.epoch:
            self._drawn = self.epoch, _shuffled(self.store.n_rows, self.seed, self.epoch)
        return self._drawn[1]

    def next(self) -> tuple[Tokens, Tensor]:
        """The next rows, padded on the right, and where each token lies in the store [B, P] (-1: padding)."""
        rows: list[int] = []
        count = 0
        while True:
            row = int(self._order()[self.position])
            length = int(self.store.starts[row + 1] - self.store.starts[row])
            if len(rows) >= self.min_rows and count + length > self.batch_tokens:
                return self.store.batch(rows, self.pad_id)
            rows.append(row)
            count += length
            self.position += 1
            if self.position == self.store.n_rows:
                self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Where the batches are."""
        place = {"epoch": self.epoch, "position": self.position}
        return place | {"outliers": self.outliers, "nonfinite": self.nonfinite}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues where ``state`` was taken."""
        self.epoch, self.position = state["epoch"], state["position"]
        self.outliers, self.nonfinite = state.get("outliers", 0), state.get("nonfinite", 0)
