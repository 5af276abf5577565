"""Documents from wherever the user's text is, read lazily and in a fixed order.

A source is a catalogue text ("chitchat"), a file, a folder, or a hub dataset ("hub:org/name" or "hub:org/name:config"):

    folder      every .txt file in it is one document; .jsonl, .json and .parquet files in it are read row by row;
                links to folders are followed, each folder is read once
    .txt        a file named by itself: blank lines separate documents
    .jsonl      one row a line;  .json: an array of rows, or one row a line;  .parquet: rows

A row is a conversation if it has the messages field ({role, content}), "conversation(s)" ({from, value} too) or
instruction/input/output; otherwise its text field is a plain document. Files larger than memory stream.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from unweave.core.errors import UnweaveError
from unweave.core.files import files_under
from unweave.core.refs import Content
from unweave.core.spec import Spec
from unweave.data.rows import (
    CONVERSATION_FIELDS,
    Messages,
    chitchat_conversations,
    conversation_or_text,
    hub_rows,
    json_rows,
    line_documents,
    paragraphs,
    parquet_rows,
    whole_text,
)
from unweave.lm.sources import CATALOGUE, fetch_text

_SHUFFLE_DOCUMENTS = 1024
_SHUFFLE_CHARACTERS = 16_000_000
_ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Source(Spec):
    """One place to take documents from."""

    path: Annotated[str, Content("unweave.core.contents:tree_of", named=True)]
    """Catalogue text (`unweave models` lists them), file, folder, or "hub:org/name[:config]"."""
    split: str = "train"
    """Which split of a hub dataset."""
    text_field: str = "text"
    """The field of a row that holds a plain document."""
    messages_field: str = "messages"
    """The field of a row that holds a conversation; "" to read only plain text."""
    weight: float = 1.0
    """How many documents to take from here for every one from a source of weight 1, until it is exhausted."""


@dataclass(frozen=True)
class Document:
    """Plain ``text`` or the ``messages`` of a conversation (the other is None), and where it comes from.

    ``index`` counts the documents of its source as they stand there.
    """

    text: str | None
    messages: Messages | None
    source: str
    index: int

    @property
    def content(self) -> str:
        """Everything that makes two documents the same, as one string."""
        if self.messages is None:
            return self.text or ""
        return json.dumps([[m["role"], m["content"]] for m in self.messages], ensure_ascii=False)


@dataclass
class TextCounts:
    """What was left out of the sources so far."""

    blank: int = 0
    """documents, and conversations, without any text"""


def documents(sources: Sequence[Source], seed: int, counts: TextCounts | None = None) -> Iterator[Document]:
    """All documents of all sources: shuffled nearby within each source, sources taking turns by weight.

    A source of weight w gives w documents for every one of a source of weight 1, until it is exhausted and the others
    share its turns.

    The same sources and seed give the same order. Reading goes on as documents are asked for; each source holds
    at most 1,024 documents (or 16 million characters) to shuffle among. ``counts`` grows as sources are read. Raises
    UnweaveError for a source that is missing, unreadable or empty, and for a row without the fields it needs.
    """
    if not sources:
        raise UnweaveError("no text was named", remedy="name at least one source, e.g. chitchat or a folder")
    for source in sources:
        if not source.weight > 0:
            raise UnweaveError(f"weight {source.weight} is not above 0", where=source.path, remedy="leave it out")
    streams = {i: _shuffled(read(source, counts), f"{seed}/{i}") for i, source in enumerate(sources)}
    taken = dict.fromkeys(streams, 0)
    while streams:
        turn = min(streams, key=lambda i: ((taken[i] + 1) / sources[i].weight, i))
        document = next(streams[turn], None)
        if document is None:
            del streams[turn]
            continue
        taken[turn] += 1
        yield document


def read(source: Source, counts: TextCounts | None = None) -> Iterator[Document]:
    """The documents of one source as they stand there; those without any text are left out and counted."""
    empty = True
    for index, (text, messages) in enumerate(_rows(source)):
        contents = [text or ""] if messages is None else [message["content"] for message in messages]
        if not any(content.strip() for content in contents):
            if counts is not None:
                counts.blank += 1
            continue
        empty = False
        yield Document(text, messages, source.path, index)
    if empty:
        raise UnweaveError("there is no text here", where=source.path, remedy="give a source with documents in it")


def is_heldout(document: Document, fraction: float, seed: int) -> bool:
    """Whether a document belongs to the held-out part, about ``fraction`` of all.

    Decided by the document's content and the seed alone, so equal documents always fall on the same side.
    """
    return _place(document, f"heldout {seed}") < fraction


def is_in_part(document: Document, part: tuple[float, float], seed: int) -> bool:
    """Whether a document belongs to a part of a split, its shares from and up to. Decided in the same way."""
    return part[0] <= _place(document, f"part {seed}") < part[1]


def _place(document: Document, key: str) -> float:
    """A number from 0 up to 1 that depends on the document's content and the key alone."""
    digest = hashlib.blake2b(document.content.strip().encode(), key=key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _shuffled(stream: Iterator[Document], seed: str) -> Iterator[Document]:
    """A shuffle that holds a bounded number of documents: each new one takes the place of one drawn at random."""
    rng = random.Random(seed)  # a string seed is hashed the same way in every process
    held: list[Document] = []
    characters = 0
    for document in stream:
        held.append(document)
        characters += len(document.content)
        while len(held) > _SHUFFLE_DOCUMENTS or (characters > _SHUFFLE_CHARACTERS and len(held) > 1):
            at = rng.randrange(len(held))
            held[at], held[-1] = held[-1], held[at]
            drawn = held.pop()
            characters -= len(drawn.content)
            yield drawn
    rng.shuffle(held)
    yield from held


def _rows(source: Source) -> Iterator[tuple[str | None, Messages | None]]:
    entry = CATALOGUE.get(source.path)
    if entry is not None and entry.kind == "text":
        path = fetch_text(entry.name)
        if entry.form == "chitchat":
            yield from ((None, messages) for messages in chitchat_conversations(path))
        elif entry.form == "lines":
            yield from ((text, None) for text in line_documents(path))
        else:
            yield from _path_rows(path, source)
    elif source.path.startswith("hub:"):
        yield from _fields(hub_rows(source.path.removeprefix("hub:"), source.split), source)
    else:
        path = Path(source.path).expanduser()
        if not source.path.strip() or not path.exists():
            texts = ", ".join(name for name, e in CATALOGUE.items() if e.kind == "text")
            remedy = f"give a file, a folder, hub:org/name, or one of {texts}"
            raise UnweaveError(f"no text {source.path!r}", where=str(path.absolute()), remedy=remedy)
        yield from _path_rows(path, source)


def _path_rows(path: Path, source: Source) -> Iterator[tuple[str | None, Messages | None]]:
    if path.is_dir():
        files = [file for file in files_under(path) if file.suffix in (".txt", *_ROW_SUFFIXES)]
        if not files:
            raise UnweaveError(
                "this folder holds no text", where=str(path), remedy="put .txt, .jsonl, .json or .parquet files in it"
            )
        for file in files:
            if file.suffix == ".txt":
                yield whole_text(file), None
            else:
                yield from _path_rows(file, source)
    elif path.suffix == ".txt":
        yield from ((text, None) for text in paragraphs(path))
    elif path.suffix in (".jsonl", ".ndjson", ".json"):
        yield from _fields(json_rows(path), source)
    elif path.suffix == ".parquet":
        columns = [source.messages_field, *CONVERSATION_FIELDS, "instruction", "input", "output", source.text_field]
        yield from _fields(parquet_rows(path, columns), source)
    else:
        raise UnweaveError(
            f"unknown kind of text file {path.suffix!r}", where=str(path), remedy="use .txt, .jsonl, .json or .parquet"
        )


def _fields(rows: Iterable[tuple[object, str]], source: Source) -> Iterator[tuple[str | None, Messages | None]]:
    for row, where in rows:
        yield conversation_or_text(row, where, source.text_field, source.messages_field)
