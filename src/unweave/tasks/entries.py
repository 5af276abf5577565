"""Files of examples: JSON lines, one JSON array, or one object of named entries, and words for what is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unweave.core.errors import UnweaveError
from unweave.core.files import parse_json, read_text


def entries(path: str | Path, what: str, fields: Sequence[str]) -> list[tuple[str, Mapping[str, Any]]]:
    """The objects of a file of ``what`` (such as "pairs"), each with where it stands.

    One object that has none of ``fields`` holds named entries. Raises UnweaveError where the file cannot be read,
    holds nothing, or holds something else than objects.
    """
    try:
        objects = list(_values(Path(path), fields))
    except UnweaveError as error:
        reason = error.what.replace("not valid JSON", "not JSON")
        raise UnweaveError(f"cannot read the {what}: {reason}", where=error.where, remedy=error.remedy) from None
    if not objects:
        raise UnweaveError(f"the file holds no {what}", where=str(path), remedy="one JSON object a line, or one array")
    for where, value in objects:
        if not isinstance(value, Mapping):
            names = ", ".join(fields)
            raise UnweaveError(
                f"the fields {names} are missing: there is {kind(value)} in place of an object",
                where=where,
                remedy=f"write an object with the fields {names}",
            )
    return objects


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "text"
    return "an object" if isinstance(value, Mapping) else "a list"


def faults(value: Mapping[str, Any], fields: Sequence[str]) -> list[str]:
    """What is wrong with those fields that must be text, such as ``answer is a number, not text``."""
    return [
        f"{name} is {kind(value[name])}, not text" if name in value else f"{name} is missing"
        for name in fields
        if not isinstance(value.get(name), str)
    ]


def _values(path: Path, fields: Sequence[str]) -> Iterator[tuple[str, Any]]:
    text = read_text(path)
    lines = [(f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        return
    where, first = lines[0]
    alone = len(lines) == 1
    try:
        value = parse_json(first, where)
    except UnweaveError:
        if alone or first.lstrip()[:1] not in ("[", "{"):
            raise
        where, value, alone = str(path), parse_json(text, str(path)), True  # written over several lines
    if alone and isinstance(value, list):
        yield from ((f"{where}, entry {index}", entry) for index, entry in enumerate(value))
    elif alone and isinstance(value, Mapping) and value and not set(fields) & set(value):
        yield from ((f"{where}, entry {name[:80]}", entry) for name, entry in value.items())
    elif alone:
        yield where, value
    else:
        yield from ((where, parse_json(line, where)) for where, line in lines)
