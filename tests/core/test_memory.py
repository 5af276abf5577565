"""Parts that are halved when memory runs out, with work that pretends to need memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from unweave.core.errors import UnweaveError
from unweave.core.halving import halving
from unweave.core.memory import out_of_memory

ERRORS = (
    MemoryError(),
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
)


def needing(limit: Callable[[int], int], error: Exception, tried: list[slice]) -> Callable[[slice], list[int]]:
    """Work on rows that fails where a part holds more rows than ``limit(its first row)``."""

    def work(rows: slice) -> list[int]:
        tried.append(rows)
        if rows.stop - rows.start > limit(rows.start):
            raise error
        return list(range(rows.start, rows.stop))

    return work


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(("n", "first", "fits"), [(20, 8, 8), (20, 8, 3), (7, 100, 2), (5, 5, 1), (1, 1, 1), (9, 4, 4)])
def test_every_row_is_worked_on_once_and_in_order(error: Exception, n: int, first: int, fits: int) -> None:
    tried: list[slice] = []
    parts, size = halving(n, first, needing(lambda _: fits, error, tried))
    assert [row for part in parts for row in part] == list(range(n))
    assert all(len(part) <= min(fits, first) for part in parts)
    failed = [rows for rows in tried if rows.stop - rows.start > fits]
    assert len(tried) == len(parts) + len(failed)  # what succeeded was never done again
    assert size <= fits or size == first
    assert fits < first or size == first


def test_memory_that_runs_out_late_keeps_what_is_done() -> None:
    tried: list[slice] = []
    parts, size = halving(16, 4, needing(lambda row: 4 if row < 8 else 1, MemoryError(), tried))
    assert [(rows.start, rows.stop) for rows in tried[:5]] == [(0, 4), (4, 8), (8, 12), (8, 10), (8, 9)]
    assert [row for part in parts for row in part] == list(range(16))
    assert size == 1


def test_a_short_last_part_is_halved_from_what_it_held() -> None:
    tried: list[slice] = []
    halving(11, 8, needing(lambda row: 8 if row == 0 else 1, MemoryError(), tried))
    assert [(rows.start, rows.stop) for rows in tried[:3]] == [(0, 8), (8, 11), (8, 9)]


def test_a_row_that_does_not_fit_is_refused_and_other_errors_pass() -> None:
    with pytest.raises(UnweaveError, match="single example"):
        halving(4, 4, needing(lambda row: 1 if row < 2 else 0, MemoryError(), []))
    with pytest.raises(RuntimeError, match="shapes"):
        halving(4, 4, needing(lambda _: 0, RuntimeError("shapes do not match"), []))
    with pytest.raises(UnweaveError, match="0 rows"):
        halving(4, 0, needing(lambda _: 1, MemoryError(), []))
    assert halving(0, 4, needing(lambda _: 1, MemoryError(), [])) == ([], 4)
    assert not out_of_memory(ValueError("out of memory"))


def test_a_single_row_is_tried_once_more_in_a_thriftier_way() -> None:
    thrifty: list[slice] = []

    def alone(rows: slice) -> list[int]:
        thrifty.append(rows)
        return list(range(rows.start, rows.stop))

    parts, size = halving(5, 4, needing(lambda row: 0 if row == 2 else 1, MemoryError(), []), alone)
    assert [row for part in parts for row in part] == list(range(5))
    assert thrifty == [slice(2, 3)] and size == 1
    with pytest.raises(UnweaveError, match="single example"):
        halving(2, 2, needing(lambda _: 0, MemoryError(), []), needing(lambda _: 0, MemoryError(), []))
    with pytest.raises(RuntimeError, match="shapes"):
        halving(2, 2, needing(lambda _: 0, MemoryError(), []), needing(lambda _: 0, RuntimeError("shapes differ"), []))


def test_tensors_of_a_failed_try_are_gone_before_the_next() -> None:
    """The error holds the frames it went through, and these what they had made: kept, it would fill memory again."""
    import weakref

    held: list[weakref.ref[torch.Tensor]] = []

    def work(rows: slice) -> int:
        assert all(ref() is None for ref in held)
        big = torch.zeros(10)
        held.append(weakref.ref(big))
        if rows.stop - rows.start > 1:
            raise MemoryError
        return rows.start

    assert halving(4, 4, work) == ([0, 1, 2, 3], 1)
