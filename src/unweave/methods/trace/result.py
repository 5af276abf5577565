"""What a comparison of estimates with measured effects, and a trace, hold. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unweave.attribute.result import SiteSum
from unweave.core.result import Result
from unweave.core.site import Site
from unweave.inputs.subject import Subject

Estimate = Literal["ig", "attribution", "exact"]
"""integrated gradients, attribution patching, and the effect measured from the clean end alone"""
Group = Literal["chosen", "weaker", "random"]
"""the strongest by estimate, these without the one of the largest measured effect, and latents drawn at random"""
Cause = Literal["steps", "interactions", "steps and interactions", "neither"]


@dataclass(frozen=True)
class Effect:
    """One latent's effect on the metric, estimated and measured: summed over positions, mean over examples."""

    latent: int
    chosen: bool
    """among the strongest by estimate; else drawn at random"""
    ig: float
    attribution: float
    exact: float
    """measured from the clean end: it alone takes its patch value"""
    exact_patch: float
    """measured from the patched end: what its going back takes away when all others have their patch value"""

    @property
    def measured(self) -> float:
        """The mean of the effects from both ends."""
        return (self.exact + self.exact_patch) / 2


@dataclass(frozen=True)
class Agreement:
    """How an estimate correlates with the mean of both ends, over a group of latents; None where it is undefined."""

    estimate: Estimate
    among: Group
    pearson: float | None
    spearman: float | None


@dataclass(frozen=True)
class Totals:
    """In units of the metric, means over examples."""

    metric_clean: float
    metric_patched: float
    """with the whole site patched"""
    top_together: float
    """the change when all chosen latents move together"""
    ig: float
    """of all latents and the error"""
    ig_error: float
    """of the SAE's error alone"""
    attribution: float
    attribution_error: float

    @property
    def change(self) -> float:
        return self.metric_patched - self.metric_clean


@dataclass(frozen=True)
class Diagnosis:
    """Why integrated gradients (IG) differ from the effects from the clean end, measured on the first ``examples``."""

    examples: int
    coarse: float
    """Pearson correlation of IG with these effects, as in the comparison"""
    fine: float
    """the same with ``fine_steps`` midpoint steps"""
    fine_steps: int
    coarse_scale: float
    """how many times larger than these effects IG is: the least-squares factor"""
    fine_scale: float
    """the same with ``fine_steps`` midpoint steps"""
    alone_error: float
    """largest |IG along one latent's own path - effect| over the strongest latents, relative to the largest |effect|"""
    other_end: float
    """Pearson correlation of fine IG with the effects from the patched end"""
    both_ends: float
    """Pearson correlation of fine IG with the mean of the effects from both ends"""
    cause: Cause
    text: str
    """all of this in sentences"""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Attribution patching and integrated gradients against measured effects at one site."""

    site: Site
    examples: int
    effects: tuple[Effect, ...]
    """the chosen by |integrated gradients|, then the random ones"""
    agreements: tuple[Agreement, ...]
    share: float | None
    """what share of the whole change the chosen latents make together"""
    totals: Totals
    sums: tuple[SiteSum, ...]
    diagnosis: Diagnosis | None
    """why estimates and effects differ, where they do"""

    def spearman(self, estimate: Estimate, among: Group) -> float | None:
        """One of the correlations."""
        return self._agreement(estimate, among).spearman

    def pearson(self, estimate: Estimate, among: Group) -> float | None:
        """One of the correlations."""
        return self._agreement(estimate, among).pearson

    def _agreement(self, estimate: Estimate, among: Group) -> Agreement:
        return next(a for a in self.agreements if (a.estimate, a.among) == (estimate, among))

    def strongest(self) -> list[Effect]:
        """The chosen latents, the largest measured effect first."""
        return sorted((e for e in self.effects if e.chosen), key=lambda e: (-abs(e.measured), e.latent))


@dataclass(frozen=True)
class Example:
    """One pair of the task."""

    clean: str
    clean_answer: str
    patch: str
    patch_answer: str


@dataclass(frozen=True, kw_only=True)
class Trace(Comparison, Result):
    """The latents of one SAE that cause a behaviour."""

    schema = 2

    subject: Subject
    task: str
    """which structure of subject-verb agreement: "across_pp" """
    right_clean: float
    """in what share of the clean sentences the model prefers the right answer; chance is half"""
    right_patch: float
    example: Example
    problem: str | None
    """why the causes of the behaviour cannot be measured; the agreements and the share are then left out"""
    pairs_file: Path
