"""Latents' records: how often each fires, on what text, and which tokens it makes the model say.

records = collect(lm, sae, source, store)      # one pass over activations
records.latent(1234)                           # prints itself
records.save(folder); Records.load(folder)     # latents.parquet, contexts.parquet, and their digests
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from unweave.core.codes import Codes
from unweave.core.contents import checked, is_listing
from unweave.core.contents import listing as file_listing
from unweave.core.errors import UnweaveError, UnweaveWarning
from unweave.core.files import read_json
from unweave.core.memory import refuse_if_memory
from unweave.core.writing import atomic_write, write_json
from unweave.latents.contexts import KINDS, Array, Chosen, Contexts, RecordsSpec, find_contexts
from unweave.latents.latent_record import Context, LatentRecord
from unweave.latents.logit_weights import Written, logit_effects, writes_into_stream
from unweave.lm.chat import Role
from unweave.lm.shown import first_texts, joined, own_texts, shown_alone

if TYPE_CHECKING:
    from unweave.data.tokens import TokenStore
    from unweave.lm.model import LM
    from unweave.sae.module import SAE

_VERSION = 2
_SPECIAL_SHARE = 0.25

__all__ = ["Context", "LatentRecord", "Records", "RecordsSpec", "build", "logit_effects"]


class Source(Protocol):
    """What ``collect`` reads activations from; ``data.stream.ActivationSource`` is one."""

    @property
    def n_chunks(self) -> int: ...

    def chunk(self, i: int, /) -> Any:
        """Something with ``x`` {site: [n, D]} and ``where`` int64 [n], the store's token of each row."""


