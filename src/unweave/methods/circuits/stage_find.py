"""The circuit of a behaviour: nodes, edges, and what they were found on."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from unweave.circuits.about import Options
from unweave.circuits.draw import Picture, to_json
from unweave.circuits.find import find_circuit, find_nodes
from unweave.circuits.graph import Circuit
from unweave.circuits.opened import FILE
from unweave.core.result import to_plain
from unweave.core.stage import Context, stage
from unweave.core.writing import write_json
from unweave.inputs.saes import Opened, open_saes
from unweave.lm.model import LM
from unweave.methods.circuits.result import CircuitSearch, LeftOut, StrongEdge
from unweave.methods.circuits.spec import CircuitFindSpec
from unweave.methods.circuits.texts import Examples, examples_of

_LISTING = "circuit.json"
_PER_SITE, _EDGES = 5, 20
"""nodes of each site, and edges, that the result lists"""


def _dtype(spec: CircuitFindSpec, lm: Any) -> dict[str, str]:
    """The dtype of a model that the caller has open, where it is another than this question would open itself."""
    return {"dtype": str(lm.dtype)} if isinstance(lm, LM) and lm.dtype != torch.float32 and not spec.saes else {}


@stage("circuit-find", version=5, also=_dtype)
def run(spec: CircuitFindSpec, ctx: Context) -> CircuitSearch:
    """Effects of all nodes over all examples, then edges; saved as circuit.safetensors, with what is above the
    thresholds in circuit.json and the examples beside it. The handle is the model, where it is open already."""
    opened = open_saes(spec, ctx.handle)
    examples = examples_of(opened.lm, spec)
    examples.save(ctx.path)
    find = find_circuit if spec.edges else find_nodes
    circuit = find(opened.lm, opened.saes, examples.batches, options_of(spec), pieces=ctx.pieces)
    about = replace(circuit.about, task=task_of(spec), subject=opened.subject, examples=examples.used.first)
    circuit = replace(circuit, about=about)
    circuit.save(ctx.path / FILE)
    ctx.log("costs", to_plain(circuit.costs))
    picture = Picture(circuit=circuit, node_threshold=spec.node_threshold, edge_threshold=spec.edge_threshold)
    write_json(ctx.path / _LISTING, to_json(picture))
    return _result(spec, opened, circuit, examples)


def options_of(spec: CircuitFindSpec) -> Options:
    """The search's options, of the spec's fields."""
    values: dict[str, Any] = {field.name: getattr(spec, field.name) for field in fields(Options)}
    values["summed"] = "none" if spec.keeps_positions else "positions"
    return Options(**values)


def task_of(spec: CircuitFindSpec) -> str:
    """What the examples are, in words."""
    if spec.inputs is not None:
        return f"single texts of {spec.inputs.name}"
    if spec.pairs is not None:
        return f"pairs of {spec.pairs.name}"
    return f"subject-verb agreement: {(spec.task or 'across_pp').replace('_', ' ')}"


def _result(spec: CircuitFindSpec, opened: Opened, circuit: Circuit, examples: Examples) -> CircuitSearch:
    search, used = circuit.about.search, examples.used
    assert search is not None
    if search.other_lengths:
        others = LeftOut("another length than the commonest", search.other_lengths)
        used = replace(used, left_out=(*used.left_out, others))
    above = circuit.above(spec.node_threshold)
    by_site = [[node for node in above if node.site == site] for site in circuit.nodes]
    edges = sorted(circuit.edges_above(spec.node_threshold, spec.edge_threshold), key=lambda edge: -abs(edge[2]))
    return CircuitSearch(
        subject=opened.subject,
        task=circuit.about.task,
        neurons=circuit.about.neurons,
        used=replace(used, examples=circuit.n_examples),
        search=search,
        sums=circuit.about.sums,
        edges=len(edges) if spec.edges else None,
        strongest=tuple(node for nodes in by_site for node in nodes[:_PER_SITE]),
        strongest_edges=tuple(StrongEdge(*edge) for edge in edges[:_EDGES]),
        circuit=Path(FILE),
        listing=Path(_LISTING),
    )
