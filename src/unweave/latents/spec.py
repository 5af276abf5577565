"""What collecting records of latents can be asked. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unweave.core.command import Command
from unweave.core.spec import require
from unweave.data.spec import DataSpec
from unweave.inputs.spec import UseSpec
from unweave.latents.result import LatentRecords


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


COMMAND = Command(
    words="latents",
    spec=LatentsSpec,
    result=LatentRecords,
    stage="unweave.latents.stage:run",
    summary="Collect each latent's record: contexts it fires on, how often, and what it writes to the logits.",
    about=("Top, quantile and random contexts, the firing rate, the tokens it promotes and suppresses."),
    examples=("unweave latents --sae runs/train-0123456789ab/sae",),
)
