"""Which stretches of text show what a latent does, for all latents at once.

1. The firings (latent, token, value) are sorted by latent and falling value, some latents at a time.
2. Top contexts are the strongest firings, the strongest of each document only.
3. Quantile contexts are drawn from bands of equally many of the other firings, from strong to weak; random contexts
   from all counted tokens, firing or not.
4. Each context is widened to a window inside its row, with the latent's value at every token of the window.

Memory: beside the codes, a byte for each of their non-zeros, and about 100 bytes for each non-zero and 60 for each
window token of the latents under way (at most 8 million non-zeros, unless one latent has more, and 8,192 latents).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from unweave.core.codes import Codes
from unweave.core.errors import UnweaveError
from unweave.latents.spec import RecordsSpec

if TYPE_CHECKING:
    from unweave.data.tokens import TokenStore

KINDS = ("top", "quantile", "random")
_BLOCK_FIRINGS = 8_000_000
_BLOCK_LATENTS = 8_192
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Contexts:
    """Windows of text as columns, sorted by latent, then kind, then rank.

    latent int32 [C]; kind uint8 [C], an index into ``KINDS``; band int8 [C], -1 outside quantile contexts; token
    int64 [C], the store's index of the token chosen; document int64 [C]; role uint8 [C], that token's role; value
    float32 [C], the latent there; focus int32 [C], that token's place in its window; offsets int64 [C+1] into the
    window tokens: ids int32 [W], values float32 [W] and counted bool [W], False at tokens that the SAE did not see
    (special tokens, outliers).
    """

    latent: Array
    kind: Array
    band: Array
    token: Array
    document: Array
    role: Array
    value: Array
    focus: Array
    offsets: Array
    ids: Array
    values: Array
    counted: Array

    def __len__(self) -> int:
        return len(self.latent)

    @classmethod
    def cat(cls, parts: list[Contexts]) -> Self:
        """Several blocks one below the other."""
        ends = np.cumsum([0] + [len(part.ids) for part in parts])
        columns = {f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)}
        shifted = [part.offsets[1:] + end for part, end in zip(parts, ends[:-1], strict=True)]
        return cls(**{**columns, "offsets": np.concatenate([np.zeros(1, np.int64), *shifted])})


@dataclass(frozen=True)
class _Firings:
    """Positive values of some latents, in the order of the codes: latent (from the block's first), row, value."""

    latent: Array  # int64 [n]
    row: Array  # int64 [n]
    value: Array  # float32 [n]


@dataclass(frozen=True)
class _Text:
    """The counted tokens: ``where`` int64 [N] in the store, and the same sorted with the rows they come from."""

    store: TokenStore
    where: Array
    sorted: Array
    row_of_sorted: Array
    starts: Array  # int64 [R+1]
    documents: Array  # int64 [R]

    def store_row(self, tokens: Array) -> Array:
        """The store's row that holds each token."""
        return np.searchsorted(self.starts, tokens, side="right") - 1

    def find(self, tokens: Array) -> tuple[Array, Array]:
        """Each token's row in the codes, and whether it has one."""
        places = np.minimum(np.searchsorted(self.sorted, tokens), len(self.sorted) - 1)
        return self.row_of_sorted[places], self.sorted[places] == tokens


@dataclass(frozen=True)
class Chosen:
    """Some of an SAE's latents: column i of the codes is latent ``latents[i]`` (ascending) of ``n_latents``."""

    latents: Array
    n_latents: int


def find_contexts(
    codes: Codes, where: Array, store: TokenStore, spec: RecordsSpec, chosen: Chosen | None = None
) -> Contexts:
    """The contexts of every latent. ``where`` int64 [N] is the store's token of each row of the codes.

    With ``chosen`` the codes are of these latents alone; their contexts are what they are among those of all latents.
    Raises UnweaveError when the parts do not fit together.
    """
    text = _text(codes, where, store)
    generator = np.random.default_rng(spec.seed)
    strata = spec.bands * spec.per_band
    n_latents = codes.n_latents if chosen is None else chosen.n_latents
    # Drawn for all latents at once, so that neither blocks nor a choice of latents change anything.
    uniform = generator.random((n_latents, strata))
    random_rows = generator.integers(0, len(text.where), (n_latents, spec.random))
    if chosen is not None:
        uniform, random_rows = uniform[chosen.latents], random_rows[chosen.latents]
    # One context per document: which document is told by the token's row in the store.
    document_of_row = text.documents[text.store_row(text.where)]
    _, group = np.unique(document_of_row, return_inverse=True)
    row = codes.row_of_each().cpu().numpy()
    latent = codes.indices.cpu().numpy()
    value = codes.values.detach().float().cpu().numpy()
    parts = []
    for first, last in _blocks(codes.counts().cpu().numpy()):
        inside = (latent >= first) & (latent < last) & (value > 0)
        firings = _Firings(latent[inside].astype(np.int64) - first, row[inside], value[inside])
        drawn = _choose(firings, group, last - first, spec, uniform[first:last], random_rows[first:last])
        parts.append(_windows(firings, text, first, last - first, drawn, spec))
    found = Contexts.cat(parts)
    return found if chosen is None else replace(found, latent=chosen.latents[found.latent].astype(np.int32))


def _text(codes: Codes, where: Array, store: TokenStore) -> _Text:
    where = np.asarray(where, dtype=np.int64)
    if len(where) != codes.n_rows:
        raise UnweaveError(f"there are codes of {codes.n_rows} tokens, but places of {len(where)}", where="records")
    if not len(where):
        raise UnweaveError("there are no tokens to collect records from", remedy="give text with ordinary tokens")
    order = np.argsort(where, kind="stable")
    ordered = where[order]
    starts = np.asarray(store.starts, dtype=np.int64)
    if ordered[0] < 0 or ordered[-1] >= starts[-1]:
        raise UnweaveError("the codes come from other tokens than this store's", remedy="give the store they come from")
    if (ordered[1:] == ordered[:-1]).any():
        raise UnweaveError("the codes hold a token twice", where="records", remedy="give one pass over the tokens")
    return _Text(store, where, ordered, order, starts, np.asarray(store.documents, dtype=np.int64))


def _blocks(counts: Array) -> Iterator[tuple[int, int]]:
    """Ranges of latents whose firings fit in memory together; all latents in order."""
    first, firings = 0, 0
    for j, count in enumerate(counts.tolist()):
        if j > first and (firings + count > _BLOCK_FIRINGS or j - first == _BLOCK_LATENTS):
            yield first, j
            first, firings = j, 0
        firings += count
    yield first, len(counts)


def _starts(latent: Array, n_latents: int) -> tuple[Array, Array]:
    """How many entries each latent has, and where they start when sorted by latent."""
    counts = np.bincount(latent, minlength=n_latents)
    return counts, np.cumsum(counts) - counts


def _choose(
    firings: _Firings, group: Array, n_latents: int, spec: RecordsSpec, uniform: Array, random_rows: Array
) -> tuple[Array, Array, Array, Array]:
    """(latent, kind, band, row) of every context, sorted by latent, kind, rank. ``group`` [N] numbers documents."""
    # Positive floats order as their bits do, so that one stable sort of integers sorts by latent and falling value.
    bits = firings.value.view(np.int32).astype(np.int64)
    order = np.argsort((firings.latent << 32) | (np.int64(0x7FFFFFFF) - bits), kind="stable")
    latent, row = firings.latent[order], firings.row[order]
    n_groups = int(group.max()) + 1
    _, best = np.unique(latent * n_groups + group[row], return_index=True)  # the first is the document's strongest
    best.sort()
    _, starts = _starts(latent[best], n_latents)
    top = best[np.arange(len(best)) - starts[latent[best]] < spec.top]

    others = np.ones(len(latent), dtype=bool)
    others[top] = False
    rest = np.flatnonzero(others)
    counts, starts = _starts(latent[rest], n_latents)
    strata = uniform.shape[1]
    edges = counts[:, None] * np.arange(strata + 1) // max(1, strata)
    low, sizes = edges[:, :-1], np.diff(edges, axis=1)
    full, stratum = np.nonzero(sizes)
    offset = np.floor(uniform[full, stratum] * sizes[full, stratum]).astype(np.int64)
    quantile = rest[starts[full] + low[full, stratum] + offset]

    everyone = np.repeat(np.arange(n_latents), random_rows.shape[1])
    columns = [
        (latent[top], 0, np.full(len(top), -1), row[top]),
        (full, 1, stratum // max(1, spec.per_band), row[quantile]),
        (everyone, 2, np.full(len(everyone), -1), random_rows.reshape(-1)),
    ]
    all_latents = np.concatenate([c[0] for c in columns])
    kinds = np.concatenate([np.full(len(c[0]), c[1]) for c in columns])
    order = np.lexsort((kinds, all_latents))  # stable: ranks keep their order
    bands, rows = (np.concatenate([c[i] for c in columns])[order] for i in (2, 3))
    return all_latents[order], kinds[order], bands, rows


def _windows(
    firings: _Firings,
    text: _Text,
    first: int,
    n_latents: int,
    chosen: tuple[Array, Array, Array, Array],
    spec: RecordsSpec,
) -> Contexts:
    """Widens each chosen token to its window, cut at the ends of its row in the store."""
    latent, kind, band, row = chosen
    token = text.where[row]
    store_row = text.store_row(token)
    begin = np.maximum(token - spec.left, text.starts[store_row])
    lengths = np.minimum(token + spec.right + 1, text.starts[store_row + 1]) - begin
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    window = np.repeat(begin - offsets[:-1], lengths) + np.arange(offsets[-1])
    code_row, counted = text.find(window)

    keys = firings.row * n_latents + firings.latent
    by_key = np.argsort(keys, kind="stable")
    wanted = code_row * n_latents + np.repeat(latent, lengths)
    values = np.zeros(len(window), dtype=np.float32)
    if len(keys):
        places = np.minimum(np.searchsorted(keys, wanted, sorter=by_key), len(keys) - 1)
        found = by_key[places]
        fires = (keys[found] == wanted) & counted
        values[fires] = firings.value[found[fires]]
    focus = token - begin
    return Contexts(
        latent=(latent + first).astype(np.int32),
        kind=kind.astype(np.uint8),
        band=band.astype(np.int8),
        token=token,
        document=text.documents[store_row],
        role=np.asarray(text.store.roles[token], dtype=np.uint8),
        value=values[offsets[:-1] + focus],
        focus=focus.astype(np.int32),
        offsets=offsets,
        ids=np.asarray(text.store.ids[window]).astype(np.int32),
        values=values,
        counted=counted,
    )
