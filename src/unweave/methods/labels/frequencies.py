"""How often latents of any number of SAEs fire in each text, from one pass of the model.

1. Texts are rows of a token store, cut off at some length; a chunk of rows goes through the model in batches of like
   length, stopped at the last site.
2. Each SAE encodes the tokens that its policy keeps; special tokens and padding never count. Equal pairs of text and
   latent are counted, and counts over the text's tokens become levels of frequency.
3. A chunk's entries are a piece on disk, in blocks of latents, so that matching reads what it needs and an interrupted
   pass goes on. No matrix of texts x latents ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unweave.core.codes import Codes
from unweave.core.pieces import Held, Pieces
from unweave.core.progress import task
from unweave.core.site import Site
from unweave.data.corpus import Document
from unweave.data.pack import PackSpec, pack
from unweave.data.stream import ActivationSource
from unweave.data.tokens import TokenStore
from unweave.latents.collect import read_site
from unweave.lm.model import LM
from unweave.methods.labels.levels import Array, level_of
from unweave.methods.labels.matching import BLOCK, Blocks, Entries
from unweave.sae.module import SAE
from unweave.tasks.tagged.texts import TaggedTexts

_CHUNK_TOKENS = 16_384


@dataclass(frozen=True)
class Reading:
    """Some tagged texts as rows of tokens, and who reads them."""

    lm: LM
    saes: Mapping[Site, SAE]
    store: TokenStore
    texts: Array
    """which of the tagged texts each row is, int64 [R]"""
    source: ActivationSource

    @classmethod
    def of(cls, lm: LM, saes: Mapping[Site, SAE], texts: TaggedTexts, which: Array, folder: Path, *,
           context: int, batch_tokens: int) -> Reading:  # fmt: skip
        """Tokenises the texts numbered ``which`` into ``folder``, where that was not done before."""
        if (folder / "meta.json").exists():
            store = TokenStore.open(folder)
        else:
            spec = PackSpec(context=context, min_tokens=1)
            documents = (Document(texts.text(int(i)), None, texts.source, int(i)) for i in which)
            store = TokenStore.write(folder, pack(documents, lm.tokenizer, spec), None, {}, unit="documents")
        sites = [read_site(sae) for sae in saes.values()]
        source = ActivationSource(lm, store, sites, chunk_tokens=_CHUNK_TOKENS, batch_tokens=batch_tokens,
                                  exclude_ids=lm.special_ids)  # fmt: skip
        return cls(lm, saes, store, which[np.asarray(store.documents)], source)

    def passes(self, chunk: int) -> Iterator[tuple[Site, Tensor, Array]]:
        """The activations that each SAE counts in a chunk, [n, D], and the store's token of each, int64 [n]."""
        ids = self.store.ids
        for part in self.source.passes(chunk):
            token_ids = torch.from_numpy(ids[part.where.numpy()].astype(np.int64))
            for site, sae in self.saes.items():
                x = part.x[self.lm.site(read_site(sae))]
                keep = sae.policy.keep(x, token_ids)
                yield site, x[keep].to(sae.W_enc.device), part.where[keep].numpy()

    def row_of(self, where: Array) -> Array:
        """The row of each of the store's tokens."""
        return np.searchsorted(self.store.starts, where, side="right") - 1


@dataclass(frozen=True)
class Frequencies:
    """The levels of all latents in all texts of a reading: its finished pieces, one a chunk."""

    reading: Reading
    pieces: Pieces

    def blocks(self, site: Site) -> Blocks:
        """The entries of an SAE's latents, by block; texts are rows of the reading's store."""

        def of(block: int) -> Iterator[Entries]:
            for chunk in range(self.reading.source.n_chunks):
                kind = f"{site}/{block}/"
                held = self._piece(chunk, kind)
                yield Entries(*(held[kind + name].numpy() for name in ("text", "latent", "level")))

        return of

    def tokens(self, site: Site) -> Array:
        """How many tokens of each row count for an SAE, int64 [R]."""
        parts = [self._piece(i, f"{site}/counted")[f"{site}/counted"] for i in range(self.reading.source.n_chunks)]
        return torch.cat(parts).numpy()

    def maxima(self, site: Site) -> Array:
        """Each latent's largest activation, float32 [F]."""
        parts = [self._piece(i, f"{site}/maximum")[f"{site}/maximum"] for i in range(self.reading.source.n_chunks)]
        return torch.stack(parts).amax(0).numpy()

    def _piece(self, chunk: int, kind: str) -> Held:
        held = self.pieces.get(_name(chunk), kind)
        assert held is not None  # all were made before anybody asks
        return held


def read(reading: Reading, pieces: Pieces) -> Frequencies:
    """One pass of the model over all texts."""
    with task("activation frequencies", total=reading.store.n_tokens, unit="tokens") as shown:
        for chunk in range(reading.source.n_chunks):
            read_chunk(reading, pieces, chunk)
            rows = reading.source.rows_of(chunk)
            shown.advance(int(reading.store.starts[rows.stop] - reading.store.starts[rows.start]))
    return Frequencies(reading, pieces)


def read_chunk(reading: Reading, pieces: Pieces, chunk: int) -> None:
    """One chunk's piece, where it is not there."""
    pieces.tensors(_name(chunk), lambda: _entries(reading, chunk), later="")


def _name(chunk: int) -> str:
    return f"frequencies-{chunk:05d}"


def _entries(reading: Reading, chunk: int) -> dict[str, Tensor]:
    """The tensors of a chunk: for each SAE its entries by block of latents, counted tokens by row, and maxima."""
    rows = reading.source.rows_of(chunk)
    keys: dict[Site, list[tuple[Array, Array]]] = {site: [] for site in reading.saes}
    counted = {site: np.zeros(len(rows), np.int64) for site in reading.saes}
    maxima = {site: torch.zeros(sae.d_sae) for site, sae in reading.saes.items()}
    for site, x, where in reading.passes(chunk):
        row = reading.row_of(where) - rows.start
        codes = reading.saes[site].codes(x)
        keys[site].append(np.unique(_fired(codes, row), return_counts=True))
        counted[site] += np.bincount(row, minlength=len(rows))
        maxima[site] = torch.maximum(maxima[site], codes.maxima().float().cpu())
    tensors: dict[str, Tensor] = {}
    for site, sae in reading.saes.items():
        key, times = (np.concatenate([part[i] for part in keys[site]]) for i in (0, 1))
        row, latent = np.divmod(key, sae.d_sae)
        level = level_of(times / counted[site][row])
        order = np.argsort(latent // BLOCK, kind="stable")
        ends = np.searchsorted(latent[order] // BLOCK, np.arange(-(-sae.d_sae // BLOCK)), side="right")
        for block, part in enumerate(np.split(order, ends[:-1])):
            columns = (row[part] + rows.start).astype(np.int32), (latent[part] % BLOCK).astype(np.int16), level[part]
            for name, values in zip(("text", "latent", "level"), columns, strict=True):
                tensors[f"{site}/{block}/{name}"] = torch.from_numpy(values)
        tensors[f"{site}/counted"], tensors[f"{site}/maximum"] = torch.from_numpy(counted[site]), maxima[site]
    return tensors


def _fired(codes: Codes, row: Array) -> Array:
    """row x F + latent of every firing, int64."""
    fires = (codes.values > 0).cpu()
    token = codes.row_of_each().cpu()[fires].numpy()
    return row[token] * codes.n_latents + codes.indices.cpu()[fires].numpy()
