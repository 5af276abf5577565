"""What a circuit says of itself, in plain values that its file holds and results share. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unweave.attribute.options import Method, Rule, fractions
from unweave.attribute.result import SiteSum, incomplete
from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.inputs.subject import Subject

Summed = Literal["none", "positions"]
"""Effects of each position, or summed over positions."""
Ablation = Literal["patch", "clean", "zero"]
"""What nodes outside a circuit are set to: means over the patch texts or the clean ones, or zero."""
Means = Literal["positions", "tokens"]
"""What means are taken over: examples, position by position and length by length, or all tokens of all examples."""


@dataclass(frozen=True)
class Options:
    """How a circuit is found. Thresholds are in units of the metric.

    ``steps`` and ``rule`` are those of integrated gradients. ``skip_first`` first tokens of each row are left as they
    are. ``upstream`` "above" draws edges only from nodes whose mean effect is above ``node_threshold``. Edges with
    |weight| <= ``edge_threshold`` are dropped, with 0 none. ``metric_at``: see ``attribute.runner.Metric``. Examples
    without patch inputs are ablated: to zero, or each node to its "mean" over all tokens of all examples.
    """

    method: Method = "ig"
    steps: int = 10
    rule: Rule = "midpoint"
    summed: Summed = "none"
    skip_first: int = 0
    node_threshold: float = 0.1
    edge_threshold: float = 0.01
    upstream: Literal["above", "all"] = "above"
    max_tokens: int = 1024
    metric_at: Site | None = None
    ablation: Literal["zero", "mean"] = "zero"

    def __post_init__(self) -> None:
        fractions(self.steps, self.rule)
        valid = {
            "method": self.method in ("ig", "attribution", "exact"),
            "summed": self.summed in ("none", "positions"),
            "skip_first": self.skip_first >= 0,
            "node_threshold": self.node_threshold >= 0,
            "edge_threshold": self.edge_threshold >= 0,
            "upstream": self.upstream in ("above", "all"),
            "ablation": self.ablation in ("zero", "mean"),
            "max_tokens": self.max_tokens > 0,
        }
        for name, fine in valid.items():
            if not fine:
                raise UnweaveError(f"{name} = {getattr(self, name)!r} is invalid", where="unweave.circuits.Options")


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
class Counts:
    """How many nodes are above a threshold."""

    latents: int
    errors: int


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
    """None where no edges were asked for"""
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
