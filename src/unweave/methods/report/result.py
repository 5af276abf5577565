"""The result of a report. Imports no torch."""

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
    """commands without a run of the named SAE"""
