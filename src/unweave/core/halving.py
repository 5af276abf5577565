"""Work on as many rows at a time as memory allows: halved when it runs out, without losing what is done."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from unweave.core.errors import UnweaveError
from unweave.core.memory import out_of_memory

T = TypeVar("T")


def halving(
    n_rows: int, first: int, work: Callable[[slice], T], alone: Callable[[slice], T] | None = None
) -> tuple[list[T], int]:
    """``work(slice of rows)`` over rows 0 to ``n_rows`` in order: what it returned, part by part, and the rows of one.

    Begins with ``first`` rows a part. When memory runs out, the part that failed is tried again with half as many rows,
    and so are those after it; finished parts are kept. The number that comes back is what a part may hold from now on,
    at most ``first``. Where a single row is too much for ``work``, ``alone``, a thriftier way for one row, is tried in
    its place. Other errors pass through. Raises UnweaveError where a single row is too much even so.
    """
    if first < 1:
        raise UnweaveError(f"a part cannot hold {first} rows", remedy="begin with at least 1")
    results: list[T] = []
    start, size = 0, first
    while start < n_rows:
        rows = slice(start, min(start + size, n_rows))
        part = _tried(work, rows)
        if part is None:
            _let_go()
            if alone is not None and rows.stop - rows.start == 1:
                part = _tried(alone, rows)
        if part is not None:
            results.append(part[0])
            start = rows.stop
            continue
        held = rows.stop - rows.start  # the last part may hold less than `size`
        if held == 1:
            what = "memory does not hold a single example"
            remedy = "use shorter texts, fewer sites or steps, or a machine with more memory"
            raise UnweaveError(what, where=f"row {rows.start} of {n_rows}", remedy=remedy)
        size = held // 2
    return results, size


def _tried(work: Callable[[slice], T], rows: slice) -> tuple[T] | None:
    """What work gives; None when memory ran out. Leaving this function also leaves the error, and so its tensors."""
    try:
        return (work(rows),)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return None


def _let_go() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
