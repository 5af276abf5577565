"""Several SAEs from one spec: fields to change, and every combination of their values. Knows no torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from unweave.core.errors import UnweaveError
from unweave.methods.train.kinds import SAESpec, changed
from unweave.methods.train.presets import PRESETS


def variants_of(base: SAESpec, variants: Sequence[Mapping[str, Any]]) -> dict[str, SAESpec]:
    """SAE specs by name: ``base`` alone under "", or one for every combination of each variant's values.

    ``({"kind": ["relu", "jumprelu"], "seed": [0, 1]},)`` makes relu-seed0, relu-seed1, jumprelu-seed0, jumprelu-seed1.
    Of a variant with a ``preset``, what the base says beside the defaults (or beside a preset of its own) replaces the
    preset's values, and what the variant itself says replaces both. Raises UnweaveError for unknown fields, for two
    variants that are the same, and for ones that cannot share a stream because they differ in ``tokens`` or ``batch``.
    """
    if not variants:
        return {"": base}
    specs: dict[str, SAESpec] = {}
    for number, variant in enumerate(variants):
        where = f"variants[{number}]"
        lists = [_values(name, value, where) for name, value in variant.items()]
        if not variant or not all(lists):
            raise UnweaveError("a variant changes nothing", where=where, remedy="name fields of sae and their values")
        for values in itertools.product(*lists):
            change = dict(zip(variant, values, strict=True))
            spec = _spec(base, change, where)
            if (spec.tokens, spec.batch) != (base.tokens, base.batch):
                what = "variants share one stream, so they cannot differ in tokens or batch"
                raise UnweaveError(what, where=where, remedy="set these in sae, or make it a training run of its own")
            name = _name(change)
            if name in specs or spec in specs.values():
                raise UnweaveError(f"two variants are the same: {name}", where=where, remedy="name each one once")
            specs[name] = spec
    return specs


def _values(name: str, value: Any, where: str) -> Sequence[Any]:
    """The values that a field takes in turn."""
    if not isinstance(value, (list, tuple)):
        return [value]
    is_list = any(isinstance(getattr(kind, name, None), tuple) for kind in SAESpec.kinds())
    if is_list and not all(isinstance(item, (list, tuple)) for item in value):
        what = f"{name} is a list itself, and the values of a variant are one SAE each"
        remedy = f"write a list of lists, also for a single one: {name}: [{list(value)}]"
        raise UnweaveError(what, where=where, remedy=remedy)
    return value


def _spec(base: SAESpec, change: Mapping[str, Any], where: str) -> SAESpec:
    if "preset" not in change:
        return SAESpec.from_dict(change, where=where, base=base)
    shared = {"tokens": base.tokens, "batch": base.batch}
    alone = SAESpec.from_dict({**shared, **change}, where=where)
    own = {name: value for name, value in _beside_presets(base).items() if name not in {**shared, **change}}
    if not own:
        return alone
    try:
        return SAESpec.from_dict({**shared, **own, **change}, where=where)
    except UnweaveError as error:
        what = f"preset {change['preset']} does not go with what sae says itself ({', '.join(own)}): {error.what}"
        remedy = "name fewer fields in sae, or give them other values in the variant"
        raise UnweaveError(what, where=where, remedy=remedy) from error


def _name(change: Mapping[str, Any]) -> str:
    """``relu-k32-seed1``: the values of kind and preset say enough by themselves."""
    words = [str(value) if key in ("kind", "preset") else f"{key}{value}" for key, value in change.items()]
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", "-".join(words))


def _beside_presets(spec: SAESpec) -> dict[str, Any]:
    """The fields in which a spec differs from the defaults, or from a preset where those are fewer."""
    fewest = changed(spec)
    for preset in PRESETS:
        other = SAESpec.from_dict({"preset": preset})
        if all(hasattr(spec, name) for name in changed(other)):
            pairs = {f.name: getattr(other, f.name, f.default) for f in fields(spec)}
            differing = {name: getattr(spec, name) for name, value in pairs.items() if getattr(spec, name) != value}
            fewest = min(fewest, differing, key=len)
    return fewest
