"""Readers of text files and tables: each yields rows (and where they stand) without holding the file in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from unweave.core import files
from unweave.core.errors import UnweaveError
from unweave.core.memory import refuse_if_memory

Messages = tuple[dict[str, str], ...]
"""The messages of a conversation, each {"role": "system" | "user" | "assistant", "content": text}."""

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
CONVERSATION_FIELDS = ("conversations", "conversation")
"""Where rows hold a conversation, besides the field that the source names."""
_LONGEST_PARAGRAPH = 1_000_000
_READ_BYTES = 1 << 20
_LONGEST_ROW = 1 << 28
"""characters; without a bound a quote that nobody closes would draw all of a file into memory"""
_LONGEST_WORD = 12
"""letters of a word, number's sign or escape, at most, that the end of what was read can cut"""


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        remedy = "convert it to UTF-8"
        raise UnweaveError(f"the file is not UTF-8 text: {error.reason}", where=str(path), remedy=remedy) from error
    except OSError as error:
        raise UnweaveError(f"cannot read it: {error.strerror or error}", where=str(path), remedy="check it") from error


def whole_text(path: Path) -> str:
    """A whole text file, however large; its lines end at line feeds."""
    with _readable(path):
        size = path.stat().st_size
    return files.read_text(path, at_most=size).replace("\r\n", "\n")


def line_documents(path: Path) -> Iterator[str]:
    """Every line is a document."""
    return (line for _, line in files.lines(path))


def paragraphs(path: Path) -> Iterator[str]:
    """Stretches of a text file between blank lines; one of more than a million characters is cut at a line's end."""
    held: list[str] = []
    size = 0
    for _, line in files.lines(path):
        if line.strip():
            held.append(line)
            size += len(line) + 1
        if held and (not line.strip() or size > _LONGEST_PARAGRAPH):
            yield "\n".join(held)
            held, size = [], 0
    if held:
        yield "\n".join(held)


def json_rows(path: Path) -> Iterator[tuple[Any, str]]:
    """Rows of a JSON array or of JSON lines, told apart by the first character; each with its position.

    Fields that nobody reads may hold NaN, and texts halves of surrogate pairs.
    """
    with _readable(path), open(path, encoding="utf-8-sig", newline="") as handle:
        first = ""
        while not first and (line := handle.readline(_READ_BYTES)):
            first = line.strip()[:1]
    yield from _array_rows(path) if first == "[" else _line_rows(path)


def _line_rows(path: Path) -> Iterator[tuple[Any, str]]:
    for number, line in files.lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = files.parse_json(line, where, finite=False, halves=True)
        except UnweaveError as error:
            what = error.what.replace("not valid JSON", "not JSON")
            raise UnweaveError(what, where=where, remedy="write one JSON object a line") from None
        yield row, where


def _array_rows(path: Path) -> Iterator[tuple[Any, str]]:
    """The elements of one large array, parsed as they are read."""
    with _readable(path), open(path, encoding="utf-8-sig", newline="") as handle:
        ahead = _Ahead(handle)
        ahead.sign()  # "[": the first character decided that this is an array
        number, sign = 0, ","
        if ahead.peek() == "]":
            sign = ahead.sign()
        while sign == ",":
            number += 1
            where = f"{path}, row {number}"
            yield ahead.value(where), where
            sign = ahead.sign()
        if sign != "]":
            what = "a comma or a bracket is missing" if sign else "the file ends before the array does"
            raise _no_json(what, f"{path}, behind row {number}")
        if ahead.peek():
            raise _no_json("something follows the array", f"{path}, behind row {number}")


class _Ahead:
    """A file of JSON that is read piece by piece; ``text`` from ``at`` on was read and not used yet."""

    def __init__(self, handle: TextIO) -> None:
        self._handle, self._decoder = handle, files.json_decoder(finite=False)
        self.text, self.at = "", 0

    def peek(self) -> str:
        """The next character that is not whitespace; nothing at the end of the file."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def sign(self) -> str:
        """The same character, which is used by that."""
        character = self.peek()
        self.at += len(character)
        return character

    def value(self, where: str) -> Any:
        """The value that comes next."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if self._may_go_on(error) and self._more():
                    continue
                raise _no_json(error.msg, where) from None
            except RecursionError:
                raise _no_json("nested too deeply", where) from None
            except ValueError as error:
                raise _no_json(str(error)[:200], where) from None
            # A number at the end of what was read may go on; anything else ends with its own bracket or quote.
            size = end - self.at
            if end < len(self.text) or not self._more():
                self.at += size
                files.check_plain(value, where, halves=True)
                return value

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        """Whether an error is only that of a value not read to its end. What is broken in the middle stays broken."""
        if len(self.text) - self.at > _LONGEST_ROW:
            return False
        return error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - _LONGEST_WORD

    def _more(self) -> bool:
        # Doubling keeps long rows from being read over and over.
        piece = self._handle.read(max(_READ_BYTES, len(self.text) - self.at))
        self.text, self.at = self.text[self.at :] + piece, 0
        return bool(piece)


def _no_json(what: str, where: str) -> UnweaveError:
    return UnweaveError(f"not JSON: {what}", where=where, remedy="fix the file")