@dataclass(frozen=True, repr=False)
class Records:
    """Latents' records, as columns. count int64 [n], maximum and mean_active float32 [n], n all latents or some."""

    n_tokens: int
    """Over how many tokens."""
    count: Array
    maximum: Array
    mean_active: Array
    contexts: Contexts
    written: Written | None
    """None where the SAE does not write into the residual stream."""
    token_texts: Mapping[int, str]
    """The own text of every token that occurs in the records (``lm/shown.py``); empty without a tokenizer."""
    spec: RecordsSpec
    latents: Array | None = None
    """Which latents these are, ascending int64 [n]; None where they are all of the SAE's."""
    first_texts: Mapping[int, str] = field(default_factory=dict)
    """The text at a row's beginning of the tokens that have another one there."""

    def __len__(self) -> int:
        return len(self.count)

    def __repr__(self) -> str:
        alive = int((self.count > 0).sum())
        return f"Records({len(self)} latents, {alive} of them fire in {self.n_tokens:,} tokens; .latent(j) shows one)"

    @property
    def rate(self) -> Array:
        """The share of tokens on which each latent fires, float64 [F]."""
        return self.count / self.n_tokens

    @property
    def special_share(self) -> float:
        """Share of special and template tokens among the chosen tokens of all top contexts (trap 4); 0 without any."""
        top = self.contexts.kind == KINDS.index("top")
        return float((self.contexts.role[top] == Role.SPECIAL).mean()) if top.any() else 0.0

    def text(self, token_id: int) -> str:
        """A token's text on its own."""
        return shown_alone(self.token_texts.get(int(token_id), ""), token_id)

    def latent(self, j: int) -> LatentRecord:
        """One latent's record. Raises UnweaveError when there is no such latent, or no record of it."""
        place = self._place(j)
        ends = np.array([j, j + 1], self.contexts.latent.dtype)  # of another type the whole column would be converted
        first, last = np.searchsorted(self.contexts.latent, ends)
        kinds: dict[str, list[Context]] = {kind: [] for kind in KINDS}
        for c in range(int(first), int(last)):
            kinds[KINDS[self.contexts.kind[c]]].append(self._context(c))
        special = [context.role is Role.SPECIAL for context in kinds["top"]]
        return LatentRecord(
            latent=int(j),
            count=int(self.count[place]),
            rate=int(self.count[place]) / self.n_tokens,
            maximum=float(self.maximum[place]),
            mean_active=float(self.mean_active[place]),
            special_share=sum(special) / len(special) if special else None,
            promoted=self._pairs(place, "promoted"),
            suppressed=self._pairs(place, "suppressed"),
            **{kind: tuple(contexts) for kind, contexts in kinds.items()},
        )

    def _place(self, j: int) -> int:
        """Where latent j stands in the columns."""
        if self.latents is None:
            if not 0 <= j < len(self):
                raise UnweaveError(f"latent {j} does not exist", where="records", remedy=f"use 0 to {len(self) - 1}")
            return j
        place = int(np.searchsorted(self.latents, j))
        if place == len(self) or self.latents[place] != j:
            raise UnweaveError(f"there is no record of latent {j}", where="records", remedy="collect records of it too")
        return place

    def _pairs(self, place: int, name: str) -> tuple[tuple[str, float], ...]:
        if self.written is None:
            return ()
        ids, scores = getattr(self.written, name)[place], getattr(self.written, f"{name}_scores")[place]
        return tuple((self.text(i), float(score)) for i, score in zip(ids, scores, strict=True))

    def _context(self, c: int) -> Context:
        columns = self.contexts
        window = slice(int(columns.offsets[c]), int(columns.offsets[c + 1]))
        ids = columns.ids[window].tolist()
        texts = [self.token_texts.get(i, f"<{i}>") for i in ids]
        texts[:1] = [self.first_texts.get(i, text) for i, text in zip(ids[:1], texts[:1], strict=True)]
        pieces = joined(texts)
        return Context(
            ids=tuple(ids),
            texts=tuple(piece.text for piece in pieces),
            goes_on=tuple(piece.goes_on for piece in pieces),
            values=tuple(columns.values[window].tolist()),
            counted=tuple(columns.counted[window].tolist()),
            focus=int(columns.focus[c]),
            token=int(columns.token[c]),
            document=int(columns.document[c]),
            role=Role(int(columns.role[c])),
            band=None if columns.band[c] < 0 else int(columns.band[c]),
        )

    # -- storage --------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Writes ``latents.parquet`` and ``contexts.parquet``, and ``records.json`` with their sizes and digests."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        latents: dict[str, Any] = {
            "latent": pa.array(np.arange(len(self)) if self.latents is None else self.latents, pa.int32()),
            "count": pa.array(self.count),
            "rate": pa.array(self.rate),
            "maximum": pa.array(self.maximum),
            "mean_active": pa.array(self.mean_active),
        }
        if self.written is not None:
            for f in fields(self.written):
                latents[f.name] = pa.array(list(getattr(self.written, f.name)))
        contexts: dict[str, Any] = {}
        for f in fields(self.contexts):
            column = getattr(self.contexts, f.name)
            if f.name in ("ids", "values", "counted"):
                contexts[f.name] = pa.LargeListArray.from_arrays(pa.array(self.contexts.offsets), pa.array(column))
            elif f.name == "kind":
                contexts["kind"] = pa.DictionaryArray.from_arrays(pa.array(column.astype(np.int8)), list(KINDS))
            elif f.name != "offsets":
                contexts[f.name] = pa.array(column)
        about = {"version": _VERSION, "n_tokens": self.n_tokens, "spec": self.spec.to_dict()}
        about["all_latents"] = self.latents is None
        for name in ("token_texts", "first_texts"):
            about[name] = {str(i): text for i, text in getattr(self, name).items()}
        tables = {
            "contexts.parquet": pa.table(contexts),
            "latents.parquet": pa.table(latents).replace_schema_metadata({"unweave.records": json.dumps(about)}),
        }
        folder = Path(folder)
        for name, table in tables.items():
            with atomic_write(folder / name) as temporary:
                pq.write_table(table, temporary)
        listed = file_listing(folder, leave_out=(".*", "records.json"))
        write_json(folder / "records.json", {name: listed[name] for name in tables})  # last: it completes the pair
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads what ``save`` wrote. UnweaveError when a file is missing or not what was written."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        folder, remedy = Path(folder), "collect the records again: unweave latents"
        listed = read_json(folder / "records.json")
        if not is_listing(listed):
            raise UnweaveError("damaged: records.json is no listing of files", where=str(folder), remedy=remedy)
        files = [checked(folder, f"{name}.parquet", listed, remedy) for name in ("latents", "contexts")]
        try:
            latents, contexts = map(pq.read_table, files)
            about = json.loads((latents.schema.metadata or {})[b"unweave.records"])
            return cls._from_tables(latents, contexts, about)
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:
            refuse_if_memory(error, folder)
            raise UnweaveError(f"cannot read latents' records: {error}", where=str(folder), remedy=remedy) from error

    @classmethod
    def _from_tables(cls, latents: Any, contexts: Any, about: dict[str, Any]) -> Self:
        if about["version"] != _VERSION:
            raise ValueError(f"written in version {about['version']}, this is version {_VERSION}")
        ragged = {name: contexts.column(name).combine_chunks() for name in ("ids", "values", "counted")}
        flat = {name: column.flatten().to_numpy(zero_copy_only=False) for name, column in ragged.items()}
        kind = contexts.column("kind").combine_chunks()
        numbers = np.array([KINDS.index(name) for name in kind.dictionary.to_pylist()], dtype=np.uint8)
        flat["kind"] = numbers[kind.indices.to_numpy()]
        lengths = np.diff(ragged["ids"].offsets.to_numpy())
        flat["offsets"] = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        plain = {f.name for f in fields(Contexts)} - set(flat)
        columns = {name: contexts.column(name).to_numpy() for name in plain}
        written = None
        if "promoted" in latents.column_names:
            written = Written(*(np.array(latents.column(f.name).to_pylist()) for f in fields(Written)))
        return cls(
            n_tokens=int(about["n_tokens"]),
            count=latents.column("count").to_numpy(),
            maximum=latents.column("maximum").to_numpy(),
            mean_active=latents.column("mean_active").to_numpy(),
            contexts=Contexts(**columns, **flat),
            written=written,
            token_texts={int(i): text for i, text in about["token_texts"].items()},
            spec=RecordsSpec.from_dict(about["spec"]),
            first_texts={int(i): text for i, text in about["first_texts"].items()},
            latents=None if about.get("all_latents", True) else latents.column("latent").to_numpy().astype(np.int64),
        )


