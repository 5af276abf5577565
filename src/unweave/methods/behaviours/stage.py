"""Behaviours that nobody named: sure tokens of a text, clustered by what the model does with them, a circuit for each.

Each part is a run of its own, so that what does not change is not made again: contexts, their vectors, and one run per
behaviour, named by its contexts. Vectors are kept in pieces as they are made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unweave.circuits.about import Options
from unweave.circuits.find import find_circuit
from unweave.core.errors import UnweaveError
from unweave.core.files import read_json
from unweave.core.pieces import Pieces
from unweave.core.progress import task
from unweave.core.result import to_plain
from unweave.core.run import Run, atomic_write, write_json
from unweave.core.spec import Spec, digest
from unweave.data.pack import PackSpec
from unweave.data.spec import DataSpec
from unweave.inputs.inputs import token_store
from unweave.inputs.saes import Opened, digest_of, open_saes
from unweave.latents.collect_many import text_stamps
from unweave.methods.behaviours import behaviours, cluster
from unweave.methods.behaviours.behaviours import Confidence, Example, Found
from unweave.methods.behaviours.cards import Behaviour, cards_of
from unweave.methods.behaviours.spec import CircuitBehavioursSpec
from unweave.methods.behaviours.vectors import SPARSE, vectors
from unweave.methods.behaviours.view import Card, page

VERSION = 3
_PIECE = 128
"""contexts whose vectors are kept at a time"""
_WINDOWS = 2
"""windows of each document that are looked at, unless the text is named"""
_BY = {
    "activations": "the activations behind them",
    "latents": "the latents behind them",
    "effects-dense": "the effects of activations on them",
    "effects-latents": "the effects of latents on them",
    "gradients": "their gradients in parameter space",
}


@dataclass(frozen=True, kw_only=True)
class _ContextsQuestion(Spec):
    """What identifies the contexts: of all that the stage is asked, only what they depend on."""

    tokens: str
    max_loss: float
    context: int
    min_context: int
    repeats: str
    per_document: int
    contexts: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class _VectorsQuestion(Spec):
    """What identifies the vectors of contexts."""

    contexts: str
    vectors: str
    positions: str
    skip_first: int
    dimensions: int
    density: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class _BehaviourQuestion(Spec):
    """What identifies the circuit of a behaviour: not its place among others."""

    model: str
    contexts: str
    options: dict[str, str]
    metric: str


def run(spec: CircuitBehavioursSpec, runs: Path) -> Run:
    """Contexts, vectors, clusters, circuits, and ``index.html`` to browse them."""
    stamped = text_stamps(spec, spec.data)
    # Parts name their contexts; only the whole depends on the text.
    inputs = digest_of(spec) | {name: value for name, value in stamped.items() if name == "model"}
    with Run.open(runs, "circuit-behaviours", spec, version=VERSION, inputs=inputs | stamped) as run:
        if run.done:
            return run
        opened = open_saes(spec)
        found, contexts_run = _contexts(spec, opened, runs)
        rows, vectors_run = _vectors(spec, opened, found, contexts_run.digest, inputs, runs)
        clusters = _clusters(spec, rows, vectors_run.digest, run)
        chosen = _chosen(spec, rows, clusters, found)
        parts = []
        with task("circuits of behaviours", total=len(chosen), unit="behaviours") as shown:
            for one in chosen:
                parts.append(_circuit(spec, opened, list(one.examples[: spec.examples]), inputs, runs))
                shown.advance()
        cards = cards_of(spec, opened, clusters, chosen, parts, runs)
        html = page(cards, _about(spec, opened, found, clusters))
        with atomic_write(run.path / "index.html") as temporary:
            temporary.write_text(html, encoding="utf-8")
        write_json(run.path / "behaviours.json", [_plain(card, part) for card, part in zip(cards, parts, strict=True)])
        results = {card.name: part.result for card, part in zip(cards, parts, strict=True)}
        run.finish(
            opened.record
            | {"summary": [[card.name, card.label, f"{card.size} contexts"] for card in cards]}
            | {"behaviours": len(cards), "counts": found.counts, "clusters": len(clusters)}
            | {"stability": clusters.stability, "coherence": _means(clusters, spec.min_size)}
            | {"completeness": {name: part["completeness"] for name, part in results.items()}}
            | {"warnings": [f"{name}: {part['incomplete']}" for name, part in results.items() if part["incomplete"]]}
            | {"parts": [part.path.name for part in (contexts_run, vectors_run, *parts)], "page": "index.html"}
        )
    return run


# -- contexts and vectors ---------------------------------------------------------------------------------------------


def _contexts(spec: CircuitBehavioursSpec, opened: Opened, runs: Path) -> tuple[Found, Run]:
    lm, (model, data) = opened.lm, _text(spec, opened)
    store, store_run = token_store(lm, model, data, spec.split, spec.tokens, runs)
    asked = _part(_ContextsQuestion, spec, {"tokens": store_run.digest})
    with Run.open(runs, "circuit-contexts", asked, version=VERSION, inputs={"dtype": str(lm.dtype)}) as run:
        path = run.path / "contexts.jsonl"
        if not run.done:
            options = Confidence(
                max_loss=spec.max_loss,
                context=spec.context,
                min_context=spec.min_context,
                repeats=spec.repeats,
                per_document=spec.per_document,
                limit=spec.contexts,
                seed=spec.seed,
            )
            found = behaviours.find(lm, store, options)
            behaviours.save(path, found)
            run.finish({"counts": found.counts})
        return behaviours.load(run.file(path.name)), run


def _text(spec: CircuitBehavioursSpec, opened: Opened) -> tuple[str, DataSpec]:
    """The model's name and the text: what was asked for, else the first SAE's own, in documents."""
    told = [sae.provenance.get("train", {}) for sae in opened.saes.values()]
    model = spec.model or next(name for name in (told_of.get("model") for told_of in told) if name)
    if spec.data is not None:
        return model, spec.data
    own = next((told_of["data"] for told_of in told if "data" in told_of), None)
    if own is None:
        raise UnweaveError(
            "these autoencoders do not say which text they were trained on",
            where="data",
            remedy="name some with --data.sources",
        )
    # The beginnings of documents, whatever the training made of them: a context should not begin in another document,
    # and many documents say more than much of a few.
    data = DataSpec.from_dict(own)
    rows = _WINDOWS * (spec.context + 1)
    pack = PackSpec(context=rows, min_tokens=spec.min_context + 1, bos=data.pack.bos, unanswered=data.pack.unanswered)
    return model, dataclasses.replace(data, pack=pack)


def _vectors(
    spec: CircuitBehavioursSpec, opened: Opened, found: Found, contexts: str, inputs: Mapping[str, str], runs: Path
) -> tuple[cluster.Vectors, Run]:
    import scipy.sparse as sp

    asked = _part(_VectorsQuestion, spec, {"contexts": contexts})
    read = {} if spec.vectors == "gradients" else dict(inputs) | {"sites": digest(opened.record["sites"])}
    with Run.open(runs, "circuit-vectors", asked, version=VERSION, inputs=read) as run:
        sparse, parts = spec.vectors in SPARSE, []
        n = len(found.examples)
        with task(f"vectors: {spec.vectors}", total=n, unit="contexts") as shown:
            for start in range(0, n, _PIECE):
                few = found.examples[start : start + _PIECE]
                path = run.path / f"{start // _PIECE:05d}.npz"
                if not path.exists():
                    made = vectors(
                        opened.lm,
                        opened.saes,
                        few,
                        kind=spec.vectors,
                        positions=spec.positions,
                        skip_first=spec.skip_first,
                        dimensions=spec.dimensions,
                        density=spec.density,
                        seed=spec.seed,
                        max_tokens=spec.max_tokens,
                    )
                    _save_rows(path, made)
                    run.log("piece", {"piece": path.name})
                parts.append(_load_rows(run.file(path.name) if run.done else path, sparse))
                shown.advance(len(few))
        if not run.done:
            run.finish({"contexts": n})
        return (sp.csr_array(sp.vstack(parts, format="csr")) if sparse else np.concatenate(parts)), run


def _save_rows(path: Path, made: Any) -> None:
    import scipy.sparse as sp

    with atomic_write(path) as temporary, open(temporary, "wb") as handle:
        if sp.issparse(made):
            sp.save_npz(handle, made)
        else:
            np.savez(handle, rows=made)


def _load_rows(path: Path, sparse: bool) -> Any:
    import scipy.sparse as sp

    try:
        return sp.load_npz(path) if sparse else np.load(path, allow_pickle=False)["rows"]
    except (OSError, ValueError, KeyError) as error:
        raise UnweaveError(
            f"cannot read vectors: {error}", where=str(path), remedy="delete the file and ask again"
        ) from error


def _part(kind: type[Spec], spec: CircuitBehavioursSpec, more: Mapping[str, Any]) -> Any:
    """The fields of a part's question that the stage's spec has, with the others."""
    names = [field.name for field in dataclasses.fields(kind) if field.name not in more]
    return kind(**{name: getattr(spec, name) for name in names}, **more)


# -- clusters ---------------------------------------------------------------------------------------------------------


def _clusters(spec: CircuitBehavioursSpec, rows: cluster.Vectors, of: str, run: Run) -> cluster.Clusters:
    """The clusters of vectors whose run has the digest ``of``, kept beside the index."""
    path, about = run.path / f"clusters-{of}.npz", run.path / f"clusters-{of}.json"
    if not (path.exists() and about.exists()):
        made = cluster.cluster(rows, spec.clusters, method=spec.clustering, rank=spec.rank, seed=spec.seed)
        arrays = {
            field.name: getattr(made, field.name) for field in dataclasses.fields(made) if field.name != "stability"
        }
        with atomic_write(path) as temporary, open(temporary, "wb") as handle:
            np.savez(handle, **arrays)
        write_json(about, {"stability": made.stability})
    told = read_json(about)
    with np.load(path, allow_pickle=False) as held:
        return cluster.Clusters(**dict(held), stability=told["stability"])


def _chosen(
    spec: CircuitBehavioursSpec, rows: cluster.Vectors, clusters: cluster.Clusters, found: Found
) -> list[Behaviour]:
    """The first clusters that are large enough, each with its contexts, the most typical first."""
    large = [place for place in range(len(clusters)) if clusters.sizes[place] >= spec.min_size][: spec.behaviours]
    if not large:
        raise UnweaveError(
            f"no cluster has {spec.min_size} contexts; the largest has {int(clusters.sizes.max())}",
            where="min_size",
            remedy="ask for fewer clusters or a smaller min_size, or find more contexts",
        )
    members = {place: cluster.typical(rows, clusters.members(place)).tolist() for place in large}
    return [Behaviour(place, tuple(found.examples[i] for i in some)) for place, some in members.items()]


# -- circuits ---------------------------------------------------------------------------------------------------------


def _circuit(
    spec: CircuitBehavioursSpec, opened: Opened, examples: list[Example], inputs: Mapping[str, str], runs: Path
) -> Run:
    """The run that holds a behaviour's circuit."""
    options = Options(
        method=spec.method,
        steps=spec.steps,
        rule=spec.rule,
        summed="positions",
        skip_first=spec.skip_first,
        node_threshold=spec.node_threshold,
        edge_threshold=spec.edge_threshold,
        max_tokens=spec.max_tokens,
    )
    told = {k: str(v) for k, v in dataclasses.asdict(options).items() if k not in ("max_tokens", "metric_at")}
    asked = _BehaviourQuestion(
        model=opened.lm.name,
        contexts=digest([[list(e.ids), e.answer] for e in examples]),
        options=told,
        metric=spec.metric,
    )
    read = dict(inputs) | {"sites": digest(opened.record["sites"])}
    with Run.open(runs, "circuit-behaviour", asked, version=VERSION, inputs=read) as run:
        if not run.done:
            batches = behaviours.batches(
                opened.lm, examples, metric=spec.metric, side="left", max_tokens=spec.max_tokens
            )
            # Parts are named by their rows; which these are depends on max_tokens, which is no part of the question.
            rows = digest([clean.ids.tolist() for clean, _, _ in batches])
            circuit = find_circuit(opened.lm, opened.saes, batches, options, pieces=Pieces(run.path / f"parts-{rows}"))
            circuit.save(run.path / "circuit.safetensors")
            behaviours.save(run.path / "contexts.jsonl", Found(tuple(examples)))
            nodes = to_plain(circuit.counts(spec.node_threshold))
            edges = len(circuit.edges_above(spec.node_threshold, spec.edge_threshold))
            complete = {"completeness": to_plain(circuit.about.sums), "incomplete": circuit.about.incomplete}
            run.finish(nodes | complete | {"edges": edges})
    return run


