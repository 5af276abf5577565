"""What the stages share: the model they work in, token stores, activation sources, and the SAE under study."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from unweave.core.dist import SOLO, Group
from unweave.core.errors import UnweaveError
from unweave.core.files import files_under
from unweave.core.run import Run
from unweave.core.site import Site
from unweave.core.spec import Spec, digest
from unweave.data.pack import pack
from unweave.data.spec import DataSpec, StreamSpec
from unweave.data.splits import SplitDocuments
from unweave.data.stream import ActivationSource
from unweave.data.tokens import TokenStore, Unit
from unweave.inputs.spec import UseSpec
from unweave.lm.model import LM
from unweave.lm.template import asks_for_date, chat_date
from unweave.sae.module import SAE

USUAL_TOKENS = 200_000
"""how many tokens latents' records are taken from"""
_CACHE_VERSION = 2
_TOKENS_VERSION = 3
"""of the chunks of activations on disk"""


@dataclass(frozen=True, kw_only=True)
class _TokensQuestion(Spec):
    """What identifies a token store."""

    model: str
    data: DataSpec
    split: str
    tokens: int | None


@lru_cache(maxsize=1)
def load_lm(model: str, dtype: str, device: str | None) -> LM:
    """The model; stages that follow one another in a process share it."""
    return LM.load(model, dtype=dtype, device=device)


def stamp(source: str | Path) -> str:
    """What a local file or folder is now (sizes and times of change); empty for names that are not local."""
    path = Path(os.path.expanduser(source))
    if not os.path.exists(path):  # unlike Path.exists, also False where a name is too long to be one
        return ""
    files = [path] if path.is_file() else files_under(path) if path.is_dir() else []
    return digest([[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files])


def stamps(model: str, data: DataSpec) -> dict[str, str]:
    """Stamps of everything local that a run reads, so that changed files are not mistaken for what they were."""
    found = {"model": stamp(model)} | {source.path: stamp(source.path) for source in data.sources}
    return {name: value for name, value in found.items() if value}


def token_store(
    lm: LM, model: str, data: DataSpec, split: str, tokens: int | None, runs: Path
) -> tuple[TokenStore, Run]:
    """At least ``tokens`` tokens of the train or heldout split (None: as many as the text's spec says), written once
    and shared by every stage that asks."""
    budget, unit = budget_of(data, split, tokens)
    asked = _TokensQuestion(model=model, data=data, split=split, tokens=budget if unit == "tokens" else None)
    fingerprint = lm.tokenizer_fingerprint() or ""
    inputs = stamps(model, data) | {"tokenizer": fingerprint}
    with Run.open(runs, "tokens", asked, version=_TOKENS_VERSION, inputs=inputs) as run:
        if not run.done:
            refuse_long_rows(lm, data.pack.context)
            if lm.tokenizer is None:
                raise UnweaveError("text needs a tokenizer", where=lm.name, remedy="use a model that comes with one")
            meta = {"tokenizer": fingerprint, "split": split, "context": data.pack.context}
            if asks_for_date(lm.tokenizer):
                meta["chat_date"] = str(chat_date())
            rows = pack(documents_of(data, split, run.path), lm.tokenizer, data.pack)
            store = TokenStore.write(run.path / "store", rows, budget, meta, unit=unit)
            run.finish({"rows": store.n_rows, "tokens": store.n_tokens, **store.meta})
    store = TokenStore.open(run.path / "store")
    store.require_tokenizer(fingerprint)
    return store, run


def budget_of(data: DataSpec, split: str, tokens: int | None = None) -> tuple[int, Unit]:
    """How much of a split to store: so many tokens, else what the text's spec says."""
    if tokens is None and split == "heldout" and data.heldout_documents is not None:
        return data.heldout_documents, "documents"
    return tokens or (data.tokens if split == "train" else data.heldout_tokens), "tokens"


def tokens_for_records(data: DataSpec, split: str, wanted: int | None, *, own: bool) -> tuple[int | None, int | None]:
    """How many tokens to store and how many of those to read for latents' records; None: all that the text names.

    Of the SAEs' ``own`` text the whole is stored, as their training did. Raises UnweaveError where it is shorter.
    """
    there = data.tokens if split == "train" else data.heldout_tokens
    if split == "heldout" and data.heldout_documents is not None:
        return (None if own else wanted), wanted
    read = min(USUAL_TOKENS, there) if wanted is None else wanted
    if own and read > there:
        raise UnweaveError(
            f"{read:,} tokens were asked for, the SAE's text has {there:,} ({split})",
            where="tokens",
            remedy="ask for fewer, or name more text with --data.tokens and --data.sources",
        )
    return (there if own else read), read


def refuse_long_rows(lm: LM, context: int) -> None:
    """Raises UnweaveError for rows of more tokens than the model has positions."""
    limit = getattr(lm.model.config, "max_position_embeddings", None)
    if limit is not None and context > limit:
        raise UnweaveError(
            f"rows of {context} tokens are longer than the {limit} positions of the model",
            where="data.pack.context",
            remedy=f"use at most {limit}",
        )


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
    """Activations of a token store, cached under ``runs`` unless told otherwise."""
    excluded = lm.special_ids if stream.special_tokens == "exclude" else ()
    asked = [[str(s) for s in sites], dtype, stream.chunk_tokens, list(excluded), stream.nonfinite]
    identity = digest([_CACHE_VERSION, store_run.digest, *asked])
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


def sae_digest(name: str | Path) -> str:
    """Twelve digits over an SAE: over the files of a folder of ours, else over what was read, whatever its format."""
    files = [Path(name) / file for file in ("cfg.json", "sae_weights.safetensors")]
    if not all(map(os.path.isfile, files)):
        return SAE.load(name).digest()[:12]
    hashed = hashlib.sha256()
    for path in files:
        hashed.update(path.read_bytes())
    return hashed.hexdigest()[:12]


def open_sae(spec: UseSpec) -> tuple[LM, SAE, dict[str, Any]]:
    """The SAE, the model to use it in, and what to record about that; refused where they do not belong together."""
    sae = SAE.load(spec.sae)
    asked = sae.provenance.get("train", {})
    model = spec.model or asked.get("model")
    if model is None:
        raise UnweaveError(
            "this SAE does not say which model it belongs to", where=str(spec.sae), remedy="name it with --model"
        )
    lm = load_lm(model, asked.get("dtype", "float32"), spec.device)
    sae = sae.to(lm.device)
    record: dict[str, Any] = {"model": lm.name, "model_note": lm.note}
    if spec.accept_mismatch is not None:
        record["accepted"] = sae.accept(lm, spec.accept_mismatch)
    else:
        sae.verify(lm)
    return lm, sae, record


def data_of(sae: SAE, data: DataSpec | None) -> DataSpec:
    """The text asked for, or the SAE's own."""
    if data is not None:
        return data
    asked: Mapping[str, Any] = sae.provenance.get("train", {})
    if "data" not in asked:
        raise UnweaveError("this SAE does not say which text it was trained on", remedy="name some with --data.sources")
    return DataSpec.from_dict(asked["data"])


def stream_of(sae: SAE) -> StreamSpec:
    """How the SAE's activations were harvested."""
    return StreamSpec.from_dict(sae.provenance.get("train", {}).get("stream", {}))
