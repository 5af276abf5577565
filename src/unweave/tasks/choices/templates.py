"""Texts with slots, ``The {dog|cat} {barked|slept}.``, and the package's word lists."""

from __future__ import annotations

import re
from importlib.resources import files
from itertools import product

_SLOT = re.compile(r"\{([^{}]*\|[^{}]*)\}")


def lines(name: str) -> list[str]:
    """The lines of a word list of this package."""
    return files("unweave.tasks.choices").joinpath(name).read_text(encoding="utf-8").splitlines()


def filled(template: str) -> list[str]:
    """The template with every combination of the words of its slots."""
    parts = _SLOT.split(template)  # text and slots take turns
    return [
        "".join(words) for words in product(*(part.split("|") if i % 2 else [part] for i, part in enumerate(parts)))
    ]
