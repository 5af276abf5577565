"""Several SAEs from one spec: fields to change, and every combination of their values. Knows no torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from unweave.core.errors import UnweaveError
from unweave.sae.spec import SAESpec


def variants_of(base: SAESpec, variants: Sequence[Mapping[str, Any]]) -> dict[str, SAESpec]:
    """SAE specs by name: ``base`` alone under "", or one for every combination of each variant's values.

    ``({"kind": ["relu", "jumprelu"], "seed": [0, 1]},)`` makes relu-seed0, relu-seed1, jumprelu-seed0, jumprelu-seed1.
    Raises UnweaveError for unknown fields, for two variants that are the same, and for ones that cannot share a stream
    because they differ in ``tokens`` or ``batch``.
    """
    if not variants:
        return {"": base}
    found: dict[str, SAESpec] = {}
    for number, variant in enumerate(variants):
        where = f"variants[{number}]"
        lists = [value if isinstance(value, (list, tuple)) else [value] for value in variant.values()]
        if not variant or not all(lists):
            raise UnweaveError("a variant changes nothing", where=where, remedy="name fields of sae and their values")
        for values in itertools.product(*lists):
            changed = dict(zip(variant, values, strict=True))
            spec = SAESpec.from_dict(changed, where=where, base=base)
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


def _name(changed: Mapping[str, Any]) -> str:
    """``relu-k32-seed1``: the values of kind and preset say enough by themselves."""
    words = [str(value) if key in ("kind", "preset") else f"{key}{value}" for key, value in changed.items()]
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", "-".join(words))
