"""Run directories: named by what was asked, finished once, resumable, never half-written.

A run lives in ``<root>/<stage>-<digest>`` and holds ``spec.json``, ``env.json``, ``log.jsonl``, ``costs.json``, its
outputs and, last, ``DONE``. Asking again finds ``DONE`` and returns at once. Every file is written to a temporary name,
flushed to the disk and renamed, so a file that is there is whole, whatever killed the process that wrote it.

``DONE`` lists every output with size and digest. A run that has lost one of them is not finished: asking again makes it
anew, and opening it by its path refuses, naming the file. Time and memory are in ``costs.json`` alone, so that equal
questions have equal outputs byte for byte; time adds up over the processes that worked on a run.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, Any, ClassVar, Generic, Self, TypeVar

from unweave.core import contents
from unweave.core.errors import UnweaveError, UnweaveWarning
from unweave.core.files import printable, read_json
from unweave.core.lock import remove_stale, take, wait_for
from unweave.core.place import usable
from unweave.core.result import Result, as_read, as_written
from unweave.core.spec import Spec, digest
from unweave.core.writing import friendly_io, make_folder, write_json

_NO_OUTPUTS = (".*", "DONE", "spec.json", "env.json", "log.jsonl", "costs.json")
_PIECES = ("parts*", "codes", "checkpoint*")
"""what only unfinished work needs: folders and files of these names are gone once a run is done"""


def environment() -> dict[str, Any]:
    """Versions that can matter to a result; no names of users, machines or folders, and no environment variables."""
    versions = {}
    for name in ("unweave", "torch", "transformers", "tokenizers", "safetensors", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {"python": platform.python_version(), "system": platform.system(), "machine": platform.machine()} | versions


def peak_memory_gb() -> float:
    """The most memory this process has held so far, in GB."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(kilobytes * (1024 if sys.platform != "darwin" else 1) / 1e9, 2)


R = TypeVar("R", bound=Result)


