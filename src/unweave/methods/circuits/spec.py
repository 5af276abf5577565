"""What finding, measuring and drawing a circuit can be asked, and what every question about several SAEs can.

Knows no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from unweave.circuits.about import Ablation, Options, Summed
from unweave.core.command import Command
from unweave.core.errors import UnweaveError
from unweave.core.refs import Content, FileRef
from unweave.core.rules import at_least, not_empty, rule
from unweave.core.spec import Spec, operational
from unweave.data.spec import ModelRef
from unweave.inputs.spec import OfSAEsSpec, SAERefs, unused
from unweave.methods.circuits.result import CircuitSearch, Drawing, Errors, Faithfulness

CircuitRef = Annotated[Path, Content("unweave.circuits.opened:content_of_circuit")]
"""A circuit: its file, or the run that has it."""

_ALL_POSITIVE = rule("at least 0, each of them", lambda values: min(values, default=0) >= 0)
CONVENTIONS: dict[str, dict[str, str]] = {
    "unweave": {"rule": "midpoint", "metric": "neg-log-p"},
    "paper": {"rule": "right", "metric": "neg-log-p"},
    "code": {"rule": "left", "metric": "neg-logit"},
}
"""Where Marks et al. 2024 and their released code differ: the end of each step of integrated gradients at which the
gradient is taken (the paper's eq. 4, and the code's), and the metric of single inputs."""


@dataclass(frozen=True, kw_only=True)
class CircuitFindSpec(Options, OfSAEsSpec):
    """Finding the circuit of a behaviour."""

    shorthands = {
        "convention": (
            Literal["unweave", "paper", "code"] | None,
            "Rule and metric by name. unweave: midpoint, -log p; paper: right, -log p; code, as the authors released "
            "it: left, -logit. Fields that are given replace them.",
        )
    }

    task: Literal["simple", "within_rc", "across_rc", "across_pp"] | None = None
    """Subject-verb agreement: alone, within or across a relative clause, or across a prepositional phrase (default)."""
    pairs: FileRef | None = None
    """Pairs of your own instead: JSON lines with clean_prefix, patch_prefix, clean_answer, patch_answer."""
    inputs: FileRef | None = None
    """Single texts instead: JSON lines with context and answer; latents are ablated."""
    examples: Annotated[int, at_least(1)] = 100
    """How many examples. A file may hold fewer."""
    split: Literal["train", "test"] = "train"
    """Which of the task's words: no sentence is in both."""
    seed: int = 0
    """Choice of examples."""
    metric: Literal["neg-log-p", "neg-logit"] = "neg-log-p"
    """Of single inputs: -log p(answer), or -logit(answer). Of pairs it is always logit(patch) - logit(clean)."""
    summed: Summed | None = None
    """Keep positions, for sentences of equal length, or sum over them; by default kept for pairs, summed for inputs."""
    edges: bool = True
    """Whether to find edges; nodes alone are much quicker and all that `evaluate` needs."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "", base: Spec | None = None) -> Self:
        """As ``Spec.from_dict``; ``convention`` stands for rule and metric."""
        if "convention" not in values:
            return super().from_dict(values, where=where, base=base)
        others = {name: value for name, value in values.items() if name != "convention"}
        name = values["convention"]
        if name not in CONVENTIONS:
            known = ", ".join(CONVENTIONS)
            raise UnweaveError(f"there is no convention {name!r}", where=where, remedy=f"conventions: {known}")
        meant = dict(CONVENTIONS[name])
        if others.get("inputs") is None:
            meant.pop("metric")  # pairs have one metric only
        if others.get("method", "ig") != "ig":
            meant.pop("rule")
        if not meant:
            raise UnweaveError(
                f"convention = {name!r} would have no effect: it names the rule of integrated gradients and the metric "
                "of single inputs",
                where=where or cls.__name__,
                remedy="leave convention out",
            )
        return super().from_dict({**meant, **others}, where=where, base=base)

    @property
    def keeps_positions(self) -> bool:
        return self.summed == "none" or (self.summed is None and self.inputs is None)

    def __post_init__(self) -> None:
        super().__post_init__()
        named = [name for name in ("task", "pairs", "inputs") if getattr(self, name) is not None]
        if len(named) > 1:
            raise UnweaveError(
                f"{' and '.join(named)} are both given", where=type(self).__name__, remedy="name one of them"
            )
        uses = {
            "metric": self.inputs is not None,
            "ablation": self.inputs is not None,
            "split": named in ([], ["task"]),
            "steps": self.method == "ig",
            "rule": self.method == "ig",
            "edge_threshold": self.edges,
            "upstream": self.edges,
        }
        unused(self, uses)
        if self.edges and self.method == "exact":
            raise UnweaveError(
                "exact effects have no gradient, and edges need one", where="method", remedy="use ig, or --no-edges"
            )


@dataclass(frozen=True, kw_only=True)
class OfCircuitSpec(Spec):
    """A question about a circuit that was found."""

    circuit: CircuitRef
    """A run of `unweave circuit find`, or, to draw it, any circuit.safetensors. Its content decides which run is
    reused."""
    saes: SAERefs = ()
    """Where its SAEs are; by default where the circuit's run found them. Others than those are refused."""
    device: str | None = operational(None)
    """cpu, cuda, cuda:1...; by default a GPU where there is one."""


