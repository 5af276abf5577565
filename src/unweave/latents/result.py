"""What a run of `unweave latents` holds. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unweave.core.result import Result
from unweave.inputs.subject import Subject


@dataclass(frozen=True)
class LatentRecords(Result):
    """Records of every latent of an SAE."""

    subject: Subject
    tokens: int
    """over how many tokens they were collected"""
    latents: int
    alive: int
    """latents that fire at least once"""
    special_share: float
    """share of special and template tokens among the chosen tokens of all top contexts"""
    records: Path
    """their folder, for ``Records.load``"""

    @property
    def alive_fraction(self) -> float:
        return self.alive / self.latents
