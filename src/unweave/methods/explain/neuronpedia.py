"""Explanations in the form that Neuronpedia exports: a JSON object for each, in lines (also .gz) or in one list.

    {"modelId": "gemma-2-2b", "layer": "20-gemmascope-res-16k", "index": "12", "description": "months",
     "typeName": "oai_token-act-pair", "explanationModelName": "gpt-4o-mini"}

``index`` is the latent; the others are its names there. Further fields, such as embeddings, are left alone.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unweave.core.errors import UnweaveError
from unweave.core.files import parse_json
from unweave.core.writing import write_file

_KEYS = ("modelId", "layer", "index", "description")


def write(path: Path, model: str, source: str, judge: str, labels: Mapping[int, str]) -> None:
    """Writes JSON lines: the explanations {latent: text} by ``judge`` of the SAE called ``source`` in ``model``."""
    rows = [dict(zip(_KEYS, (model, source, str(j), text), strict=True)) for j, text in labels.items()]
    more = {"typeName": "unweave", "explanationModelName": judge}
    write_file(path, "".join(json.dumps(row | more, ensure_ascii=False) + "\n" for row in rows))


def read(path: Path) -> dict[int, str]:
    """The explanations {latent: text} in JSON lines or a list, gzipped or not; of several of a latent the last.
    UnweaveError names what is wrong and where; a file about more than one SAE is."""
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UnweaveError(f"cannot read explanations: {error}", where=str(path), remedy="give a JSON file") from None
    if text.lstrip().startswith("["):
        rows = [(f"{path}, item {i}", row) for i, row in enumerate(parse_json(text, str(path), finite=False), 1)]
    else:
        lines = ((f"{path}, line {i}", line) for i, line in enumerate(text.split("\n"), 1))
        rows = [(where, parse_json(line, where, finite=False)) for where, line in lines if line.strip()]
    for where, row in rows:
        _refuse_invalid(row, where)
    sources = sorted({f"{row['modelId']}/{row['layer']}" for _, row in rows})
    if len(sources) > 1:
        what = f"explanations of {len(sources)} sources: {', '.join(sources[:5])}"
        raise UnweaveError(what, where=str(path), remedy="give a file about one SAE")
    return {int(row["index"]): row["description"] for _, row in rows if row["description"].strip()}


def _refuse_invalid(row: Any, where: str) -> None:
    if not isinstance(row, dict) or any(key not in row for key in _KEYS):
        raise UnweaveError("this is no explanation of Neuronpedia's", where=where, remedy=f"it has {', '.join(_KEYS)}")
    index = str(row["index"])
    if not (index.isascii() and index.isdecimal()) or not isinstance(row["description"], str):
        raise UnweaveError("index is no number, or description no text", where=where, remedy="fix or delete it")
