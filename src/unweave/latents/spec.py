"""Options for collecting records of latents. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from unweave.core.command import Command
from unweave.core.errors import UnweaveError
from unweave.core.rules import at_least
from unweave.core.spec import Spec
from unweave.data.spec import DataSpec
from unweave.inputs.spec import OfSAEsSpec, SAERef
from unweave.latents.result import LatentRecords


@dataclass(frozen=True, kw_only=True)
class RecordsSpec(Spec):
    """Which contexts a latent's record holds."""

    top: Annotated[int, at_least(0)] = 5
    """Strongest contexts, at most one per document."""
    bands: Annotated[int, at_least(1)] = 4
    """Bands of equally many firings, from strong to weak, that quantile contexts are drawn from."""
    per_band: Annotated[int, at_least(0)] = 2
    """Contexts drawn from each band."""
    random: Annotated[int, at_least(0)] = 5
    """Contexts drawn from all tokens, whether the latent fires there or not."""
    left: Annotated[int, at_least(0)] = 12
    """Tokens shown before the one that a context was chosen for."""
    right: Annotated[int, at_least(0)] = 8
    """Tokens shown after it."""
    logits: Annotated[int, at_least(0)] = 8
    """Tokens that a latent promotes most, and as many that it suppresses most."""
    seed: int = 0
    """Decides the quantile and random contexts."""


@dataclass(frozen=True, kw_only=True)
class LatentsSpec(OfSAEsSpec):
    """Collecting what each latent responds to, of one SAE (sae) or of many with one pass of the model (saes)."""

    sae: SAERef | None = None
    """The SAE's folder, as `train` printed it, or any other SAE that can be read: docs/formats.md. Its content, not its
    path, decides which run is reused."""
    latents: tuple[str, ...] = ()
    """Only these: numbers of the only SAE's latents, else names such as resid_post.9/123; by default all."""
    data: DataSpec | None = None
    """Other text to look at; by default the training text."""
    split: Literal["train", "heldout"] = "train"
    """Which documents of that text: those to train on, or those held out."""
    tokens: Annotated[int | None, at_least(1)] = None
    """How many tokens to look at; by default 200,000, or all there are."""
    contexts: RecordsSpec = RecordsSpec()
    """How many contexts of each kind, and how wide."""
    seed: int = 0
    """Choice of the random and quantile contexts."""

    def __post_init__(self) -> None:
        Spec.__post_init__(self)
        if self.contexts.seed:
            raise UnweaveError("the latents' own seed decides contexts", where="contexts.seed", remedy="give --seed")
        if self.sae is None:
            super().__post_init__()
        elif self.saes or self.neurons or self.sites:
            raise UnweaveError("sae names one SAE, saes, neurons and sites say which of many", where="sae")


COMMAND = Command(
    words="latents",
    spec=LatentsSpec,
    result=LatentRecords,
    stage="unweave.latents.stage:run",
    summary="Collect each latent's record: contexts it fires on, how often, and what it writes to the logits.",
    about=(
        "Top, quantile and random contexts, the firing rate, the tokens it promotes and suppresses; of one SAE, or of "
        "many from one pass of the model."
    ),
    examples=(
        "unweave latents --sae runs/train-0123456789ab/sae",
        "unweave latents --saes runs/train-0123456789ab/sae    # all that lie below it",
    ),
)
