"""What a result is about: the model, and the SAEs it used. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from unweave.core.site import Site


@dataclass(frozen=True)
class SAEInfo:
    """One SAE in plain values."""

    site: Site | None
    """where it writes; None where its file names no site"""
    kind: str
    """what it was trained as, else its activation function"""
    d_in: int
    latents: int
    k: int | None
    """latents per token (TopK); None where sparsity comes from a penalty"""
    digest: str
    """of its weights"""

    @property
    def words(self) -> str:
        """ "TopK SAE with 4,608 latents, 32 of them per token"."""
        return f"{self.kind} SAE with {self.latents:,} latents" + (f", {self.k} of them per token" if self.k else "")


@dataclass(frozen=True)
class Subject:
    """A model and SAEs that were used in it."""

    model: str
    note: str
    """what a reader must know of the model's weights, as "dequantised from Q4_1"; else empty"""
    saes: tuple[SAEInfo, ...]
    accepted: dict[str, Any]
    """what was measured of SAEs that were used in another model than their own, by site, with the reason"""

    @property
    def named_model(self) -> str:
        return f"{self.model} ({self.note})" if self.note else self.model

    @property
    def notes(self) -> tuple[str, ...]:
        """Caveats for a reader, in sentences."""
        notes = []
        if self.note:
            notes.append(f"The model's weights are {self.note}: results are of them, not of the original ones.")
        for site, evidence in self.accepted.items():
            notes.append(f"The SAE at {site} was used in another model than it was trained on: {evidence}")
        return tuple(notes)
