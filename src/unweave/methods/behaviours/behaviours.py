"""Behaviours that nobody named: sure tokens of a text, clustered by what the model does with them, a circuit for each.

    behaviours(lm, saes, ["some text", ...])        # in a notebook: shows itself as the index

1. ``contexts.find``: which tokens the model is sure of, without repetition (Marks et al. 2024, app. G.1).
2. ``vectors.vectors``: what the model does with each one's context, as a vector (app. G.2).
3. ``clustered``, ``chosen``: clusters by direction, the best of them with their most typical contexts (app. G.3).
4. ``circuit_of``: each one's circuit, by ablation.
5. ``described``: all of it in plain values, with what the strongest latents fire on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from unweave.circuits.about import Node, Options, by_site
from unweave.circuits.find import find_circuit
from unweave.circuits.graph import Circuit
from unweave.core.errors import UnweaveError
from unweave.core.pieces import Held, Pieces
from unweave.core.progress import task
from unweave.core.site import Site
from unweave.data.tokens import TokenStore
from unweave.inputs.saes import info_of
from unweave.inputs.subject import Subject
from unweave.latents.records import Records
from unweave.latents.view import entry_of
from unweave.lm.model import LM
from unweave.methods.behaviours import cluster, result
from unweave.methods.behaviours.contexts import Texts, batches, find
from unweave.methods.behaviours.spec import BehaviourOptions, CircuitOptions
from unweave.methods.behaviours.vectors import vectors
from unweave.sae.module import SAE

RecordsOf = Callable[[Mapping[Site, Sequence[int]]], Mapping[Site, Records]]
"""The records of some latents of each site."""
_CONTEXTS, _ANSWERS, _LATENTS, _PROMOTED = 24, 6, 10, 5
"""the most that is listed of a behaviour and of a latent"""


@dataclass(frozen=True)
class Group:
    """A cluster that is a behaviour: its place among the clusters, and its contexts, the most typical first."""

    place: int
    examples: tuple[result.Example, ...]


@dataclass(frozen=True)
class Explained:
    """A group's circuit, and where it and its drawing lie, if anywhere."""

    group: Group
    circuit: Circuit
    run: str = ""
    drawing: Path | None = None


def behaviours(
    lm: LM,
    saes: Mapping[Site, SAE],
    texts: TokenStore | Sequence[str],
    options: BehaviourOptions | None = None,
    *,
    records: RecordsOf | None = None,
    pieces: Pieces | None = None,
) -> result.BehavioursResult:
    """Behaviours in some texts, each with the latents that cause its predictions; ``records`` of these are shown.

    Raises UnweaveError where the model is sure of nothing, and where no cluster is large enough.
    """
    options, pieces = options or BehaviourOptions(), pieces or Pieces(None)
    store = texts if isinstance(texts, TokenStore) else Texts(lm, texts)
    contexts = find(lm, store, options.contexts, seed=options.seed)
    how = {"skip_first": options.skip_first, "seed": options.seed, "max_tokens": options.max_tokens}
    rows = vectors(lm, saes, contexts.examples, options.vectors, **how)
    clusters = clustered(rows, options, pieces)
    explained = []
    groups = chosen(rows, clusters, contexts, options)
    with task("circuits of behaviours", total=len(groups), unit="behaviours") as shown:
        for group in groups:
            examples = group.examples[: options.circuit.examples]
            circuit = circuit_of(lm, saes, examples, options.circuit, options.skip_first, options.max_tokens)
            explained.append(Explained(group, circuit))
            shown.advance()
    subject = Subject(lm.name, lm.note, tuple(info_of(sae) for sae in saes.values()), {})
    return described(lm, subject, contexts, clusters, explained, options, records)


# -- the steps --------------------------------------------------------------------------------------------------------


def clustered(rows: cluster.Vectors, options: BehaviourOptions, pieces: Pieces) -> cluster.Clusters:
    """The clusters of vectors, from the pieces where they are finished."""

    def work() -> Held:
        how = options.clusters
        clusters = cluster.cluster(rows, how.number, method=how.method, rank=how.rank, seed=options.seed)
        stability = np.asarray(np.nan if clusters.stability is None else clusters.stability)
        arrays = {field.name: getattr(clusters, field.name) for field in fields(clusters)} | {"stability": stability}
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}

    held = {name: tensor.numpy() for name, tensor in pieces.tensors("clusters", work).items()}
    stability = held.pop("stability").item()
    return cluster.Clusters(**held, stability=None if np.isnan(stability) else stability)


