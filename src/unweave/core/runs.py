"""The runs of a folder: what each was asked, when, how large it is, whether it is whole, and which build on it.

A run builds on another where its question or its result names that one's folder. Shared folders (activations, rows of
tokens) hold what several runs read; they have no question, and what they hold can be computed again.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from unweave.core.errors import UnweaveError
from unweave.core.lock import take
from unweave.core.run import Run

State = Literal["done", "unfinished", "at work", "damaged", "shared"]
_NAME = re.compile(r"[A-Za-z0-9_.-]+-[0-9a-f]{12}")


@dataclass(frozen=True)
class Entry:
    """A run's folder, or a shared one."""

    path: Path
    state: State
    changed: float
    """when it finished, or was last written to: seconds since 1970"""
    size: int
    """bytes of all its files"""
    uses: tuple[str, ...]
    """names of the runs that it builds on"""
    used_by: tuple[str, ...]
    problem: str = ""
    """what a damaged run has lost"""

    @property
    def name(self) -> str:
        return self.path.name


def entries(root: Path) -> list[Entry]:
    """Runs and shared folders under ``root``, the latest first; other folders are passed over.

    UnweaveError where there is no such folder.
    """
    if not root.is_dir():
        raise UnweaveError("there is no such folder of runs", where=str(root), remedy="name one with --runs")
    paths = [path for path in sorted(root.iterdir()) if _NAME.fullmatch(path.name) and path.is_dir()]
    paths = [path for path in paths if not path.is_symlink()]
    names = {path.name for path in paths}
    uses = {path.name: _named(path) & (names - {path.name}) for path in paths}
    used_by = {name: sorted(other for other, used in uses.items() if name in used) for name in names}
    found = []
    for path in paths:
        state, problem = _state(path)
        size, changed = _size(path)
        found.append(
            Entry(path, state, changed, size, tuple(sorted(uses[path.name])), tuple(used_by[path.name]), problem)
        )
    return sorted(found, key=lambda entry: -entry.changed)


def _named(path: Path) -> set[str]:
    """Names of runs in a run's question and result."""
    names: set[str] = set()
    for file in ("spec.json", "result.json"):
        if (path / file).is_file():
            names |= set(_NAME.findall((path / file).read_text("utf-8", errors="replace")))
    return names


def _state(path: Path) -> tuple[State, str]:
    if not (path / "spec.json").exists():
        return "shared", ""
    if (path / ".lock").exists():
        try:
            lock = take(path / ".lock")
        except OSError:  # nothing can be written here, so nobody works here
            pass
        else:
            if lock is None:
                return "at work", ""
            lock.close()
    if not (path / "DONE").exists():
        return "unfinished", ""
    problem = Run.at(path).problem
    return ("damaged", problem) if problem else ("done", "")


def _size(path: Path) -> tuple[int, float]:
    """Bytes of all files, and when the last of them was written."""
    size, changed = 0, path.stat().st_mtime
    for folder, _, files in os.walk(path):
        for file in files:
            about = os.lstat(os.path.join(folder, file))
            size += about.st_size
            if file != ".lock":
                changed = max(changed, about.st_mtime)
    return size, changed


def chosen(every: Sequence[Entry], names: Sequence[str]) -> list[Entry]:
    """The entries of these names or beginnings of names. UnweaveError for one that fits none, or several."""
    some = []
    for name in (Path(name).name for name in names):
        fitting = [entry for entry in every if entry.name == name] or [e for e in every if e.name.startswith(name)]
        if len(fitting) != 1:
            which = ", ".join(entry.name for entry in fitting[:5])
            what = f"{len(fitting)} runs begin with this name: {which}" if fitting else "there is no run of this name"
            raise UnweaveError(what, where=name, remedy="'unweave runs' lists them")
        some += [entry for entry in fitting if entry not in some]
    return some


def remove(some: Sequence[Entry]) -> int:
    """Deletes runs; how many bytes that freed. UnweaveError, before anything is deleted, where one is at work or a run
    that is not among them builds on one."""
    going = {entry.name for entry in some}
    for entry in some:
        if entry.state == "at work":
            raise UnweaveError("another process is working in this run", where=entry.name, remedy="wait, or stop it")
        staying = [name for name in entry.used_by if name not in going]
        if staying:
            raise UnweaveError(f"{', '.join(staying)} build{'s' * (len(staying) == 1)} on this run", where=entry.name,
                               remedy="remove these too, or keep it")  # fmt: skip
    for entry in some:
        shutil.rmtree(entry.path)
    return sum(entry.size for entry in some)


def changes(spec: Any, default: Any = None, prefix: str = "") -> dict[str, Any]:
    """The fields of a Spec that differ from their defaults, by dotted name; fields without a default count as such."""
    differing: dict[str, Any] = {}
    for field in fields(spec):
        value = getattr(spec, field.name)
        usual = _default(field) if default is None else getattr(default, field.name)
        if value == usual:
            continue
        if is_dataclass(value) and type(value) is type(usual):
            differing |= changes(value, usual, f"{prefix}{field.name}.")
        elif is_dataclass(value):
            differing |= changes(value, None, f"{prefix}{field.name}.")
        else:
            differing[prefix + field.name] = value
    return differing


def _default(field: Any) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default
