"""What a folder promises to hold: its files by size and digest, so that a missing, cut or changed one is noticed.

A listing is {relative path: {"bytes": n, "sha256": hex}}. Existence and size cost nothing to check; a digest is worked
out once for a file that has not changed since (about a second a gigabyte).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

from unweave.core.errors import UnweaveError
from unweave.core.files import files_under

Listing = dict[str, dict[str, Any]]


def listing(folder: Path, *, leave_out: Collection[str] = ()) -> Listing:
    """Every file below ``folder`` with its size and digest, but for those whose path, or a folder on it, matches one
    of the patterns ``leave_out``."""
    files: Listing = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(fnmatch(part, pattern) for part in parts for pattern in leave_out):
            files["/".join(parts)] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return files


def sha256(path: Path) -> str:
    """A file's digest, from memory where it has not changed since."""
    about = path.stat()
    return _sha256(str(path.resolve()), about.st_size, about.st_mtime_ns, about.st_ino)


@lru_cache(maxsize=4096)
def _sha256(path: str, size: int, changed: int, inode: int) -> str:
    del size, changed, inode
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def content_of(path: Path) -> str:
    """Twelve digits over a file's bytes, for the identity of what reads it. UnweaveError where it cannot be read."""
    try:
        return sha256(path)[:12]
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise UnweaveError(f"cannot read it: {error}", where=str(path), remedy="check the path") from None


def tree_of(place: str | Path) -> str:
    """Twelve digits over a file's bytes, or over the names and bytes of all files below a folder; empty where there is
    neither, as for names of what is elsewhere."""
    path = Path(os.path.expanduser(place))
    if not os.path.exists(path):  # unlike Path.exists, also False where a name is too long to be one
        return ""
    if not path.is_dir():
        return content_of(path)
    hashed = hashlib.sha256()
    for file in files_under(path):
        hashed.update(f"{file.relative_to(path).as_posix()} {content_of(file)} ".encode())
    return hashed.hexdigest()[:12]


def missing(folder: Path, listed: Mapping[str, Mapping[str, Any]]) -> str | None:
    """What is wrong with the files of a listing, by existence and size alone; None where nothing is."""
    for name, about in listed.items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != about["bytes"]:
            return f"{name} has {size:,} bytes instead of {about['bytes']:,}"
    return None


def checked(folder: Path, name: str, listed: Mapping[str, Mapping[str, Any]], remedy: str) -> Path:
    """The path of a listed file. UnweaveError, with ``remedy``, where it is missing or not what was written."""
    path, about = folder / name, listed.get(name)
    problem = f"{name} does not belong to this folder" if about is None else missing(folder, {name: about})
    if problem is None and about is not None and sha256(path) != about["sha256"]:
        problem = f"{name} is not what was written"
    if problem is not None:
        raise UnweaveError(f"damaged: {problem}", where=str(folder), remedy=remedy)
    return path


def is_listing(value: Any) -> bool:
    """Whether a value read from a file has the form of a listing."""
    return isinstance(value, dict) and all(
        isinstance(about, dict)
        and isinstance(about.get("bytes"), int)
        and isinstance(about.get("sha256"), str)
        and isinstance(name, str)
        and not name.startswith("/")
        and ".." not in name.split("/")
        for name, about in value.items()
    )
