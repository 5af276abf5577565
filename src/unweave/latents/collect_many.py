"""Contexts of latents of many autoencoders from one pass over activations.

1. Autoencoders that share text and stream share the pass. Their training's cache of activations serves again, here
   or beside its run; otherwise the model runs once over the text, for the sites that are read, and nothing is cached.
2. Chunk by chunk every autoencoder encodes, and its sparse codes go to disk: what is there is not computed again.
3. Site by site the codes become records, so that memory holds the codes of one autoencoder at a time.

Where only some latents are asked for, only their columns are computed and kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from unweave.core.codes import Codes
from unweave.core.errors import UnweaveError
from unweave.core.memory import refuse_if_memory
from unweave.core.progress import task
from unweave.core.run import Run, atomic_write
from unweave.core.site import Site
from unweave.core.spec import Spec, digest
from unweave.data.spec import DataSpec, StreamSpec
from unweave.data.stream import ActivationSource
from unweave.data.tokens import TokenStore
from unweave.inputs.identity import provenance_of
from unweave.inputs.inputs import activation_source, data_of, stamps, token_store, tokens_for_records
from unweave.inputs.saes import Opened, named_saes
from unweave.inputs.spec import OfSAEsSpec
from unweave.latents.records import Records, RecordsSpec, build
from unweave.sae.activations import TopK
from unweave.sae.module import SAE

VERSION = 2
Split = Literal["train", "heldout"]


@dataclass(frozen=True, kw_only=True)
class _RecordsQuestion(Spec):
    """What identifies the records of one group of autoencoders, besides the autoencoders themselves."""

    model: str
    dtype: str
    data: DataSpec
    split: str
    tokens: int | None
    special_tokens: str
    chunk_tokens: int
    nonfinite: str
    latents: str
    """a digest of the latents chosen; empty for all"""
    seed: int


@dataclass(frozen=True)
class _Group:
    """Autoencoders that were trained on the same text and stream."""

    data: DataSpec
    stream: StreamSpec
    trained_at: tuple[str, ...]
    """the sites of the training, as it was asked for them"""
    model: str
    sites: tuple[Site, ...]


def records_of(
    opened: Opened,
    data: DataSpec | None,
    tokens: int | None,
    runs: Path,
    latents: Mapping[Site, Sequence[int]] | None = None,
    *,
    split: Split = "train",
    model: str | None = None,
    seed: int = 0,
) -> dict[Site, Records]:
    """The records of all latents, or of those chosen, {site: Records}; only sites with latents chosen are in it.

    ``data`` None: the autoencoders' own training text. ``tokens`` None: 200,000, or all there are. ``model`` is the
    name that ``opened`` was opened by, where that was not the training's. What is finished lies in runs
    ``circuit-records-...`` below ``runs`` and is found again. UnweaveError for sites or latents that are not there,
    and for more tokens than the text has.
    """
    chosen = _chosen(opened, latents)
    found: dict[Site, Records] = {}
    for group in _groups(opened, sorted(chosen), data, model):
        found |= _of_group(opened, group, chosen, (data is not None, split, tokens, seed), runs)
    return dict(sorted(found.items()))


def text_stamps(spec: OfSAEsSpec, data: DataSpec | None) -> dict[str, str]:
    """Stamps of what is local of the model and of the text that records are taken from: ``data``, or every training's.

    For the identity of runs that collect records, without loading the model.
    """
    if data is not None and spec.model is not None:
        return stamps(spec.model, data)
    found: dict[str, str] = {}
    for _, name in named_saes(spec.saes):
        told = provenance_of(name).get("train", {})
        model = spec.model or told.get("model")
        if model is not None and (data is not None or "data" in told):
            found |= stamps(model, data if data is not None else DataSpec.from_dict(told["data"]))
    return found


def _chosen(opened: Opened, latents: Mapping[Site, Sequence[int]] | None) -> dict[Site, list[int] | None]:
    """{site: ascending latents, or None for all}; sites without any are left out."""
    if latents is None:
        return dict.fromkeys(opened.saes)
    chosen: dict[Site, list[int] | None] = {}
    for site, some in latents.items():
        if site not in opened.saes:
            raise UnweaveError(f"no autoencoder is at {site}", where="records", remedy="name the one of that site too")
        which = sorted({int(j) for j in some})
        last = opened.saes[site].d_sae - 1
        if which and not 0 <= which[0] <= which[-1] <= last:
            wrong = which[0] if which[0] < 0 else which[-1]
            raise UnweaveError(f"latent {wrong} does not exist at {site}", where="records", remedy=f"use 0 to {last}")
        if which:
            chosen[site] = which
    return chosen


def _groups(opened: Opened, sites: Sequence[Site], data: DataSpec | None, model: str | None) -> list[_Group]:
    """Neurons, and autoencoders that do not name a text, go with the first that does."""
    asked = {site: opened.saes[site].provenance.get("train", {}) for site in sites}
    known = [a for a in asked.values() if "data" in a]
    fallback = known[0] if known else {}
    groups: dict[str, _Group] = {}
    for site in sites:
        about = asked[site] if data is not None or "data" in asked[site] else fallback
        text = data if data is not None else _text_of(opened.saes[site], about)
        stream = StreamSpec.from_dict(about.get("stream", {}))
        name = model or about.get("model") or opened.lm.name
        group = _Group(text, stream, tuple(about.get("sites", ())), name, (site,))
        key = digest([group.data.to_dict(result_only=True), stream.to_dict(result_only=True), group.trained_at, name])
        groups[key] = replace(groups[key], sites=(*groups[key].sites, site)) if key in groups else group
    return list(groups.values())


def _text_of(sae: SAE, about: Mapping[str, Any]) -> DataSpec:
    return DataSpec.from_dict(about["data"]) if "data" in about else data_of(sae, None)


def _of_group(
    opened: Opened,
    group: _Group,
    chosen: Mapping[Site, list[int] | None],
    asked: tuple[bool, Split, int | None, int],
    runs: Path,
) -> dict[Site, Records]:
    other_text, split, wanted, seed = asked
    stored, tokens = tokens_for_records(group.data, split, wanted, own=not other_text)
    some = {str(site): chosen[site] for site in group.sites if chosen[site] is not None}
    question = _RecordsQuestion(
        model=group.model,
        dtype=_dtype(opened),
        data=group.data,
        split=split,
        tokens=tokens,
        special_tokens=group.stream.special_tokens,
        chunk_tokens=group.stream.chunk_tokens,
        nonfinite=group.stream.nonfinite,
        latents=digest(some) if some else "",
        seed=seed,
    )
    inputs = {str(site): opened.saes[site].digest() for site in group.sites} | stamps(group.model, group.data)
    with Run.open(runs, "circuit-records", question, version=VERSION, inputs=inputs) as run:
        places = {site: run.path / "records" / str(site) for site in group.sites}
        left = [site for site in group.sites if not (places[site] / "records.json").exists()]
        if left:
            store, store_run = token_store(opened.lm, group.model, group.data, split, stored, runs)
            source = _source(opened, group, store, store_run, runs)
            parts = _encode(opened, group, chosen, source, store, tokens, run.path / "codes")
            for site in left:
                _build(opened, site, chosen[site], parts, store, seed).save(places[site])
        if not run.done:
            run.finish({"sites": {str(site): str(path.relative_to(run.path)) for site, path in places.items()}})
    return {site: Records.load(path) for site, path in places.items()}


def _dtype(opened: Opened) -> str:
    return str(opened.lm.dtype).removeprefix("torch.")


def _source(opened: Opened, group: _Group, store: TokenStore, store_run: Run, runs: Path) -> ActivationSource:
    """The training's activations where they are on disk, else those that are read here, uncached."""
    lm, dtype = opened.lm, _dtype(opened)
    needed = {lm.site(_read(opened.saes[site])) for site in group.sites}
    try:
        trained = needed | {lm.site(site) for pair in lm.matching(group.trained_at) for site in pair}
    except UnweaveError:  # another model than the training's may lack these sites
        trained = needed
    for home in _homes(opened, group, runs):
        source = activation_source(lm, store, store_run, sorted(trained), group.stream, dtype, home)
        chunks = len(list(source.cache.glob("*.safetensors"))) if source.cache is not None else 0
        if chunks == source.n_chunks or (chunks and home == runs):
            return source
    return activation_source(lm, store, store_run, sorted(needed), replace(group.stream, cache=False), dtype, runs)


