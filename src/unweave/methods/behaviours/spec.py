"""What ``unweave circuit behaviours`` can be asked. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from unweave.attribute.options import GradientOptions
from unweave.core.command import Command
from unweave.core.errors import UnweaveError
from unweave.core.refs import FileRef
from unweave.core.rules import above, at_least, at_most, below, only_for
from unweave.core.spec import Spec, operational
from unweave.data.spec import DataSpec, ModelRef
from unweave.inputs.spec import OfSAEsSpec, SAERefs, unused
from unweave.methods.behaviours.result import BehavioursResult, VectorKind


@dataclass(frozen=True, kw_only=True)
class ContextOptions(Spec):
    """Which tokens of a text are looked at: those that the model is sure of, without repetition."""

    max_loss: Annotated[float, above(0), below(0.69)] = 0.3
    """The model is sure of a token whose cross-entropy is below this, in nats; the paper has 0.1 or 0.3. Below 0.69:
    above, another token may be likelier."""
    context: Annotated[int, at_least("min_context")] = 64
    """The most tokens of a context. Documents are cut into windows, from whose beginning contexts count."""
    min_context: Annotated[int, at_least(1)] = 8
    """The fewest tokens of a context."""
    repeats: Literal["bigram", "word", "answer"] = "bigram"
    """Which tokens are left out as repetition: where the pair (token before, answer) occurred earlier in the context,
    as in the paper; or also where it did in another case; or where the answer itself did."""
    per_document: Annotated[int, at_least(1)] = 8
    """The most tokens of one document, drawn at random."""
    limit: Annotated[int, at_least(1)] = 1000
    """The most contexts in all, drawn at random."""


@dataclass(frozen=True, kw_only=True)
class VectorOptions(Spec):
    """What contexts are compared by."""

    kind: VectorKind = "effects-latents"
    """Dense or sparse activations, dense or sparse linear effects, or the projected gradient of the model's
    parameters."""
    positions: Literal["last", "last-5", "sum"] = "sum"
    """At which positions vectors are taken; gradients have none."""
    dimensions: Annotated[int, at_least(1)] = 30_000
    """Dimensions of projected gradients."""
    density: Annotated[float, above(0), at_most(1)] = 32 / 30_000
    """Share of the projection's entries that are not zero."""

    def __post_init__(self) -> None:
        super().__post_init__()
        gradients = self.kind == "gradients"
        unused(self, {"dimensions": gradients, "density": gradients, "positions": not gradients})


@dataclass(frozen=True, kw_only=True)
class ClusterOptions(Spec):
    """How contexts are grouped."""

    number: Annotated[int, at_least(1)] = 40
    """How many clusters."""
    method: Literal["spectral", "kmeans"] = "spectral"
    """Spectral clustering on angular similarity, for up to about 8,192 contexts, or k-means in small batches."""
    rank: Literal["coherence", "size"] = "coherence"
    """Which clusters come first: those most coherent beside clusters drawn at random, or the largest."""
    min_size: Annotated[int, at_least(1)] = 8
    """Smaller clusters are no behaviours."""


@dataclass(frozen=True, kw_only=True)
class CircuitOptions(GradientOptions):
    """How the circuit of a behaviour is found."""

    examples: Annotated[int, at_least(1)] = 12
    """On how many contexts of a cluster, the most typical ones; the paper has up to 100."""
    steps: Annotated[int, at_least(1), only_for("method", "ig")] = 4
    """Steps of integrated gradients."""
    metric: Literal["neg-log-p", "neg-logit"] = "neg-log-p"
    """What circuits explain: -log p(answer), as the paper, or -logit(answer), as its released code."""
    node_threshold: Annotated[float, at_least(0)] = 0.1
    """Nodes whose mean effect is larger, in either direction, are in a circuit."""
    edge_threshold: Annotated[float, at_least(0)] = 0.01
    """Edges of larger weight, in either direction, are kept."""


