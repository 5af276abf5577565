"""What identifies an SAE that a question names: the bytes of its files. No weights are read as numbers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from unweave.core.contents import content_of, tree_of
from unweave.core.files import read_json
from unweave.core.spec import digest
from unweave.data.spec import DataSpec
from unweave.inputs.spec import OfSAEsSpec

_OWN = ("cfg.json", "sae_weights.safetensors")


def sae(name: str | Path) -> str:
    """Twelve digits over the files of an SAE of any format. UnweaveError where there is no SAE in a known format.

    A folder of our own form says all in its files. In other formats the names on the way to a file can say the site, so
    they count as well.
    """
    own = [Path(name) / file for file in _OWN]
    if all(map(os.path.isfile, own)):
        return digest([content_of(path) for path in own])
    from unweave.sae.formats import registry

    source = registry.locate(name)
    registry.detect(source)
    named = [source.origin] if source.facts else list(source.path.resolve().parts[-3:])
    return digest([named, *([str(path.relative_to(source.folder)), content_of(path)] for path in source.files())])


def provenance_of(name: str | Path) -> dict[str, Any]:
    """What an SAE of our own form says of where it comes from, without its weights; nothing for other forms."""
    path = Path(name) / _OWN[0]
    config = read_json(path) if os.path.isfile(path) else {}
    own = config.get("metadata", {}).get("unweave", {}) if isinstance(config, dict) else {}
    provenance = own.get("provenance", {}) if isinstance(own, dict) else {}
    return provenance if isinstance(provenance, dict) else {}


def _local(model: str, data: DataSpec) -> dict[str, str]:
    """The content of what is local of a model and of the text that tokens come from."""
    contents = {"model": tree_of(model)} | {source.path: tree_of(source.path) for source in data.sources}
    return {name: value for name, value in contents.items() if value}


def texts_of(spec: OfSAEsSpec, data: DataSpec | None) -> dict[str, str]:
    """The content of what is local of the model and of the text that is read: ``data``, or every SAE's training text.

    For the identity of runs that read it, without loading a model or weights.
    """
    from unweave.inputs.saes import named_saes

    if data is not None and spec.model is not None:
        return _local(spec.model, data)
    contents: dict[str, str] = {}
    for _, name in named_saes(spec.saes):
        training = provenance_of(name).get("train", {})
        model = spec.model or training.get("model")
        if model is not None and (data is not None or "data" in training):
            contents |= _local(model, data if data is not None else DataSpec.from_dict(training["data"]))
    return contents


def saes(written: tuple[str, ...]) -> str:
    """Twelve digits over every SAE that is named, alone or as SITE=NAME, and those inside folders."""
    from unweave.inputs.saes import named_saes

    return digest([[str(site), sae(name)] for site, name in named_saes(written)]) if written else ""


def models(names: tuple[str, ...]) -> str:
    """Twelve digits over what is local of several models."""
    return digest([tree_of(name) for name in names])
