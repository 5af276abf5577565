"""What the stages of ``unweave circuit`` can be asked. Knows no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from unweave.core.errors import UnweaveError
from unweave.core.spec import Spec, operational, require
from unweave.jobs.specs import DataSpec
from unweave.judge.spec import JudgeSpec


@dataclass(frozen=True, kw_only=True)
class OfSAEsSpec(Spec):
    """A question about several autoencoders in one model."""

    saes: tuple[str, ...] = field(default=(), metadata={"result": False})
    """Autoencoders: folders as `train` makes them (one SAE, or all below sae/), any that can be read (docs/formats.md),
    or SITE=NAME for one whose file names no site. Their content decides which run is reused."""
    neurons: tuple[str, ...] = ()
    """Sites, also by pattern, whose neurons (coordinates) stand for latents, without an error: the baseline."""
    sites: tuple[str, ...] = ()
    """Use only the autoencoders at these sites, by pattern; by default all."""
    model: str | None = None
    """The model; by default the one that the autoencoders were trained on."""
    device: str | None = operational(None)
    """cpu, cuda, cuda:1...; by default a GPU where there is one."""
    accept_mismatch: str | None = None
    """Use autoencoders in a model that they were not trained on, for this reason; what was measured is recorded."""

    def __post_init__(self) -> None:
        if not self.saes and not self.neurons:
            raise UnweaveError("there are no sites", where="saes", remedy="name autoencoders (saes) or sites (neurons)")
        if not self.saes and (self.sites or self.accept_mismatch):
            raise UnweaveError("sites and accept_mismatch say something about saes, and there are none", where="saes")
        if self.neurons and not self.saes and self.model is None:
            raise UnweaveError("neurons alone do not say of which model", where="model", remedy="name it with --model")


CONVENTIONS: dict[str, dict[str, str]] = {
    "unweave": {"rule": "midpoint", "metric": "neg-log-p"},
    "paper": {"rule": "right", "metric": "neg-log-p"},
    "code": {"rule": "left", "metric": "neg-logit"},
}
"""Where Marks et al. 2024 and their released code differ: the end of each step of integrated gradients at which the
gradient is taken (the paper's eq. 4, and the code's), and the metric of single inputs."""


@dataclass(frozen=True, kw_only=True)
class CircuitFindSpec(OfSAEsSpec):
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
    pairs: Path | None = field(default=None, metadata={"result": False})
    """Pairs of your own instead: JSON lines with clean_prefix, patch_prefix, clean_answer, patch_answer."""
    inputs: Path | None = field(default=None, metadata={"result": False})
    """Single texts instead: JSON lines with context and answer; latents are ablated to zero."""
    examples: int = 100
    """How many examples. A file may hold fewer."""
    split: Literal["train", "test"] = "train"
    """Which of the task's words: no sentence is in both."""
    seed: int = 0
    """Choice of examples."""
    method: Literal["ig", "attribution", "exact"] = "ig"
    """Integrated gradients; attribution patching, which is one step of it; or exact effects, for tiny models."""
    steps: int = 10
    """Steps of integrated gradients."""
    rule: Literal["left", "midpoint", "right"] = "midpoint"
    """Where in each step the gradient is taken."""
    metric: Literal["neg-log-p", "neg-logit"] = "neg-log-p"
    """Of single inputs: -log p(answer), or -logit(answer). Of pairs it is always logit(patch) - logit(clean)."""
    summed: Literal["none", "positions"] | None = None
    """Keep positions, for sentences of equal length, or sum over them; by default kept for pairs, summed for inputs."""
    skip_first: int = 0
    """How many first tokens of each text are left as they are, as 1 for a BOS token."""
    node_threshold: float = 0.1
    """Nodes whose mean effect on the metric is larger, in either direction, are in the circuit and get edges."""
    edge_threshold: float = 0.01
    """Edges of larger weight, in either direction, are kept; 0 keeps all."""
    upstream: Literal["above", "all"] = "above"
    """Edges from nodes above the threshold only, or from all."""
    edges: bool = True
    """Whether to find edges; nodes alone are much quicker and all that `evaluate` needs."""
    max_tokens: int = operational(1024)
    """Tokens that go through the model at once at most; halved while memory is too small for them."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "", base: Spec | None = None) -> Self:
        """As ``Spec.from_dict``; ``convention`` stands for rule and metric."""
        if "convention" not in values:
            return super().from_dict(values, where=where, base=base)
        given = {name: value for name, value in values.items() if name != "convention"}
        name = values["convention"]
        if name not in CONVENTIONS:
            known = ", ".join(CONVENTIONS)
            raise UnweaveError(f"there is no convention {name!r}", where=where, remedy=f"conventions: {known}")
        meant = dict(CONVENTIONS[name])
        if given.get("inputs") is None:
            meant.pop("metric")  # pairs have one metric only
        if given.get("method", "ig") != "ig":
            meant.pop("rule")
        return super().from_dict({**meant, **given}, where=where, base=base)

    @property
    def keeps_positions(self) -> bool:
        return self.summed == "none" or (self.summed is None and self.inputs is None)

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = {name: getattr(self, name) > 0 for name in ("examples", "steps", "max_tokens")}
        least = {name: getattr(self, name) >= 0 for name in ("skip_first", "node_threshold", "edge_threshold")}
        require(self, whole | least)
        named = [name for name in ("task", "pairs", "inputs") if getattr(self, name) is not None]
        if len(named) > 1:
            raise UnweaveError(
                f"{' and '.join(named)} are both given", where=type(self).__name__, remedy="name one of them"
            )
        uses = {
            "metric": self.inputs is not None,
            "split": named in ([], ["task"]),
            "steps": self.method == "ig",
            "rule": self.method == "ig",
            "edge_threshold": self.edges,
            "upstream": self.edges,
        }
        _unused(self, uses)
        if self.edges and self.method == "exact":
            raise UnweaveError(
                "exact effects have no gradient, and edges need one",
                where="method",
                remedy="use ig, or --no-edges",
            )


@dataclass(frozen=True, kw_only=True)
class CircuitDrawSpec(Spec):
    """Drawing a circuit that was found."""

    circuit: Path = field(metadata={"result": False})
    """A run of `unweave circuit find`, or any circuit.safetensors. Its content decides which drawing is reused."""
    nodes: int = 60
    """About how many of the strongest nodes to draw where no node_threshold is given."""
    node_threshold: float | None = None
    """Draw nodes whose effect is larger, in either direction; by default as nodes says, but never below the
    threshold that the circuit's edges were found with."""
    edge_threshold: float | None = None
    """Draw edges whose weight is larger, in either direction; by default so that about 2.5 for each node remain."""
    max_nodes: int = 150
    """Never draw more nodes than this; the picture says how many it leaves out."""
    annotations: Path | None = field(default=None, metadata={"result": False})
    """What to write on latents: JSON lines as `unweave annotate` makes them, or in the paper's form."""
    contexts: bool = False
    """Show in circuit.html what each latent drawn responds to. This reads text, which may take minutes."""
    tokens: int | None = None
    """How many tokens contexts are taken from; by default 200,000, or all there are."""
    title: str | None = None
    """What stands above the picture; by default the circuit's task."""
    saes: tuple[str, ...] = field(default=(), metadata={"result": False})
    """For contexts: where the autoencoders are; by default where the circuit's run found them."""
    model: str | None = None
    """For contexts: the model; by default that of the circuit's run."""
    device: str | None = operational(None)
    """For contexts: cpu, cuda, cuda:1...; by default a GPU where there is one."""

    def __post_init__(self) -> None:
        limits = {name: getattr(self, name) for name in ("node_threshold", "edge_threshold")}
        least = {name: value is None or value >= 0 for name, value in limits.items()}
        whole = {name: getattr(self, name) > 0 for name in ("nodes", "max_nodes")}
        require(self, least | whole | {"tokens": self.tokens is None or self.tokens > 0})
        _unused(self, {"nodes": self.node_threshold is None, "tokens": self.contexts, "device": self.contexts})


