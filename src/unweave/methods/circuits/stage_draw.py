"""Pictures of a circuit: circuit.svg, circuit.html and circuit.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unweave.circuits.about import Node, by_site
from unweave.circuits.draw import Picture, draw_svg, key_of, to_json
from unweave.circuits.draw_html import draw_html
from unweave.circuits.opened import StoredCircuit, open_circuit
from unweave.circuits.picture import thresholds
from unweave.core.errors import UnweaveError
from unweave.core.refs import contents_of
from unweave.core.site import Site
from unweave.core.stage import Context, stage
from unweave.core.writing import write_file
from unweave.inputs.saes import named_saes, open_saes
from unweave.inputs.spec import OfSAEsSpec
from unweave.latents import annotations as annotated
from unweave.latents.annotations import Annotation
from unweave.latents.records import Records
from unweave.latents.stage import records_of
from unweave.methods.circuits.result import Drawing
from unweave.methods.circuits.spec import CircuitDrawSpec
from unweave.methods.circuits.view import example_words
from unweave.sae.module import SAE

_PICTURE, _PAGE, _LISTING = "circuit.svg", "circuit.html", "circuit.json"


def _stored(spec: CircuitDrawSpec) -> tuple[StoredCircuit, OfSAEsSpec | None]:
    """The circuit, and where its SAEs are, which contexts need."""
    stored = open_circuit(spec.circuit)
    of = stored.saes_spec(spec.saes, spec.model, spec.device)
    if spec.contexts and of is None:
        remedy = "name them with --saes, or leave --contexts out"
        raise UnweaveError("this circuit does not say where its SAEs are", where=str(stored.path), remedy=remedy)
    return stored, of


def _of_contexts(spec: CircuitDrawSpec, _handle: Any) -> dict[str, str]:
    """The SAEs, which contexts depend on."""
    _, of = _stored(spec)
    return contents_of(of) if spec.contexts else {}


@stage("circuit-draw", version=3, also=_of_contexts)
def run(spec: CircuitDrawSpec, ctx: Context) -> Drawing:
    """Writes the three files into the run's folder."""
    stored, of = _stored(spec)
    circuit = stored.circuit
    limits = thresholds(
        circuit, spec.nodes, spec.max_nodes, node_threshold=spec.node_threshold, edge_threshold=spec.edge_threshold
    )
    notes = annotated.load(spec.annotations, circuit.nodes) if spec.annotations is not None else {}
    picture = Picture(
        circuit=circuit, node_threshold=limits.node, edge_threshold=limits.edge, annotations=notes, title=spec.title,
        max_nodes=spec.max_nodes,
    )  # fmt: skip
    selection = picture.selection
    _check(notes, of, str(spec.annotations))
    records = _records(spec, of, notes, selection.nodes, ctx.runs) if spec.contexts and of is not None else None
    texts = {
        _PICTURE: draw_svg(picture),
        _PAGE: draw_html(picture, records, example_words(circuit.about.examples)),
        _LISTING: json.dumps(to_json(picture), ensure_ascii=False, indent=1),
    }
    for name, text in texts.items():
        write_file(ctx.path / name, text)
    return Drawing(
        subject=circuit.about.subject,
        title=picture.name,
        examples=circuit.n_examples,
        nodes=len(selection.nodes),
        errors=sum(node.is_error for node in selection.nodes),
        labelled=sum(key_of(node) in notes for node in selection.nodes),
        edges=len(selection.edges),
        nodes_left_out=selection.nodes_left_out,
        edges_left_out=selection.edges_left_out,
        node_threshold=limits.node,
        edge_threshold=limits.edge,
        why=limits.why,
        wanted=spec.nodes,
        picture=Path(_PICTURE),
        report=Path(_PAGE),
        listing=Path(_LISTING),
    )


def _records(
    spec: CircuitDrawSpec, of: OfSAEsSpec, notes: Mapping[str, Annotation], nodes: Sequence[Node], runs: Path
) -> Mapping[Site, Records]:
    """What the latents among nodes respond to."""
    opened = open_saes(of)
    annotated.refuse_strangers(notes, {s: sae.digest() for s, sae in opened.saes.items()}, str(spec.annotations))
    latents = by_site((node.site, node.slot) for node in nodes if not node.is_error)
    return records_of(opened, None, spec.tokens, runs, latents)


def _check(notes: Mapping[str, Annotation], of: OfSAEsSpec | None, where: str) -> None:
    """Refuses annotations of other SAEs, as far as these can be found and the annotations say which."""
    named = {annotation.site for annotation in notes.values() if annotation.sae is not None}
    if not named or of is None:
        return
    saes = named_saes(of.saes)
    if not all(Path(name).exists() for _, name in saes):
        return
    digests: dict[Site, str] = {}
    for site, name in saes:
        sae = SAE.load(name)
        place = site or sae.write
        if place in named and place is not None:
            digests[place] = sae.digest()
    annotated.refuse_strangers(notes, digests, where)