def build(
    lm: LM,
    sae: SAE,
    codes: Codes,
    where: Tensor | Array,
    store: TokenStore,
    spec: RecordsSpec | None = None,
    *,
    latents: Sequence[int] | None = None,
) -> Records:
    """The records of latents whose codes over N tokens are known; ``where`` int64 [N] are those tokens in the store.

    With ``latents`` (ascending) the codes are of these alone, in this order (``Codes.of``); the records are the same
    as among those of all latents. Warns when special and template tokens crowd the top contexts (trap 4).
    """
    spec = spec or RecordsSpec()
    places = np.asarray(where, dtype=np.int64)
    some = None if latents is None else _chosen(latents, sae, codes)
    contexts = find_contexts(codes, places, store, spec, some)
    count = codes.counts().cpu().numpy()
    fires = codes.values > 0
    total = torch.zeros(codes.n_latents, dtype=torch.float64, device=codes.values.device)
    total.index_add_(0, codes.indices[fires], codes.values[fires].double())
    maximum = codes.maxima().clamp(min=0).float().cpu().numpy()
    mean = (total.cpu().numpy() / np.maximum(count, 1)).astype(np.float32)
    written = None
    if writes_into_stream(lm, sae.write, sae.d_out):
        written = logit_effects(lm, sae, spec.logits, None if some is None else torch.from_numpy(some.latents))
    texts, firsts = _token_texts(lm, contexts, written)
    which = None if some is None else some.latents
    records = Records(codes.n_rows, count, maximum, mean, contexts, written, texts, spec, which, firsts)
    base = float((np.asarray(store.roles)[places] == Role.SPECIAL).mean())
    if records.special_share > max(_SPECIAL_SHARE, 2 * base):
        warnings.warn(
            f"{records.special_share:.0%} of the latents' top contexts are special or template tokens, which are "
            f"{base:.0%} of the tokens: exclude them by id when training, or read these latents with care",
            UnweaveWarning,
            stacklevel=2,
        )
    return records


def _token_texts(lm: LM, contexts: Contexts, written: Written | None) -> tuple[dict[int, str], dict[int, str]]:
    """The own text of every token that occurs, and where it differs that at a row's beginning."""
    if lm.tokenizer is None:
        return {}, {}
    used = [contexts.ids] if written is None else [contexts.ids, written.promoted, written.suppressed]
    ids = np.unique(np.concatenate([np.unique(some) for some in used])).tolist()
    texts = dict(zip(ids, own_texts(lm.tokenizer, ids), strict=True))
    begin = np.unique(contexts.ids[contexts.offsets[:-1]]).tolist()
    firsts = dict(zip(begin, first_texts(lm.tokenizer, begin), strict=True))
    return texts, {i: text for i, text in firsts.items() if text != texts[i]}


def _chosen(latents: Sequence[int], sae: SAE, codes: Codes) -> Chosen:
    """UnweaveError for latents that are not ascending, that do not exist, or that the codes are not of."""
    which = np.asarray(latents, dtype=np.int64)
    inside = len(which) > 0 and which[0] >= 0 and which[-1] < sae.d_sae and bool((np.diff(which) > 0).all())
    if not inside or codes.n_latents != len(which):
        what = f"records of {len(which)} latents from codes of {codes.n_latents} cannot be made"
        remedy = f"give different latents of 0 to {sae.d_sae - 1} in ascending order, and codes of these alone"
        raise UnweaveError(what, where="records", remedy=remedy)
    return Chosen(which, sae.d_sae)