@dataclass(frozen=True, kw_only=True)
class CircuitDrawSpec(OfCircuitSpec):
    """Drawing a circuit that was found. Its SAEs and the device are needed for contexts only."""

    nodes: Annotated[int, at_least(1)] = 60
    """About how many of the strongest nodes to draw where no node_threshold is given."""
    node_threshold: Annotated[float | None, at_least(0)] = None
    """Draw nodes whose effect is larger, in either direction; by default as nodes says, but never below the
    threshold that the circuit's edges were found with."""
    edge_threshold: Annotated[float | None, at_least(0)] = None
    """Draw edges whose weight is larger, in either direction; by default so that about 2.5 for each node remain."""
    max_nodes: Annotated[int, at_least(1)] = 150
    """Never draw more nodes than this; the picture says how many it leaves out."""
    annotations: FileRef | None = None
    """What to write on latents: JSON lines as `unweave annotate` makes them, or in the paper's form."""
    contexts: bool = False
    """Show in circuit.html what each latent drawn responds to. This reads text, which may take minutes."""
    tokens: Annotated[int | None, at_least(1)] = None
    """How many tokens contexts are taken from; by default 200,000, or all there are."""
    title: str | None = None
    """What stands above the picture; by default the circuit's task."""
    model: ModelRef | None = None
    """For contexts: the model; by default that of the circuit's run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        unused(self, {"nodes": self.node_threshold is None, "tokens": self.contexts, "device": self.contexts})


@dataclass(frozen=True, kw_only=True)
class CircuitEvaluateSpec(OfCircuitSpec):
    """Measuring how faithful and how complete a circuit is."""

    pairs: FileRef | None = None
    """Pairs to measure on: JSON lines as for `circuit find`; by default the test split of its task."""
    inputs: FileRef | None = None
    """Single texts to measure on, for a circuit of single texts."""
    examples: Annotated[int, at_least(1)] = 40
    """How many examples. A file may hold fewer; what the circuit was found on is left out."""
    seed: int = 0
    """Choice of examples and of random nodes."""
    start_layer: Annotated[int | None, at_least(-1)] = None
    """Ablate from this layer on, -1 for the embedding too; by default from the first layer with nodes. Early layers
    deal with particular words, which are others in the test split."""
    errors: Annotated[tuple[Errors, ...], not_empty()] = ("default", "remove-attn-mlp", "remove")
    """What happens to errors, a curve for each: nodes as any other (default), all kept, all removed, or removed at
    attention and MLPs."""
    ablation: Ablation | None = None
    """What ablated nodes are set to: means over the patch texts (default for pairs), over the clean texts (default for
    single texts; over all their tokens together where positions are summed), or zero."""
    spaced: Literal["range", "paper"] = "range"
    """Thresholds: 15 at log-spaced numbers of nodes, from all to one; or 15 from 1e-4 to 1, as in the paper."""
    thresholds: Annotated[tuple[float, ...], _ALL_POSITIVE] = ()
    """Thresholds of your own instead."""
    neurons: bool = True
    """Whether to find a circuit of neurons at the same sites on the same examples, and measure it beside."""
    draws: Annotated[int, at_least(0)] = 1
    """How many circuits of random nodes to measure beside each; 0 for none."""
    level: float = 0.8
    """The faithfulness for which to say how many nodes it takes."""
    max_tokens: Annotated[int, at_least(1)] = operational(1024)
    """Tokens that go through the model at once at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs is not None and self.inputs is not None:
            raise UnweaveError("pairs and inputs are both given", where=type(self).__name__, remedy="name one of them")
        unused(self, {"spaced": not self.thresholds})


FIND = Command(
    words="circuit find",
    spec=CircuitFindSpec,
    result=CircuitSearch,
    stage="unweave.methods.circuits.stage_find:run",
    summary="Find the latents and errors that cause a behaviour, and how they act on one another.",
    about="Integrated gradients over minimal pairs, or over single texts with ablation, give every latent's effect "
    "at every SAE's site; then the edges between those above a threshold. Keep positions for sentences "
    "of one template, sum over them for texts of any length. Examples run in batches that fit the memory; "
    "after an interruption the same command goes on where it was.",
    examples=(
        "unweave circuit find --saes runs/train-0123456789ab/sae --task across_pp",
        "unweave circuit find --saes runs/train-0123456789ab/sae --inputs contexts.jsonl --summed positions",
    ),
)
EVALUATE = Command(
    words="circuit evaluate",
    spec=CircuitEvaluateSpec,
    result=Faithfulness,
    stage="unweave.methods.circuits.stage_evaluate:run",
    summary="Measure how much of a behaviour a circuit carries, on texts that it was not found on.",
    about="Everything outside the circuit is set to its mean over the changed texts, at every threshold: "
    "faithfulness is what is left of the behaviour, 1 for the whole model and 0 for none; completeness is what "
    "is left without the circuit. Beside it stand circuits without errors, of neurons at the same sites, and "
    "of random nodes. Writes faithfulness.png, faithfulness.csv and how many nodes reach 0.8.",
    examples=(
        "unweave circuit evaluate --circuit runs/circuit-find-0123456789ab",
        "unweave circuit evaluate --circuit runs/circuit-find-0123456789ab --start-layer 2 --spaced paper --draws 5",
    ),
)
DRAW = Command(
    words="circuit draw",
    spec=CircuitDrawSpec,
    result=Drawing,
    stage="unweave.methods.circuits.stage_draw:run",
    summary="Draw a circuit: layers upward, token positions across, as SVG, as a page to look around in, and as JSON.",
    about="Rectangles are latents, triangles are errors; blue raises the metric when patched, red lowers it. Latents "
    "are labelled from an annotation file, as 'unweave annotate' writes it. circuit.html shows every node's "
    "effect and strongest edges, and with --contexts what it responds to. Without thresholds about 60 nodes "
    "are drawn.",
    examples=(
        "unweave circuit draw --circuit runs/circuit-find-0123456789ab --annotations annotations.jsonl --contexts",
        "unweave circuit draw --circuit circuit.safetensors --node-threshold 0.1 --edge-threshold 0.01",
    ),
)
COMMANDS = (FIND, EVALUATE, DRAW)
