"""Which tagged texts are read. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from unweave.core.refs import Content
from unweave.core.rules import above, at_least, below, only_where
from unweave.core.spec import Spec

SETS = ("topics", "code", "occupations", "sentiment", "reviews")
"""Labelled sets that a package registry carries."""
DEBTAGS = "debtags"
Kind = Literal["set", "debian", "stackexchange", "rows", ""]
ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")


def kind_of(source: str) -> Kind:
    """What a source is, by its name and what is there; empty where nothing fits."""
    path = os.path.expanduser(source)
    if source in SETS:
        return "set"
    if source == DEBTAGS:
        return "debian"
    if path.lower().endswith(".7z") or os.path.isfile(os.path.join(path, "Posts.xml")):
        return "stackexchange"
    if path.lower().endswith(ROW_SUFFIXES):
        return "rows"
    if os.path.isdir(path) and any(name.endswith("Packages") for name in os.listdir(path)):
        return "debian"
    return ""


_DUMP = only_where("source is a Stack Exchange dump", lambda s: kind_of(s.source) == "stackexchange", "name a dump")
_ROWS = only_where("source is a file of rows", lambda s: kind_of(s.source) == "rows", "name a JSON or Parquet file")


@dataclass(frozen=True, kw_only=True)
class TaggedSpec(Spec):
    """Which texts with tags are read, and how they are divided into those to choose on and those held out."""

    source: Annotated[str, Content("unweave.tasks.tagged.texts:content_of", named=True)] = DEBTAGS
    """debtags (Debian's package descriptions), topics, code, occupations, sentiment, reviews; a folder with Posts.xml
    and Comments.xml of Stack Exchange, or its .7z; a file of rows (.jsonl, .json, .parquet); a folder with Debian's
    Packages and Translation files."""
    texts: Annotated[int | None, at_least(2)] = None
    """At most so many, drawn at random; by default all."""
    heldout: Annotated[float, above(0), below(1)] = 0.3
    """The share of texts that are held out, by a hash of their content; near duplicates fall on one side."""
    seed: int = 0
    """Which texts are drawn, and which are held out."""
    text_field: Annotated[str, _ROWS] = "text"
    """The field of a row that holds the text."""
    tags_field: Annotated[str, _ROWS] = "tags"
    """The field of a row that holds its tags: a list of texts, or one text with "|" between tags."""
    code_blocks: Annotated[Literal["keep", "drop"], _DUMP] = "keep"
    """What becomes of code blocks in posts."""
    comments: Annotated[bool, _DUMP] = True
    """Whether a post's comments follow its text."""

    @property
    def path(self) -> Path:
        """The source as a place on this machine."""
        return Path(self.source).expanduser()
