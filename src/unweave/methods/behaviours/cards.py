"""What the index shows of each behaviour: its contexts, its circuit, and what the strongest latents fire on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from unweave.circuits.draw import draw_svg
from unweave.circuits.graph import Circuit, Node
from unweave.core.run import Run
from unweave.core.site import Site
from unweave.inputs.saes import Opened
from unweave.latents.collect_many import records_of
from unweave.latents.records import Records
from unweave.latents.view import entry_of
from unweave.methods.behaviours.behaviours import Example
from unweave.methods.behaviours.cluster import Clusters
from unweave.methods.behaviours.spec import CircuitBehavioursSpec
from unweave.methods.behaviours.view import Card, Latent

_CONTEXTS = 24
_ANSWERS = 6
_LATENTS = 10
_PROMOTED = 5
_DRAWN_NODES, _DRAWN_EDGES = 60, 200


@dataclass(frozen=True)
class Behaviour:
    """One cluster: its place among the clusters, and its contexts, the most typical first."""

    place: int
    examples: tuple[Example, ...]


def cards_of(
    spec: CircuitBehavioursSpec,
    opened: Opened,
    clusters: Clusters,
    behaviours: Sequence[Behaviour],
    parts: Sequence[Run],
    runs: Path,
) -> list[Card]:
    """A card for each behaviour, whose circuit is in the part of the same place."""
    circuits = [Circuit.load(part.file("circuit.safetensors")) for part in parts]
    strongest = [_strongest(circuit) for circuit in circuits]
    records = _records(spec, opened, [node for nodes in strongest for node in nodes], runs)
    return [
        _card(spec, opened, clusters, behaviour, part, circuit, [_latent(node, records) for node in nodes])
        for behaviour, part, circuit, nodes in zip(behaviours, parts, circuits, strongest, strict=True)
    ]


def _strongest(circuit: Circuit) -> list[Node]:
    latents = [node for node in circuit.above(0.0) if not node.is_error]
    return sorted(latents, key=lambda node: -abs(node.effect))[:_LATENTS]


def _records(spec: CircuitBehavioursSpec, opened: Opened, nodes: Sequence[Node], runs: Path) -> Mapping[Site, Records]:
    """Records of these latents, from one pass over the text that the autoencoders know."""
    chosen: dict[Site, set[int]] = {}
    for node in nodes:
        chosen.setdefault(node.site, set()).add(node.slot)
    if not spec.records_tokens or not chosen:
        return {}
    if spec.data is not None:
        there = [spec.tokens]
    else:
        told = [sae.provenance.get("train", {}) for sae in opened.saes.values()]
        there = [one["data"]["tokens"] for one in told if "data" in one]
    tokens = min([spec.records_tokens, *there])
    latents = {site: sorted(found) for site, found in sorted(chosen.items())}
    split = spec.split if spec.data is not None else "train"
    return records_of(opened, spec.data, tokens, runs, latents, split=split, model=spec.model)


def _latent(node: Node, records: Mapping[Site, Records]) -> Latent:
    if node.site not in records:
        return Latent(node.name, node.effect)
    entry = entry_of(records[node.site].latent(node.slot), kinds=("top",))
    top = max(entry.contexts, key=lambda context: context.activations[context.peak], default=None)
    return Latent(node.name, node.effect, promoted=entry.promoted[:_PROMOTED], context=top)


def _card(
    spec: CircuitBehavioursSpec,
    opened: Opened,
    clusters: Clusters,
    behaviour: Behaviour,
    part: Run,
    circuit: Circuit,
    latents: Sequence[Latent],
) -> Card:
    lm, place, examples = opened.lm, behaviour.place, behaviour.examples
    answers = Counter(example.answer for example in examples).most_common(_ANSWERS)
    texts = lm.token_strings([token for token, _ in answers])
    return Card(
        name=f"behaviour {place + 1}",
        place=place,
        size=int(clusters.sizes[place]),
        documents=len({example.document for example in examples}),
        coherence=float(clusters.coherence[place]),
        control=float(clusters.control[place]),
        spread=float(clusters.spread[place]),
        answers=[(text, count) for text, (_, count) in zip(texts, answers, strict=True)],
        contexts=[
            (lm.pieces(example.ids), lm.token_strings([example.answer])[0], example.loss)
            for example in examples[:_CONTEXTS]
        ],
        latents=latents,
        facts={key: part.result[key] for key in ("latents", "errors", "edges")},
        examples=circuit.n_examples,
        svg=_drawing(spec, circuit, f"Behaviour {place + 1}: what makes the model say {texts[0]!r}"),
        folder=part.path.name,
    )


def _drawing(spec: CircuitBehavioursSpec, circuit: Circuit, title: str) -> str:
    """The circuit's drawing, of the strongest nodes; empty where no node is above the threshold."""
    if not circuit.above(spec.node_threshold):
        return ""
    return draw_svg(
        circuit,
        node_threshold=spec.node_threshold,
        edge_threshold=spec.edge_threshold,
        title=title,
        max_nodes=_DRAWN_NODES,
        max_edges=_DRAWN_EDGES,
    )
