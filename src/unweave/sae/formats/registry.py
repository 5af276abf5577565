"""Every file format: recognised by content, then read by its own module.

A format is a module with ``NAME``, ``recognise(source) -> bool`` and ``load(source) -> SAE``; those that we also write
have ``save(sae, folder) -> folder``. To add one, write the module and name it here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from unweave.core.errors import UnweaveError
from unweave.sae.activations import Identity
from unweave.sae.formats import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    hub,
    openmoss,
    quantised,
    saelens,
    sparsify,
)
from unweave.sae.formats.source import WEIGHTS, Source
from unweave.sae.module import SAE


class Format(Protocol):
    """What a format's module offers."""

    NAME: str

    def recognise(self, source: Source) -> bool: ...

    def load(self, source: Source) -> SAE: ...


# In this order: a folder's most telling file names first.
FORMATS: tuple[Format, ...] = (sparsify, quantised, saelens, openmoss, dictionary_learning, gemma_scope, circuit_tracer)  # type: ignore[assignment]

WRITERS: dict[str, Callable[[SAE, Path], Path]] = {
    "unweave": saelens.save_own,
    "saelens": saelens.save,
    "dictionary_learning": dictionary_learning.save,
    "sparsify": sparsify.save,
}
"""What an SAE can be saved as."""


def locate(name: str | Path) -> Source:
    """Where the SAE of that name is, fetched if it is on the hub. Raises UnweaveError when it is nowhere."""
    text = str(name)
    if text.startswith((hub.HUB, hub.SAELENS)):
        return hub.fetch(text)
    path = Path(os.path.expanduser(name))  # unlike Path's, leaves ~nobody as it is
    if not _exists(path):
        remedy = "give a folder, a file, hub:org/name/sub/folder, or saelens:RELEASE/ID"
        raise UnweaveError("no such SAE folder or file", where=text, remedy=remedy)
    return Source(path, text)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, or a folder that may not be read
        return False


def detect(source: Source) -> Format:
    """The format of a source. Raises UnweaveError, listing SAEs near it, when it is in no known format."""
    for format in FORMATS:
        if format.recognise(source):
            return format
    raise UnweaveError(
        "this is not an SAE in a known format", where=source.origin, remedy=f"{_inside(source)}; see docs/formats.md"
    )


def load(name: str | Path) -> SAE:
    """Reads an SAE; see ``SAE.load``."""
    source = locate(name)
    try:
        return detect(source).load(source)
    except UnweaveError as error:
        if error.where:
            raise
        raise UnweaveError(error.what, where=source.origin, remedy=error.remedy) from None  # the SAE's own checks


def save(sae: SAE, folder: Path, format: str) -> Path:
    """Writes an SAE; see ``SAE.save``."""
    if format not in WRITERS:
        raise UnweaveError(f"SAEs cannot be written as {format!r}", remedy=f"known: {', '.join(WRITERS)}")
    if isinstance(sae.activation, Identity):
        remedy = "make them again: neurons(lm, site)"
        raise UnweaveError("neurons are not a trained SAE, and no format can hold them", where=repr(sae), remedy=remedy)
    return WRITERS[format](sae, folder)


def _inside(source: Source) -> str:
    """What a folder holds that could have been meant."""
    if not source.path.is_dir():
        return f"a file of tensors ends in {', '.join(WEIGHTS)} and holds an encoder and a decoder"
    files = sorted(path.name for path in source.path.iterdir() if path.suffix in WEIGHTS)
    folders = sorted(path.name for path in source.path.iterdir() if path.is_dir() and _is_sae(path))
    if folders:
        return f"it holds SAEs in folders of their own, name one: {_some(folders)}"
    if files:
        return f"name one of its files: {_some(files)}"
    return "its folder holds no weights"


def _is_sae(folder: Path) -> bool:
    return any(format.recognise(Source(folder, "")) for format in FORMATS)


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
