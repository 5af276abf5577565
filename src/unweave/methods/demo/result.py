"""The result of the demo. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unweave.core.result import Result


@dataclass(frozen=True)
class Step:
    """One of its runs."""

    stage: str
    run: str
    """the name of its folder, beside the demo's"""


@dataclass(frozen=True)
class Demo(Result):
    """The main job: the numbers that matter most of each of its runs."""

    model: str
    """with what a reader must know of its weights"""
    tokens: int
    distinct_tokens: int
    unexplained_variance: float
    l0: float
    latents: int
    recovered_vs_mean: float | None
    recovered_vs_zero: float | None
    recovery_notes: tuple[str, ...]
    """why the recovered share is missing"""
    alive_fraction: float
    read_tokens: int
    """over which latents had the chance to fire"""
    share: float | None
    """of the change in agreement that the strongest latents make together"""
    spearman: float | None
    """integrated gradients with measured effects of the strongest latents, without the first"""
    pearson: float | None
    """the same over all the strongest"""
    steered: int
    label: tuple[str, ...]
    steps: tuple[Step, ...]
    sae: Path
    """relative to the demo's folder, as ``report``"""
    report: Path
