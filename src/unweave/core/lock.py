"""One process at a time: lock files, which the system gives back when a process ends, however it ends, and what such a
process leaves behind."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from unweave.core.errors import UnweaveError
from unweave.core.progress import task

_PAUSE = 0.2
"""seconds between two tries"""


def take(path: Path) -> IO[str] | None:
    """The lock, held until it is closed; None where another process holds it. OSError where no file can be made."""
    handle = _opened(path)
    if _locked(handle, path):
        return handle
    handle.close()
    return None


def wait_for(path: Path, what: str) -> IO[str]:
    """The lock, as soon as no other process holds it; ``what`` is being made there, and progress says so meanwhile."""
    handle = _opened(path)
    if not _locked(handle, path):
        with task(f"waiting for {what}, which another process is making", total=0, unit="s") as shown:
            while not _locked(handle, path):
                time.sleep(_PAUSE)
                shown.advance(_PAUSE)
    return handle


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """Inside, no other process makes the file ``path``. The lock is gone afterwards."""
    lock = path.with_name(f".{path.name}.lock")
    handle = wait_for(lock, f"{path.parent.name}/{path.name}")
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # while it is held: who waits for it finds the file made
        handle.close()


def remove_stale(folder: Path) -> None:
    """Deletes the temporary files and folders below ``folder`` of processes that are gone; their names end in those
    processes' numbers."""
    for temporary in list(folder.rglob(".*.tmp")):
        number = temporary.name.split(".")[-2]
        if number.isdigit() and int(number) != os.getpid() and not _alive(int(number)):
            if temporary.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink(missing_ok=True)


def _opened(path: Path) -> IO[str]:
    return open(path, "w")  # stays open for as long as the lock is held


def _locked(handle: IO[str], path: Path) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        handle.close()
        what = f"files cannot be locked here: {error.strerror}"
        raise UnweaveError(what, where=str(path), remedy="choose another folder with --runs") from error
    return True


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True
