"""Which latents `unweave annotate` asks about, and what it shows of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from unweave.circuits.about import Judged
from unweave.circuits.graph import means, strongest
from unweave.circuits.opened import FILE, StoredCircuit, open_circuit
from unweave.circuits.picture import threshold_for
from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.inputs.saes import Opened, open_saes
from unweave.inputs.spec import OfSAEsSpec
from unweave.latents import annotations as notes
from unweave.latents.annotations import Annotation, name_of
from unweave.latents.stage import records_of
from unweave.methods.annotate.annotating import Question, in_circuit

Effects = Sequence[tuple[int | None, float]]


@dataclass(frozen=True)
class Asked:
    """What the command was asked: a circuit, or SAEs (``saes``) and their ``latents``, numbers where there is
    one SAE, else names such as resid_post.24/3036."""

    target: Path | None
    saes: tuple[str, ...] = ()
    latents: tuple[str, ...] = ()
    threshold: float | None = None
    top: int | None = None
    tokens: int | None = None
    model: str | None = None
    device: str | None = None
    again: bool = False
    """Ask about latents with answers too."""


def questions(asked: Asked, out: Path, runs: Path) -> tuple[list[Question], int]:
    """The latents to ask about, with their records, and how many were passed over because ``out`` has answers.

    UnweaveError for a circuit or latents that are not there. Opens no model where nothing is left to ask.
    """
    stored = _circuit(asked)
    spec = _saes(asked, stored)
    opened: Opened | None = None
    if stored is not None:
        wanted = _of_circuit(asked, stored)
    else:
        opened = open_saes(spec)
        wanted = _of_names(asked, opened)
    said = notes.load(out, [site for site, _ in wanted]) if out.exists() else {}
    left = [key for key in wanted if asked.again or name_of(*key) not in said]
    known = len(wanted) - len(left)
    if not left:
        return [], known
    opened = opened or open_saes(spec)
    _check(said, opened, out)
    chosen: dict[Site, list[int]] = {}
    for site, latent in left:
        chosen.setdefault(site, []).append(latent)
    records = records_of(opened, None, asked.tokens, runs, chosen)
    digests = {site: opened.saes[site].digest() for site in chosen}
    made = [
        Question(name_of(site, latent), digests[site], records[site].latent(latent), tuple(wanted[site, latent]))
        for site, latent in left
    ]
    return made, known


def _circuit(asked: Asked) -> StoredCircuit | None:
    """The circuit, where the target is one; None where SAEs are named instead."""
    if asked.target is None:
        if not asked.saes:
            remedy = "name a circuit's run, or --saes and --latents"
            raise UnweaveError("there is nothing to annotate", where="unweave annotate", remedy=remedy)
        return None
    if asked.latents:
        raise UnweaveError(
            "a circuit and latents are both named", where="--latents", remedy="give --saes and --latents, or a circuit"
        )
    if os.path.isdir(asked.target) and not os.path.isfile(asked.target / FILE) and list(asked.target.rglob("cfg.json")):
        remedy = f"unweave annotate --saes {asked.target} --latents 12 34"
        raise UnweaveError("this is an SAE, not a circuit", where=str(asked.target), remedy=remedy)
    return open_circuit(asked.target)


def _saes(asked: Asked, stored: StoredCircuit | None) -> OfSAEsSpec:
    if stored is None:
        return OfSAEsSpec(saes=asked.saes, model=asked.model, device=asked.device)
    spec = stored.saes_spec(asked.saes, asked.model, asked.device)
    if spec is None:
        remedy = "name them with --saes"
        raise UnweaveError("this circuit does not say where its SAEs are", where=str(stored.path), remedy=remedy)
    return spec


def _of_circuit(asked: Asked, stored: StoredCircuit) -> Mapping[tuple[Site, int], Effects]:
    """Latents above the threshold, strongest first."""
    if stored.circuit.about.of == "classifier":
        return _of_classifier(asked, stored)
    threshold = threshold_for(stored.circuit) if asked.threshold is None else asked.threshold
    latents = in_circuit(stored.circuit.above(threshold))
    if not latents:
        raise UnweaveError(
            f"no latent's effect is above {threshold:g}", where=str(stored.path), remedy="give a lower --threshold"
        )
    return dict(list(latents.items())[: asked.top])


def _of_classifier(asked: Asked, stored: StoredCircuit) -> Mapping[tuple[Site, int], Effects]:
    """The latents of a classifier's circuit that its run judges: those that support the label."""
    if stored.circuit.about.neurons:
        remedy = "annotate the circuit-0.safetensors beside it"
        raise UnweaveError("this circuit is of neurons, which have no contexts", where=str(stored.path), remedy=remedy)
    judged = stored.circuit.about.judged or Judged()
    threshold = judged.threshold if asked.threshold is None else asked.threshold
    strong = strongest(means(stored.circuit), threshold=threshold, top=asked.top or judged.top)
    if not strong:
        what = f"no latent supports the label by more than {threshold:g}"
        raise UnweaveError(what, where=str(stored.path), remedy="give a lower --threshold")
    return {(one.site, one.latent): ((None, one.effect),) for one in strong}


def _of_names(asked: Asked, opened: Opened) -> Mapping[tuple[Site, int], Effects]:
    if asked.threshold is not None:
        raise UnweaveError("a threshold needs a circuit's effects", where="--threshold", remedy="name latents instead")
    if not asked.latents:
        raise UnweaveError("no latents are named", where="--latents", remedy="write --latents 12 34")
    wanted = list(dict.fromkeys(notes.parse_latents(asked.latents, opened.saes)))
    return dict.fromkeys(wanted[: asked.top], ())


def _check(said: Mapping[str, Annotation], opened: Opened, out: Path) -> None:
    """Before anything is asked: the file's answers are about these SAEs."""
    named = {annotation.site for annotation in said.values()} & set(opened.saes)
    notes.refuse_strangers(said, {site: opened.saes[site].digest() for site in named}, str(out))
