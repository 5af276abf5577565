"""Latents, or directions, chosen to be taken out of a model: a JSON file, with tensors beside it where it needs them.

    {"name": "chosen", "kind": "latents", "model": "smollm2-135m-instruct", "candidates": 100, "by": "query",
     "query": "gender", "seed": null, "tensors": null, "sites": [{"site": "resid_post.9", "sae": "runs/.../sae",
     "digest": "0123456789ab", "chosen": [{"number": 123, "effect": 0.81, "why": "female pronouns: 0.63"}]}]}

``unweave finetune select`` writes the chosen latents and their random controls, each as such a file. A selection of
``directions`` (principal components, random directions) has a matrix [C, D] of each site in a safetensors file whose
digest the JSON file holds: its own bytes identify all of it. Knows no torch until directions are read or written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from unweave.core.contents import sha256
from unweave.core.errors import UnweaveError
from unweave.core.files import read_json
from unweave.core.result import from_plain, to_plain
from unweave.core.site import Site
from unweave.core.writing import atomic_write, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from unweave.sae.module import SAE

Kind = Literal["latents", "directions"]


@dataclass(frozen=True)
class Chosen:
    """One latent, or one direction, and why it was chosen."""

    number: int
    """of the latent; of a direction: of the component, or of the draw"""
    effect: float | None = None
    """on the metric that candidates were ranked by"""
    why: str = ""


@dataclass(frozen=True)
class SiteChoice:
    """What was chosen at one site. Row i of the site's directions belongs to ``chosen[i]``."""

    site: Site
    chosen: tuple[Chosen, ...]
    sae: str | None = None
    """the SAE's name, as it was opened; None for directions"""
    digest: str | None = None
    """``SAE.digest()``: latents of two trainings share numbers and nothing else"""

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(one.number for one in self.chosen)


@dataclass(frozen=True)
class _About:
    name: str
    """chosen, random-0, directions-0"""
    kind: Kind
    sites: tuple[SiteChoice, ...]
    model: str
    candidates: int
    """how many there were to choose from"""
    by: str
    """query, label, rule, annotations, or random"""
    query: str = ""
    """what was asked of candidates, in words"""
    seed: int | None = None
    """of a random control"""


@dataclass(frozen=True)
class Selection(_About):
    """Latents of SAEs, or directions, at one or several sites.

    Raises UnweaveError for one that chooses nothing, a site or latent that is named twice, and directions that are not
    one finite row for each that was chosen.
    """

    directions: Mapping[Site, Tensor] = field(default_factory=dict, compare=False)
    """float [C, D] by site; empty for latents"""

    def __post_init__(self) -> None:
        where = f"selection {self.name!r}"
        if not self:
            raise UnweaveError("nothing is selected", where=where, remedy="choose at least one candidate")
        sites = [one.site for one in self.sites]
        if len(set(sites)) != len(sites):
            raise UnweaveError("a site is named twice", where=where, remedy="name each site once")
        for one in self.sites:
            numbers = one.numbers
            if len(set(numbers)) != len(numbers) or any(number < 0 for number in numbers):
                what = f"at {one.site} a number is negative or named twice"
                raise UnweaveError(what, where=where, remedy="name each once")
        expected = {one.site: len(one.chosen) for one in self.sites} if self.kind == "directions" else {}
        if expected != {site: len(rows) for site, rows in self.directions.items()}:
            raise UnweaveError(
                f"directions of {', '.join(map(str, self.directions)) or 'no site'} do not fit what was chosen",
                where=where,
                remedy="give one row for each that was chosen; latents have none",
            )
        for site, rows in self.directions.items():
            if rows.ndim != 2 or not rows.is_floating_point() or not bool(rows.isfinite().all()):
                what = f"the directions at {site} are {rows.dtype} {list(rows.shape)}, or not finite"
                raise UnweaveError(what, where=where, remedy="give finite numbers [C, D]")

    def __len__(self) -> int:
        return sum(len(one.chosen) for one in self.sites)

    @property
    def latents(self) -> dict[Site, tuple[int, ...]]:
        """The latents by site; empty for directions."""
        return {one.site: one.numbers for one in self.sites if one.chosen and self.kind == "latents"}

    @property
    def saes(self) -> tuple[str, ...]:
        """SITE=NAME of the SAEs, for ``saes`` of a Spec."""
        return tuple(f"{one.site}={one.sae}" for one in self.sites if one.sae is not None)

    def check(self, saes: Mapping[Site, SAE]) -> None:
        """Raises UnweaveError for a site whose SAE is missing, another SAE than the one chosen from, and latents that
        do not exist. For directions there is nothing to check."""
        for one in self.sites if self.kind == "latents" else ():
            where, sae = f"selection {self.name!r}, {one.site}", saes.get(one.site)
            if sae is None:
                there = ", ".join(map(str, saes)) or "none"
                raise UnweaveError("no SAE is at this site", where=where, remedy=f"give it with --saes; there: {there}")
            if one.digest is not None and one.digest != (used := sae.digest()):
                what = f"latents were chosen in SAE {one.digest}, this one is {used}"
                raise UnweaveError(what, where=where, remedy=f"give {one.sae}, or select again")
            if above := [number for number in one.numbers if number >= sae.d_sae]:
                what = f"latent {above[0]} does not exist"
                raise UnweaveError(what, where=where, remedy=f"use 0 to {sae.d_sae - 1}")


def write(path: str | Path, selection: Selection) -> Path:
    """Writes the JSON file ``path``, and directions as ``path`` with the suffix .safetensors."""
    path = Path(path)
    tensors = None
    if selection.directions:
        from safetensors.torch import save_file

        beside = path.with_suffix(".safetensors")
        rows = {str(site): rows.detach().cpu().contiguous() for site, rows in selection.directions.items()}
        with atomic_write(beside) as temporary:
            save_file(rows, temporary)
        tensors = {"file": beside.name, "sha256": sha256(beside)}
    about = {name: value for name, value in vars(selection).items() if name != "directions"}
    write_json(path, to_plain(about | {"tensors": tensors}))
    return path


def read(path: str | Path) -> Selection:
    """Reads what ``write`` wrote. UnweaveError, naming the field, for anything else, and for tensors that changed."""
    path, value = Path(path), read_json(path)
    if not isinstance(value, dict) or not isinstance(value.get("sites"), list):
        what = "this is no selection"
        raise UnweaveError(what, where=str(path), remedy="give a JSON file that `unweave finetune select` wrote")
    tensors = value.pop("tensors", None)
    about = from_plain(_About, value, str(path))
    return Selection(**vars(about), directions={} if tensors is None else _tensors(path, tensors))


def _tensors(path: Path, about: Any) -> dict[Site, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    named = from_plain(dict[str, str], about, f"{path}.tensors")
    beside = path.with_name(Path(named.get("file", "")).name)
    if not beside.is_file() or sha256(beside) != named.get("sha256"):
        what = "the file of directions is missing or not what was written"
        raise UnweaveError(what, where=str(beside), remedy="copy both files of a selection, or select again")
    try:
        return {Site.parse(name): rows for name, rows in load_file(beside).items()}
    except SafetensorError as error:
        raise UnweaveError(f"cannot read directions: {error}", where=str(beside), remedy="select again") from None


def by_site(chosen: Iterable[tuple[Site, Chosen]]) -> dict[Site, tuple[Chosen, ...]]:
    """What was chosen, by site in execution order; at each site in the order given."""
    grouped: dict[Site, list[Chosen]] = {}
    for site, one in chosen:
        grouped.setdefault(site, []).append(one)
    return {site: tuple(grouped[site]) for site in sorted(grouped)}
