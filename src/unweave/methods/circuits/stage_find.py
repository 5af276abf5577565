"""The circuit of a behaviour: nodes, edges, and what they were found on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from unweave.circuits.find import Options, find_circuit, find_nodes
from unweave.circuits.graph import COSTS, Circuit, Node, Y
from unweave.core.run import Run, write_json
from unweave.inputs.saes import digest_of, open_saes
from unweave.lm.model import LM
from unweave.methods.circuits.spec import CircuitFindSpec
from unweave.methods.circuits.stage_examples import Examples, accuracy_row, examples_of, file_digests

VERSION = 3
CIRCUIT = "circuit.safetensors"
_PER_SITE, _EDGES = 5, 20
"""nodes of each site, and edges, that the result lists"""


def run(spec: CircuitFindSpec, runs: Path, lm: LM | None = None) -> Run:
    """Effects of all nodes over all examples, then edges; saved as circuit.safetensors, with what is above the
    thresholds in circuit.json and the examples beside it.

    ``lm`` is the spec's model where it is loaded already; in another dtype than usual it makes another run.
    """
    inputs = digest_of(spec) | file_digests(spec.pairs, spec.inputs)
    if lm is not None and lm.dtype != torch.float32 and not spec.saes:
        inputs["dtype"] = str(lm.dtype)
    with Run.open(runs, "circuit-find", spec, version=VERSION, inputs=inputs) as run:
        if run.done:
            return run
        opened = open_saes(spec, lm)
        examples = examples_of(opened.lm, spec)
        examples.save(run.path)
        parts = run.path / "parts"
        find = find_circuit if spec.edges else find_nodes
        circuit = find(opened.lm, opened.saes, examples.batches, options_of(spec), keep=parts)
        skipped = examples.about["skipped"] | circuit.about["skipped"]
        circuit.about.update(opened.record, task=task_of(spec), accuracy=examples.about.get("accuracy"))
        if circuit.positions:  # an example's words, for drawings
            first = next(b for b in examples.batches if b[0].ids.shape[1] == circuit.about["lengths"]["longest"])
            circuit.about["tokens"] = opened.lm.pieces(first[0].ids[0])
        run.log("costs", {name: circuit.about[name] for name in COSTS})
        circuit.save(run.path / CIRCUIT)
        write_json(run.path / "circuit.json", contents(circuit, spec.node_threshold, spec.edge_threshold))
        result = _result(spec, circuit, examples, skipped)
        run.finish(opened.record | result)
    return run


def options_of(spec: CircuitFindSpec) -> Options:
    """The search's options, of the spec's fields."""
    return Options(
        method=spec.method,
        steps=spec.steps,
        rule=spec.rule,
        summed="none" if spec.keeps_positions else "positions",
        skip_first=spec.skip_first,
        node_threshold=spec.node_threshold,
        edge_threshold=spec.edge_threshold,
        upstream=spec.upstream,
        max_tokens=spec.max_tokens,
        ablation=spec.ablation,
    )


def task_of(spec: CircuitFindSpec) -> str:
    """What the examples are, in words."""
    if spec.inputs is not None:
        return f"single texts of {spec.inputs.name}"
    if spec.pairs is not None:
        return f"pairs of {spec.pairs.name}"
    return f"subject-verb agreement: {(spec.task or 'across_pp').replace('_', ' ')}"


def contents(circuit: Circuit, node_threshold: float, edge_threshold: float) -> dict[str, Any]:
    """Nodes and edges above the thresholds, and what was measured, in plain values; the strongest edges first."""
    edges = circuit.edges_above(node_threshold, edge_threshold)
    edges.sort(key=lambda edge: -abs(edge[2]))
    return {
        "about": {name: value for name, value in circuit.about.items() if name not in COSTS},
        "nodes": [_plain(node) for node in circuit.above(node_threshold)],
        "edges": [[up.name, down.name if down else Y, weight] for up, down, weight in edges],
    }


def completeness_rows(about: Mapping[str, Any]) -> list[list[str]]:
    """The row of a summary with the effects' sum and the measured change, of the site where they differ most."""
    rows = about["completeness"]
    if not rows:
        return []
    site = max(rows, key=lambda name: abs(rows[name]["sum"] - rows[name]["change"]))
    meaning = about["incomplete"] or f"of all effects at {site}, and of moving all there; elsewhere they are closer"
    return [["sum / measured", f"{rows[site]['sum']:.3f} / {rows[site]['change']:.3f}", meaning]]


def _plain(node: Node) -> dict[str, Any]:
    return {
        "name": node.name,
        "site": str(node.site),
        "latent": None if node.is_error else node.slot,
        "position": node.position,
        "effect": node.effect,
    }


def _result(spec: CircuitFindSpec, circuit: Circuit, examples: Examples, skipped: dict[str, int]) -> dict[str, Any]:
    about = circuit.about
    above = about["above"]
    strongest: dict[str, list[list[Any]]] = {}
    for node in circuit.above(spec.node_threshold):
        rows = strongest.setdefault(str(node.site), [])
        if len(rows) < _PER_SITE:
            rows.append([node.name, node.effect])
    edges = contents(circuit, spec.node_threshold, spec.edge_threshold)["edges"] if spec.edges else []
    values = ", ".join(f"{value:.2f} on {side} texts" for side, value in about["metric"].items())
    summary = [
        ["task", task_of(spec), ""],
        ["examples", circuit.n_examples, "; ".join(f"{n} left out: {why}" for why, n in skipped.items())],
        *accuracy_row(examples.about),
        ["metric", values, "mean"],
        *completeness_rows(about),
        ["latents", above["latents"], f"with a mean effect above {spec.node_threshold:g}"],
        ["errors", above["errors"], "the same of what autoencoders leave unexplained"],
        *([["edges", len(edges), f"between them, above {spec.edge_threshold:g}"]] if spec.edges else []),
        *([["edges to y", len(circuit.edges), about["edges_to_y"]]] if "edges_to_y" in about else []),
        *[[site, rows[0][0], f"the strongest of its nodes: {rows[0][1]:+.3f}"] for site, rows in strongest.items()],
    ]
    return {
        "task": task_of(spec),
        "examples": examples.about | {"examples": circuit.n_examples, "skipped": skipped},
        "metric": about["metric"],
        "completeness": about["completeness"],
        "incomplete": about["incomplete"],
        "above": above,
        "edges": about.get("edges"),
        "strongest": strongest,
        "strongest_edges": edges[:_EDGES],
        "circuit": CIRCUIT,
        "summary": summary,
    }
