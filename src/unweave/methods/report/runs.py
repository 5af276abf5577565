"""Which runs a report shows, and what they hold."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unweave.core.command import Command
from unweave.core.contents import content_of
from unweave.core.errors import UnweaveError
from unweave.core.files import printable
from unweave.core.result import Result
from unweave.core.run import Run
from unweave.core.spec import digest
from unweave.inputs.subject import Subject
from unweave.methods import command_of

ABOUT_AN_SAE = ("eval", "latents", "trace", "steer")
"""the commands whose absence the page of an SAE mentions"""


@dataclass(frozen=True)
class Shown:
    """A finished run and its command."""

    run: Run[Any]
    command: Command
    result: Result

    @property
    def sae(self) -> str:
        """The digest of the one SAE that it is about; empty where it is not about one."""
        subject = getattr(self.result, "subject", None)
        return subject.saes[0].digest if isinstance(subject, Subject) and len(subject.saes) == 1 else ""


def content(folders: Sequence[Path]) -> str:
    """Twelve digits over the questions and results of runs."""
    return digest([[folder.name, content_of(_finished(folder) / "result.json")] for folder in folders])


def _finished(folder: Path) -> Path:
    if not os.path.isfile(folder / "DONE"):
        raise UnweaveError(
            "this is not a finished run",
            where=printable(folder),
            remedy="give run directories as the commands print them",
        )
    return folder


def opened(folder: Path) -> Shown:
    """A run's result. UnweaveError where it has not finished, or is of no command that has a view."""
    untyped: Run[Any] = Run.at(_finished(folder))
    command = command_of(untyped.asked["stage"])
    if command is None:
        raise UnweaveError(
            f"runs of {untyped.asked['stage']!r} are parts of others and have no page",
            where=printable(folder),
            remedy="give runs as the commands print them",
        )
    run: Run[Any] = Run.at(folder, command.result)
    return Shown(run, command, run.result)


def of_sae(sae: Path, runs: Path) -> list[Path]:
    """The training that an SAE's folder lies in, and the newest finished run of each command about it."""
    from unweave.inputs.identity import sae as identity_of

    identity = identity_of(sae)
    newest: dict[str, tuple[float, Path]] = {}
    for path in Path(runs).glob("*-*"):
        if not (path / "DONE").is_file():
            continue
        question = Run.at(path).asked
        if question["inputs"].get("sae") == identity and command_of(question["stage"]) is not None:
            finished = (path / "DONE").stat().st_mtime
            if question["stage"] not in newest or finished > newest[question["stage"]][0]:
                newest[question["stage"]] = (finished, path)
    return [*_training(sae), *(path for _, path in newest.values())]


def _training(sae: Path) -> list[Path]:
    for folder in sae.resolve().parents:
        if folder.name.startswith("train-") and (folder / "DONE").is_file():
            return [folder]
    return []
