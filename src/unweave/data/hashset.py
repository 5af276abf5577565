"""A set of 64-bit hashes that can outgrow memory: sorted arrays, merged as they pile up, the large ones in files.

New hashes arrive sorted and are kept as sorted runs. Runs in memory are merged whenever the newest is at least half as
long as the one before it, so there are few. When they fill their part of the memory they are written to one file; four
files of about the same size are merged into one. Files hold plain sorted uint64 and have no name, so that nothing is
left behind however the process ends; of each only the first hash of every block stays in memory.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from unweave.core.writing import friendly_io

_BYTES = 8
_BLOCK = 1 << 14
"""Hashes of a file that are read at a time: 128 KiB."""
_FANOUT = 4


class HashSet:
    """An exact set of uint64 values that are spread evenly, as hashes are.

    ``memory_bytes`` bounds what it holds in memory, copies while sorting included (a few blocks of 128 KiB are the
    least); the rest goes to nameless files in ``folder`` (by default where the system keeps temporary files), 8 bytes a
    hash and as much again while files are merged.
    """

    def __init__(self, memory_bytes: int, folder: Path | None = None) -> None:
        self.folder = Path(folder) if folder is not None else Path(tempfile.gettempdir())
        self._held_most = max(1, memory_bytes // (4 * _BYTES))
        self._merged_at_once = max(_FANOUT * _BLOCK, memory_bytes // (8 * _BYTES))
        self._memory: list[np.ndarray] = []
        self._files: list[_FileRun] = []
        self.spilled = 0
        """How many hashes were moved to files so far."""

    def __len__(self) -> int:
        return sum(map(len, self._memory)) + sum(run.length for run in self._files)

    @property
    def in_files(self) -> bool:
        """Whether some of it is on disk, so that asking for many at once pays."""
        return bool(self._files)

    def contains(self, hashes: np.ndarray) -> np.ndarray:
        """Which of the sorted ``hashes`` [N] are in the set, bool [N]."""
        present = np.zeros(len(hashes), dtype=bool)
        for run in self._memory:
            present |= in_sorted(run, hashes)
        with friendly_io(self.folder):
            for run in self._files:
                run.mark(hashes, present)
        return present

    def add(self, hashes: np.ndarray) -> None:
        """Adds ``hashes``, sorted, distinct, and none of them in the set yet. UnweaveError when the disk is full."""
        if not len(hashes):
            return
        self._memory.append(hashes)
        while len(self._memory) > 1 and 2 * len(self._memory[-1]) >= len(self._memory[-2]):
            merged = np.concatenate([self._memory.pop(), self._memory.pop()])
            merged.sort()
            self._memory.append(merged)
        if sum(map(len, self._memory)) > self._held_most:
            with friendly_io(self.folder):
                self._spill()

    def close(self) -> None:
        """Gives memory and disk back; the set is empty then."""
        for run in self._files:
            run.close()
        self._memory, self._files = [], []

    def _spill(self) -> None:
        held = np.concatenate(self._memory)
        self._memory = []
        held.sort()
        self.spilled += len(held)
        self._files.append(_FileRun.write(self.folder, [held], 0))
        while len(alike := [run for run in self._files if run.tier == self._files[-1].tier]) >= _FANOUT:
            merged = _FileRun.write(self.folder, _merged(alike, self._merged_at_once), alike[0].tier + 1)
            for run in alike:
                run.close()
            self._files = [run for run in self._files if run not in alike] + [merged]


class _FileRun:
    """Sorted hashes in a file without a name."""

    def __init__(self, handle: IO[bytes], length: int, fences: np.ndarray, tier: int) -> None:
        self.handle, self.length, self.tier = handle, length, tier
        self.fences = fences  # the first hash of every block
        self.close = weakref.finalize(self, handle.close)  # reading may end early, with nobody to close it

    @classmethod
    def write(cls, folder: Path, pieces: Sequence[np.ndarray] | Iterator[np.ndarray], tier: int) -> _FileRun:
        """A run of the sorted pieces, which follow one another in order."""
        folder.mkdir(parents=True, exist_ok=True)
        handle = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it lives as long as the run
        fences: list[np.ndarray] = []
        length = 0
        try:
            for piece in pieces:
                fences.append(piece[-length % _BLOCK :: _BLOCK].copy())
                handle.write(piece.data)
                length += len(piece)
            handle.flush()
        except BaseException:
            handle.close()
            raise
        return cls(handle, length, np.concatenate(fences), tier)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Hashes start to stop, uint64 [stop - start]."""
        left, parts = (stop - start) * _BYTES, []
        at = start * _BYTES
        while left:
            part = os.pread(self.handle.fileno(), left, at)
            if not part:
                raise OSError(f"a file of spilled hashes ends early, at byte {at}")
            parts.append(part)
            at, left = at + len(part), left - len(part)
        return np.frombuffer(parts[0] if len(parts) == 1 else b"".join(parts), dtype=np.uint64)

    def mark(self, hashes: np.ndarray, present: np.ndarray) -> None:
        """Sets ``present`` where the sorted ``hashes`` are in this run. Each block that may hold one is read once."""
        block_of = np.searchsorted(self.fences, hashes, side="right") - 1
        blocks, firsts = np.unique(block_of, return_index=True)
        ends = [*firsts[1:].tolist(), len(hashes)]
        for block, first, end in zip(blocks.tolist(), firsts.tolist(), ends, strict=True):
            if block >= 0:
                held = self.read(block * _BLOCK, min((block + 1) * _BLOCK, self.length))
                present[first:end] |= in_sorted(held, hashes[first:end])

    def first_from(self, bound: int) -> int:
        """How many hashes are below ``bound``."""
        block = int(np.searchsorted(self.fences, np.uint64(bound))) - 1
        if block < 0:
            return 0
        held = self.read(block * _BLOCK, min((block + 1) * _BLOCK, self.length))
        return block * _BLOCK + int(np.searchsorted(held, np.uint64(bound)))


def in_sorted(held: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Which ``hashes`` [N] are among the sorted ones that are ``held``, bool [N]."""
    if not len(held):
        return np.zeros(len(hashes), dtype=bool)
    return held[np.minimum(np.searchsorted(held, hashes), len(held) - 1)] == hashes


def _merged(runs: Sequence[_FileRun], at_once: int) -> Iterator[np.ndarray]:
    """The hashes of all runs in order, in pieces of about ``at_once``: hashes are spread evenly, so are the cuts."""
    n = -(-2 * sum(run.length for run in runs) // at_once)
    lows = [0] * len(runs)
    for part in range(1, n + 1):
        highs = [run.length if part == n else run.first_from((part << 64) // n) for run in runs]
        piece = np.concatenate([run.read(low, high) for run, low, high in zip(runs, lows, highs, strict=True)])
        piece.sort()
        lows = highs
        if len(piece):
            yield piece
