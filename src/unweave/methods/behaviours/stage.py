"""Behaviours as a stage. Contexts, their vectors and every behaviour's circuit are runs of their own, which other
questions share: asking for more behaviours, or another threshold, makes only what is new."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unweave.circuits.draw import Picture, draw_svg
from unweave.circuits.graph import Circuit
from unweave.core.errors import UnweaveError
from unweave.core.pieces import Pieces
from unweave.core.progress import task
from unweave.core.run import Run
from unweave.core.site import Site
from unweave.core.stage import Context, stage
from unweave.core.writing import write_file
from unweave.data.pack import PackSpec
from unweave.data.spec import DataSpec
from unweave.inputs.identity import texts_of
from unweave.inputs.inputs import token_store
from unweave.inputs.saes import Opened, open_saes
from unweave.latents.records import Records
from unweave.latents.stage import records_of
from unweave.lm.model import LM
from unweave.methods.behaviours import view
from unweave.methods.behaviours.behaviours import Explained, Group, chosen, circuit_of, clustered, described
from unweave.methods.behaviours.contexts import find
from unweave.methods.behaviours.result import BehaviourCircuit, BehavioursResult, Contexts, Example, VectorsResult
from unweave.methods.behaviours.spec import (
    BehaviourSpec,
    CircuitBehavioursSpec,
    CircuitOptions,
    ContextsSpec,
    VectorsSpec,
)
from unweave.methods.behaviours.vectors import from_tensors, joined, to_tensors, vectors
from unweave.sae.activations import Identity

_PIECE = 128
"""contexts whose vectors are kept at a time"""
_WINDOWS = 2
"""windows of each document that are looked at, unless the text is named"""
_DRAWN_NODES, _DRAWN_EDGES = 60, 200
_CIRCUIT = "circuit.safetensors"


def _also(spec: CircuitBehavioursSpec, _handle: Any) -> Mapping[str, str]:
    """The SAEs' own text, where none is named."""
    return texts_of(spec, spec.data)


@stage("circuit-behaviours", version=5, also=_also)
def run(spec: CircuitBehavioursSpec, ctx: Context) -> BehavioursResult:
    """Contexts, vectors, clusters, circuits, and ``index.html`` to browse them."""
    opened = open_saes(spec)
    common = _common(spec, opened)
    of_text = {"data": spec.data or _own_text(spec, opened), "split": spec.split, "tokens": spec.tokens}
    of_model = {name: common[name] for name in ("model", "dtype")}
    contexts_run = contexts(
        ContextsSpec(**of_model, **of_text, options=spec.contexts, seed=spec.seed), ctx.runs, opened
    )
    sure = contexts_run.result
    question = VectorsSpec(**common, contexts=contexts_run.file("result.json"), options=spec.vectors, seed=spec.seed)
    if spec.vectors.kind == "gradients":  # of the model alone
        question = dataclasses.replace(question, saes=(), neurons=(), sites=(), skip_first=0)
    vectors_run = context_vectors(question, ctx.runs, opened)
    rows = _rows(vectors_run)
    clusters = clustered(rows, spec, ctx.pieces)
    groups, explained = chosen(rows, clusters, sure, spec), []
    with task("circuits of behaviours", total=len(groups), unit="behaviours") as shown:
        for group in groups:
            ids = tuple((*example.ids, example.answer) for example in group.examples[: spec.circuit.examples])
            part = behaviour(BehaviourSpec(**common, contexts=ids, options=spec.circuit), ctx.runs, opened)
            explained.append(_explained(opened.lm, group, part, spec.circuit, ctx.path))
            shown.advance()
    records = _records(spec, opened, ctx.runs) if spec.records_tokens else None
    result = described(opened.lm, opened.subject, sure, clusters, explained, spec, records)
    view.save(ctx.path, result)
    return result


# -- what several questions share; the handle is what is open ---------------------------------------------------------


@stage("circuit-contexts", version=5)
def contexts(spec: ContextsSpec, ctx: Context) -> Contexts:
    """The contexts of a text that the model is sure of."""
    lm = ctx.handle.lm
    store, _ = token_store(lm, spec.model, spec.data, spec.split, spec.tokens, ctx.runs)
    return find(lm, store, spec.options, seed=spec.seed)