@dataclass(frozen=True, kw_only=True)
class BehaviourOptions(Spec):
    """How behaviours are discovered in a text."""

    contexts: ContextOptions = ContextOptions()
    """Which tokens of the text."""
    vectors: VectorOptions = VectorOptions()
    """What their contexts are compared by."""
    clusters: ClusterOptions = ClusterOptions()
    """How they are grouped."""
    circuit: CircuitOptions = CircuitOptions()
    """How a group's circuit is found."""
    behaviours: Annotated[int, at_least(1)] = 20
    """How many clusters, from the first, get a circuit."""
    skip_first: Annotated[int, at_least(0), below("contexts.min_context")] = 1
    """How many first tokens of a context are left as they are: the first is often an attention sink."""
    seed: int = 0
    """Choice of contexts, projection and clustering."""
    max_tokens: Annotated[int, at_least(1)] = operational(2048)
    """Tokens that go through the model at once at most; halved while memory is too small for them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clusters.number > self.contexts.limit:
            what = f"{self.contexts.limit} contexts cannot make {self.clusters.number} clusters"
            raise UnweaveError(what, where="clusters.number", remedy="ask for fewer clusters, or for more contexts")


@dataclass(frozen=True, kw_only=True)
class CircuitBehavioursSpec(BehaviourOptions, OfSAEsSpec):
    """Discovering behaviours in a text, and the circuit of each."""

    data: DataSpec | None = None
    """The text to look through; by default that of the SAEs' training: each document's beginning, two
    windows long."""
    split: Literal["train", "heldout"] = "train"
    """Which documents of that text: those to train on, or those held out."""
    tokens: Annotated[int, at_least(1)] = 40_000
    """How many tokens to look through."""
    records_tokens: Annotated[int, at_least(0)] = 50_000
    """How many tokens to take contexts of the strongest latents from, for the index; 0 shows none. They are those of
    the SAEs' training, whose activations serve again where they are kept, unless data names others."""


# -- what several questions share: runs of their own ------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ContextsSpec(Spec):
    """Which contexts of a text the model is sure of."""

    model: ModelRef
    dtype: str
    data: DataSpec
    split: Literal["train", "heldout"]
    tokens: Annotated[int, at_least(1)]
    options: ContextOptions
    seed: int


@dataclass(frozen=True, kw_only=True)
class OfContextsSpec(Spec):
    """A question about contexts: the model and the SAEs in use."""

    model: ModelRef
    dtype: str
    saes: SAERefs
    neurons: tuple[str, ...]
    sites: tuple[str, ...]
    """where the SAEs and neurons that are used lie; none, like SAEs, where they do not matter"""
    skip_first: Annotated[int, at_least(0)]
    max_tokens: Annotated[int, at_least(1)] = operational(2048)


@dataclass(frozen=True, kw_only=True)
class VectorsSpec(OfContextsSpec):
    """The vectors of contexts."""

    contexts: FileRef
    """the result of the run that has them"""
    options: VectorOptions
    seed: int


@dataclass(frozen=True, kw_only=True)
class BehaviourSpec(OfContextsSpec):
    """The circuit of one behaviour: of its contexts, wherever they come from."""

    contexts: tuple[tuple[int, ...], ...]
    """token ids, the answer last"""
    options: CircuitOptions


COMMAND = Command(
    words="circuit behaviours",
    spec=CircuitBehavioursSpec,
    result=BehavioursResult,
    stage="unweave.methods.behaviours.stage:run",
    summary="Discover what a model does in a text without naming it first, and find the circuit of each behaviour.",
    about="Takes the tokens that the model is sure of and that do not repeat what stands before them, and clusters "
    "their contexts by what the model does with them: activations, latents, their effects on the answer, or gradients "
    "of the parameters. Each of the best clusters gets a circuit by ablation, and index.html shows them all. "
    "Contexts, vectors and every circuit are kept by themselves: asking for more behaviours, or another threshold, "
    "makes only what is new.",
    examples=(
        "unweave circuit behaviours --saes runs/train-0123456789ab/sae",
        "unweave circuit behaviours --saes runs/train-0123456789ab/sae --tokens 400_000 --contexts.limit 8192 "
        "--clusters.number 750 --behaviours 100 --circuit.examples 100 --circuit.steps 10",
        "unweave circuit behaviours --saes runs/train-0123456789ab/sae --vectors.kind gradients "
        "--vectors.dimensions 1000 --clusters.method kmeans",
    ),
)
