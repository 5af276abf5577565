"""Tagged texts of any source: read once into a folder of the cache, then by number, with a fixed split.

    texts.bin     the texts, UTF-8, one after the other        offsets.npy   int64 [N+1] where each begins
    indptr.npy    int64 [N+1], labels.npy int32: CSR of labels  hashes.npy   uint64 [N] of contents
    groups.npy    uint64 [N], equal for near duplicates         about.json   names of labels, counts, notes

1. Blank texts are left out; texts that are equal are one text with the labels of all.
2. Near duplicates are found by MinHash: texts with an equal smallest hash of eight words in a row, under one of four
   permutations, are in one group (a pair whose eight-word spans overlap by half is found with probability 0.94).
3. A group is held out, or not, as a whole, by the hash of its first text and the seed.

In memory while reading: about 150 bytes a text. Afterwards everything but the names is mapped from disk.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unweave.core.contents import tree_of
from unweave.core.errors import UnweaveError
from unweave.core.files import read_json
from unweave.core.progress import task
from unweave.core.spec import digest
from unweave.data.alike import first_alike, min_hashes, salted
from unweave.lm.fetch import building, cache_dir
from unweave.tasks.tagged.spec import DEBTAGS, SETS, TaggedSpec, kind_of

_FORMAT = 1
_AT_ONCE = 1_000
_MANY_ALIKE = 0.1
"""share of the texts above which a group of near duplicates is worth a note"""
Array = np.ndarray[Any, Any]


class Tagged(NamedTuple):
    """One text as its source gives it."""

    text: str
    tags: tuple[str, ...]


@dataclass(frozen=True)
class TaggedTexts:
    """N texts with M labels; ``text`` reads from disk. ``rows`` [N] are the texts that were drawn of those stored."""

    folder: Path
    names: tuple[str, ...]
    """of the labels, in order"""
    source: str
    """where the texts come from, in words"""
    notes: tuple[str, ...]
    """what a reader of results must know of them"""
    rows: Array
    heldout: Array
    """bool [N]"""
    alike: int = 1
    """how many texts the largest group of near duplicates has; they are on one side"""

    def __len__(self) -> int:
        return len(self.rows)

    def text(self, i: int) -> str:
        """Text i."""
        start, end = self._offsets[self.rows[i]], self._offsets[self.rows[i] + 1]
        return bytes(self._bytes[start:end]).decode()

    def labels(self, i: int) -> list[int]:
        """The labels of text i, ascending."""
        return self.label_rows(np.array([i]))[1].tolist()

    def label_rows(self, texts: Array) -> tuple[Array, Array]:
        """The labels of some texts [n] as CSR: offsets int64 [n+1], labels int32."""
        rows = self.rows[texts]
        first, counts = self._indptr[rows], self._indptr[rows + 1] - self._indptr[rows]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        places = np.arange(offsets[-1]) + np.repeat(first - offsets[:-1], counts)
        return offsets, np.asarray(self._labels[places])

    def support(self, texts: Array) -> Array:
        """How many of some texts [n] have each label, int64 [M]."""
        return np.bincount(self.label_rows(texts)[1], minlength=len(self.names))

    @cached_property
    def groups(self) -> Array:
        """uint64 [N], equal for near duplicates."""
        return np.load(self.folder / "groups.npy")[self.rows]

    @cached_property
    def _offsets(self) -> Array:
        return np.load(self.folder / "offsets.npy", mmap_mode="r")

    @cached_property
    def _indptr(self) -> Array:
        return np.load(self.folder / "indptr.npy", mmap_mode="r")

    @cached_property
    def _labels(self) -> Array:
        return np.load(self.folder / "labels.npy", mmap_mode="r")

    @cached_property
    def _bytes(self) -> Array:
        return np.memmap(self.folder / "texts.bin", dtype=np.uint8, mode="r")


def open_tagged(spec: TaggedSpec) -> TaggedTexts:
    """The texts of a spec; a source is read the first time and kept in the cache.

    Raises UnweaveError for a source that is missing, unreadable or no source, for rows without text or tags, and where
    fewer than two texts are left.
    """
    fields = {name: getattr(spec, name) for name in ("text_field", "tags_field", "code_blocks", "comments")}
    key = digest([_FORMAT, spec.source if spec.source in (*SETS, DEBTAGS) else "", content_of(spec.source), fields])
    folder = cache_dir() / "tagged" / key
    with building(folder) as work:
        if work is not None:
            about, texts = _read(spec)
            _store(work / "out", about, texts)
    about = read_json(folder / "about.json")
    hashes, groups = (np.load(folder / f"{name}.npy") for name in ("hashes", "groups"))
    rows = np.arange(len(hashes))
    if spec.texts is not None and spec.texts < len(rows):
        rows = np.sort(np.argsort(salted(hashes, f"draw {spec.seed}"), kind="stable")[: spec.texts])
    heldout = salted(groups[rows], f"heldout {spec.seed}") < np.uint64(spec.heldout * 2**64)
    alike = int(np.unique(groups[rows], return_counts=True)[1].max())
    notes = [*about["notes"]]
    if alike > _MANY_ALIKE * len(rows):
        notes.append(f"{alike:,} of the {len(rows):,} texts are near duplicates of one another and lie on one side of "
                     f"the split: {heldout.mean():.0%} of the texts are held out.")  # fmt: skip
    return TaggedTexts(folder, tuple(about["names"]), about["source"], tuple(notes), rows, heldout, alike)


def content_of(source: str) -> str:
    """Twelve digits over what is read; empty for sets whose archive is pinned. UnweaveError where there is nothing."""
    kind = kind_of(source)
    if not kind:
        raise UnweaveError(
            f"no tagged texts {source!r}",
            where=str(Path(source).expanduser().absolute()),
            remedy=f"give one of {', '.join((DEBTAGS, *SETS))}; a Stack Exchange folder with Posts.xml, or its .7z; a "
            ".jsonl, .json or .parquet file; or a folder with Debian's Packages and Translation-en files",
        )
    if kind == "set":
        return ""
    if source == DEBTAGS:
        from unweave.tasks.tagged.debian import fetched

        return tree_of(fetched())
    path = Path(source).expanduser()
    if not (path.is_file() or (path.is_dir() and kind != "rows")):
        raise UnweaveError("there is no such file", where=str(path.absolute()), remedy="check the path")
    return tree_of(source)


def contents_of(sources: tuple[str, ...]) -> str:
    """Twelve digits over what is read of several sources."""
    return digest([content_of(source) for source in sources])


def _read(spec: TaggedSpec) -> tuple[dict[str, Any], Iterable[Tagged]]:
    """What a source is, and its texts."""
    from unweave.tasks.tagged import debian, rows, sets, stackexchange

    kind = kind_of(spec.source)
    if kind == "set":
        return sets.read(spec.source)
    if kind == "debian":
        return debian.read(debian.fetched() if spec.source == DEBTAGS else spec.path)
    if kind == "stackexchange":
        return stackexchange.read(spec.path, drop_code=spec.code_blocks == "drop", comments=spec.comments)
    return rows.read(spec.path, spec.text_field, spec.tags_field)


# -- writing ----------------------------------------------------------------------------------------------------------


def _store(folder: Path, about: dict[str, Any], texts: Iterable[Tagged]) -> None:
    """Writes the files of the module; UnweaveError where fewer than two texts have anything in them."""
    seen: dict[bytes, int] = {}
    names: dict[str, int] = {}
    offsets, of_text, of_label = array("q", [0]), array("q"), array("i")
    counts = {"read": 0, "blank": 0, "equal": 0}
    keys: list[Array] = []
    with open(folder / "texts.bin", "wb") as out, task("tagged texts", total=0, unit="texts") as shown:
        for batch in _batches(texts):
            new = []
            for text, tags in batch:
                counts["read"] += 1
                if not text.strip():
                    counts["blank"] += 1
                    continue
                content = blake2b(text.strip().encode(), digest_size=8).digest()
                at = seen.setdefault(content, len(seen))
                of_text.extend([at] * len(tags))
                of_label.extend(names.setdefault(tag, len(names)) for tag in tags)
                if at < len(offsets) - 1:
                    counts["equal"] += 1
                    continue
                offsets.append(offsets[-1] + out.write(text.encode()))
                new.append(text)
            keys.append(min_hashes(new))
            shown.advance(len(batch))
    if len(seen) < 2 or not names:
        what = f"{len(seen)} texts" if len(seen) < 2 else "no text with a tag"
        but = f": {counts['blank']} of {counts['read']} rows are blank, {counts['equal']} equal to others"
        raise UnweaveError(
            f"the source holds {what}{but if counts['read'] > len(seen) else ''}",
            where=about["source"],
            remedy="give texts with tags",
        )
    order = sorted(names)
    rank = np.argsort(np.argsort(np.array(order, dtype=object), kind="stable"))  # names in order of their text
    place = np.empty(len(names), dtype=np.int64)
    place[[names[name] for name in order]] = rank
    pairs = np.unique(np.frombuffer(of_text, np.int64) * len(names) + place[np.frombuffer(of_label, np.int32)])
    per_text = np.bincount(pairs // len(names), minlength=len(seen))
    hashes = np.frombuffer(b"".join(seen), dtype="<u8")
    arrays = {
        "offsets": np.frombuffer(offsets, np.int64),
        "indptr": np.concatenate([np.zeros(1, np.int64), np.cumsum(per_text)]),
        "labels": (pairs % len(names)).astype(np.int32),
        "hashes": hashes,
        "groups": hashes[first_alike(np.concatenate(keys))],
    }
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    written = about | {"names": order, "counts": counts}
    (folder / "about.json").write_text(json.dumps(written, ensure_ascii=False), encoding="utf-8")


def _batches(texts: Iterable[Tagged]) -> Iterator[list[Tagged]]:
    held: list[Tagged] = []
    for one in texts:
        held.append(one)
        if len(held) == _AT_ONCE:
            yield held
            held = []
    yield held
