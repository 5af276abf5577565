"""Explanations in the form that Neuronpedia exports: a JSON object for each, in lines (also .gz) or in one list.

    {"modelId": "gemma-2-2b", "layer": "20-gemmascope-res-16k", "index": "12", "description": "months",
     "typeName": "oai_token-act-pair", "explanationModelName": "gpt-4o-mini"}

``index`` is the latent; the others are its names there. Further fields, such as embeddings, are left alone.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unweave.core.errors import UnweaveError
from unweave.core.files import parse_json
from unweave.core.writing import write_file

_KEYS = ("modelId", "layer", "index", "description")


@dataclass(frozen=True)
class NeuronpediaExplanation:
    """One explanation, under Neuronpedia's names for its fields."""

    modelId: str
    layer: str
    """of the source: layer, and which SAEs"""
    index: str
    description: str
    typeName: str = ""
    explanationModelName: str = ""


def write(path: Path, explanations: Iterable[NeuronpediaExplanation]) -> None:
    """Writes JSON lines."""
    write_file(path, "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in explanations))


def read(path: Path) -> list[NeuronpediaExplanation]:
    """Reads JSON lines or a list, gzipped or not. UnweaveError names what is wrong and where."""
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
    return [_explanation(row, where) for where, row in rows]


def _explanation(row: Any, where: str) -> NeuronpediaExplanation:
    if not isinstance(row, dict) or any(key not in row for key in _KEYS):
        raise UnweaveError("this is no explanation of Neuronpedia's", where=where, remedy=f"it has {', '.join(_KEYS)}")
    index, words = str(row["index"]), row["description"]
    if not (index.isascii() and index.isdecimal()) or not isinstance(words, str):
        raise UnweaveError("index is no number, or description no text", where=where, remedy="fix or delete it")
    rest = (str(row.get(key) or "") for key in ("typeName", "explanationModelName"))
    return NeuronpediaExplanation(str(row["modelId"]), str(row["layer"]), index, words, *rest)


def labels(explanations: Iterable[NeuronpediaExplanation]) -> dict[int, str]:
    """{latent: description}; of several the last. UnweaveError where they are of more than one source."""
    rows = list(explanations)
    sources = sorted({(one.modelId, one.layer) for one in rows})
    if len(sources) > 1:
        raise UnweaveError(
            f"explanations of {len(sources)} sources: {', '.join('/'.join(one) for one in sources[:5])}",
            where="explanations",
            remedy="give a file about one SAE",
        )
    return {int(one.index): one.description for one in rows if one.description.strip()}
