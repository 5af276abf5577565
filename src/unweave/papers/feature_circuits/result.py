"""What the recipe of sparse feature circuits holds. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unweave.core.result import Result
from unweave.inputs.subject import Subject
from unweave.methods.behaviours.result import BehavioursResult
from unweave.methods.circuits.result import Faithfulness
from unweave.methods.shift.result import ShiftResult


@dataclass(frozen=True)
class Overlap:
    """What the circuits across RC and across PP have in common, positions apart: latents alone, and errors too."""

    sizes: tuple[int, int]
    shared: int
    with_errors: int

    @property
    def share(self) -> float | None:
        """Shared latents among those of the smaller circuit; None where one has none."""
        return self.shared / min(self.sizes) if min(self.sizes) else None


@dataclass(frozen=True)
class Structure:
    """One structure of subject-verb agreement."""

    name: str
    faithfulness: Faithfulness


Part = Literal["train", "find", "evaluate", "draw", "shift", "behaviours"]


@dataclass(frozen=True)
class PartRun:
    """One of the runs that the recipe consists of, in the same folder."""

    part: Part
    structure: str | None
    """None where it is of all of them"""
    run: str


@dataclass(frozen=True)
class FeatureCircuits(Result):
    """Agreement, SHIFT and behaviours at one scale."""

    scale: Literal["smoke", "paper"]
    subject: Subject
    structures: tuple[Structure, ...]
    overlap: Overlap
    shift: ShiftResult
    behaviours: BehavioursResult
    runs: tuple[PartRun, ...]

    def part(self, part: str, structure: str | None = None) -> str:
        """The name of one of the runs."""
        return next(run.run for run in self.runs if (run.part, run.structure) == (part, structure))
