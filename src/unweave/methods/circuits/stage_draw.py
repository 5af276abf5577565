"""Pictures of a circuit that was found: circuit.svg, circuit.html and circuit.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unweave.circuits.draw import counts_text, draw_svg, edge_threshold_for, key_of, threshold_for, to_json
from unweave.circuits.draw_html import draw_html
from unweave.circuits.graph import Circuit, Node
from unweave.circuits.opened import Found, open_circuit
from unweave.circuits.picture import Selection, select
from unweave.core.contents import content_of
from unweave.core.errors import UnweaveError
from unweave.core.run import Run, atomic_write
from unweave.core.site import Site
from unweave.inputs.saes import digest_of, named_saes, open_saes
from unweave.inputs.spec import OfSAEsSpec
from unweave.latents import annotations as annotated
from unweave.latents.annotations import Annotation
from unweave.latents.collect_many import records_of
from unweave.lm.chat import encode_text
from unweave.lm.shown import pieces
from unweave.methods.circuits.spec import CircuitDrawSpec
from unweave.methods.circuits.stage_examples import PAIRS
from unweave.sae.module import SAE
from unweave.tasks import agreement

VERSION = 2
_EDGES_A_NODE = 2.5


def run(spec: CircuitDrawSpec, runs: Path) -> Run:
    """Writes the three files into the run's folder."""
    found = open_circuit(spec.circuit)
    of = found.saes_spec(spec.saes, spec.model, spec.device)
    inputs = {"circuit": content_of(found.path)}
    if spec.annotations is not None:
        inputs["annotations"] = content_of(spec.annotations)
    if spec.contexts:
        if of is None:
            raise UnweaveError(
                "this circuit does not say where its autoencoders are",
                where=str(found.path),
                remedy="name them with --saes, or leave --contexts out",
            )
        inputs |= digest_of(of)
    with Run.open(runs, "circuit-draw", spec, version=VERSION, inputs=inputs) as run:
        if run.done:
            return run
        result = _draw(spec, found, of, run.path, runs)
        run.finish(result)
    return run


