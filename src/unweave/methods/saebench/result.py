"""What SAEBench's measures find. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unweave.core.result import Result
from unweave.core.site import Site
from unweave.inputs.subject import Subject


@dataclass(frozen=True)
class Gap:
    """How far an SAE is from a baseline, seed by seed on the same data."""

    baseline: str
    value: float
    """the baseline's"""
    difference: float
    """the SAE's number minus the baseline's"""
    low: float
    high: float
    """its 95 % interval"""


@dataclass(frozen=True)
class Measure:
    """One number of one SAE."""

    key: str
    value: float
    draws: tuple[float, ...]
    """of each seed"""
    low: float
    high: float
    """the 95 % interval over seeds"""
    smallest: float
    """the smallest difference between two SAEs that this many seeds would detect, four times in five"""
    better: int = 0
    """1: higher is better; -1: lower is; 0: neither, or no headline number"""
    gaps: tuple[Gap, ...] = ()
    """from the baselines, of headline numbers"""

    @property
    def untold(self) -> tuple[str, ...]:
        """The baselines that this number does not put the SAE ahead of."""
        return tuple(g.baseline for g in self.gaps if (g.low <= 0 if self.better > 0 else g.high >= 0))


@dataclass(frozen=True)
class Scores:
    """What one task measured of one SAE."""

    task: str
    version: int
    site: Site
    sae: str
    """the name it was given by"""
    digest: str
    """of its weights"""
    l0: float
    """active latents per token on the task's data"""
    data: str
    """twelve digits over what was read"""
    source: str
    """where it came from, in words"""
    notes: tuple[str, ...]
    """what a reader must know of it"""
    overlap: float
    """test over training texts where seeds divide the same texts anew"""
    measures: tuple[Measure, ...]
    file: Path
    """SAEBench's own form of it"""


@dataclass(frozen=True)
class NotRun:
    """A task that could not run at a site, or on one SAE."""

    task: str
    site: Site
    sae: str
    """empty: on none of the site"""
    reason: str


@dataclass(frozen=True)
class SaebenchResult(Result):
    """SAEBench's measures of SAEs."""

    subject: Subject
    form: str
    seeds: int
    scores: tuple[Scores, ...]
    not_run: tuple[NotRun, ...]
