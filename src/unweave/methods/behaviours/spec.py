"""What ``unweave circuit behaviours`` can be asked. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unweave.core.spec import operational, require
from unweave.data.spec import DataSpec
from unweave.inputs.spec import OfSAEsSpec, unused


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
    rule: Literal["left", "midpoint", "right", "graded"] = "midpoint"
    """Where in each step the gradient is taken. graded: in the middle of steps that grow shorter towards the end, for
    ablation to the zero vector (neurons, an autoencoder without a decoder bias), with 80 steps or more."""
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
        unused(self, uses | {"steps": self.method == "ig", "rule": self.method == "ig"})
