"""Deduplication by n-grams of words, in one pass over any amount of text: algorithm 1 of the FAST paper.

A document is dropped if any n words in a row, within one of its messages, occurred in a document that was kept before;
otherwise its n-grams are remembered and it is kept. So the outcome depends on the order, one shared boilerplate passage
drops a document, a document never drops itself, and a text without n words in a row is always kept. Words are what
white space separates, compared as they are.

n-grams are compared by 64-bit hashes. With N remembered, a new n-gram is mistaken for one of them with probability
N / 2^64: over 10^9 n-grams about 0.03 mistakes are expected in all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unweave.core.errors import UnweaveError
from unweave.core.progress import task
from unweave.core.writing import atomic_write
from unweave.data.corpus import Document, Source, read
from unweave.data.hashset import HashSet, in_sorted
from unweave.data.words import gram_hashes, word_hashes

_CHARACTERS_AT_ONCE = 500_000
_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 2_000_000
_LEAST_MEMORY = 1 << 20


@dataclass
class DedupCounts:
    """What was read so far, and what became of it."""

    n: int
    """the length of the n-grams in words"""
    documents: int = 0
    kept: int = 0
    dropped: int = 0
    grams: int = 0
    """distinct n-grams of the documents that were kept"""


class Deduplicator:
    """Decides about documents in the order they are given.

    ``memory_bytes`` bounds the memory of the remembered n-grams; what is beyond goes to nameless files in ``folder``
    (see ``HashSet``). The decisions depend on neither, nor on how documents are divided into calls.
    """

    def __init__(self, n: int = 20, *, memory_bytes: int = 512 << 20, folder: Path | None = None) -> None:
        if n < 1:
            raise UnweaveError(f"n-grams of {n} words are invalid", remedy="use at least 1; the FAST paper uses 20")
        self.n = n
        self.seen = HashSet(memory_bytes, folder)

    def keep(self, documents: Sequence[Document]) -> tuple[np.ndarray, np.ndarray]:
        """Which of the next documents [N] to keep, bool [N], and how many new n-grams each brought, int64 [N]."""
        hashes, owners = self._grams(documents)
        keep = np.ones(len(documents), dtype=bool)
        distinct, times = _distinct(hashes)
        repeated = self.seen.contains(distinct)
        keep[owners[in_sorted(distinct[repeated], hashes)]] = False
        again = self._settle(distinct[(times > 1) & ~repeated], hashes, owners, keep)
        remain = keep[owners]
        self.seen.add(distinct if remain.all() else _distinct(hashes[remain])[0])
        return keep, np.bincount(owners[remain], minlength=len(documents)) - again

    def _settle(self, repeated: np.ndarray, hashes: np.ndarray, owners: np.ndarray, keep: np.ndarray) -> np.ndarray:
        """Marks documents that share an n-gram with an earlier one of the same batch, in order.

        ``repeated`` [R] are the new n-grams, sorted, that occur several times in the batch. Returns how many n-grams
        of each kept document it had brought before itself, int64 [N].
        """
        again = np.zeros(len(keep), dtype=np.int64)
        places = np.flatnonzero(in_sorted(repeated, hashes) & keep[owners])
        which, whose = np.searchsorted(repeated, hashes[places]), owners[places]
        taken = np.zeros(len(repeated), dtype=bool)
        bounds = np.flatnonzero(np.diff(whose, prepend=-1, append=len(keep)))
        for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            own = which[start:end]
            if taken[own].any():
                keep[whose[start]] = False
            else:
                taken[own] = True
                again[whose[start]] = len(own) - len(np.unique(own))
        return again

    def _grams(self, documents: Sequence[Document]) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of all n-grams, uint64 [G], and the document each is from, int32 [G], ascending."""
        hashes, owners = [np.zeros(0, dtype=np.uint64)], [np.zeros(0, dtype=np.int32)]
        texts: list[str] = []
        whose: list[int] = []
        characters = 0

        def flush() -> None:
            words, lengths = word_hashes(texts)
            counts = np.maximum(lengths - self.n + 1, 0)
            # A text of L words begins L - n + 1 n-grams; where the others would begin, they reach into the next text.
            first = np.cumsum(lengths) - lengths
            places = np.arange(counts.sum()) + np.repeat(first - np.cumsum(counts) + counts, counts)
            hashes.append(gram_hashes(words, self.n)[places])
            owners.append(np.repeat(np.asarray(whose, dtype=np.int32), counts))

        for index, document in enumerate(documents):
            contents = [document.text or ""] if document.messages is None else [m["content"] for m in document.messages]
            for text in contents:
                if len(text) >= 2 * self.n - 1:  # n words and the blanks between them
                    texts.append(text)
                    whose.append(index)
                    characters += len(text)
                if characters > _CHARACTERS_AT_ONCE:
                    flush()
                    texts, whose, characters = [], [], 0
        if texts:
            flush()
        return np.concatenate(hashes), np.concatenate(owners)


