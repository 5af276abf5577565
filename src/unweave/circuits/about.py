"""The description of a circuit, in plain values that its file holds and results share. Knows no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from unweave.attribute.options import Method, Rule
from unweave.attribute.result import SiteSum, incomplete
from unweave.core.rules import at_least
from unweave.core.site import Site
from unweave.core.spec import Spec, operational
from unweave.inputs.subject import Subject
from unweave.latents.annotations import name_of

Summed = Literal["none", "positions"]
"""Effects of each position, or summed over positions."""
Ablation = Literal["patch", "clean", "zero"]
"""What nodes outside a circuit are set to: means over the patch texts or the clean ones, or zero."""
Means = Literal["positions", "tokens"]
"""What means are taken over: examples, position by position and length by length, or all tokens of all examples."""


@dataclass(frozen=True, kw_only=True)
class Options(Spec):
    """How a circuit is found. Thresholds are in units of the metric."""

    method: Method = "ig"
    """Integrated gradients; attribution patching, which is one step of it; or exact effects, for tiny models."""
    steps: Annotated[int, at_least(1)] = 10
    """Steps of integrated gradients."""
    rule: Rule = "midpoint"
    """Where in each step the gradient is taken. graded: in the middle of steps that grow shorter towards the end, for
    ablation to the zero vector (neurons, an SAE without a decoder bias), with 80 steps or more."""
    summed: Summed = "none"
    """Keep positions, for sentences of equal length, or sum over them."""
    skip_first: Annotated[int, at_least(0)] = 0
    """How many first tokens of each text are left as they are, as 1 for a BOS token."""
    ablation: Literal["zero", "mean"] = "zero"
    """Of single texts: ablate nodes to zero, or to their means over all tokens. Take the mean for neurons, and where
    effects do not add up to what is measured."""
    node_threshold: Annotated[float, at_least(0)] = 0.1
    """Nodes whose mean effect on the metric is larger, in either direction, are in the circuit and get edges."""
    edge_threshold: Annotated[float, at_least(0)] = 0.01
    """Edges of larger weight, in either direction, are kept; 0 keeps all."""
    upstream: Literal["above", "all"] = "above"
    """Edges from nodes above the threshold only, or from all."""
    max_tokens: Annotated[int, at_least(1)] = operational(1024)
    """Tokens that go through the model at once at most; halved while memory is too small for them."""


@dataclass(frozen=True, kw_only=True)
class AblationOptions(Spec):
    """How everything outside a circuit is ablated."""

    start_layer: Annotated[int, at_least(-1)] = 0
    """From this layer on, -1 for the embedding too."""
    ablation: Ablation = "patch"
    """What ablated nodes are set to: means over the patch texts or the clean ones, or zero."""
    skip_first: Annotated[int, at_least(0)] = 0
    """How many first tokens of each text stay as they are, whatever is kept."""
    max_tokens: Annotated[int, at_least(1)] = operational(1024)
    """Tokens that go through the model at once at most."""


@dataclass(frozen=True)
class Node:
    """One node above a threshold. ``slot`` F (``is_error``) is the error; ``position`` None: summed over positions."""

    site: Site
    slot: int
    position: int | None
    effect: float
    is_error: bool

    @property
    def name(self) -> str:
        """``resid_post.9/123``, or ``resid_post.9/error``; with its position in front where positions are kept."""
        inner = f"{self.site}/{'error' if self.is_error else self.slot}"
        return inner if self.position is None else f"{self.position}, {inner}"


@dataclass(frozen=True)
class Supporting:
    """A latent that supports a classifier's labels, and by how much, in logits."""

    site: Site
    latent: int
    effect: float

    @property
    def name(self) -> str:
        return name_of(self.site, self.latent)


def by_site(latents: Iterable[tuple[Site, int]]) -> dict[Site, list[int]]:
    """Latents by site, in their order and each once."""
    grouped: dict[Site, dict[int, None]] = {}
    for site, latent in latents:
        grouped.setdefault(site, {})[latent] = None
    return {site: list(group) for site, group in grouped.items()}


@dataclass(frozen=True)
class SiteCounts:
    """How many nodes of a site are above the search's threshold."""

    site: Site
    latents: int
    errors: int


@dataclass(frozen=True)
class EdgeCounts:
    """Edges of all pairs of sites, and those above the search's threshold."""

    measured: int
    stored: int


@dataclass(frozen=True)
class Example:
    """One text of an example and the answer to it."""

    side: Literal["clean", "patch", "alone"]
    text: str
    answer: str


@dataclass(frozen=True)
class Search:
    """How a circuit was searched for, and what was measured on the way."""

    options: Options
    shortest: int
    """tokens of the shortest example"""
    longest: int
    other_lengths: int
    """examples left out since positions are kept and their length is not the commonest"""
    clean: float
    """the metric's mean on the clean texts"""
    patch: float | None
    """the same on the patch texts; None where nodes are ablated"""
    above: tuple[SiteCounts, ...]
    edges: EdgeCounts | None = None
    """None for a search without edges"""
    ends: tuple[Site, ...] = ()
    """sites with edges to the metric. Of several, these edges are total effects: what one does through a later one
    counts at both"""


@dataclass(frozen=True)
class Judged:
    """Which latents of a classifier's circuit are judged: those that support its labels, the strongest."""

    threshold: float = 0.0
    """they support the labels by more than this, in logits"""
    top: int | None = None
    """so many at most"""


@dataclass(frozen=True)
class About:
    """What a circuit is of, and what was measured to find it."""

    task: str = ""
    """what the examples are, in words, for titles"""
    of: Literal["model", "classifier"] = "model"
    """what the metric reads: the model's output, or a classifier's on its activations, whose label effects support"""
    judged: Judged | None = None
    """of a classifier's circuit"""
    neurons: bool = False
    """whether all nodes are coordinates of activations, which no SAE explains"""
    subject: Subject | None = None
    tokens: tuple[str, ...] = ()
    """the tokens of one example, where positions are kept"""
    examples: tuple[Example, ...] = ()
    """one example, its texts side by side"""
    search: Search | None = None
    sums: tuple[SiteSum, ...] = ()
    """sums of effects beside measured changes, by site"""

    @property
    def incomplete(self) -> str | None:
        """What a reader must know where integrated gradients do not add up to the measured change."""
        promised = self.search is None or self.search.options.method == "ig"
        return incomplete(self.sums) if promised else None


@dataclass(frozen=True)
class Costs:
    """What finding a circuit took: no part of its file."""

    max_tokens: int
    """the largest pass that memory allowed"""
    peak_gb: float
    seconds_nodes: float
    seconds_edges: float | None = None
    peak_gpu_gb: float | None = None