def _homes(opened: Opened, group: _Group, runs: Path) -> list[Path]:
    """Where the training's activations may lie: here, or beside the runs that the autoencoders are in."""
    homes = {runs: None}
    for site in group.sites:
        above = Path(opened.names[site]).resolve().parents
        homes |= dict.fromkeys(folder.parent for folder in above if (folder / "spec.json").is_file())
    return list(homes)


def _read(sae: SAE) -> Site:
    assert sae.read is not None  # open_saes refuses an SAE without a site
    return sae.read


def _encode(
    opened: Opened,
    group: _Group,
    chosen: Mapping[Site, list[int] | None],
    source: ActivationSource,
    store: TokenStore,
    tokens: int | None,
    folder: Path,
) -> list[Path]:
    """One file of codes per chunk, until every autoencoder has seen ``tokens`` tokens; None: all there are."""
    from safetensors import safe_open

    for site in group.sites:
        opened.saes[site].verify(opened.lm)
    ids, parts = np.asarray(store.ids), []
    seen = dict.fromkeys(group.sites, 0)
    with task("contexts of latents", total=min(tokens or store.n_tokens, store.n_tokens), unit="tokens") as progress:
        for i in range(source.n_chunks):
            path = folder / f"{i:05d}.safetensors"
            if not path.exists():
                _encode_chunk(opened, group.sites, chosen, source, i, ids, path)
            parts.append(path)
            before = min(seen.values())
            with safe_open(path, "pt") as handle:
                for site in group.sites:
                    seen[site] += handle.get_slice(f"{site}/where").get_shape()[0]
            progress.advance(min(seen.values()) - before)
            if tokens is not None and min(seen.values()) >= tokens:
                break
    if not min(seen.values()):
        raise UnweaveError("there are no tokens to collect records from", remedy="give text with ordinary tokens")
    return parts


