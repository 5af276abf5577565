"""The one interface of an evaluation, and the activations that all SAEs of a site share.

An evaluation is one file with a ``TASK``. Its ``prepare`` reads data and does what no SAE is needed for (activations,
labels, the model's own probes); what it returns measures one SAE, or a baseline, over reseeded data and probes.
Activations go through ``data.stream``: chunks on disk that other SAEs of the site, and later runs, read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from unweave.core.contents import tree_of
from unweave.core.pieces import Pieces
from unweave.core.progress import task
from unweave.core.site import Site
from unweave.core.spec import digest
from unweave.data.pack import Row
from unweave.data.policy import TokenPolicy
from unweave.data.stream import ActivationSource
from unweave.data.tokens import TokenStore
from unweave.lm.model import LM, Tokens
from unweave.methods.saebench.spec import SaebenchSpec
from unweave.methods.saebench.spread import Scored
from unweave.sae.module import SAE

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class About:
    """What a task measures on."""

    data: str
    """twelve digits over it"""
    source: str
    """where it comes from, in words"""
    sample: Tensor
    """some activations [n, D] of it, from which random directions take their centre and sparsity"""
    notes: tuple[str, ...] = ()
    """what a reader must know of it"""


class Prepared(Protocol):
    """What a task measures with, once its data are read."""

    @property
    def about(self) -> About: ...

    def score(self, sae: SAE, pieces: Pieces) -> Scored:
        """One SAE's numbers. Raises UnweaveError for an SAE that cannot be measured."""
        ...


@dataclass(frozen=True)
class Task:
    """An evaluation."""

    name: str
    eval_type: str
    """SAEBench's eval_type_id"""
    version: int
    """raise it when numbers change"""
    headlines: Mapping[str, int]
    """the numbers that are compared with baselines; 1: higher is better, -1: lower is"""
    baselines: tuple[str, ...]
    """which baselines make sense"""
    prepare: Callable[[Bench], Prepared]
    config: Callable[[SaebenchSpec], dict[str, Any]]
    """SAEBench's eval_config"""
    categories: Callable[[SaebenchSpec], Mapping[str, Sequence[str]]]
    """SAEBench's numbers, by category; what a task measures beyond them is not in its files' metrics"""


@dataclass(frozen=True)
class Bench:
    """A site of a model, and what a task works with there."""

    lm: LM
    model: str
    """the name that the model was loaded by"""
    site: Site
    """where the SAEs read"""
    saes: tuple[SAE, ...]
    policy: TokenPolicy
    """which tokens count: the same for all SAEs of the site, and for baselines"""
    spec: SaebenchSpec
    pieces: Pieces
    """of what the SAEs of a site share in this task"""
    runs: Path
    common: Pieces = field(default_factory=lambda: Pieces(None))
    """of what tasks share at this site"""

    @property
    def seeds(self) -> range:
        return range(self.spec.seed, self.spec.seed + self.spec.seeds)

    @cached_property
    def _identity(self) -> list[str]:
        return [self.model, tree_of(self.model), str(self.site), str(self.lm.dtype)]

    def _place(self, name: str, *what: Any) -> Path:
        return self.runs.resolve() / f"{name}-{digest([*self._identity, *what])}"

    def kept(self, name: str, *what: Any) -> Pieces:
        """Pieces of what is computed at the site without any SAE, which later runs share."""
        return Pieces(self._place(name, *what))

    def stored(self, rows: Sequence[Row]) -> TokenStore:
        """Rows of tokens as a store, which later runs share."""
        folder = self._place("saebench-rows", [row.ids for row in rows])
        there = (folder / "meta.json").exists()
        return TokenStore.open(folder) if there else TokenStore.write(folder, rows, None, {}, unit="documents")

    def source(self, store: TokenStore, chunk_tokens: int) -> ActivationSource:
        """The activations of a store at the site, special tokens included, in chunks of whole rows: all computed."""
        cache = self._place("activations", store.digest, chunk_tokens)
        source = ActivationSource(self.lm, store, [self.site], chunk_tokens=chunk_tokens, cache=cache,
                                  batch_tokens=self.spec.batch_tokens)  # fmt: skip
        with task("activations", total=source.n_chunks, unit="chunks") as shown:
            for chunk in range(source.n_chunks):
                source.chunk(chunk)
                shown.advance()
        return source

    def placed(self, source: ActivationSource, chunk: int) -> tuple[Tensor, Array]:
        """The activations of a chunk that count, [n, D], and the token of the store that each is at, int64 [n]."""
        part, store = source.chunk(chunk), source.store
        x = part.x[self.site]
        keep = self.policy.keep(x, torch.from_numpy(store.ids[part.where.numpy()].astype(np.int64)))
        return x[keep].to(self.lm.device), part.where[keep].numpy()

    def counted(self, source: ActivationSource, chunk: int) -> tuple[Tensor, Tensor]:
        """The activations of a chunk that count, [n, D], and the row of the store that each is in, int64 [n]."""
        x, where = self.placed(source, chunk)
        row = np.searchsorted(source.store.starts, where, side="right") - 1
        return x, torch.from_numpy(row).to(self.lm.device)

    def chunks(self, source: ActivationSource) -> Iterator[tuple[Tensor, Tensor]]:
        """``counted`` of every chunk."""
        return (self.counted(source, chunk) for chunk in range(source.n_chunks))

    def at(self, rows: Sequence[Row], places: Sequence[int]) -> Tensor:
        """The activation at one token of each row, [n, D] on the CPU, which later runs share."""
        asked = [[row.ids, place] for row, place in zip(rows, places, strict=True)]
        pieces, parts = self.kept("saebench-places", asked), []
        with task("activations of words", total=len(rows), unit="words") as shown:
            for first in range(0, len(rows), 256):
                some = range(first, min(first + 256, len(rows)))
                make = lambda some=some: {"x": self._at(rows, places, some)}  # noqa: E731
                parts.append(pieces.tensors(f"{first:06d}", make)["x"])
                shown.advance(len(some))
        return torch.cat(parts)

    def _at(self, rows: Sequence[Row], places: Sequence[int], some: Sequence[int]) -> Tensor:
        step = max(1, self.spec.batch_tokens // max(len(rows[i].ids) for i in some))
        parts = []
        for first in range(0, len(some), step):
            batch = some[first : first + step]
            with self.lm.taps(read=[self.site], stop=self.site) as seen:
                self.lm(Tokens.pad([(rows[i].ids, rows[i].roles) for i in batch], self.lm.pad_id))
            parts.append(seen[self.site][range(len(batch)), [places[i] for i in batch]].float().cpu())
        return torch.cat(parts)
