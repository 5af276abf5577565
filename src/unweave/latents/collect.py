"""Records of latents of one SAE or many, from one pass over activations.

1. Chunk by chunk every SAE encodes what it reads; its sparse codes are a piece, which is not computed again.
2. Site by site the codes become records, so that memory holds the codes of one SAE at a time.

Where only some latents are asked for, only their columns are computed and held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from unweave.core.codes import Codes
from unweave.core.errors import UnweaveError
from unweave.core.pieces import Pieces
from unweave.core.progress import task
from unweave.core.site import Site
from unweave.latents.records import Records, RecordsSpec, Source, build
from unweave.sae.activations import TopK

if TYPE_CHECKING:
    from unweave.data.tokens import TokenStore
    from unweave.lm.model import LM
    from unweave.sae.module import SAE

Chosen = Mapping[Site, Sequence[int] | None]
"""{site: ascending latents, or None for all}"""
_ENCODED = "encoded"


@dataclass(frozen=True)
class Encoded:
    """Codes of the latents of several SAEs over the same text."""

    lm: LM
    saes: Mapping[Site, SAE]
    chosen: Chosen
    store: TokenStore
    pieces: Pieces
    chunks: tuple[str, ...]
    """the names of the pieces"""

    def records(self, site: Site, spec: RecordsSpec | None = None) -> Records:
        """The records of the SAE at a site."""
        sae, latents = self.saes[site], self.chosen[site]
        codes, places = [], []
        for name in self.chunks:
            held = self.pieces.get(name, f"{site}/")
            assert held is not None  # it was there, or made, when the chunks were counted
            offsets, indices, values, where = (held[f"{site}/{part}"] for part in _PARTS)
            n_latents = sae.d_sae if latents is None else len(latents)
            codes.append(Codes(offsets, indices.long(), values, n_latents))
            places.append(where)
        return build(self.lm, sae, Codes.cat(codes), torch.cat(places), self.store, spec, latents=latents)


_PARTS = ("offsets", "indices", "values", "where")


def collect(
    lm: LM,
    sae: SAE,
    source: Source,
    store: TokenStore,
    spec: RecordsSpec | None = None,
    *,
    max_tokens: int | None = None,
) -> Records:
    """Encodes the source's chunks, without another pass of the model where they are cached, and makes the records.

    Only tokens that the SAE's policy keeps are counted. ``max_tokens`` ends after the chunk that reaches so many.
    Memory: 12 bytes per non-zero latent (77 MB for 200,000 tokens at L0 32) and what ``latents/contexts.py`` says.
    """
    site = read_site(sae)
    return encode(lm, {site: sae}, source, store, max_tokens=max_tokens).records(site, spec)


def encode(
    lm: LM,
    saes: Mapping[Site, SAE],
    source: Source,
    store: TokenStore,
    *,
    chosen: Chosen | None = None,
    max_tokens: int | None = None,
    pieces: Pieces | None = None,
) -> Encoded:
    """The codes of every SAE, chunk by chunk until each has seen ``max_tokens`` tokens; None: all there are.

    Records come of them one by one. Pieces are in memory by default. UnweaveError where an SAE is another model's, and
    where there are no tokens.
    """
    chosen = chosen or dict.fromkeys(saes)
    pieces = pieces or Pieces(None)
    for sae in saes.values():
        read_site(sae)
        sae.verify(lm)
    ids, names = np.asarray(store.ids), []
    seen = torch.zeros(len(saes), dtype=torch.int64)
    total = min(max_tokens or len(ids), len(ids))
    with task("contexts of latents", total=total, unit="tokens") as progress:
        for index in range(source.n_chunks):
            names.append(f"{index:05d}")
            there = pieces.get(names[-1], _ENCODED) or pieces.tensors(
                names[-1], lambda index=index: dict(_chunk(lm, saes, chosen, source, index, ids)), later=""
            )
            before = int(seen.min())
            seen = seen + there[_ENCODED]
            progress.advance(int(seen.min()) - before)
            if max_tokens is not None and int(seen.min()) >= max_tokens:
                break
    if not int(seen.min()):
        raise UnweaveError("there are no tokens to collect records from", remedy="give text with ordinary tokens")
    return Encoded(lm, saes, chosen, store, pieces, tuple(names))


def read_site(sae: SAE) -> Site:
    """Where an SAE reads. UnweaveError for one whose file does not say."""
    if sae.read is None:
        raise UnweaveError("this SAE does not say which site it reads", remedy='name it: sae.at("resid_post.9")')
    return sae.read


def _chunk(
    lm: LM, saes: Mapping[Site, SAE], chosen: Chosen, source: Source, index: int, ids: np.ndarray[Any, Any]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a chunk: every SAE's codes, the tokens that they are of, and how many these are."""
    chunk = source.chunk(index)
    where = torch.as_tensor(chunk.where).cpu()
    token_ids = torch.from_numpy(ids[where.numpy()].astype(np.int64))
    counts = []
    for site, sae in saes.items():
        x = chunk.x[lm.site(read_site(sae))]
        keep = sae.policy.keep(x, token_ids.to(x.device))
        codes = _codes(sae, x[keep].to(sae.W_enc.device), chosen[site])
        columns = (codes.offsets, codes.indices.int(), codes.values.float(), where[keep.cpu()])
        for name, tensor in zip(_PARTS, columns, strict=True):
            yield f"{site}/{name}", tensor
        counts.append(codes.n_rows)
    yield _ENCODED, torch.tensor(counts)


def _codes(sae: SAE, x: Tensor, latents: Sequence[int] | None) -> Codes:
    """All latents' codes, or those of a few, for which only their own columns are computed (but for TopK)."""
    if latents is None:
        return sae.codes(x)
    if isinstance(sae.activation, TopK):
        return sae.codes(x).of(torch.tensor(latents))
    with torch.no_grad():
        return Codes.from_dense(sae.subset(latents).encode(x))
