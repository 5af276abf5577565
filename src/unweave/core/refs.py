"""Types of fields that name something to read. Such a field is identified by content, not by name.

A type says how: ``FileRef = Annotated[Path, Content("module:function")]``, where the function takes the field's value
and returns a digest of what it names, or "" where nothing local is named. Specs import no torch, so the function is
imported when it is asked.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any


@dataclass(frozen=True)
class Content:
    """How the content of what a field names is digested. ``named``: the name counts beside the content."""

    of: str
    named: bool = False

    def digest(self, value: Any) -> str:
        module, _, name = self.of.partition(":")
        function: Callable[[Any], str] = getattr(import_module(module), name)
        return function(value)


FileRef = Annotated[Path, Content("unweave.core.contents:content_of")]
"""A file on this machine, known by its bytes."""


@lru_cache
def content_fields(kind: type) -> dict[str, Content]:
    """The fields of a Spec's class that name something to read."""
    hints = typing.get_type_hints(kind, include_extras=True)
    markers = {field.name: _marker(hints[field.name]) for field in dataclasses.fields(kind)}
    return {name: marker for name, marker in markers.items() if marker is not None}


def contents_of(spec: Any, prefix: str = "") -> dict[str, str]:
    """{dotted field: digest} of everything that a Spec, and the Specs inside it, name to read."""
    digests: dict[str, str] = {}
    named = content_fields(type(spec))
    for field in dataclasses.fields(spec):
        value, name = getattr(spec, field.name), f"{prefix}{field.name}"
        if value is None:
            continue
        if field.name in named:
            if digest := named[field.name].digest(value):
                digests[name] = digest
        elif field.metadata.get("result", True):
            for inner, part in _specs_in(value, name):
                digests |= contents_of(part, f"{inner}.")
    return digests


def _specs_in(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield name, value
    elif isinstance(value, tuple):
        for number, item in enumerate(value):
            yield from _specs_in(item, f"{name}[{number}]")


def _marker(hint: Any) -> Content | None:
    """The marker of an annotated type, also of ``X | None``."""
    for extra in getattr(hint, "__metadata__", ()):
        if isinstance(extra, Content):
            return extra
    inner = [_marker(part) for part in typing.get_args(hint)] if typing.get_origin(hint) is not Annotated else []
    return next((part for part in inner if part is not None), None)
