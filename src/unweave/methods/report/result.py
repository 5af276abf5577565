"""What a report's run holds. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unweave.core.result import Result


@dataclass(frozen=True)
class Report(Result):
    """A page on disk."""

    report: Path
    megabytes: float
    runs: tuple[str, ...]
    """the runs on it, by name"""
    not_run: tuple[str, ...]
    """commands for which there is no run of the SAE that was named"""
