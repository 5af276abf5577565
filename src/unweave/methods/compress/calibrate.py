"""What the calibration tokens say of each projection's inputs, block by block or in one pass.

Block by block, inputs are those that the compressed blocks below give. One sweep does for a block:

1. a pass begins at the residual stream where the last sweep stopped, runs the block below, now compressed, and then
   this block as it is, up to its last projection: no further product is needed to see the inputs;
2. squared norms, or products X^T X, of every projection's inputs are added up; q, k and v share theirs;
3. the block's projections are compressed.

Rows of a batch have equal lengths: there is no padding that an expert would have to be told from tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.progress import task
from unweave.core.site import Site
from unweave.lm.model import LM, Tokens
from unweave.lm.projections import Projection, watch_inputs
from unweave.lm.taps import Stop

Order = Literal["blocks", "one-pass"]
Needs = Literal["nothing", "norms", "gram"]


@dataclass
class Inputs:
    """Sums over the inputs of one or several projections."""

    squares: Tensor
    """float64 [in]: of every input, its squares"""
    gram: Tensor | None
    """float64 [in, in]: X^T X, where it is needed"""

    @classmethod
    def of(cls, width: int, needs: Needs, device: torch.device) -> Inputs:
        zeros = torch.zeros(width, dtype=torch.float64, device=device)
        return cls(zeros, torch.zeros(width, width, dtype=torch.float64, device=device) if needs == "gram" else None)

    @property
    def norms(self) -> Tensor:
        """||X_j||, float64 [in]."""
        return self.squares.sqrt()

    def add(self, x: Tensor) -> None:
        """Takes in inputs [N, in]."""
        x = x.float() if x.dtype != torch.float64 else x
        if self.gram is None:
            self.squares += torch.linalg.vector_norm(x, dim=0).double().square()
        else:
            self.gram += (x.T @ x).double()
            self.squares = self.gram.diagonal()


@dataclass
class _Seen:
    """The inputs of projections as they are used; a tensor that several use in a row is added up once."""

    needs: Needs
    of: dict[Projection, Inputs] = field(default_factory=dict)
    last: Projection | None = None
    _before: tuple[Projection, Tensor] | None = None
    stops: bool = False
    """whether a pass ends at the projection that was the last to be used in the first batch"""

    def __call__(self, projection: Projection, x: Tensor) -> None:
        shared = None if self._before is None or not _same(self._before[1], x) else self.of[self._before[0]]
        if projection not in self.of:
            self.of[projection] = shared or Inputs.of(x.shape[1], self.needs, x.device)
        if self.of[projection] is not shared:
            self.of[projection].add(x)
        self._before = (projection, x)  # holding x, nothing else can take its address
        if self.stops and projection is self.last:
            raise Stop
        if not self.stops:
            self.last = projection

    def next_batch(self) -> None:
        self._before = None
        self.stops = self.last is not None and self.last.expert is None  # which experts come last is up to the tokens


def _same(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.shape, a._version) == (b.data_ptr(), b.shape, b._version)


Work = Callable[[Projection, "Inputs | None"], None]
"""Compresses one projection, in place."""


def each_projection(
    lm: LM, chosen: Sequence[Projection], batches: Sequence[Tokens], needs: Needs, order: Order, work: Work
) -> None:
    """Calls ``work`` for every projection with what the calibration batches say of its inputs, see above.

    Raises UnweaveError for an expert that no token was routed to.
    """
    if needs == "nothing":
        for projection in chosen:
            work(projection, None)
        return
    layers = sorted({projection.layer for projection in chosen})
    groups = [list(chosen)] if order == "one-pass" else [[p for p in chosen if p.layer == each] for each in layers]
    total = len(groups) * sum(batch.n_tokens for batch in batches)
    with TemporaryDirectory(prefix="unweave-") as folder, task("compress", total=total, unit="tokens") as progress:
        stream = _Stream(batches, lm, folder) if len(groups) > 1 else None
        for group in groups:
            seen = _Seen(needs)
            with watch_inputs(lm, group, seen):
                for place, batch in enumerate(batches):
                    _pass(lm, batch, stream, place, group)
                    seen.next_batch()
                    progress.advance(batch.n_tokens)
            if stream is not None:
                stream.site = Site("resid_pre", group[0].layer)
            for projection in group:
                if projection not in seen.of:
                    raise UnweaveError(
                        f"no calibration token was routed to {projection}",
                        where=lm.name,
                        remedy="calibrate on more text (data.tokens), or use a method without calibration",
                    )
                work(projection, seen.of[projection])


def _pass(lm: LM, batch: Tokens, stream: _Stream | None, place: int, group: Sequence[Projection]) -> None:
    """One batch from where the stream is held to the last of the projections; the stream is then held before them."""
    first, stop = Site("resid_pre", group[0].layer), Site("resid_post", group[-1].layer)
    start = None if stream is None or stream.site is None else (stream.site, stream.values[place].to(lm.device))
    with lm.taps(read=[first], stop=stop, start=start) as read:
        lm(batch)
    if stream is not None:
        stream.values[place].copy_(read[first])


class _Stream:
    """The residual stream of all batches at ``site``, [B, P, D] each, in a file: memory holds what is worked on."""

    def __init__(self, batches: Sequence[Tokens], lm: LM, folder: str) -> None:
        sizes = [batch.ids.numel() * lm.d_model for batch in batches]
        held = torch.from_file(f"{folder}/stream", shared=True, size=sum(sizes), dtype=lm.dtype)
        parts = held.split(sizes)
        self.site: Site | None = None
        self.values = [part.view(*batch.ids.shape, -1) for part, batch in zip(parts, batches, strict=True)]
