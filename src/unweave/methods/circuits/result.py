"""What finding, measuring and drawing a circuit give. Knows no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unweave.attribute.result import SiteSum
from unweave.circuits.about import Ablation, Example, Means, Node, Search
from unweave.core.result import Result
from unweave.inputs.subject import Subject

Errors = Literal["default", "keep", "remove", "remove-attn-mlp"]
"""What happens to errors: nodes as any other, all in the circuit, none, or none at attention and MLPs."""


@dataclass(frozen=True)
class LeftOut:
    """Examples that were not used, and why."""

    reason: str
    examples: int


@dataclass(frozen=True)
class Accuracy:
    """Shares of texts on which the model prefers the right answer; chance is half."""

    clean: float
    patch: float
    problem: str | None
    """why effects say little of this model and task; None where they say much"""


@dataclass(frozen=True)
class Used:
    """The examples of a question."""

    examples: int
    left_out: tuple[LeftOut, ...]
    accuracy: Accuracy | None
    """None for single texts"""
    first: tuple[Example, ...]
    """the texts of the first example"""

    @property
    def problem(self) -> str | None:
        """Why effects say little of this model and task."""
        return None if self.accuracy is None else self.accuracy.problem


@dataclass(frozen=True)
class StrongEdge:
    """An edge between nodes above the threshold; ``down`` None is the metric."""

    up: Node
    down: Node | None
    weight: float


@dataclass(frozen=True)
class CircuitSearch(Result):
    """The circuit of a behaviour."""

    subject: Subject
    task: str
    """what the examples are, in words"""
    neurons: bool
    """whether its nodes are neurons"""
    used: Used
    search: Search
    sums: tuple[SiteSum, ...]
    """sums of effects beside measured changes, by site"""
    edges: int | None
    """between nodes above the thresholds; None for a search without edges"""
    strongest: tuple[Node, ...]
    """each site's strongest nodes above the threshold"""
    strongest_edges: tuple[StrongEdge, ...]
    circuit: Path
    listing: Path
    """JSON with every node and edge above the thresholds"""

    @property
    def latents(self) -> int:
        """Latents above the threshold."""
        return sum(row.latents for row in self.search.above)

    @property
    def errors(self) -> int:
        """Errors above the threshold."""
        return sum(row.errors for row in self.search.above)


@dataclass(frozen=True)
class RandomNodes:
    """Faithfulness of as many random latents and errors, of those whose effect is not 0."""

    mean: float
    low: float
    """of the draws, as ``high``"""
    high: float
    draws: int


@dataclass(frozen=True)
class Row:
    """One circuit: the nodes above a threshold. ``completeness`` is F of everything but them: low is good."""

    threshold: float
    nodes: int
    latents: int
    errors: int
    faithfulness: float
    completeness: float
    random: RandomNodes | None


@dataclass(frozen=True)
class Sweep:
    """One circuit at every size: ``rows`` from many nodes to few, with errors treated one way."""

    neurons: bool
    """whether its nodes are neurons"""
    errors: Errors
    rows: tuple[Row, ...]
    model: float
    """the metric's mean in the whole model"""
    empty: float
    """the same without any node"""
    examples: int
    start_layer: int
    ablation: Ablation
    means: Means
    """what the means that ablated nodes are set to were taken over"""
    skip_first: int
    changing: int
    """nodes from the start layer on whose effect is not 0"""

    def nodes_for(self, level: float = 0.8) -> float | None:
        """How many nodes reach a faithfulness: where the curve, going up in nodes, first crosses ``level``, linear in
        the logarithm of the number of nodes. None where it never does."""
        return _reached([(row.nodes, row.faithfulness) for row in self.rows], level)

    def random_nodes_for(self, level: float = 0.8) -> float | None:
        """The same for random nodes."""
        return _reached([(row.nodes, row.random.mean) for row in self.rows if row.random is not None], level)

    def reached(self, level: float) -> Reached:
        """Both, and of how many nodes."""
        return Reached(self.neurons, self.errors, self.nodes_for(level), self.random_nodes_for(level), self.changing)


@dataclass(frozen=True)
class Reached:
    """How many nodes a curve takes to reach the level, and how many random ones; None: it never does."""

    neurons: bool
    errors: Errors
    nodes: float | None
    random_nodes: float | None
    changing: int
    """of how many"""


@dataclass(frozen=True)
class Faithfulness(Result):
    """How much of a behaviour a circuit carries, and how much is left without it."""

    subject: Subject
    circuit: str
    """the name of the run that found it"""
    task: str
    used: Used
    level: float
    """the faithfulness for which ``reached`` says how many nodes it takes"""
    reached: tuple[Reached, ...]
    curves: tuple[Sweep, ...]
    """the circuit's, with errors treated in each way, then that of neurons"""
    figure: Path
    table: Path

    def curve(self, errors: Errors = "default", *, neurons: bool = False) -> Sweep | None:
        """One of the curves; None where it was not measured."""
        return next((c for c in self.curves if (c.errors, c.neurons) == (errors, neurons)), None)


@dataclass(frozen=True)
class Drawing(Result):
    """Pictures of a circuit."""

    subject: Subject | None
    """None where the circuit's file does not say"""
    title: str
    examples: int
    """over which effects are means"""
    nodes: int
    errors: int
    """of the nodes"""
    labelled: int
    """nodes with an annotation"""
    edges: int
    nodes_left_out: int
    """above the threshold, but weaker than those for which there is room; likewise edges"""
    edges_left_out: int
    node_threshold: float
    edge_threshold: float
    why: Literal["asked", "own", "count"]
    """where the node threshold comes from: the question, the circuit's search, or about ``wanted`` nodes to draw"""
    wanted: int
    picture: Path
    report: Path
    listing: Path


def _reached(points: Sequence[tuple[int, float]], level: float) -> float | None:
    """Where a curve first reaches a level, going up in nodes; linear in the logarithm of the number of nodes."""
    ordered = sorted(points)
    for i, (nodes, value) in enumerate(ordered):
        if value >= level:
            if i == 0:
                return float(nodes)
            before, low = ordered[i - 1]
            share = (level - low) / (value - low)
            return math.exp(math.log(max(before, 1)) * (1 - share) + math.log(max(nodes, 1)) * share)
    return None
