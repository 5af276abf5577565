"""What the recipe of labelled steering holds. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unweave.core.result import Result
from unweave.core.site import Site
from unweave.methods.axbench.result import Comparison, Judged, Rated
from unweave.methods.labels.result import LabelsResult
from unweave.papers.labelled_steering.simulation import Simulation
from unweave.papers.parts import PartRun

F1 = Literal["calibrated", "ordinary"]


@dataclass(frozen=True)
class MixResult(Result):
    """Tagged texts of several sources in one file."""

    texts: int
    train: int
    """texts of the side that is not held out, which SAEs may be trained on"""
    origin: dict[str, str]
    """the source of each label"""


@dataclass(frozen=True)
class Labelled:
    """The labels that a set of SAEs (one a layer) got from a corpus."""

    corpus: str
    saes: str
    f1: F1
    labels: LabelsResult


@dataclass(frozen=True)
class Steered:
    """What the pairs of such labels do to generated texts."""

    corpus: str
    saes: str
    f1: F1
    comparison: Comparison

    @property
    def judged(self) -> Judged:
        """By the first judge."""
        return self.comparison.judged[0]

    def of(self, method: str) -> list[Rated]:
        """Every pair steered by a method."""
        return [one for one in self.judged.rated if one.method == method]


@dataclass(frozen=True)
class Survival:
    """How many of the labels that one seed's latents tell on unseen texts another seed's tell too."""

    site: Site
    labels: int
    share: float | None


@dataclass(frozen=True)
class Sample:
    """A text as it was generated."""

    latent: str
    concept: str
    method: str
    factor: float | None
    instruction: str
    text: str
    rating: float | None


@dataclass(frozen=True)
class LabelledSteering(Result):
    """Labels and steering at one scale; of the sets of SAEs the first is the sparse one."""

    scale: Literal["smoke", "paper"]
    labelled: tuple[Labelled, ...]
    steered: tuple[Steered, ...]
    survival: tuple[Survival, ...]
    origin: dict[str, str]
    """the source of each label, where a corpus is of several"""
    samples: tuple[Sample, ...]
    simulation: Simulation
    runs: tuple[PartRun, ...]

    def pairs(self, saes: str, f1: F1 = "calibrated") -> tuple[Steered, ...]:
        """The comparisons of one set of SAEs, of all corpora."""
        return tuple(one for one in self.steered if (one.saes, one.f1) == (saes, f1))
