"""The documents of one split: all sources in their fixed order, without near duplicates, divided by a hash.

Duplicates are dropped before the split is made, so that it does not matter which side an earlier document is on: no
n-gram of a held-out document occurs in the training text. Each split reads the whole stream and decides the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from unweave.core.errors import UnweaveError
from unweave.data.corpus import Document, Source, TextCounts, documents, is_heldout, is_in_part
from unweave.data.dedup import Deduplicated


@dataclass
class SplitCounts(TextCounts):
    """What was read so far."""

    taken: int = 0
    other_split: int = 0
    other_part: int = 0


class SplitDocuments(Iterator[Document]):
    """The documents of the train or heldout split, read as they are taken; ``counts`` grows along.

    ``dedup`` is the n of the n-grams that no two documents may share (0: documents are not compared); their memory is
    bounded by ``memory_bytes``, the rest lies in nameless files in ``folder``. ``part`` says which shares of the split
    are given, from and up to; parts that do not overlap have no document in common. Raises UnweaveError at the end when
    there was no document for this split.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        split: str,
        *,
        heldout: float,
        seed: int,
        dedup: int = 0,
        memory_bytes: int = 512 << 20,
        folder: Path | None = None,
        part: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        if split not in ("train", "heldout"):
            raise UnweaveError(f"unknown split {split!r}", remedy="use train or heldout")
        self.split, self.part, self.counts = split, part, SplitCounts()
        stream = documents(sources, seed, self.counts)
        self.dedup = Deduplicated(stream, dedup, memory_bytes=memory_bytes, folder=folder) if dedup else None
        self._taken = self._divided(self.dedup or stream, heldout, seed)

    def __next__(self) -> Document:
        return next(self._taken)

    def report(self) -> dict[str, dict[str, int]]:
        """{"text": counts} and, with deduplication, {"dedup": counts}."""
        return {"text": asdict(self.counts)} | ({"dedup": self.dedup.report()} if self.dedup else {})

    def in_words(self) -> str:
        """What became of the documents."""
        counts = self.counts
        words = [f"{counts.taken:,} of this split", f"{counts.other_split:,} of the other"]
        words += [f"{counts.other_part:,} of another part of it"] if counts.other_part else []
        words += [f"{counts.blank:,} blank"] if counts.blank else []
        if self.dedup is not None:
            dropped = self.dedup.counts
            words.append(f"{dropped.dropped:,} of {dropped.documents:,} dropped for {dropped.n}-grams seen before")
        return ", ".join(words)

    def _divided(self, stream: Iterator[Document], heldout: float, seed: int) -> Iterator[Document]:
        for document in stream:
            if is_heldout(document, heldout, seed) != (self.split == "heldout"):
                self.counts.other_split += 1
            elif not is_in_part(document, self.part, seed):
                self.counts.other_part += 1
            else:
                self.counts.taken += 1
                yield document
        if not self.counts.taken:
            remedy = "give more text, another share of held-out documents, or longer n-grams to compare"
            raise UnweaveError(f"no document is left for the {self.split} split: {self.in_words()}", remedy=remedy)
