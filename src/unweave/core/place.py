"""Whether a folder can hold run directories, known before any work is done for them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from unweave.core.errors import UnweaveError
from unweave.core.files import is_text, printable

_LONGEST_NAME = 255
"""bytes, on every usual file system"""
_LONGEST_PATH = 3800
"""bytes, of the 4096 that Linux allows: run directories and the files in them need the rest"""


def usable(folder: str | Path) -> Path:
    """The absolute path of a folder that is there, or that can be made. Nothing is made here.

    UnweaveError for a path through a file, a loop of links or a folder that may not be entered, for names that are too
    long, and for those that are not text (a null byte, invalid UTF-8), which other libraries cannot open.
    """
    if "\0" in str(folder):
        raise _unusable(folder, "a null byte in its name")
    if not is_text(str(folder)):
        raise _unusable(folder, "its name is not UTF-8 text")
    try:
        real = Path(os.path.realpath(folder))
    except OSError as error:  # the current folder was deleted
        raise _unusable(folder, (error.strerror or str(error)).lower()) from None
    if not is_text(str(real)):
        raise _unusable(real, "its name is not UTF-8 text")
    longest = max(len(os.fsencode(part)) for part in real.parts)
    if longest > _LONGEST_NAME:
        raise _unusable(real, f"a name of {longest} bytes, of at most {_LONGEST_NAME}")
    if len(os.fsencode(real)) > _LONGEST_PATH:
        raise _unusable(real, f"a path of {len(os.fsencode(real)):,} bytes, of at most {_LONGEST_PATH:,}")
    _refuse_what_is_no_folder(real)
    return real


def _refuse_what_is_no_folder(real: Path) -> None:
    """Looks at the path, or at the lowest folder above it that is there."""
    for place in (real, *real.parents):
        try:
            kind = os.stat(place).st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise _unusable(place, (error.strerror or str(error)).lower()) from None
        if not stat.S_ISDIR(kind):
            raise _unusable(place, "not a folder")
        return


def _unusable(folder: str | Path, reason: str) -> UnweaveError:
    return UnweaveError(
        f"cannot write here: {reason}", where=printable(folder), remedy="choose another folder with --runs"
    )
