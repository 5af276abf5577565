"""What a report can be asked. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass

from unweave.core.spec import require
from unweave.inputs.spec import OfSAESpec


@dataclass(frozen=True, kw_only=True)
class ReportSpec(OfSAESpec):
    """One page from what was found about an autoencoder; stages that were not run yet are named in it."""

    title: str = "What is inside this model?"
    """The page's heading."""
    latents: int | None = 8192
    """How many latents to show, besides those that other parts of the page name; none: all of them. A page of 8,192
    is about 5 MB; it says what it leaves out."""

    def __post_init__(self) -> None:
        require(self, {"latents": self.latents is None or self.latents >= 1})