class Deduplicated(Iterator[Document]):
    """The documents that are kept, in their order, decided as they are read; ``counts`` grows as they are taken."""

    def __init__(
        self, documents: Iterable[Document], n: int = 20, *, memory_bytes: int = 512 << 20, folder: Path | None = None
    ) -> None:
        self.counts = DedupCounts(n)
        self._memory = max(memory_bytes, _LEAST_MEMORY)
        self._judge = Deduplicator(n, memory_bytes=memory_bytes, folder=folder)
        self._kept = self._decide(iter(documents))

    def __next__(self) -> Document:
        return next(self._kept)

    def report(self) -> dict[str, int]:
        """The counts as plain values."""
        return asdict(self.counts)

    def _decide(self, documents: Iterator[Document]) -> Iterator[Document]:
        counts = self.counts
        while batch := self._batch(documents):
            keep, grams = self._judge.keep(batch)
            for document, is_new, new in zip(batch, keep.tolist(), grams.tolist(), strict=True):
                counts.documents += 1
                counts.grams += new
                if is_new:
                    counts.kept += 1
                    yield document
                else:
                    counts.dropped += 1
        self._judge.seen.close()

    def _batch(self, documents: Iterator[Document]) -> list[Document]:
        """The next documents to decide about. Once n-grams are in files, many at a time: each batch reads them all."""
        most, characters = _BATCH_DOCUMENTS, _BATCH_CHARACTERS
        if self._judge.seen.in_files:
            most, characters = max(most, self._memory >> 14), max(characters, self._memory >> 4)
        batch: list[Document] = []
        while len(batch) < most and characters > 0 and (document := next(documents, None)) is not None:
            batch.append(document)
            characters -= len(document.content)
        return batch


def _distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values, sorted, and how often each occurs."""
    ordered = np.sort(values)
    starts = np.flatnonzero(np.diff(ordered, prepend=~ordered[:1]))
    return ordered[starts], np.diff(starts, append=len(ordered))


def write_deduplicated(
    sources: Sequence[Source], out: Path, n: int = 20, *, memory_bytes: int = 512 << 20
) -> dict[str, Any]:
    """Writes the documents of the sources that are kept, in the order they stand there, as JSON lines; the counts.

    A line is {"messages": [...]} or {"text": ...}, with where the document came from. The file appears when it is
    whole; n-grams that memory cannot hold lie in its folder meanwhile. UnweaveError when it cannot be written.
    """
    if not sources:
        raise UnweaveError("no text was named", remedy="name at least one source, e.g. chitchat or a folder")
    out = Path(out)
    if any(out.resolve() == Path(source.path).expanduser().resolve() for source in sources):
        raise UnweaveError("this would replace the text it reads", where=str(out), remedy="give another --out")
    documents = (document for source in sources for document in read(source))
    deduplicated = Deduplicated(documents, n, memory_bytes=memory_bytes, folder=out.resolve().parent)
    with (
        atomic_write(out) as temporary,
        open(temporary, "w", encoding="utf-8") as handle,
        task("deduplicate", total=0, unit="documents") as shown,
    ):
        for document in deduplicated:
            held = {"text": document.text} if document.messages is None else {"messages": document.messages}
            row = {**held, "source": document.source, "index": document.index}
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
            shown.advance()
            shown.note(f"{deduplicated.counts.dropped:,} dropped")
    return deduplicated.report()
