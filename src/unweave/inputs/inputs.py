"""What the stages share: the model they work in, token stores, activation sources, and the SAE under study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from unweave.core.dist import SOLO, Group
from unweave.core.errors import UnweaveError
from unweave.core.result import Result
from unweave.core.run import Run
from unweave.core.site import Site
from unweave.core.spec import Spec, digest
from unweave.core.stage import Context, stage
from unweave.data.pack import pack
from unweave.data.spec import DataSpec, ModelRef, StreamSpec
from unweave.data.splits import SplitDocuments
from unweave.data.stream import ActivationSource
from unweave.data.tokens import TokenStore, Unit
from unweave.lm.model import LM
from unweave.lm.template import asks_for_date, chat_date
from unweave.sae.module import SAE

USUAL_TOKENS = 200_000
"""how many tokens latents' records are taken from"""
_CACHE_VERSION = 2
"""of the chunks of activations on disk"""


@dataclass(frozen=True, kw_only=True)
class TokensSpec(Spec):
    """Which text becomes a token store, by which model's tokenizer."""

    model: ModelRef
    data: DataSpec
    split: str
    """train or heldout"""
    tokens: int | None
    """how many; None: as many documents as the text's spec says"""


@dataclass(frozen=True)
class StoredTokens(Result):
    """A token store."""

    n_rows: int
    n_tokens: int
    chat_date: str | None
    """the date that the template wrote, where it writes one"""
    store: Path


def _tokenizer(spec: TokensSpec, lm: LM) -> dict[str, str]:
    return {"tokenizer": lm.tokenizer_fingerprint() or ""}


@stage("tokens", version=4, also=_tokenizer)
def tokenised(spec: TokensSpec, ctx: Context) -> StoredTokens:
    """The store of a split's tokens; the handle is the model, of which only the tokenizer is used."""
    lm, data = ctx.handle, spec.data
    refuse_long_rows(lm, data.pack.context)
    if lm.tokenizer is None:
        raise UnweaveError("text needs a tokenizer", where=lm.name, remedy="use a model that comes with one")
    meta = {"tokenizer": ctx.inputs["tokenizer"], "split": spec.split, "context": data.pack.context}
    if asks_for_date(lm.tokenizer):
        meta["chat_date"] = str(chat_date())
    rows = pack(documents_of(data, spec.split, ctx.path), lm.tokenizer, data.pack)
    budget, unit = budget_of(data, spec.split, spec.tokens)
    store = TokenStore.write(ctx.path / "store", rows, budget, meta, unit=unit)
    return StoredTokens(store.n_rows, store.n_tokens, meta.get("chat_date"), Path("store"))


@lru_cache(maxsize=1)
def load_lm(model: str, dtype: str, device: str | None) -> LM:
    """The model; stages that follow one another in a process share it."""
    return LM.load(model, dtype=dtype, device=device)


def token_store(
    lm: LM, model: str, data: DataSpec, split: str, tokens: int | None, runs: Path
) -> tuple[TokenStore, Run[StoredTokens]]:
    """At least ``tokens`` tokens of the train or heldout split (None: as many as the text's spec says), written once
    and shared by every stage that asks."""
    budget, unit = budget_of(data, split, tokens)
    spec = TokensSpec(model=model, data=data, split=split, tokens=budget if unit == "tokens" else None)
    run = tokenised(spec, runs, lm)
    store = TokenStore.open(run.path / "store")
    store.require_tokenizer(lm.tokenizer_fingerprint() or "")
    return store, run


def budget_of(data: DataSpec, split: str, tokens: int | None = None) -> tuple[int, Unit]:
    """How much of a split to store: ``tokens``, else what the text's spec says."""
    if tokens is None and split == "heldout" and data.heldout_documents is not None:
        return data.heldout_documents, "documents"
    return tokens or (data.tokens if split == "train" else data.heldout_tokens), "tokens"


def tokens_for_records(data: DataSpec, split: str, tokens: int | None, *, own: bool) -> tuple[int | None, int | None]:
    """How many tokens to store and how many of those to read for latents' records; None: all that the text names.

    Of the SAEs' ``own`` text the whole is stored, as their training did. Raises UnweaveError where it is shorter.
    """
    there = data.tokens if split == "train" else data.heldout_tokens
    if split == "heldout" and data.heldout_documents is not None:
        return (None if own else tokens), tokens
    read = min(USUAL_TOKENS, there) if tokens is None else tokens
    if own and read > there:
        what = f"{read:,} tokens were asked for, the SAE's text has {there:,} ({split})"
        remedy = "ask for fewer, or name more text with --data.tokens and --data.sources"
        raise UnweaveError(what, where="tokens", remedy=remedy)
    return (there if own else read), read


def refuse_long_rows(lm: LM, context: int) -> None:
    """Raises UnweaveError for rows of more tokens than the model has positions."""
    limit = getattr(lm.model.config, "max_position_embeddings", None)
    if limit is not None and context > limit:
        what = f"rows of {context} tokens are longer than the {limit} positions of the model"
        raise UnweaveError(what, where="data.pack.context", remedy=f"use at most {limit}")


def documents_of(data: DataSpec, split: str, folder: Path | None = None) -> SplitDocuments:
    """The documents of one split, train or heldout; what deduplication must put on disk lies in ``folder``."""
    return SplitDocuments(
        data.sources,
        split,
        heldout=data.heldout,
        seed=data.seed,
        dedup=data.dedup,
        memory_bytes=data.dedup_memory_mb << 20,
        folder=folder,
        part=(0.0, 1.0) if split == "train" else data.heldout_part,
    )


def activation_source(
    lm: LM,
    store: TokenStore,
    store_run: Run,
    sites: list[Site],
    stream: StreamSpec,
    dtype: str,
    runs: Path,
    group: Group = SOLO,
) -> ActivationSource:
    """Activations of a token store, cached under ``runs`` unless ``stream.cache`` is off."""
    excluded = lm.special_ids if stream.special_tokens == "exclude" else ()
    settings = [[str(s) for s in sites], dtype, stream.chunk_tokens, list(excluded), stream.nonfinite]
    identity = digest([_CACHE_VERSION, store_run.digest, *settings])
    cache = Path(runs).resolve() / f"activations-{identity}" if stream.cache else None
    return ActivationSource(
        lm,
        store,
        sites,
        chunk_tokens=stream.chunk_tokens,
        batch_tokens=stream.batch_tokens,
        exclude_ids=excluded,
        cache=cache,
        nonfinite=stream.nonfinite,
        group=group,
    )


def data_of(sae: SAE, data: DataSpec | None) -> DataSpec:
    """The text asked for, or the SAE's own."""
    if data is not None:
        return data
    training: Mapping[str, Any] = sae.provenance.get("train", {})
    if "data" not in training:
        raise UnweaveError("this SAE does not say which text it was trained on", remedy="name some with --data.sources")
    return DataSpec.from_dict(training["data"])