def chosen(
    rows: cluster.Vectors, clusters: cluster.Clusters, contexts: result.Contexts, options: BehaviourOptions
) -> list[Group]:
    """The first clusters that are large enough, each with its contexts, the most typical first."""
    least = options.clusters.min_size
    large = [place for place in range(len(clusters)) if clusters.sizes[place] >= least][: options.behaviours]
    if not large:
        what = f"no cluster has {least} contexts; the largest has {int(clusters.sizes.max())}"
        remedy = "ask for fewer clusters or a smaller min_size, or find more contexts"
        raise UnweaveError(what, where="clusters.min_size", remedy=remedy)
    members = {place: cluster.typical(rows, clusters.members(place)).tolist() for place in large}
    return [Group(place, tuple(contexts.examples[i] for i in indices)) for place, indices in members.items()]


def circuit_of(
    lm: LM,
    saes: Mapping[Site, SAE],
    examples: Sequence[result.Example],
    options: CircuitOptions,
    skip_first: int = 1,
    max_tokens: int = 2048,
    pieces: Pieces | None = None,
) -> Circuit:
    """The circuit behind the answers to some contexts: every node ablated to zero, effects summed over positions."""
    search = Options(
        method=options.method, steps=options.steps, rule=options.rule, summed="positions", skip_first=skip_first,
        node_threshold=options.node_threshold, edge_threshold=options.edge_threshold, max_tokens=max_tokens,
    )  # fmt: skip
    few = batches(lm, examples, metric=options.metric, side="left", max_tokens=max_tokens)
    return find_circuit(lm, saes, few, search, pieces=pieces)


# -- in plain values --------------------------------------------------------------------------------------------------


def described(
    lm: LM,
    subject: Subject,
    contexts: result.Contexts,
    clusters: cluster.Clusters,
    explained: Sequence[Explained],
    options: BehaviourOptions,
    records: RecordsOf | None = None,
) -> result.BehavioursResult:
    """The result."""
    strongest = [_strongest(one.circuit) for one in explained]
    latents = by_site(sorted((node.site, node.slot) for nodes in strongest for node in nodes))
    known = records(latents) if records and latents else {}
    return result.BehavioursResult(
        subject=subject,
        counts=contexts.counts,
        vectors=options.vectors.kind,
        method=options.circuit.method,
        min_size=options.clusters.min_size,
        clusters=tuple(
            result.Cluster(int(size), *map(float, rest))
            for size, *rest in zip(clusters.sizes, clusters.coherence, clusters.control, clusters.spread, strict=True)
        ),
        stability=clusters.stability,
        behaviours=tuple(
            _behaviour(lm, one, options.circuit, tuple(_latent(node, known) for node in nodes))
            for one, nodes in zip(explained, strongest, strict=True)
        ),
    )


def _strongest(circuit: Circuit) -> list[Node]:
    latents = [node for node in circuit.above(0.0) if not node.is_error]
    return sorted(latents, key=lambda node: -abs(node.effect))[:_LATENTS]


def _latent(node: Node, records: Mapping[Site, Records]) -> result.StrongLatent:
    if node.site not in records:
        return result.StrongLatent(node.site, node.slot, node.effect)
    entry = entry_of(records[node.site].latent(node.slot), kinds=("top",))
    promoted = tuple((text, float(value)) for text, value in entry.promoted[:_PROMOTED])
    top = max(entry.contexts, key=lambda context: context.activations[context.peak], default=None)
    firing = None if top is None else result.Firing(tuple(top.tokens), tuple(map(float, top.activations)), top.peak)
    return result.StrongLatent(node.site, node.slot, node.effect, promoted, firing)


def _behaviour(
    lm: LM, explained: Explained, options: CircuitOptions, strongest: tuple[result.StrongLatent, ...]
) -> result.Behaviour:
    examples, circuit = explained.group.examples, explained.circuit
    latents, errors = circuit.counts(options.node_threshold)
    answers = Counter(example.answer for example in examples).most_common(_ANSWERS)
    texts = lm.token_strings([token for token, _ in answers])
    return result.Behaviour(
        place=explained.group.place,
        documents=len({example.document for example in examples}),
        answers=tuple((text, count) for text, (_, count) in zip(texts, answers, strict=True)),
        contexts=tuple(
            result.Context(tuple(lm.pieces(e.ids)), lm.token_strings([e.answer])[0], e.loss)
            for e in examples[:_CONTEXTS]
        ),
        examples=circuit.n_examples,
        latents=latents,
        errors=errors,
        edges=len(circuit.edges_above(options.node_threshold, options.edge_threshold)),
        strongest=strongest,
        sums=circuit.about.sums,
        run=explained.run,
        drawing=explained.drawing,
    )
