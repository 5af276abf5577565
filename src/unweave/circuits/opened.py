"""A circuit on disk, and the question that it answers."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from unweave.circuits.graph import Circuit
from unweave.core.contents import content_of
from unweave.core.errors import UnweaveError
from unweave.core.files import printable, read_json
from unweave.core.run import Run
from unweave.inputs.saes import split_name
from unweave.inputs.spec import OfSAEsSpec

FILE = "circuit.safetensors"


@dataclass(frozen=True)
class StoredCircuit:
    """A circuit on disk: its file, and the question that it answers, where its run says so."""

    path: Path
    asked: dict[str, Any]

    @cached_property
    def circuit(self) -> Circuit:
        """What the file holds. UnweaveError where it is damaged."""
        return Circuit.load(self.path)

    def saes_spec(
        self, saes: tuple[str, ...] = (), model: str | None = None, device: str | None = None
    ) -> OfSAEsSpec | None:
        """The question about SAEs that the circuit's run asked, with what is given in its place; None where
        neither says where they are."""
        known = {f.name: self.asked[f.name] for f in dataclasses.fields(OfSAEsSpec) if f.name in self.asked}
        overrides = {"saes": list(saes), "model": model, "device": device}
        values = known | {name: value for name, value in overrides.items() if value}
        if not (values.get("saes") or values.get("neurons")):
            return None
        spec = OfSAEsSpec.from_dict(values, where=str(self.path.parent / "spec.json"))
        moved = saes or tuple(_moved(name, self.path.parent) for name in spec.saes)
        return dataclasses.replace(spec, saes=moved)


def _moved(name: str, folder: Path) -> str:
    """A relative path of a run's question as it is from here: the run was perhaps asked from another folder."""
    for above in (Path(), *folder.resolve().parents):
        if os.path.exists(above / name):
            return str(above / name)
    try:
        site, rest = split_name(name)
    except UnweaveError:
        return name
    return name if site is None else f"{site}={_moved(rest, folder)}"


def content_of_circuit(place: Path) -> str:
    """Twelve digits over the circuit's file. UnweaveError without one."""
    return content_of(_file_of(place))


def _file_of(place: Path) -> Path:
    path = place / FILE if os.path.isdir(place) else place
    if not os.path.isfile(path):
        remedy = "give the folder that `unweave circuit find` printed, or a circuit.safetensors"
        raise UnweaveError("there is no circuit here", where=printable(place), remedy=remedy)
    return path


def open_circuit(place: Path) -> StoredCircuit:
    """The circuit of a run's folder, or of a file; it is read on first use.

    UnweaveError without one, and for a damaged run.
    """
    path = _file_of(place)
    folder = path.parent
    if not (folder / "DONE").exists():  # a file on its own, or of a search that goes on; what is beside it is of use
        return StoredCircuit(path, _asked(folder / "spec.json"))
    run = Run.at(folder)
    if run.problem is not None:
        raise UnweaveError(
            f"damaged: {run.problem}", where=str(folder), remedy=f"delete {folder} and run the same command again"
        )
    return StoredCircuit(run.file(path.name), run.spec)


def _asked(path: Path) -> dict[str, Any]:
    """The Spec's fields in spec.json, where there is one."""
    values = read_json(path) if path.is_file() else {}
    question = values.get("spec", {}) if isinstance(values, dict) else None
    if not isinstance(question, dict):
        raise UnweaveError("damaged: it does not say what was asked", where=str(path), remedy="delete this file")
    return question
