"""Several SAEs from one spec: fields to change, and every combination of their values. Knows no torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from unweave.core.errors import UnweaveError
from unweave.methods.train.sae_spec import SAESpec, said_beside_presets


def variants_of(base: SAESpec, variants: Sequence[Mapping[str, Any]]) -> dict[str, SAESpec]:
    """SAE specs by name: ``base`` alone under "", or one for every combination of each variant's values.

    ``({"kind": ["relu", "jumprelu"], "seed": [0, 1]},)`` makes relu-seed0, relu-seed1, jumprelu-seed0, jumprelu-seed1.
    Of a variant with a ``preset``, what the base says beside the defaults (or beside a preset of its own) replaces the
    preset's values, and what the variant itself says replaces both. Raises UnweaveError for unknown fields, for two
    variants that are the same, and for ones that cannot share a stream because they differ in ``tokens`` or ``batch``.
    """
    if not variants:
        return {"": base}
    found: dict[str, SAESpec] = {}
    for number, variant in enumerate(variants):
        where = f"variants[{number}]"
        lists = [_values(base, name, value, where) for name, value in variant.items()]
        if not variant or not all(lists):
            raise UnweaveError("a variant changes nothing", where=where, remedy="name fields of sae and their values")
        for values in itertools.product(*lists):
            changed = dict(zip(variant, values, strict=True))
            spec = _spec(base, changed, where)
            if (spec.tokens, spec.batch) != (base.tokens, base.batch):
                raise UnweaveError(
                    "variants share one stream, so they cannot differ in tokens or batch",
                    where=where,
                    remedy="set these in sae, or make it a training run of its own",
                )
            name = _name(changed)
            if name in found or spec in found.values():
                raise UnweaveError(f"two variants are the same: {name}", where=where, remedy="name each one once")
            found[name] = spec
    return found


def _values(base: SAESpec, name: str, value: Any, where: str) -> Sequence[Any]:
    """The values that a field takes in turn."""
    if not isinstance(value, (list, tuple)):
        return [value]
    if isinstance(getattr(base, name, None), tuple) and not all(isinstance(one, (list, tuple)) for one in value):
        raise UnweaveError(
            f"{name} is a list itself, and the values of a variant are one SAE each",
            where=where,
            remedy=f"write a list of lists, also for a single one: {name}: [{list(value)}]",
        )
    return value


def _spec(base: SAESpec, changed: Mapping[str, Any], where: str) -> SAESpec:
    if "preset" not in changed:
        return SAESpec.from_dict(changed, where=where, base=base)
    shared = {"tokens": base.tokens, "batch": base.batch}
    alone = SAESpec.from_dict({**shared, **changed}, where=where)
    kept = {name: value for name, value in said_beside_presets(base).items() if name not in {**shared, **changed}}
    if not kept:
        return alone
    try:
        return SAESpec.from_dict({**shared, **kept, **changed}, where=where)
    except UnweaveError as error:
        raise UnweaveError(
            f"preset {changed['preset']} does not go with what sae says itself ({', '.join(kept)}): {error.what}",
            where=where,
            remedy="name fewer fields in sae, or give them other values in the variant",
        ) from error


def _name(changed: Mapping[str, Any]) -> str:
    """``relu-k32-seed1``: the values of kind and preset say enough by themselves."""
    words = [str(value) if key in ("kind", "preset") else f"{key}{value}" for key, value in changed.items()]
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", "-".join(words))