class Run(Generic[R]):
    """One stage's directory. Use as ``with Run.open(...) as run:``; inside, no other process can hold it.

    ``done`` says that the stage has finished: then ``result`` is what it found and nothing needs doing.
    """

    _held: ClassVar[set[Path]] = set()
    """the runs that this process is working in"""

    def __init__(self, path: Path, identity: str, kind: type[R] | None = None) -> None:
        self.path = path
        self.kind = kind
        self.digest = identity
        self._lock: IO[str] | None = None
        self._since = 0.0
        self.reused = self.done

    @classmethod
    def open(
        cls,
        root: Path,
        stage: str,
        spec: Spec,
        *,
        version: int = 1,
        inputs: Mapping[str, str] | None = None,
        kind: type[R] | None = None,
    ) -> Self:
        """The run directory for a spec under ``root``; made if new.

        ``version`` is the stage's own (raise it when its results change), ``inputs`` the digests of what it reads,
        ``kind`` the class of its result.
        """
        question = {"stage": stage, "version": version, "spec": spec.digest(), "inputs": dict(inputs or {})}
        identity = digest(question)
        path = usable(root) / f"{stage}-{identity}"
        make_folder(path)
        run = cls(path, identity, kind)
        if _asked(path) is None:
            write_json(path / "spec.json", question | {"spec": spec.to_dict()})
        if not (path / "env.json").exists() and not run.done:
            write_json(path / "env.json", environment())
        return run

    @classmethod
    def at(cls, path: Path, kind: type[R] | None = None) -> Self:
        """A finished or unfinished run that already has a directory; ``kind`` is the class of its result."""
        path = Path(os.path.realpath(printable(path)))
        if not os.path.isfile(path / "spec.json"):
            raise UnweaveError("this is not a run directory", where=str(path), remedy="give a folder with a spec.json")
        return cls(path, path.name.rsplit("-", 1)[-1], kind)

    def __enter__(self) -> Self:
        with friendly_io(self.path):
            self._lock = self._take()
        self.reused = self.done
        if self._lock is None:
            return self
        remove_stale(self.path)
        if self.reused:
            self._remove_pieces()
        elif (self.path / "DONE").exists():
            self.log("made anew", {"reason": self.problem})
            warnings.warn(f"{self.path.name} is made anew: {self.problem}", UnweaveWarning, stacklevel=2)
            (self.path / "DONE").unlink()
        self._since = time.monotonic()
        Run._held.add(self.path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            if isinstance(error, UnweaveError) and self._untouched:
                shutil.rmtree(self.path, ignore_errors=True)  # a question that was refused before any work
            else:
                self._count_costs()
            self._lock.close()
            self._lock = None
            Run._held.discard(self.path)

    def _take(self) -> IO[str] | None:
        """The lock; None where it cannot be had and the run has finished: reading needs none, nor a disk to write on.

        What another process is making is waited for inside another run, of which it is a part that several may need.
        Else it is refused.
        """
        path = self.path / ".lock"
        try:
            handle = take(path)
        except OSError:
            if self.done:
                return None
            raise
        if handle is not None or self.done:
            return handle
        if Run._held and self.path not in Run._held:
            return wait_for(path, self.path.name)
        remedy = "wait for it to finish and ask again: its result will be reused"
        raise UnweaveError("another process is working in this run directory", where=str(self.path), remedy=remedy)

    @property
    def done(self) -> bool:
        """Whether it has finished and holds what it promised."""
        return (self.path / "DONE").exists() and self.problem is None

    @property
    def problem(self) -> str | None:
        """What a finished run has lost: an output is missing or of another size, or the result is damaged."""
        listed = self._listed()
        if listed is None:
            return "DONE is damaged"
        if "result.json" not in listed:
            return "DONE does not list result.json"
        lost = contents.missing(self.path, listed)
        if lost is None and contents.sha256(self.path / "result.json") != listed["result.json"]["sha256"]:
            return "result.json is not what was written"
        return lost

    def _listed(self) -> contents.Listing | None:
        try:
            listed = read_json(self.path / "DONE")
        except UnweaveError:
            return None
        return listed if contents.is_listing(listed) else None

    def file(self, name: str) -> Path:
        """The path of an output. UnweaveError where it is missing, or not what the run wrote."""
        return self._checked(name, self._listed() or {})

    def folder(self, name: str) -> Path:
        """The path of a folder of outputs, every file in it checked."""
        listed = self._listed() or {}
        for inner in listed:
            if inner.startswith(f"{name}/"):
                self._checked(inner, listed)
        return self.path / name

    def _checked(self, name: str, listed: contents.Listing) -> Path:
        return contents.checked(self.path, name, listed, f"delete {self.path} and run the same command again")

    @property
    def costs(self) -> dict[str, Any]:
        """{"seconds", "peak_memory_gb"} of all processes that worked on it, so far; empty where nothing is known."""
        try:
            costs = read_json(self.path / "costs.json")
        except UnweaveError:
            return {}
        return costs if isinstance(costs, dict) else {}

    @property
    def seconds(self) -> float:
        """How long its work took, over all processes; 0 where that is not known."""
        return _number(self.costs.get("seconds"))

    def _count_costs(self) -> None:
        """Adds what has passed since the last time to ``costs.json``."""
        if self._lock is None or self.reused:
            return
        now = time.monotonic()
        old, memory = self.costs, peak_memory_gb()
        seconds = self.seconds + now - self._since
        peak = max(memory, _number(old.get("peak_memory_gb")))
        self._since = now
        write_json(self.path / "costs.json", old | {"seconds": round(seconds, 2), "peak_memory_gb": peak})

    @property
    def _untouched(self) -> bool:
        return all(path.name in (".lock", "spec.json", "env.json") for path in self.path.iterdir())

    def _remove_pieces(self) -> None:
        for path in [path for pattern in _PIECES for path in self.path.glob(pattern)]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    @property
    def spec(self) -> dict[str, Any]:
        """What was asked, as plain values."""
        return self.asked["spec"]

    @property
    def asked(self) -> dict[str, Any]:
        """{"stage", "version", "spec", "inputs"}: the whole question. UnweaveError where it is missing or damaged."""
        question = _asked(self.path)
        if question is None:
            remedy = "run the same command again, which writes it anew, or delete the folder"
            raise UnweaveError("damaged: spec.json does not say what was asked", where=str(self.path), remedy=remedy)
        return question

    @property
    def environment(self) -> dict[str, str]:
        """The versions that it was made with; empty where nobody noted them. UnweaveError where the file is damaged."""
        path = self.path / "env.json"
        versions = read_json(path) if path.exists() else {}
        if not isinstance(versions, dict) or not all(isinstance(value, str) for value in versions.values()):
            remedy = "delete it: versions stay unknown"
            raise UnweaveError("damaged: env.json does not name versions", where=str(self.path), remedy=remedy)
        return versions

    @property
    def result(self) -> R:
        """What a finished run found. UnweaveError when it has not finished, or has lost an output."""
        if not (self.path / "DONE").exists():
            raise UnweaveError("this run has not finished", where=str(self.path), remedy="run the same command again")
        problem = self.problem
        if problem is not None:
            raise UnweaveError(
                f"damaged: {problem}", where=str(self.path), remedy="run the same command again, which makes it anew"
            )
        if self.kind is None:
            raise TypeError("a run that is opened without the class of its result has none to give")
        place = self.path / "result.json"
        return as_read(self.kind, read_json(place), str(place))

    def log(self, event: str, fields: Mapping[str, Any] | None = None) -> None:
        """Appends one line to ``log.jsonl``. What is logged must hold no secrets."""
        line = {"time": round(time.time(), 3), "event": event, **(fields or {})}
        with friendly_io(self.path), open(self.path / "log.jsonl", "a", encoding="utf-8") as handle:
            handle.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._count_costs()

    def events(self, event: str) -> list[dict[str, Any]]:
        """The logged lines of one kind, oldest first; damaged lines, as a crash leaves them, are passed over."""
        events = []
        path = self.path / "log.jsonl"
        for text in path.read_bytes().split(b"\n") if path.is_file() else []:
            with contextlib.suppress(ValueError, RecursionError):
                line = json.loads(text)
                if isinstance(line, dict) and line.get("event") == event:
                    events.append(line)
        return events

    def finish(self, result: Result) -> None:
        """Writes the result and then, last of all, ``DONE`` with the listing of every output.

        What was measured of time and memory belongs in ``costs.json``, not in the result.
        """
        write_json(self.path / "result.json", as_written(result))
        self._count_costs()
        write_json(self.path / "DONE", contents.listing(self.path, leave_out=(*_NO_OUTPUTS, *_PIECES)))
        self._remove_pieces()


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


def _asked(path: Path) -> dict[str, Any] | None:
    """What spec.json says, where it has the form of a question."""
    try:
        question = read_json(path / "spec.json")
    except UnweaveError:
        return None
    forms = {"stage": str, "version": int, "spec": dict, "inputs": dict}
    fine = isinstance(question, dict) and all(isinstance(question.get(name), form) for name, form in forms.items())
    return question if fine else None
