"""What discovering behaviours holds: the contexts looked at, their clusters, and each behaviour. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unweave.attribute.result import SiteSum
from unweave.core.result import Result
from unweave.core.site import Site
from unweave.inputs.subject import Subject
from unweave.latents.annotations import name_of

VectorKind = Literal["activations", "latents", "effects-dense", "effects-latents", "gradients"]


@dataclass(frozen=True)
class Counts:
    """What became of a text's tokens."""

    scanned: int
    """tokens with a context long enough"""
    sure: int
    """of them, with a low loss"""
    repeated: int
    """of them, left out as repetition"""
    same: int
    """left out because another document begins alike"""
    crowded: int
    """left out because their document had enough"""
    surplus: int
    """left out because there were enough in all"""
    kept: int
    """the contexts"""


@dataclass(frozen=True)
class Example:
    """A context and the token that the model is sure will follow. ``loss`` is -log p(answer) in nats."""

    ids: tuple[int, ...]
    answer: int
    loss: float
    document: int
    """which document of the text it comes from"""
    place: int
    """the answer's index in the text's tokens"""


@dataclass(frozen=True)
class Contexts(Result):
    """Contexts, in the order of the text, and what became of the other tokens."""

    counts: Counts
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class VectorsResult(Result):
    """One vector per context."""

    contexts: int
    width: int
    file: Path


@dataclass(frozen=True)
class BehaviourCircuit(Result):
    """The circuit of one behaviour. Counts are of what is above the thresholds."""

    latents: int
    errors: int
    edges: int
    sums: tuple[SiteSum, ...]
    file: Path


@dataclass(frozen=True)
class Cluster:
    """Contexts that the model treats alike. Coherence is the mean cosine between their vectors and the mean vector."""

    size: int
    coherence: float
    control: float
    """the same of as many contexts drawn at random"""
    spread: float
    """the control's standard deviation over draws"""


@dataclass(frozen=True)
class Context:
    """A context's tokens, the token that follows, and its loss, -log p in nats."""

    tokens: tuple[str, ...]
    answer: str
    loss: float


@dataclass(frozen=True)
class Firing:
    """The context in which a latent fires most strongly."""

    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    peak: int


@dataclass(frozen=True)
class StrongLatent:
    """A latent of a behaviour's circuit."""

    site: Site
    latent: int
    effect: float
    """mean effect on the metric when it is ablated"""
    promoted: tuple[tuple[str, float], ...] = ()
    """tokens that it makes likelier, and by how much"""
    firing: Firing | None = None
    """None where no records were read"""

    @property
    def name(self) -> str:
        return name_of(self.site, self.latent)


@dataclass(frozen=True)
class Behaviour:
    """A cluster with a circuit."""

    place: int
    """which of the clusters"""
    documents: int
    """from how many its contexts come"""
    answers: tuple[tuple[str, int], ...]
    """the commonest tokens that follow its contexts, and how many each"""
    contexts: tuple[Context, ...]
    """the most typical"""
    examples: int
    """how many of them the circuit was found on"""
    latents: int
    errors: int
    edges: int
    strongest: tuple[StrongLatent, ...]
    sums: tuple[SiteSum, ...]
    run: str = ""
    """the folder, beside the result's, of the run that holds the circuit; empty without one"""
    drawing: Path | None = None
    """the circuit as SVG; None where no node is above the threshold"""


@dataclass(frozen=True)
class BehavioursResult(Result):
    """Behaviours that nobody named: clusters of contexts, and a circuit for each of the best."""

    subject: Subject
    counts: Counts
    vectors: VectorKind
    """what contexts were compared by"""
    method: Literal["ig", "attribution"]
    """how circuits were found; attribution patching does not promise that effects add up"""
    min_size: int
    """smaller clusters are no behaviours"""
    clusters: tuple[Cluster, ...]
    """the best first"""
    stability: float | None
    """adjusted Rand index with the clusters that another seed gives: 1 the same, 0 no more alike than chance"""
    behaviours: tuple[Behaviour, ...]

    def coherence(self) -> tuple[float, float] | None:
        """Of clusters large enough, and of random ones of the same sizes, weighted by size."""
        large = [cluster for cluster in self.clusters if cluster.size >= self.min_size]
        total = sum(cluster.size for cluster in large)
        if not total:
            return None
        own = sum(cluster.size * cluster.coherence for cluster in large) / total
        return own, sum(cluster.size * cluster.control for cluster in large) / total
