"""Which SAEs a training run makes: every variant at every site."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.lm.model import LM
from unweave.methods.train.kinds import SAESpec, changed
from unweave.methods.train.presets import PRESETS
from unweave.methods.train.spec import TrainSpec

_T = TypeVar("_T")


@dataclass(frozen=True)
class Member:
    """One SAE of a training run. ``name`` is its folder under ``sae/``: site, variant, both, or "" for only one."""

    name: str
    read: Site
    write: Site
    spec: SAESpec

    def of(self, values: Mapping[Site, _T]) -> tuple[_T, _T | None]:
        """The inputs among values by site, and the targets; None for those where they are the inputs."""
        return values[self.read], None if self.read == self.write else values[self.write]


def sites_named(read: Site | None, write: Site | None) -> str:
    """``resid_post.9``, or ``mlp_in.9->mlp_add.9`` of a transcoder, as ``--sites`` takes it."""
    return str(read) if read == write else f"{read}->{write}"


def sites_of(every: Sequence[Member]) -> list[Site]:
    """Where the SAEs read and write, in order."""
    return sorted({site for member in every for site in (member.read, member.write)})


def members(spec: TrainSpec, lm: LM) -> list[Member]:
    """The SAEs that a spec asks for in a model, in the order of sites. UnweaveError for a pattern that fits no site."""
    pairs = lm.matching(spec.sites)
    for site in (site for pair in pairs for site in pair if site.point == "path"):
        what = "activations of module paths cannot be harvested"
        raise UnweaveError(what, where=str(site), remedy="use a named site")
    variants = variants_of(spec.sae, spec.variants)
    every = []
    for read, write in sorted(pairs):
        site = str(read) if read == write else f"{read}-{write}"
        for variant, sae in variants.items():
            folders = [site] if len(pairs) > 1 or variant else []
            every.append(Member("/".join([*folders, variant] if variant else folders), read, write, sae))
    if spec.objective == "end-to-end":
        _refuse_end_to_end(every)
    return every


def _refuse_end_to_end(every: list[Member]) -> None:
    """Trap 31: what end-to-end training would ignore."""
    sites = sorted({member.read for member in every})
    remedy = "use objective: reconstruction"
    if any(member.read != member.write for member in every):
        raise UnweaveError("transcoders are not trained end to end", where="objective", remedy=remedy)
    if len(sites) > 1:
        what = f"end-to-end training is at one site at a time, not at {len(sites)}: {', '.join(map(str, sites))}"
        raise UnweaveError(what, where="sites", remedy="make it one training run per site")
    if any(member.spec.nested for member in every):
        raise UnweaveError(
            "nested reconstructions (matryoshka's groups, multi_topk) take no part in end-to-end training",
            where="objective",
            remedy=f"use kind batchtopk, or topk without multi_topk; or {remedy}",
        )


# -- variants ----------------------------------------------------------------------------------------------------------


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