def parquet_rows(
    path: Path, fields: Sequence[str], remedy: str = "name one of its columns as text_field or messages_field"
) -> Iterator[tuple[Any, str]]:
    """Rows of a Parquet file with those of the fields that it has, a few hundred at a time; ``remedy`` is what to do
    about a file that has none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as opened:
            names = opened.schema_arrow.names
            columns = [name for name in dict.fromkeys(fields) if name in names]
            if not columns:
                listed = ", ".join(repr(name) for name in dict.fromkeys(fields) if name)
                what = f"the table has none of the columns {listed}"
                raise UnweaveError(what, where=str(path), remedy=f"{remedy}: {', '.join(names)}")
            for batch in opened.iter_batches(batch_size=256, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{path}, row {number}"
    except (pa.ArrowException, OSError, ValueError, OverflowError, TypeError, LookupError) as error:
        refuse_if_memory(error, path)
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:300]
        raise UnweaveError(
            f"cannot read it as Parquet: {reason}", where=str(path), remedy="restore the file"
        ) from error


def hub_rows(name: str, split: str) -> Iterator[tuple[Any, str]]:
    """Rows of a hub dataset "org/name" or "org/name:config", streamed."""
    where = f"hub:{name}, split {split}"
    path, _, config = name.partition(":")
    try:
        from datasets import load_dataset
    except ImportError:
        raise UnweaveError(
            "hub datasets need the package datasets", where=where, remedy="pip install datasets"
        ) from None
    try:
        for number, row in enumerate(load_dataset(path, config or None, split=split, streaming=True), 1):
            yield row, f"{where}, row {number}"
    except UnweaveError:
        raise
    except Exception as error:  # network, hub and format errors of many libraries meet here
        lines = str(error).strip().splitlines() or [type(error).__name__]
        remedy = "check the name, its config and split, and the network; or give local files"
        raise UnweaveError(f"cannot read the dataset: {lines[0][:300]}", where=where, remedy=remedy) from error


def chitchat_conversations(path: Path) -> Iterator[Messages]:
    """The conversations of the chitchat package: the first to speak is the user, the other the assistant.

    What one person sends before the other answers is one message, its parts on lines of their own.
    """
    with _readable(path):
        data = json.loads(path.read_text(encoding="utf-8"))
    for conversation in data.values():
        messages: list[dict[str, str]] = []
        first = None
        for part in (part for turn in conversation["messages"] for part in turn):
            if not part["text"].strip():
                continue
            first = first or part["sender"]
            role = "user" if part["sender"] == first else "assistant"
            if messages and messages[-1]["role"] == role:
                messages[-1]["content"] += "\n" + part["text"]
            else:
                messages.append({"role": role, "content": part["text"]})
        if messages:
            yield tuple(messages)


def conversation_or_text(
    row: Any, where: str, text_field: str, messages_field: str
) -> tuple[str | None, Messages | None]:
    """(text, None) or (None, messages) of a row; UnweaveError when it holds neither."""
    if not isinstance(row, Mapping):
        raise UnweaveError(
            f"a row is a {type(row).__name__}, not an object with fields", where=where, remedy="fix the row"
        )
    if messages_field:
        for field in (messages_field, *CONVERSATION_FIELDS):
            if row.get(field) is not None:
                return None, _messages(row[field], field, where)
        if isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str):
            extra = row.get("input")
            if extra is not None and not isinstance(extra, str):
                raise UnweaveError("'input' is not text", where=where, remedy="fix or drop the row")
            prompt = "\n\n".join(part for part in (row["instruction"], extra) if part)
            pair = {"role": "user", "content": prompt}, {"role": "assistant", "content": row["output"]}
            return None, tuple({**message, "content": without_halves(message["content"])} for message in pair)
    text = row.get(text_field)
    if not isinstance(text, str):
        kind = "null" if text is None else f"a {type(text).__name__}"
        there = f": it is {kind}" if text_field in row else ""
        others = ", ".join(str(name) for name in row if name != text_field)[:300]
        raise UnweaveError(
            f"the row has no text in {text_field!r}{there}" + (f" and no {messages_field!r}" if messages_field else ""),
            where=where,
            remedy=("fix or drop the row" if there else "fix the row")
            + (f", or name another of its fields as text_field or messages_field: {others}" if others else ""),
        )
    return without_halves(text), None


def _messages(value: Any, field: str, where: str) -> Messages:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        empty = " but an empty one" if isinstance(value, Sequence) and not isinstance(value, str) else ""
        raise UnweaveError(f"{field!r} is not a list of messages{empty}", where=where, remedy="fix or drop the row")
    messages = []
    for index, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise UnweaveError(f"message {index} of {field!r} is not an object", where=where, remedy="fix the row")
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if isinstance(content, Sequence) and not isinstance(content, str):
            content = _joined_parts(content)
        if not isinstance(role, str) or role not in _ROLES:
            roles = ", ".join(_ROLES)
            raise UnweaveError(
                f"message {index} has the role {str(role)[:80]!r}", where=where, remedy=f"known roles: {roles}"
            )
        if not isinstance(content, str):
            raise UnweaveError(f"message {index} ({role}) has no text", where=where, remedy="fix or drop the row")
        messages.append({"role": _ROLES[role], "content": without_halves(content)})
    return tuple(messages)


def without_halves(text: str) -> str:
    """The text with halves of surrogate pairs, which JSON can hold and no tokenizer takes, replaced."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _joined_parts(parts: Sequence[Any]) -> str | None:
    """The text of a content given in parts; None when some part is not text."""
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    return "".join(text for text in texts if text) if all(isinstance(text, str) for text in texts) else None
