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
from unweave.core.result import Result, view_of
from unweave.core.run import Run
from unweave.core.spec import digest
from unweave.inputs.subject import SAEInfo, Subject
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
    def view(self) -> Any:
        """The module that shows the result."""
        return view_of(type(self.result))

    @property
    def saes(self) -> tuple[SAEInfo, ...]:
        """The SAEs that it is about."""
        subject = getattr(self.result, "subject", None)
        return subject.saes if isinstance(subject, Subject) else ()

    @property
    def sae(self) -> str:
        """The digest of the one SAE that it is about; empty where it is not about one."""
        return self.saes[0].digest if len(self.saes) == 1 else ""


def content(folders: Sequence[Path]) -> str:
    """Twelve digits over the questions and results of runs."""
    return digest([[folder.name, content_of(_finished(folder) / "result.json")] for folder in folders])


def _finished(folder: Path) -> Path:
    if not os.path.isfile(folder / "DONE"):
        remedy = "give run directories as the commands print them"
        raise UnweaveError("this is not a finished run", where=printable(folder), remedy=remedy)
    return folder


def opened(folder: Path) -> Shown:
    """A run's result. UnweaveError where it has not finished, or is of no command that has a view."""
    name = Run.at(_finished(folder)).asked["stage"]
    command = command_of(name)
    if command is None:
        what, remedy = f"runs of {name!r} are parts of others and have no page", "give runs as the commands print them"
        raise UnweaveError(what, where=printable(folder), remedy=remedy)
    run: Run[Any] = Run.at(folder, command.result)
    return Shown(run, command, run.result)


def of_sae(sae: Path, runs: Path) -> list[Path]:
    """The training that an SAE's folder lies in, and the newest finished run of each command about it."""
    from unweave.inputs.identity import sae as identity_of

    identity = identity_of(sae)
    newest: dict[str, Path] = {}
    for done in sorted(Path(runs).glob("*-*/DONE"), key=lambda done: done.stat().st_mtime):
        question = Run.at(done.parent).asked
        if question["inputs"].get("sae") == identity and command_of(question["stage"]) is not None:
            newest[question["stage"]] = done.parent
    above = (folder for folder in sae.resolve().parents if folder.name.startswith("train-"))
    training = next((folder for folder in above if (folder / "DONE").is_file()), None)
    return [*([] if training is None else [training]), *newest.values()]