# -- what is said about it --------------------------------------------------------------------------------------------


def _about(spec: CircuitBehavioursSpec, opened: Opened, found: Found, clusters: cluster.Clusters) -> dict[str, Any]:
    return {
        "model": opened.lm.name,
        "sites": opened.record["sites"],
        "counts": found.counts,
        "clusters": len(clusters),
        "stability": clusters.stability,
        "by": _BY[spec.vectors],
    }


def _means(clusters: cluster.Clusters, least: int) -> dict[str, float] | None:
    """Coherence of clusters large enough, and of random ones of the same sizes, weighted by size."""
    large = clusters.sizes >= least
    if not large.any():
        return None
    weights = clusters.sizes[large]
    pairs = {"clusters": clusters.coherence, "random": clusters.control}
    return {name: round(float(np.average(values[large], weights=weights)), 4) for name, values in pairs.items()}


def _plain(card: Card, part: Run) -> dict[str, Any]:
    left_out = ("svg", "contexts", "latents")
    fields = {f.name: getattr(card, f.name) for f in dataclasses.fields(card) if f.name not in left_out}
    fields["latents"] = [[latent.name, latent.effect] for latent in card.latents]
    texts = [{"context": "".join(tokens), "answer": answer, "loss": loss} for tokens, answer, loss in card.contexts]
    return fields | {"contexts": texts, "run": part.path.name}
