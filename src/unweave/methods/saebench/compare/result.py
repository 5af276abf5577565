"""What a comparison finds. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass

from unweave.core.result import Result
from unweave.core.site import Site


@dataclass(frozen=True)
class Entry:
    """One SAE's number."""

    sae: str
    kind: str
    l0: float
    value: float
    low: float
    high: float
    untold: tuple[str, ...]
    """baselines that it is not told from"""


@dataclass(frozen=True)
class Pair:
    """Two SAEs, or two kinds of SAE at one L0."""

    better: str
    worse: str
    difference: float
    """in favour of the better one"""
    low: float | None
    """of its 95 % interval; None on a curve, which has none"""
    l0: float | None = None
    """where the curves were compared"""

    @property
    def told(self) -> bool:
        return self.low is not None and self.low > 0


@dataclass(frozen=True)
class Table:
    """One headline number of SAEs at one site, measured alike."""

    task: str
    key: str
    site: Site
    form: str
    better: int
    """1: higher is better, -1: lower is"""
    entries: tuple[Entry, ...]
    """by L0"""
    pairs: tuple[Pair, ...]
    why_not: str
    """why SAEs are not ranked; empty where they are"""


@dataclass(frozen=True)
class ComparedSAEs(Result):
    """Tables over SAEs."""

    model: str
    tables: tuple[Table, ...]
