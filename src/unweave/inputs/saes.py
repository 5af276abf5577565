"""The autoencoders (or neurons) and the model that a circuit is asked for in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unweave.core.errors import UnweaveError
from unweave.core.files import printable
from unweave.core.site import Site, matching
from unweave.core.spec import digest
from unweave.inputs.inputs import load_lm, sae_digest, stamp
from unweave.inputs.spec import OfSAEsSpec
from unweave.lm.model import LM
from unweave.sae.module import SAE
from unweave.sae.neurons import neurons


@dataclass(frozen=True)
class Opened:
    """What ``open_saes`` finds. ``names`` says where each SAE came from; ``record`` belongs in the run's result."""

    lm: LM
    saes: dict[Site, SAE]
    names: dict[Site, str]
    record: dict[str, Any]


def split_name(written: str) -> tuple[Site | None, str]:
    """(site, name) of what was written as SITE=NAME, (None, name) of a name alone, which may hold "=" as well: what is
    there under the whole name is meant. UnweaveError where neither is."""
    left, equals, right = written.partition("=")
    if not equals or os.path.exists(written):
        return None, written
    try:
        site = Site.parse(left.strip())
    except UnweaveError:
        raise UnweaveError(
            "there is no such folder",
            where=printable(written),
            remedy=f"check the path; in SITE=NAME the site comes first, and {printable(left)!r} is none",
        ) from None
    if not right.strip():
        raise UnweaveError(f"no autoencoder is named for {site}", where=written, remedy=f"write {site}=FOLDER")
    return site, right.strip()


def found_saes(spec: OfSAEsSpec) -> list[tuple[Site | None, str]]:
    """Every SAE that ``spec.saes`` names, as (site or None where its file names it, name). Folders are looked through.

    Raises UnweaveError for a folder without any.
    """
    found: list[tuple[Site | None, str]] = []
    for written in spec.saes:
        site, name = split_name(written)
        if site is not None:
            found.append((site, name))
            continue
        folder = Path(written)
        inner = sorted(p.parent for p in folder.rglob("cfg.json")) if os.path.isdir(folder) else []
        if not os.path.isdir(folder) or folder in inner or not inner:
            found.append((None, written))
        else:
            found += [(None, str(path)) for path in inner]
    return found


def digest_of(spec: OfSAEsSpec) -> dict[str, str]:
    """The content of everything that is read, for the run's identity."""
    content = [[str(site), sae_digest(name)] for site, name in found_saes(spec)]
    inputs = {"saes": digest(content)} if content else {}
    local = stamp(spec.model) if spec.model else ""
    return inputs | ({"model": local} if local else {})


def open_saes(spec: OfSAEsSpec, lm: LM | None = None) -> Opened:
    """Loads SAEs, and the model where it is not given, and refuses what does not belong together, or two for one site.

    One file may serve several sites.
    """
    loaded: dict[tuple[Site, str], SAE] = {}
    for site, name in found_saes(spec):
        sae = SAE.load(name)
        sae = sae if site is None else sae.at(site)
        if sae.write is None:
            raise UnweaveError("this SAE's file names no site", where=name, remedy=f"write resid_post.9={name}")
        loaded[sae.write, name] = sae
    if lm is None:
        lm = load_lm(*_model_of(spec, loaded), spec.device)
    return _placed(spec, lm, loaded)


def _model_of(spec: OfSAEsSpec, loaded: Mapping[tuple[Site, str], SAE]) -> tuple[str, str]:
    """The model's name and dtype: what is asked for, else what the SAEs were trained on."""
    models = {}
    if not spec.model:
        models = {sae.provenance.get("train", {}).get("model"): name for (_, name), sae in loaded.items()}
    if len(models) > 1 or None in models:
        raise UnweaveError(
            f"the SAEs name several models or none: {', '.join(map(str, models))}",
            where=", ".join(models.values()),
            remedy="name the model with --model",
        )
    model = spec.model or next(iter(models))
    assert model is not None  # the spec's own check: saes, or a model
    dtypes = {sae.provenance.get("train", {}).get("dtype", "float32") for sae in loaded.values()} or {"float32"}
    return model, next(iter(dtypes)) if len(dtypes) == 1 else "float32"


def _placed(spec: OfSAEsSpec, lm: LM, loaded: Mapping[tuple[Site, str], SAE]) -> Opened:
    """The SAEs on the model's device, by site, with neurons at the other sites that were asked for."""
    wanted = {site for pattern in spec.sites for _, site in matching(pattern, lm.sites())}
    saes: dict[Site, SAE] = {}
    names: dict[Site, str] = {}
    accepted: dict[str, Any] = {}
    for (site, name), sae in loaded.items():
        if spec.sites and site not in wanted:
            continue
        if site in saes:
            raise UnweaveError(f"two SAEs are at {site}", where=f"{names[site]}, {name}", remedy="name one per site")
        sae = sae.to(lm.device)
        if spec.accept_mismatch is not None:
            accepted[str(site)] = sae.accept(lm, spec.accept_mismatch)
        else:
            sae.verify(lm)
        saes[site], names[site] = sae, name
    missing = wanted - set(saes)
    if missing:
        there = ", ".join(map(str, sorted(saes)))
        names_of = ", ".join(map(str, sorted(missing)))
        raise UnweaveError(f"no SAE is at {names_of}", where="sites", remedy=f"there are: {there}")
    for _, site in lm.matching(spec.neurons):
        if site in saes:
            raise UnweaveError(f"both an SAE and neurons are asked for at {site}", where="neurons", remedy="name one")
        saes[site], names[site] = neurons(lm, site), f"neurons of {site}"
    record: dict[str, Any] = {"model": lm.name, "model_note": lm.note, "sites": [str(site) for site in sorted(saes)]}
    if accepted:
        record["accepted"] = accepted
    return Opened(lm, dict(sorted(saes.items())), dict(sorted(names.items())), record)
