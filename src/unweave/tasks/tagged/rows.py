"""Tagged texts in a file of rows: JSON lines, a JSON array, or Parquet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unweave.core.errors import UnweaveError
from unweave.data.rows import json_rows, parquet_rows, without_halves
from unweave.tasks.tagged.texts import Tagged


def read(path: Path, text_field: str, tags_field: str) -> tuple[dict[str, Any], Iterator[Tagged]]:
    """The texts of a file. UnweaveError for rows without the fields."""
    return {"source": path.name, "notes": []}, _texts(path, text_field, tags_field)


def _texts(path: Path, text_field: str, tags_field: str) -> Iterator[Tagged]:
    remedy = "name two of its columns as text_field and tags_field"
    parquet = path.suffix.lower() == ".parquet"
    for row, where in parquet_rows(path, [text_field, tags_field], remedy) if parquet else json_rows(path):
        if not isinstance(row, Mapping):
            raise UnweaveError("a row is not an object with fields", where=where, remedy="fix the row")
        text, tags = row.get(text_field), row.get(tags_field)
        tags = [tag for tag in tags.split("|") if tag.strip()] if isinstance(tags, str) else tags
        if not isinstance(text, str):
            raise _wrong(text_field, "text", row, where)
        if not isinstance(tags, list) or not all(isinstance(tag, str) and tag.strip() for tag in tags):
            raise _wrong(tags_field, "list of tags", row, where)
        yield Tagged(without_halves(text), tuple(without_halves(tag.strip()) for tag in tags))


def _wrong(field: str, kind: str, row: Mapping[str, Any], where: str) -> UnweaveError:
    return UnweaveError(
        f"the row has no {kind} in {field!r}",
        where=where,
        remedy=f"fix the row, or name another of its fields: {', '.join(map(str, row))}"[:400],
    )