def _draw(spec: CircuitDrawSpec, found: Found, of: OfSAEsSpec | None, folder: Path, runs: Path) -> dict[str, Any]:
    circuit = found.circuit
    node_threshold, edge_threshold, why = _thresholds(spec, found)
    selection = select(circuit, node_threshold, edge_threshold, spec.max_nodes)
    said = annotated.load(spec.annotations, circuit.nodes) if spec.annotations is not None else {}
    _check(said, of, str(spec.annotations))
    records = None
    if spec.contexts and of is not None:
        opened = open_saes(of)
        annotated.refuse_strangers(said, {s: sae.digest() for s, sae in opened.saes.items()}, str(spec.annotations))
        records = records_of(opened, None, spec.tokens, runs, latents_of(selection.nodes), model=of.model)
    tokens = _tokens(found, of)
    title = spec.title or _title(found)
    svg = draw_svg(
        circuit,
        node_threshold=node_threshold,
        edge_threshold=edge_threshold,
        annotations=said,
        tokens=tokens,
        title=title,
        max_nodes=spec.max_nodes,
    )
    page = draw_html(
        circuit,
        node_threshold=node_threshold,
        edge_threshold=edge_threshold,
        annotations=said,
        records=records,
        tokens=tokens,
        title=title,
        note=_example(found),
        max_nodes=spec.max_nodes,
    )
    values = to_json(
        circuit, node_threshold=node_threshold, edge_threshold=edge_threshold, annotations=said, tokens=tokens
    )
    texts = {"circuit.svg": svg, "circuit.json": json.dumps(values, ensure_ascii=False, indent=1), "circuit.html": page}
    for name, text in texts.items():
        with atomic_write(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return _result(circuit, selection, said, node_threshold, edge_threshold, why)


def _thresholds(spec: CircuitDrawSpec, found: Found) -> tuple[float, float, str]:
    """Node and edge threshold, and how the former was chosen."""
    circuit = found.circuit
    if spec.node_threshold is not None:
        node, why = spec.node_threshold, "as asked"
    else:
        wanted, own = threshold_for(circuit, spec.nodes), _own_threshold(circuit)
        node = max(wanted, own)
        why = "the circuit's own" if own > wanted else f"chosen so that about {spec.nodes} nodes remain"
    edge = spec.edge_threshold
    if edge is None:
        n_nodes = min(len(circuit.above(node)), spec.max_nodes)
        edge = edge_threshold_for(circuit, node, round(_EDGES_A_NODE * n_nodes))
        asked = circuit.about.get("options")
        own_edge = asked.get("edge_threshold", 0.0) if isinstance(asked, Mapping) else 0.0
        edge = max(edge, float(own_edge))  # weaker ones were never kept
    return node, edge, why


def _own_threshold(circuit: Circuit) -> float:
    """The threshold below which no edges were looked for; 0 where the circuit has none."""
    options = circuit.about.get("options")
    own = options.get("node_threshold", 0.0) if isinstance(options, Mapping) and circuit.edges else 0.0
    return float(own) if circuit.counts(float(own)) != {"latents": 0, "errors": 0} else 0.0


def latents_of(nodes: tuple[Node, ...] | list[Node]) -> dict[Site, list[int]]:
    """The latents among nodes, by site, in the nodes' order and each once."""
    chosen: dict[Site, dict[int, None]] = {}
    for node in nodes:
        if not node.is_error:
            chosen.setdefault(node.site, {})[node.slot] = None
    return {site: list(some) for site, some in chosen.items()}


def _check(said: Mapping[str, Annotation], of: OfSAEsSpec | None, where: str) -> None:
    """Refuses annotations of other autoencoders, as far as these can be found and the annotations say which."""
    named = {annotation.site for annotation in said.values() if annotation.sae is not None}
    if not named or of is None or not all(Path(name).exists() for _, name in named_saes(of.saes)):
        return
    digests: dict[Site, str] = {}
    for site, name in named_saes(of.saes):
        sae = SAE.load(name)
        place = site or sae.write
        if place in named and place is not None:
            digests[place] = sae.digest()
    annotated.refuse_strangers(said, digests, where)


def _tokens(found: Found, of: OfSAEsSpec | None) -> list[str] | None:
    """The words of the first example that is as long as the circuit, one for each position; None where they, or the
    model's tokenizer, are not at hand."""
    from unweave.lm.sources import load_tokenizer

    path = found.path.parent / PAIRS
    if not found.circuit.positions or of is None or not path.is_file():
        return None
    length = max(effects.shape[0] for effects in found.circuit.nodes.values())
    try:
        tokenizer = load_tokenizer(of.model or _trained_on(of))
    except UnweaveError:
        return None
    if tokenizer is None:
        return None
    for pair in agreement.load(path):
        ids = encode_text(tokenizer, pair.clean_prefix)[0]
        if len(ids) == length:
            return [piece.text for piece in pieces(tokenizer, ids)]
    return None


def _trained_on(of: OfSAEsSpec) -> str:
    """The model of the first autoencoder; empty where it names none."""
    for _, name in named_saes(of.saes):
        return str(SAE.load(name).provenance.get("train", {}).get("model") or "")
    return ""


def _title(found: Found) -> str | None:
    task = found.result.get("task") or found.asked.get("task")
    return str(task) if task else None


def _example(found: Found) -> str:
    """The first example in a sentence."""
    examples = found.result.get("examples")
    lines = examples.get("example") if isinstance(examples, dict) else None
    if not isinstance(lines, list):
        return ""
    return "For example, " + "; ".join(f"{name}: {text!r}" for name, text in lines) + "."


def _result(
    circuit: Circuit,
    selection: Selection,
    said: Mapping[str, Annotation],
    node_threshold: float,
    edge_threshold: float,
    why: str,
) -> dict[str, Any]:
    errors = sum(node.is_error for node in selection.nodes)
    labelled = sum(key_of(node) in said for node in selection.nodes)
    shown = counts_text(circuit, selection, node_threshold, edge_threshold)
    rows = [
        ["nodes drawn", len(selection.nodes), f"{errors} of them errors, {labelled} labelled"],
        ["node threshold", node_threshold, why],
        ["edges drawn", len(selection.edges), ""],
        ["edge threshold", edge_threshold, ""],
        ["left out", f"{selection.nodes_left_out:,} nodes, {selection.edges_left_out:,} edges", "for want of room"],
    ]
    return {
        "summary": rows,
        "shown": shown,
        "node_threshold": node_threshold,
        "edge_threshold": edge_threshold,
        "chosen": why,
        "nodes": len(selection.nodes),
        "errors": errors,
        "edges": len(selection.edges),
        "nodes_left_out": selection.nodes_left_out,
        "labelled": labelled,
        "report": "circuit.html",
        "files": ["circuit.svg", "circuit.html", "circuit.json"],
    }
