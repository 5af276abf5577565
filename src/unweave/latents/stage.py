"""What latents respond to and write: the records of one SAE, or of many from one pass of the model.

SAEs that share text and stream share the pass. Their training's cache of activations serves again, here or beside its
run; otherwise the model runs once over the text, for the sites that are read, and no activations go to disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from unweave.core.errors import UnweaveError
from unweave.core.pieces import Pieces
from unweave.core.run import Run
from unweave.core.site import Site
from unweave.core.spec import digest
from unweave.core.stage import Context, stage
from unweave.data.spec import DataSpec, StreamSpec
from unweave.data.stream import ActivationSource
from unweave.data.tokens import TokenStore
from unweave.inputs.identity import texts_of
from unweave.inputs.inputs import activation_source, data_of, token_store, tokens_for_records
from unweave.inputs.saes import Opened, open_one, open_saes
from unweave.inputs.spec import OfSAEsSpec, UseSpec
from unweave.latents.annotations import name_of, parse_latents
from unweave.latents.collect import Chosen, encode, read_site
from unweave.latents.records import Records
from unweave.latents.result import LatentRecords, SiteRecords
from unweave.latents.spec import LatentsSpec

RECORDS = "records"


def _texts(spec: LatentsSpec, _handle: object) -> dict[str, str]:
    asked = spec if spec.sae is None else OfSAEsSpec(saes=(str(spec.sae),), model=spec.model)
    return texts_of(asked, spec.data)


@stage("latents", version=4, also=_texts)
def run(spec: LatentsSpec, ctx: Context) -> LatentRecords:
    """Records of all latents, or of those named, in the run's ``records/``; of several SAEs in a folder for each.

    The handle is the SAEs where they are open already. UnweaveError for sites or latents that are not there, and for
    more tokens than the text has.
    """
    opened: Opened = ctx.handle or _opened(spec)
    chosen = _chosen(spec, opened)
    rows = [
        row
        for number, group in enumerate(_groups(opened, sorted(chosen), spec.data))
        for row in _of_group(spec, ctx, opened, group, chosen, Pieces(ctx.path / "parts" / str(number)))
    ]
    return LatentRecords(opened.subject, tuple(sorted(rows, key=lambda row: row.site)))


def _opened(spec: LatentsSpec) -> Opened:
    if spec.sae is None:
        return open_saes(spec)
    return open_one(UseSpec(sae=spec.sae, model=spec.model, device=spec.device, accept_mismatch=spec.accept_mismatch))


def load(run: Run[LatentRecords]) -> Records:
    """The records of a finished run about one SAE."""
    (only,) = load_all(run).values()
    return only


def load_all(run: Run[LatentRecords]) -> dict[Site, Records]:
    """The records of a finished run, by site."""
    return {row.site: Records.load(run.folder(str(row.records))) for row in run.result.saes}


def records_of(
    opened: Opened,
    data: DataSpec | None,
    tokens: int | None,
    runs: Path,
    latents: Mapping[Site, Sequence[int]] | None = None,
    *,
    split: Literal["train", "heldout"] = "train",
    seed: int = 0,
) -> dict[Site, Records]:
    """The records of all latents of SAEs that are open, or of those chosen; only sites with latents chosen are in it.

    ``data`` None: the SAEs' own training text. ``tokens`` None: 200,000, or all there are. What is finished is the
    run that ``unweave latents`` would make. UnweaveError as ``run``.
    """
    if latents is not None and not any(len(some) for some in latents.values()):
        return {}
    refuse_absent(latents or {}, opened)
    asked = opened.asked
    named = () if latents is None else tuple(name_of(s, j) for s in sorted(latents) for j in sorted({*latents[s]}))
    spec = LatentsSpec(
        saes=asked.saes,
        neurons=asked.neurons,
        sites=asked.sites,
        model=asked.model,
        device=asked.device,
        accept_mismatch=asked.accept_mismatch,
        data=data,
        split=split,
        tokens=tokens,
        latents=named,
        seed=seed,
    )
    return load_all(run(spec, runs, opened))


def _chosen(spec: LatentsSpec, opened: Opened) -> dict[Site, list[int] | None]:
    """{site: ascending latents, or None for all}; sites without any are left out."""
    if not spec.latents:
        return dict.fromkeys(opened.saes)
    chosen: dict[Site, list[int]] = {}
    for site, latent in sorted(set(parse_latents(spec.latents, opened.saes))):
        chosen.setdefault(site, []).append(latent)
    refuse_absent(chosen, opened)
    return dict(chosen)


def refuse_absent(latents: Mapping[Site, Sequence[int]], opened: Opened) -> None:
    """Raises UnweaveError for a latent that its SAE does not have, and for a site without one."""
    for site, some in latents.items():
        if site not in opened.saes:
            raise UnweaveError(f"no SAE is at {site}", where="latents", remedy="name the one of that site too")
        last = opened.saes[site].d_sae - 1
        for wrong in (latent for latent in some if not 0 <= latent <= last):
            raise UnweaveError(f"latent {wrong} does not exist at {site}", where="latents", remedy=f"use 0 to {last}")


# -- SAEs that share a pass -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """SAEs that were trained on the same text and stream."""

    data: DataSpec
    stream: StreamSpec
    trained_at: tuple[str, ...]
    """the sites of the training, as it was asked for them"""
    sites: tuple[Site, ...]


def _groups(opened: Opened, sites: Sequence[Site], data: DataSpec | None) -> list[_Group]:
    """Neurons, and SAEs that do not name a text, go with the first that does."""
    asked = {site: opened.saes[site].provenance.get("train", {}) for site in sites}
    known = [about for about in asked.values() if "data" in about]
    groups: dict[str, _Group] = {}
    for site in sites:
        about = asked[site] if data is not None or "data" in asked[site] or not known else known[0]
        own = DataSpec.from_dict(about["data"]) if "data" in about else None
        text = data or own or data_of(opened.saes[site], None)
        group = _Group(text, StreamSpec.from_dict(about.get("stream", {})), tuple(about.get("sites", ())), (site,))
        key = digest([text.to_dict(result_only=True), group.stream.to_dict(result_only=True), group.trained_at])
        groups[key] = replace(groups[key], sites=(*groups[key].sites, site)) if key in groups else group
    return list(groups.values())


def _of_group(
    spec: LatentsSpec, ctx: Context, opened: Opened, group: _Group, chosen: Chosen, pieces: Pieces
) -> list[SiteRecords]:
    stored, tokens = tokens_for_records(group.data, spec.split, spec.tokens, own=spec.data is None)
    store, store_run = token_store(opened.lm, opened.model, group.data, spec.split, stored, ctx.runs)
    source = _source(opened, group, store, store_run, ctx.runs)
    saes = {site: opened.saes[site] for site in group.sites}
    encoded = encode(opened.lm, saes, source, store, chosen=chosen, max_tokens=tokens, pieces=pieces)
    rows = []
    for site in group.sites:
        folder = Path(RECORDS) if len(chosen) == 1 else Path(RECORDS) / str(site)
        if not (ctx.path / folder / "records.json").exists():
            encoded.records(site, replace(spec.contexts, seed=spec.seed)).save(ctx.path / folder)
        records = Records.load(ctx.path / folder)
        alive = int((records.count > 0).sum())
        rows.append(SiteRecords(site, records.n_tokens, len(records), alive, records.special_share, folder))
    return rows


def _source(opened: Opened, group: _Group, store: TokenStore, store_run: Run[Any], runs: Path) -> ActivationSource:
    """The training's activations where they are on disk, else those that are read here, uncached."""
    lm, dtype = opened.lm, str(opened.lm.dtype).removeprefix("torch.")
    needed = {lm.site(read_site(opened.saes[site])) for site in group.sites}
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
    """Where the training's activations may lie: here, or beside the runs that the SAEs are in."""
    homes = {runs: None}
    for site in group.sites:
        above = Path(opened.names[site]).resolve().parents
        homes |= dict.fromkeys(folder.parent for folder in above if (folder / "spec.json").is_file())
    return list(homes)
