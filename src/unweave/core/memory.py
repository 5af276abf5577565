"""Whether an error means that memory ran out: the file is not damaged, and the remedy differs."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from unweave.core.errors import UnweaveError

_SIGNS = (
    "out of memory",
    "allocate memory",
    "cannot allocate",
    "not enough memory",
    "alloc_failed",
    "bad_alloc",
    "(os error 12)",
    "paging file is too small",
)
"""What errors of many kinds say, in lower case, when memory is their cause (PyTorch, safetensors, CUDA, Windows)."""


def out_of_memory(error: BaseException) -> bool:
    """Whether memory is why an error was raised, by itself or as what it was raised from. Never an UnweaveError's."""
    if isinstance(error, UnweaveError):
        return False
    return any(_says_so(cause) for cause in _chain(error))


def _says_so(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):  # PyTorch's, which may not be there
        return True
    if isinstance(error, (ValueError, TypeError, LookupError)):  # these speak of what somebody asked for
        return False
    return any(sign in str(error).lower() for sign in _SIGNS)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def refuse_if_memory(error: BaseException, where: object) -> None:
    """Raises UnweaveError where memory ran out while ``where`` was read: its content may well be whole."""
    if out_of_memory(error):
        lines = str(error).strip().splitlines()
        what = f"not enough memory to read it: {lines[0][:300] if lines else 'an allocation failed'}"
        remedy = "free some memory, use a machine with more, or a smaller model or a narrower dtype (bfloat16)"
        raise UnweaveError(what, where=str(where), remedy=remedy) from error