@dataclass(frozen=True, kw_only=True)
class CircuitBehavioursSpec(OfSAEsSpec):
    """Discovering behaviours in a text, and the circuit of each."""

    data: DataSpec | None = None
    """The text to look through; by default that of the autoencoders' training: each document's beginning, two
    windows long."""
    split: Literal["train", "heldout"] = "train"
    """Which documents of that text: those to train on, or those held out."""
    tokens: int = 40_000
    """How many tokens to look through."""
    max_loss: float = 0.3
    """The model is sure of a token whose cross-entropy is below this, in nats; the paper has 0.1 or 0.3."""
    context: int = 64
    """The most tokens of a context. Documents are cut into windows, from whose beginning contexts count."""
    min_context: int = 8
    """The fewest tokens of a context."""
    repeats: Literal["bigram", "word", "answer"] = "bigram"
    """Which tokens are left out as repetition: where the pair (token before, answer) occurred earlier in the context,
    as in the paper; or also where it did in another case; or where the answer itself did."""
    per_document: int = 8
    """The most tokens of one document, drawn at random."""
    contexts: int = 1000
    """The most contexts to cluster, drawn at random."""
    vectors: Literal["activations", "latents", "effects-dense", "effects-latents", "gradients"] = "effects-latents"
    """What contexts are compared by: dense or sparse activations, dense or sparse linear effects, or the projected
    gradient of the model's parameters."""
    positions: Literal["last", "last-5", "sum"] = "sum"
    """At which positions vectors are taken; gradients have none."""
    dimensions: int = 30_000
    """Dimensions of projected gradients."""
    density: float = 32 / 30_000
    """Share of the projection's entries that are not zero."""
    clustering: Literal["spectral", "kmeans"] = "spectral"
    """Spectral clustering on angular similarity, for up to about 8,192 contexts, or k-means in small batches."""
    clusters: int = 40
    """How many clusters."""
    rank: Literal["coherence", "size"] = "coherence"
    """Which clusters come first: those most coherent beside clusters drawn at random, or the largest."""
    min_size: int = 8
    """Smaller clusters are no behaviours."""
    behaviours: int = 20
    """How many clusters, from the first, get a circuit."""
    examples: int = 12
    """On how many contexts of a cluster, the most typical ones, its circuit is found; the paper has up to 100."""
    method: Literal["ig", "attribution"] = "ig"
    """Integrated gradients, or attribution patching, which is one step of it."""
    steps: int = 4
    """Steps of integrated gradients."""
    rule: Literal["left", "midpoint", "right"] = "midpoint"
    """Where in each step the gradient is taken."""
    metric: Literal["neg-log-p", "neg-logit"] = "neg-log-p"
    """What circuits explain: -log p(answer), as the paper, or -logit(answer), as its released code."""
    node_threshold: float = 0.1
    """Nodes whose mean effect is larger, in either direction, are in a circuit."""
    edge_threshold: float = 0.01
    """Edges of larger weight, in either direction, are kept."""
    skip_first: int = 1
    """How many first tokens of a context are left as they are: the first is often an attention sink."""
    records_tokens: int = 50_000
    """How many tokens to take contexts of the strongest latents from, for the index; 0 shows none. They are those of
    the autoencoders' training, whose activations serve again where they are kept, unless data names others."""
    seed: int = 0
    """Choice of contexts, projection and clustering."""
    max_tokens: int = operational(2048)
    """Tokens that go through the model at once at most; halved while memory is too small for them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = "tokens min_context per_document contexts dimensions clusters min_size behaviours examples steps"
        fine = {name: getattr(self, name) > 0 for name in [*sizes.split(), "max_tokens"]}
        least = ("node_threshold", "edge_threshold", "skip_first", "records_tokens")
        fine |= {name: getattr(self, name) >= 0 for name in least}
        fine |= {
            "max_loss": 0 < self.max_loss < 0.69,
            "context": self.context >= self.min_context,
            "skip_first": self.skip_first < self.min_context,
            "density": 0 < self.density <= 1,
            "clusters": 0 < self.clusters <= self.contexts,
        }
        require(self, fine)
        gradients = self.vectors == "gradients"
        uses = {"dimensions": gradients, "density": gradients, "positions": not gradients}
        _unused(self, uses | {"steps": self.method == "ig", "rule": self.method == "ig"})


@dataclass(frozen=True, kw_only=True)
class CircuitShiftSpec(OfSAEsSpec):
    """Making a classifier forget what it should not rely on (SHIFT)."""

    probe: str | None = None
    """The site whose activations the classifier averages; by default the last autoencoder's residual site."""
    biographies: str = "templated"
    """hub:LabHC/bias_in_bios, a file of its form (JSON lines, JSON, Parquet: hard_text, profession, gender), or
    templated: written from word lists, with the same two professions."""
    pool: int = 160
    """Biographies of each of the four groups that every seed draws its training examples from."""
    train: int = 240
    """Training examples of a classifier: half and half for the ambiguous set, all four groups for the balanced one."""
    test: int = 75
    """Biographies of each of the four groups to test on, none of which is trained on."""
    max_length: int = 128
    """Biographies are cut off after so many tokens."""
    skip_first: int = 1
    """First tokens of a text that are neither averaged over nor attributed to: the first is often an attention sink."""
    lr: float = 0.01
    """Learning rate of the classifier."""
    epochs: int = 1
    """Epochs of the classifier."""
    standardise: bool = True
    """Centre and scale the averaged activations before the classifier is trained; the paper does not."""
    examples: int = 40
    """Training examples that the circuit is found on; a multiple of 4."""
    method: Literal["ig", "attribution"] = "ig"
    """Integrated gradients, or attribution patching, which is one step of it."""
    steps: int = 3
    """Steps of integrated gradients."""
    rule: Literal["left", "midpoint", "right"] = "midpoint"
    """Where in each step the gradient is taken."""
    threshold: float = 0.0
    """Latents that support the labels by more than this, in logits, are in the circuit."""
    top: int | None = 100
    """So many of them at most, the strongest; null for all."""
    judge: Literal["rule", "file", "chat"] = "rule"
    """Who says which latents are about gender: a rule over their contexts and the tokens they promote, a file of
    annotations, or a chat model."""
    context_share: float = 0.4
    """rule: the share of a latent's strongest contexts whose strongest word must be one for gender; or..."""
    promoted_share: float = 0.25
    """rule: ...the share of the tokens it promotes."""
    annotations: Path | None = field(default=None, metadata={"result": False})
    """file: JSON lines as `unweave annotate` writes them; latents with relevant: false are ablated."""
    chat: JudgeSpec = JudgeSpec()
    """chat: the chat model."""
    data: DataSpec | None = None
    """rule, chat: other text to take contexts from; by default the autoencoders' training text."""
    latents_tokens: int | None = None
    """rule, chat: how many of its tokens; by default 200,000, or all there are."""
    where: Literal["all", "policy"] = "all"
    """Ablate at every token, as the paper, or only at those that the autoencoders were trained on."""
    random: int = 1
    """With how many draws of as many other latents to do the same, per seed."""
    seeds: int = 5
    """How often to do everything: with other training examples, first weights and random latents."""
    seed: int = 0
    """Choice of the biographies."""
    batch_tokens: int = operational(2048)
    """Tokens that go through the model at once at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = ("pool", "train", "test", "max_length", "epochs", "examples", "steps", "seeds", "random")
        fine = {name: getattr(self, name) > 0 for name in (*sizes, "batch_tokens", "lr")}
        fine |= {
            "skip_first": 0 <= self.skip_first < self.max_length,
            "train": self.train % 4 == 0 and self.train <= 2 * self.pool,
            "examples": self.examples % 4 == 0 and self.examples <= self.train,
            "threshold": self.threshold >= 0,
            "top": self.top is None or self.top > 0,
            "context_share": 0 < self.context_share <= 1,
            "promoted_share": 0 < self.promoted_share <= 1,
            "latents_tokens": self.latents_tokens is None or self.latents_tokens > 0,
        }
        require(self, fine)
        asked = self.judge != "file"
        ruled = self.judge == "rule"
        uses = {"context_share": ruled, "promoted_share": ruled, "annotations": not asked, "chat": self.judge == "chat"}
        uses |= {"data": asked, "latents_tokens": asked, "steps": self.method == "ig", "rule": self.method == "ig"}
        _unused(self, uses)
        if self.judge == "file" and self.annotations is None:
            raise UnweaveError("there is no file to judge by", where="annotations", remedy="name it with --annotations")


@dataclass(frozen=True, kw_only=True)
class CircuitEvaluateSpec(Spec):
    """Measuring how faithful and how complete a circuit is."""

    circuit: Path = field(metadata={"result": False})
    """The folder of a finished `circuit find`. Its content decides which run is reused."""
    saes: tuple[str, ...] = field(default=(), metadata={"result": False})
    """Where its autoencoders are now; by default where they were then. Others than those are refused."""
    pairs: Path | None = field(default=None, metadata={"result": False})
    """Pairs to measure on: JSON lines as for `circuit find`; by default the test split of its task."""
    inputs: Path | None = field(default=None, metadata={"result": False})
    """Single texts to measure on, for a circuit of single texts."""
    examples: int = 40
    """How many examples. A file may hold fewer; what the circuit was found on is left out."""
    seed: int = 0
    """Choice of examples and of random nodes."""
    start_layer: int | None = None
    """Ablate from this layer on, -1 for the embedding too; by default from the first layer with nodes. Early layers
    deal with particular words, which are others in the test split."""
    errors: tuple[Literal["default", "keep", "remove", "remove-attn-mlp"], ...] = (
        "default",
        "remove-attn-mlp",
        "remove",
    )
    """What happens to errors, a curve for each: nodes as any other (default), all kept, all removed, or removed at
    attention and MLPs."""
    ablation: Literal["patch", "clean", "zero"] | None = None
    """What ablated nodes are set to: means over the patch texts (default for pairs), over the clean texts (default for
    single texts), or zero."""
    spaced: Literal["range", "paper"] = "range"
    """Thresholds: 15 at log-spaced numbers of nodes, from all to one; or 15 from 1e-4 to 1, as in the paper."""
    thresholds: tuple[float, ...] = ()
    """Thresholds of your own instead."""
    neurons: bool = True
    """Whether to find a circuit of neurons at the same sites on the same examples, and measure it beside."""
    draws: int = 1
    """How many circuits of random nodes to measure beside each; 0 for none."""
    level: float = 0.8
    """The faithfulness for which to say how many nodes it takes."""
    device: str | None = operational(None)
    """cpu, cuda, cuda:1...; by default a GPU where there is one."""
    max_tokens: int = operational(1024)
    """Tokens that go through the model at once at most."""

    def __post_init__(self) -> None:
        require(
            self,
            {
                "examples": self.examples > 0,
                "start_layer": self.start_layer is None or self.start_layer >= -1,
                "errors": len(self.errors) > 0,
                "thresholds": all(t >= 0 for t in self.thresholds),
                "draws": self.draws >= 0,
                "max_tokens": self.max_tokens > 0,
            },
        )
        if self.pairs is not None and self.inputs is not None:
            raise UnweaveError("pairs and inputs are both given", where=type(self).__name__, remedy="name one of them")
        _unused(self, {"spaced": not self.thresholds})


def _unused(spec: Spec, uses: Mapping[str, bool]) -> None:
    """Raises UnweaveError for a field that is set and would have no effect."""
    for name, used in uses.items():
        if not used and getattr(spec, name) != type(spec).__dataclass_fields__[name].default:
            raise UnweaveError(
                f"{name} = {getattr(spec, name)!r} would have no effect",
                where=type(spec).__name__,
                remedy=f"leave {name} out",
            )
