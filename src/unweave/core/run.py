"""Run directories: named by what was asked, finished once, resumable, never half-written.

A run lives in ``<root>/<stage>-<digest>`` and holds ``spec.json``, ``env.json``, ``log.jsonl``, its outputs and, last,
``DONE``. Asking again finds ``DONE`` and returns at once. Every file is written to a temporary name, flushed to the
disk and renamed, so a file that is there is whole, whatever killed the process that wrote it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from unweave.core.errors import UnweaveError
from unweave.core.files import read_json
from unweave.core.spec import Spec, digest

_NEARLY_NOTHING = 1 << 20


@contextmanager
def friendly_io(path: Path) -> Iterator[None]:
    """Turns the file system's refusals into UnweaveErrors that name the path and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(path) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            reason = (error.strerror or str(error)).lower()
            remedy = "make the folder writable or choose another with --runs"
            raise UnweaveError(f"cannot write here: {reason}", where=str(path), remedy=remedy) from error
        raise
    except UnweaveError:
        raise
    except Exception as error:  # torch and safetensors say in their own ways that a file could not be written
        if "No space left" in str(error) or _free_bytes(path) < _NEARLY_NOTHING:
            raise _disk_full(path) from error
        raise


def _disk_full(path: Path) -> UnweaveError:
    left = f"{_free_bytes(path) / 1e6:.0f} MB left"
    remedy = f"free some space ({left}) or choose another --runs folder; what is finished is kept"
    return UnweaveError("the disk is full", where=str(path), remedy=remedy)


def _free_bytes(path: Path) -> int:
    return shutil.disk_usage(next(folder for folder in (path, *path.resolve().parents) if folder.exists())).free


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; what is written there is flushed and renamed to ``path`` at the end."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with friendly_io(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _remove_stale(temporary: Path) -> None:
    """Deletes a temporary file or folder of a process that is gone; its name ends in that process's number."""
    number = temporary.name.split(".")[-2]
    if number.isdigit() and int(number) != os.getpid():
        with contextlib.suppress(PermissionError):  # somebody else's process: it is alive
            try:
                os.kill(int(number), 0)
            except ProcessLookupError:
                if temporary.is_dir():
                    shutil.rmtree(temporary, ignore_errors=True)
                else:
                    temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes renames inside a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically. NaN and infinity are errors: they are not JSON."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


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


class Run:
    """One stage's directory. Use as ``with Run.open(...) as run:``; inside, no other process can hold it.

    ``done`` says that the stage has finished: then ``result`` is what it found and nothing needs doing.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        self.digest = identity
        self._lock: IO[str] | None = None
        self.reused = self.done

    @classmethod
    def open(
        cls, root: Path, stage: str, spec: Spec, *, version: int = 1, inputs: Mapping[str, str] | None = None
    ) -> Self:
        """The run directory for a spec under ``root``; made if new.

        ``version`` is the stage's own (raise it when its results change), ``inputs`` the digests of what it reads.
        """
        asked = {"stage": stage, "version": version, "spec": spec.digest(), "inputs": dict(inputs or {})}
        identity = digest(asked)
        path = Path(root).resolve() / f"{stage}-{identity}"
        with friendly_io(path):
            path.mkdir(parents=True, exist_ok=True)
        run = cls(path, identity)
        if not (path / "spec.json").exists():
            write_json(path / "spec.json", asked | {"spec": spec.to_dict()})
            write_json(path / "env.json", environment())
        return run

    @classmethod
    def at(cls, path: Path) -> Self:
        """A finished or unfinished run that already has a directory."""
        path = Path(path).resolve()
        if not (path / "spec.json").is_file():
            raise UnweaveError("this is not a run directory", where=str(path), remedy="give a folder with a spec.json")
        return cls(path, path.name.rsplit("-", 1)[-1])

    def __enter__(self) -> Self:
        with friendly_io(self.path):
            handle = open(self.path / ".lock", "w")  # stays open for as long as the lock is held
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.close()
            raise UnweaveError(
                "another process is working in this run directory",
                where=str(self.path),
                remedy="wait for it to finish and ask again: its result will be reused",
            ) from None
        self._lock = handle
        self.reused = self.done
        for stale in self.path.glob(".*.tmp"):
            _remove_stale(stale)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def done(self) -> bool:
        return (self.path / "DONE").exists()

    @property
    def spec(self) -> dict[str, Any]:
        """What was asked, as plain values."""
        return read_json(self.path / "spec.json")["spec"]

    @property
    def result(self) -> dict[str, Any]:
        """What a finished run found. UnweaveError when it has not finished."""
        if not self.done:
            raise UnweaveError("this run has not finished", where=str(self.path), remedy="run the same command again")
        return read_json(self.path / "result.json")

    def log(self, event: str, fields: Mapping[str, Any] | None = None) -> None:
        """Appends one line to ``log.jsonl``. What is logged must hold no secrets."""
        line = {"time": round(time.time(), 3), "event": event, **(fields or {})}
        with friendly_io(self.path), open(self.path / "log.jsonl", "a", encoding="utf-8") as handle:
            handle.write(json.dumps(line, ensure_ascii=False) + "\n")

    def events(self, event: str) -> list[dict[str, Any]]:
        """The logged lines of one kind, oldest first; a last line cut short by a crash is passed over."""
        found = []
        path = self.path / "log.jsonl"
        for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if line["event"] == event:
                    found.append(line)
        return found

    def finish(self, result: Mapping[str, Any]) -> None:
        """Writes the result and then, last of all, ``DONE``."""
        write_json(self.path / "result.json", dict(result))
        with atomic_write(self.path / "DONE") as temporary:
            temporary.write_text(f"{sys.argv[0].rsplit('/', 1)[-1]}\n", encoding="utf-8")