def _encode_chunk(
    opened: Opened,
    sites: Sequence[Site],
    chosen: Mapping[Site, list[int] | None],
    source: ActivationSource,
    index: int,
    ids: np.ndarray[Any, Any],
    path: Path,
) -> None:
    from safetensors.torch import save_file

    chunk = source.chunk(index)
    where = chunk.where.cpu()
    token_ids = torch.from_numpy(ids[where.numpy()].astype(np.int64))
    tensors: dict[str, Tensor] = {}
    for site in sites:
        sae = opened.saes[site]
        x = chunk.x[opened.lm.site(_read(sae))]
        keep = sae.policy.keep(x, token_ids.to(x.device))
        codes = _codes(sae, x[keep].to(sae.W_enc.device), chosen[site])
        columns = {"offsets": codes.offsets, "indices": codes.indices.int(), "values": codes.values.float()}
        columns["where"] = where[keep.cpu()]
        tensors |= {f"{site}/{name}": tensor.cpu().contiguous() for name, tensor in columns.items()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary)


def _codes(sae: SAE, x: Tensor, latents: Sequence[int] | None) -> Codes:
    """All latents' codes, or those of a few, for which only their own columns are computed (but for TopK)."""
    if latents is None:
        return sae.codes(x)
    if isinstance(sae.activation, TopK):
        return sae.codes(x).of(torch.tensor(latents))
    with torch.no_grad():
        return Codes.from_dense(sae.subset(latents).encode(x))


def _build(
    opened: Opened, site: Site, latents: Sequence[int] | None, parts: Sequence[Path], store: TokenStore, seed: int
) -> Records:
    from safetensors import SafetensorError, safe_open

    sae = opened.saes[site]
    n_latents = sae.d_sae if latents is None else len(latents)
    codes, places = [], []
    for path in parts:
        try:
            with safe_open(path, "pt") as handle:
                offsets, indices, values, where = (
                    handle.get_tensor(f"{site}/{name}") for name in ("offsets", "indices", "values", "where")
                )
        except (OSError, SafetensorError) as error:
            refuse_if_memory(error, path)
            raise UnweaveError(
                f"codes on disk are damaged: {error}", where=str(path), remedy="delete this file and run again"
            ) from error
        codes.append(Codes(offsets, indices.long(), values, n_latents))
        places.append(where)
    return build(opened.lm, sae, Codes.cat(codes), torch.cat(places), store, RecordsSpec(seed=seed), latents=latents)
