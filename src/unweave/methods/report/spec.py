"""Options for a report. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from unweave.core.command import Command
from unweave.core.errors import UnweaveError
from unweave.core.refs import Content
from unweave.core.rules import at_least
from unweave.core.spec import Spec
from unweave.methods.report.result import Report

RunRefs = Annotated[tuple[Path, ...], Content("unweave.methods.report.runs:content")]
"""Finished runs, known by what they were asked and what they hold."""


@dataclass(frozen=True, kw_only=True)
class ReportSpec(Spec):
    """One page from the results of any finished runs."""

    of: RunRefs = ()
    """Run directories, of any commands and in any number; on the command line they need no option."""
    sae: Path | None = None
    """Also the newest finished run of each command for this SAE, and the training that made it."""
    title: str = "What is inside this model?"
    """The page's heading."""
    latents: Annotated[int | None, at_least(1)] = 8192
    """How many latents to show of an SAE, besides those that other parts of the page name; none: all of them. A page of
    8,192 is about 5 MB; it says what it leaves out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.of and self.sae is None:
            remedy = "name run directories, or an SAE with --sae"
            raise UnweaveError("there is nothing to report", where=type(self).__name__, remedy=remedy)


COMMAND = Command(
    words="report",
    spec=ReportSpec,
    result=Report,
    stage="unweave.methods.report.stage:run",
    positional="of",
    summary="Write one self-contained HTML page from finished runs.",
    about=(
        "Shows any results, in any number: trainings, evaluations, latents, causes, circuits, SHIFT, behaviours, "
        "special tokens, ratings. Numbers with their meaning, figures, a browsable list of latents, steered text. The "
        "page needs no network and no other file, and making it loads no model."
    ),
    examples=(
        "unweave report runs/train-0123456789ab runs/eval-0123456789ab",
        "unweave report --sae runs/train-0123456789ab/sae",
    ),
)
