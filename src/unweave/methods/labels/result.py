"""What labelling finds: pairs of latent and label, with their scores where they were chosen and on texts held out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unweave.core.intervals import Interval
from unweave.core.result import Result
from unweave.core.site import Site
from unweave.inputs.subject import Subject
from unweave.latents.annotations import ScoredLabel


@dataclass(frozen=True)
class Passage:
    """A stretch of a held-out text around the token on which a latent fires most."""

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    peak: int
    labelled: bool
    """whether the text has the label"""


@dataclass(frozen=True)
class LabelledLatent:
    """One pair."""

    latent: int
    label: ScoredLabel
    positive: int
    """held-out texts with the label"""
    heldout_score: float | None
    """calibrated F1 on held-out texts, at the threshold chosen before"""
    shuffled_auroc: float | None
    """AUROC on held-out texts whose labels are shuffled"""
    promoted: tuple[str, ...]
    """tokens that the latent's direction promotes most"""
    passages: tuple[Passage, ...]
    """of the best pairs"""


@dataclass(frozen=True)
class SiteLabels:
    """The pairs of one SAE, the best first."""

    site: Site
    latents: int
    firing: int
    """latents that fire in some text"""
    candidates: int
    """pairs with a score above 0"""
    tried: int
    """latents whose output score was computed, from the best pair on"""
    shuffled_best: float
    """the best match score of any pair when the texts' labels are shuffled: what chance reaches"""
    pairs: tuple[LabelledLatent, ...]
    auroc: Interval | None
    """mean over pairs on held-out texts"""
    shuffled_auroc: Interval | None

    @property
    def above_half(self) -> int:
        """Pairs whose interval lies above 0.5."""
        return sum((pair.label.auroc_low or 0.0) > 0.5 for pair in self.pairs)

    @property
    def labels(self) -> frozenset[str]:
        """The labels that some latent tells on texts held out: those of pairs whose interval lies above 0.5."""
        return frozenset(pair.label.label for pair in self.pairs if (pair.label.auroc_low or 0.0) > 0.5)


@dataclass(frozen=True)
class Side:
    """The texts of one side of the split."""

    texts: int
    tokens: int


@dataclass(frozen=True)
class LabelsResult(Result):
    """Labels of latents of any number of SAEs; ``annotations`` is the file that other methods read."""

    subject: Subject
    source: str
    notes: tuple[str, ...]
    """what a reader must know of the texts"""
    chosen_on: Side
    heldout: Side
    uncounted: int
    """texts of the first side without a token that counts for any SAE; they are neither positive nor negative"""
    labels: int
    """how many there are"""
    supported: int
    """labels on enough of the texts to be matched"""
    prior: float | None
    sites: tuple[SiteLabels, ...]
    annotations: Path


def survival(one: SiteLabels, other: SiteLabels) -> float | None:
    """The share of the labels that one SAE's latents tell that another's tell too, as of another seed; None without
    any."""
    return len(one.labels & other.labels) / len(one.labels) if one.labels else None