@stage("circuit-vectors", version=4)
def context_vectors(spec: VectorsSpec, ctx: Context) -> VectorsResult:
    """Their vectors, some contexts at a time."""
    opened: Opened = ctx.handle
    examples, parts = Run.at(spec.contexts.parent, Contexts).result.examples, []
    with task(f"vectors: {spec.options.kind}", total=len(examples), unit="contexts") as shown:
        for start in range(0, len(examples), _PIECE):
            batch = examples[start : start + _PIECE]

            def work(batch: Sequence[Example] = batch) -> dict[str, Any]:
                how = {"skip_first": spec.skip_first, "seed": spec.seed, "max_tokens": spec.max_tokens}
                return to_tensors(vectors(opened.lm, opened.saes, batch, spec.options, **how))

            parts.append(from_tensors(ctx.pieces.tensors(f"{start // _PIECE:05d}", work)))
            shown.advance(len(batch))
    rows = joined(parts)
    Pieces(ctx.path).tensors("vectors", lambda: to_tensors(rows))
    return VectorsResult(rows.shape[0], rows.shape[1], Path("vectors.safetensors"))


def _rows(done: Run[VectorsResult]) -> Any:
    file = done.file(str(done.result.file))
    held = Pieces(file.parent).get(file.stem)
    assert held is not None
    return from_tensors(held)


@stage("circuit-behaviour", version=5)
def behaviour(spec: BehaviourSpec, ctx: Context) -> BehaviourCircuit:
    """A behaviour's circuit."""
    opened, options = ctx.handle, spec.options
    examples = [Example(ids[:-1], ids[-1], 0.0, 0, 0) for ids in spec.contexts]
    circuit = circuit_of(opened.lm, opened.saes, examples, options, spec.skip_first, spec.max_tokens, ctx.pieces)
    circuit.save(ctx.path / _CIRCUIT)
    latents, errors = circuit.counts(options.node_threshold)
    edges = len(circuit.edges_above(options.node_threshold, options.edge_threshold))
    return BehaviourCircuit(latents, errors, edges, circuit.about.sums, Path(_CIRCUIT))


# -- what is asked of them --------------------------------------------------------------------------------------------


def _common(spec: CircuitBehavioursSpec, opened: Opened) -> dict[str, Any]:
    """The fields that all questions about contexts share."""
    neurons = tuple(str(site) for site, sae in opened.saes.items() if isinstance(sae.activation, Identity))
    return {
        "model": opened.model,
        "dtype": str(opened.lm.dtype).removeprefix("torch."),
        "saes": spec.saes,
        "neurons": neurons,
        "sites": tuple(map(str, opened.saes)),
        "skip_first": spec.skip_first,
        "max_tokens": spec.max_tokens,
    }


def _own_text(spec: CircuitBehavioursSpec, opened: Opened) -> DataSpec:
    """The first SAE's own text, in documents."""
    own = next((data for sae in opened.saes.values() if (data := sae.provenance.get("train", {}).get("data"))), None)
    if own is None:
        remedy = "name some with --data.sources"
        raise UnweaveError("these SAEs do not say which text they were trained on", where="data", remedy=remedy)
    # The beginnings of documents, whatever the training made of them: a context should not begin in another document,
    # and many documents say more than much of a few.
    data, contexts = DataSpec.from_dict(own), spec.contexts
    pack = PackSpec(
        context=_WINDOWS * (contexts.context + 1), min_tokens=contexts.min_context + 1, bos=data.pack.bos,
        unanswered=data.pack.unanswered,
    )  # fmt: skip
    return dataclasses.replace(data, pack=pack)


def _explained(lm: LM, group: Group, part: Run[BehaviourCircuit], options: CircuitOptions, folder: Path) -> Explained:
    """A group with its circuit, which is drawn in ``folder``."""
    circuit = Circuit.load(part.file(str(part.result.file)))
    if not circuit.above(options.node_threshold):
        return Explained(group, circuit, part.path.name)
    (answer, _), *_ = Counter(example.answer for example in group.examples).most_common()
    title = f"Behaviour {group.place + 1}: what makes the model say {lm.token_strings([answer])[0]!r}"
    drawing = Path("circuits") / f"{group.place + 1}.svg"
    picture = Picture(
        circuit=circuit, node_threshold=options.node_threshold, edge_threshold=options.edge_threshold, title=title,
        max_nodes=_DRAWN_NODES, max_edges=_DRAWN_EDGES,
    )  # fmt: skip
    write_file(folder / drawing, draw_svg(picture))
    return Explained(group, circuit, part.path.name, drawing)


def _records(spec: CircuitBehavioursSpec, opened: Opened, runs: Path) -> Any:
    """The records of latents, from one pass over the text that the SAEs know."""
    lengths = [spec.tokens]
    if spec.data is None:
        trainings = [sae.provenance.get("train", {}) for sae in opened.saes.values()]
        lengths = [one["data"]["tokens"] for one in trainings if "data" in one]
    tokens, split = min([spec.records_tokens, *lengths]), spec.split if spec.data is not None else "train"

    def records(latents: Mapping[Site, Sequence[int]]) -> Mapping[Site, Records]:
        return records_of(opened, spec.data, tokens, runs, latents, split=split)

    return records
