"""The SAEs (or neurons) and the model that a question is about."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from unweave.core.errors import UnweaveError
from unweave.core.files import printable
from unweave.core.site import Site, matching
from unweave.inputs.inputs import load_lm
from unweave.inputs.spec import OfSAEsSpec, UseSpec
from unweave.inputs.subject import SAEInfo, Subject
from unweave.lm.model import LM
from unweave.sae.activations import TopK
from unweave.sae.module import SAE
from unweave.sae.neurons import neurons


@dataclass(frozen=True)
class Opened:
    """A model and the SAEs (or neurons) to use in it, by site; they belong together, or were accepted."""

    lm: LM
    saes: dict[Site, SAE]
    names: dict[Site, str]
    """where each SAE came from"""
    model: str
    """the name that the model was loaded by"""
    accepted: dict[str, Any]
    """what was measured of SAEs of another model, by site"""
    asked: OfSAEsSpec
    """the question that they were opened for"""

    @property
    def sae(self) -> SAE:
        """The only SAE."""
        (only,) = self.saes.values()
        return only

    @cached_property
    def subject(self) -> Subject:
        """What a result says of them."""
        infos = tuple(info_of(sae) for sae in self.saes.values())
        return Subject(self.lm.name, self.lm.note, infos, self.accepted)


def info_of(sae: SAE) -> SAEInfo:
    """An SAE in plain values."""
    kind = sae.provenance.get("train", {}).get("sae", {}).get("kind", sae.kind)
    k = sae.activation.k if isinstance(sae.activation, TopK) else None
    return SAEInfo(sae.write or sae.read, str(kind), sae.d_in, sae.d_sae, k, sae.digest()[:12])


def open_one(spec: UseSpec) -> Opened:
    """The SAE of a question about one, and the model to use it in; refused where they do not belong together."""
    sae, name = SAE.load(spec.sae), str(spec.sae)
    place = sae.write or sae.read  # an SAE that only encodes writes nowhere
    if place is None:
        raise UnweaveError("this SAE's file named no site", where=name, remedy='name it: sae.at("resid_post.9")')
    alone = OfSAEsSpec(saes=(name,), model=spec.model, device=spec.device, accept_mismatch=spec.accept_mismatch)
    return _opened(alone, {(place, name): sae}, None)


def split_name(written: str) -> tuple[Site | None, str]:
    """(site, name) of what was written as SITE=NAME, (None, name) of a name alone, which may hold "=" as well: what is
    there under the whole name is meant. UnweaveError where neither is."""
    left, equals, right = written.partition("=")
    if not equals or os.path.exists(written):
        return None, written
    try:
        site = Site.parse(left.strip())
    except UnweaveError:
        remedy = f"check the path; in SITE=NAME the site comes first, and {printable(left)!r} is not one"
        raise UnweaveError("there is no such folder", where=printable(written), remedy=remedy) from None
    if not right.strip():
        raise UnweaveError(f"no SAE is given for {site}", where=written, remedy=f"write {site}=FOLDER")
    return site, right.strip()


def named_saes(names: Sequence[str]) -> list[tuple[Site | None, str]]:
    """Every SAE that is named, as (site or None where its file names it, name). Folders are looked through.

    Raises UnweaveError for a folder without any.
    """
    named: list[tuple[Site | None, str]] = []
    for written in names:
        site, name = split_name(written)
        if site is not None:
            named.append((site, name))
            continue
        folder = Path(written)
        inner = sorted(p.parent for p in folder.rglob("cfg.json")) if os.path.isdir(folder) else []
        if not os.path.isdir(folder) or folder in inner or not inner:
            named.append((None, written))
        else:
            named += [(None, str(path)) for path in inner]
    return named


def open_saes(spec: OfSAEsSpec, lm: LM | None = None) -> Opened:
    """Loads SAEs, and the model where it is not given, and refuses what does not belong together, or two for one site.

    One file may serve several sites.
    """
    loaded: dict[tuple[Site, str], SAE] = {}
    for site, name in named_saes(spec.saes):
        sae = SAE.load(name)
        sae = sae if site is None else sae.at(site)
        if sae.write is None:
            raise UnweaveError("this SAE's file names no site", where=name, remedy=f"write resid_post.9={name}")
        loaded[sae.write, name] = sae
    return _opened(spec, loaded, lm)


def _model_of(spec: OfSAEsSpec, loaded: Mapping[tuple[Site, str], SAE]) -> tuple[str, str]:
    """The model's name and dtype: the spec's model, else what the SAEs were trained on."""
    trainings = {name: sae.provenance.get("train", {}) for (_, name), sae in loaded.items()}
    models = {training.get("model"): name for name, training in trainings.items()}
    if not spec.model and (len(models) > 1 or None in models):
        what = f"the SAEs name several models or none: {', '.join(map(str, models))}"
        raise UnweaveError(what, where=", ".join(models.values()), remedy="name the model with --model")
    model = spec.model or next(iter(models))
    assert model is not None  # the spec's own check: saes, or a model
    dtypes = {training.get("dtype", "float32") for training in trainings.values()}
    return model, dtypes.pop() if len(dtypes) == 1 else "float32"


def _opened(spec: OfSAEsSpec, loaded: Mapping[tuple[Site, str], SAE], lm: LM | None) -> Opened:
    """The SAEs on the model's device, by site, with neurons at the spec's other sites."""
    if lm is None:
        model, dtype = _model_of(spec, loaded)
        lm = load_lm(model, dtype, spec.device)
    else:
        model = spec.model or lm.name
    chosen = {site for pattern in spec.sites for _, site in matching(pattern, lm.sites())}
    saes: dict[Site, SAE] = {}
    names: dict[Site, str] = {}
    accepted: dict[str, Any] = {}
    for (site, name), sae in loaded.items():
        if spec.sites and site not in chosen:
            continue
        if site in saes:
            raise UnweaveError(f"two SAEs are at {site}", where=f"{names[site]}, {name}", remedy="name one per site")
        saes[site], names[site] = sae.to(lm.device), name
        if spec.accept_mismatch is None:
            sae.verify(lm)
        else:
            accepted[str(site)] = sae.accept(lm, spec.accept_mismatch)
    missing = ", ".join(map(str, sorted(chosen - set(saes))))
    if missing:
        there = ", ".join(map(str, sorted(saes)))
        raise UnweaveError(f"no SAE is at {missing}", where="sites", remedy=f"there are: {there}")
    for _, site in lm.matching(spec.neurons):
        if site in saes:
            raise UnweaveError(f"both an SAE and neurons are asked for at {site}", where="neurons", remedy="name one")
        saes[site], names[site] = neurons(lm, site), f"neurons of {site}"
    return Opened(lm, dict(sorted(saes.items())), dict(sorted(names.items())), model, accepted, spec)
