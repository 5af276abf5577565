"""What is asked of latents, opened: names become latents of SAEs, strengths become values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.latents.annotations import name_of, parse_latents
from unweave.lm.at import At
from unweave.lm.model import LM
from unweave.methods.steer.spec import EditSpec, condition
from unweave.sae.edits import Change, Fires, Where, together
from unweave.sae.module import SAE


@dataclass(frozen=True)
class Watched(Fires):
    """A condition that remembers whether it held at any token that was to be edited."""

    held: list[bool] = field(default_factory=list, compare=False)
    """True since it first did; else empty"""

    def holds(self, x: Tensor, at: At, tokens: Tensor) -> Tensor:
        here = super().holds(x, at, tokens)
        if not self.held and bool(here.any()):
            self.held.append(True)
        return here


@dataclass(frozen=True)
class OpenedEdit:
    """An edit with its SAE; ``amount`` is what strength 1 means."""

    spec: EditSpec
    site: Site
    sae: SAE
    latent: int
    amount: float
    when: Watched | None

    @property
    def name(self) -> str:
        """resid_post.9/123"""
        return name_of(self.site, self.latent)

    def change(self, strength: float = 1.0) -> Change:
        """The edit at a multiple of its amount."""
        where: Where = self.spec.where.split("+") if "+" in self.spec.where else self.spec.where
        return Change(self.sae, self.latent, strength * self.amount, self.spec.mode, where, self.when)


def open_edits(
    lm: LM, specs: Sequence[EditSpec], saes: Mapping[Site, SAE], maximum: Callable[[Site, int], float]
) -> list[OpenedEdit]:
    """Edits of latents of ``saes``. ``maximum(site, latent)``: its largest activation, where it is the unit.

    Raises UnweaveError for latents and SAEs that are not there, and for whatever the model cannot be edited by.
    """
    opened: list[OpenedEdit] = []
    for spec in specs:
        site, latent = latent_of(spec.latent, saes)
        when = None
        if spec.when is not None:
            name, above = condition(spec.when)
            at, other = latent_of(name, saes)
            when = Watched(saes[at], other, above)
            when = next((one.when for one in opened if one.when == when), when)
        factor = 1.0 if spec.strength is None else spec.strength
        amount = factor if spec.value is None else spec.value
        if spec.relative:
            largest = maximum(site, latent)
            if not largest > 0:
                what = f"{name_of(site, latent)} never fired in its records, so that it has no strength to measure by"
                raise UnweaveError(what, remedy="give a value, or collect records on more text")
            amount *= largest
        opened.append(OpenedEdit(spec, site, saes[site], latent, amount, when))
    for edit in together([[one.change() for one in opened]]):
        edit.verify(lm)
    return opened


def latent_of(name: str, saes: Mapping[Site, SAE]) -> tuple[Site, int]:
    """(site, latent) of a name. UnweaveError where there is no such SAE or latent."""
    ((site, latent),) = parse_latents([name.strip()], saes)
    if site not in saes:
        there = ", ".join(map(str, saes))
        raise UnweaveError(f"no SAE is at {site}", where=name, remedy=f"there are: {there}")
    if not latent < saes[site].d_sae:
        raise UnweaveError(f"latent {latent} does not exist", where=name, remedy=f"use 0 to {saes[site].d_sae - 1}")
    return site, latent
