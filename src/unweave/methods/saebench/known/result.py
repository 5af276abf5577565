"""What measures of known features find. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass

from unweave.core.result import Result


@dataclass(frozen=True)
class Known:
    """A measure of an SAE, and the truth. None: there is none, such as absorption where no feature was found."""

    sae: str
    key: str
    measured: float | None
    truth: float | None


@dataclass(frozen=True)
class KnownResult(Result):
    """Every measure of every SAE."""

    features: int
    width: int
    tokens: int
    measures: tuple[Known, ...]
