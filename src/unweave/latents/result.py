"""The result of `unweave latents`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unweave.core.result import Result
from unweave.core.site import Site
from unweave.inputs.subject import Subject


@dataclass(frozen=True)
class SiteRecords:
    """Records of the latents of one SAE."""

    site: Site
    tokens: int
    """over how many tokens they were collected"""
    latents: int
    """how many, all of the SAE's or those that were asked for"""
    alive: int
    """latents that fire at least once"""
    special_share: float
    """share of special and template tokens among the chosen tokens of all top contexts"""
    records: Path
    """their folder, for ``Records.load``"""

    @property
    def alive_fraction(self) -> float:
        return self.alive / self.latents


@dataclass(frozen=True)
class LatentRecords(Result):
    """Records of latents of one SAE or many."""

    subject: Subject
    saes: tuple[SiteRecords, ...]
    """by site; only those with latents that were asked for"""

    @property
    def only(self) -> SiteRecords:
        """Of the only SAE."""
        (one,) = self.saes
        return one
