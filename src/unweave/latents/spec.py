"""What collecting records of latents can be asked. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unweave.core.spec import require
from unweave.data.spec import DataSpec
from unweave.inputs.spec import UseSpec


@dataclass(frozen=True, kw_only=True)
class LatentsSpec(UseSpec):
    """Collecting what each latent responds to."""

    data: DataSpec | None = None
    """Other text to look at; by default the training text."""
    split: Literal["train", "heldout"] = "train"
    """Which documents of that text: those to train on, or those held out."""
    tokens: int | None = None
    """How many tokens to look at; by default 200,000, or all there are."""
    seed: int = 0
    """Choice of the random and quantile contexts."""

    def __post_init__(self) -> None:
        require(self, {"tokens": self.tokens is None or self.tokens > 0})
