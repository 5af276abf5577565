"""What the recipe of compressed models holds. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unweave.core.result import Result
from unweave.methods.compress.transfer.result import Transfer
from unweave.methods.saebench.result import SaebenchResult
from unweave.papers.parts import PartRun


@dataclass(frozen=True)
class Group:
    """SAEs that were studied together: those of a seed, or of a layer."""

    name: str
    transfer: Transfer


@dataclass(frozen=True)
class Bench:
    """SAEBench's tasks on the forms of one SAE in the compressed model."""

    site: str
    forms: dict[str, str]
    """the form of each SAE by the name that the result has"""
    scores: SaebenchResult


@dataclass(frozen=True)
class Study:
    """One model."""

    name: str
    groups: tuple[Group, ...]
    benches: tuple[Bench, ...]


@dataclass(frozen=True)
class CompressedModels(Result):
    """Every model of a scale."""

    scale: Literal["smoke", "paper"]
    studies: tuple[Study, ...]
    runs: tuple[PartRun, ...]
