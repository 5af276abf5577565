"""Which SAEs a training run makes: every variant at every site."""

from __future__ import annotations

from dataclasses import dataclass

from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.lm.model import LM
from unweave.methods.train.kinds import SAESpec
from unweave.methods.train.spec import TrainSpec
from unweave.methods.train.variants import variants_of


@dataclass(frozen=True)
class Member:
    """One SAE of a training run. ``name`` is its folder under ``sae/``: site, variant, both, or "" for only one."""

    name: str
    read: Site
    write: Site
    spec: SAESpec


def sites_named(read: Site | None, write: Site | None) -> str:
    """``resid_post.9``, or ``mlp_in.9->mlp_add.9`` of a transcoder, as ``--sites`` takes it."""
    return str(read) if read == write else f"{read}->{write}"


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
