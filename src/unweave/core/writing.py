"""Whole files: written beside their place, flushed to the disk and renamed; what the file system refuses, in words."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unweave.core.errors import UnweaveError

_NEARLY_NOTHING = 1 << 20
FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSALS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR),
    *(errno.ELOOP, errno.ENAMETOOLONG),
)


@contextmanager
def friendly_io(path: Path) -> Iterator[None]:
    """Turns the file system's refusals into UnweaveErrors that name the path and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise _disk_full(path) from error
        if error.errno in REFUSALS:
            reason = (error.strerror or str(error)).lower()
            remedy = "make the folder writable or choose another with --runs"
            raise UnweaveError(f"cannot write here: {reason}", where=str(path), remedy=remedy) from error
        raise
    except UnweaveError:
        raise
    except Exception as error:  # torch and safetensors say in their own ways that a file could not be written
        if "No space left" in str(error) or disk_free(path) < _NEARLY_NOTHING:
            raise _disk_full(path) from error
        raise


def _disk_full(path: Path) -> UnweaveError:
    left = f"{disk_free(path) / 1e6:.0f} MB left"
    remedy = f"free some space ({left}) or choose another --runs folder; what is finished is kept"
    return UnweaveError("the disk is full", where=str(path), remedy=remedy)


def disk_free(path: Path) -> int:
    """How many bytes are free where a path is, or would be."""
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


def make_folder(path: Path) -> None:
    """Makes a folder and those above it. UnweaveError where that cannot be; a folder that is there needs no writing."""
    if path.is_dir():
        return
    with friendly_io(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # a file system that has no room for folders, as /proc
            raise PermissionError(errno.EACCES, "no folder can be made here") from error


def sync_folder(folder: Path) -> None:
    """Makes renames inside a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, content: str | bytes) -> None:
    """Writes a file atomically; text as UTF-8."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically. NaN and infinity are errors: they are not JSON."""
    write_file(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
