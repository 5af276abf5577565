"""The SAEs that training goes on with: which one is a member's, what identifies them, and whether they belong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.core.spec import digest
from unweave.inputs import identity
from unweave.lm.model import LM
from unweave.methods.train import fit
from unweave.methods.train.members import Member, sites_named
from unweave.methods.train.spec import TrainSpec
from unweave.sae.module import SAE


def inputs(spec: TrainSpec, _handle: object = None) -> dict[str, str]:
    """What decides about the SAEs to start from besides their content, for the run's digest."""
    return {} if spec.start is None or spec.accept_mismatch is None else {"accept_mismatch": spec.accept_mismatch}


def content(start: Path) -> str:
    """Twelve digits over every SAE folder below, or the one SAE of whatever format."""
    folders = sorted(path.parent for path in Path(start).rglob("cfg.json")) if os.path.isdir(start) else []
    if folders:
        return digest([[str(folder.relative_to(start)), identity.sae(folder)] for folder in folders])
    try:
        return identity.sae(start)
    except UnweaveError as error:
        what = f"there is no SAE to start from: {error.what}"
        remedy = error.remedy or "give an SAE, or a run's sae/"
        raise UnweaveError(what, where=error.where or str(start), remedy=remedy) from error


def fitting(
    spec: TrainSpec, lm: LM, every: list[Member], own: list[Member]
) -> dict[str, tuple[SAE, dict[str, Any] | None]]:
    """The SAEs that this process's ``own`` members go on with, by name, each as ``opened``.

    Raises UnweaveError for what the training of any member would refuse, from the spec, the model and these SAEs alone:
    no text is read for it.
    """
    starts = {}
    for member in every:
        sae, accepted = opened(spec, lm, member.name, member.read, member.write)
        fit.latents(member.spec, *member.of({site: lm.width(site) for site in (member.read, member.write)}), sae)
        if sae is not None and member in own:
            starts[member.name] = sae, accepted
    return starts


def opened(spec: TrainSpec, lm: LM, name: str, read: Site, write: Site) -> tuple[SAE | None, dict[str, Any] | None]:
    """The SAE that the member ``name`` goes on with, on the model's device, and what was accepted about it.

    One whose file names no site is taken to be of the member's. Raises UnweaveError for another site's, and for
    another model's unless ``accept_mismatch`` gives a reason.
    """
    if spec.start is None:
        return None, None
    folder = Path(spec.start)
    inside = folder / name
    sae = SAE.load(folder if (folder / "cfg.json").exists() or not inside.exists() else inside).to(lm.device)
    if sae.read is None:
        sae.at(read, write)
    if (sae.read, sae.write) != (read, write):
        own = sites_named(sae.read, sae.write)
        what = f"the SAE to start from is of {own}, not of {sites_named(read, write)}"
        raise UnweaveError(what, where=name, remedy=f"name its own with --sites {own!r}, or give the SAE of this one")
    if spec.accept_mismatch is None:
        sae.verify(lm)
        return sae, None
    return sae, sae.accept(lm, spec.accept_mismatch)
