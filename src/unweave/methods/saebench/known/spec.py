"""What known features can be asked. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from unweave.core.command import Command
from unweave.core.rules import above, at_least, at_most, share
from unweave.core.spec import Spec
from unweave.inputs.spec import SAERefs
from unweave.methods.saebench.known.result import KnownResult


@dataclass(frozen=True, kw_only=True)
class KnownSpec(Spec):
    """SAEs measured on activations whose features are known, each measure beside the truth."""

    saes: SAERefs = ()
    """SAEs that were trained on such activations (docs/saebench.md); beside those that are built here."""
    features: Annotated[int, at_least(4)] = 64
    """How many features there are."""
    width: Annotated[int, at_least(2)] = 64
    """Dimensions of the activations; with fewer than features these lie in superposition."""
    children: Annotated[float, share()] = 0.5
    """Share of features that fire only where their parent does."""
    rate: Annotated[float, above(0), at_most(1)] = 0.5
    """How often the most frequent feature fires."""
    zipf: Annotated[float, at_least(0)] = 0.5
    """The r-th feature fires r^-zipf times as often."""
    absorbed: Annotated[float, share()] = 1.0
    """How much of a parent's value moves into a child, in the SAE that absorbs."""
    tokens: Annotated[int, at_least(1000)] = 20_000
    """How many activations to measure on."""
    seed: int = 0
    """Of the features and the activations."""


COMMAND = Command(
    words="planted",
    spec=KnownSpec,
    result=KnownResult,
    stage="unweave.methods.saebench.known.stage:run",
    positional="saes",
    summary="Measure SAEs on a synthetic model whose features are known: each measure beside the truth.",
    about=(
        "Activations are sums of features that fire by Zipf's law, some only where their parent fires, in "
        "superposition where they outnumber the dimensions. Built SAEs (true, absorbing, random directions) and "
        "those given are measured as saebench measures them, beside what the features themselves say."
    ),
    examples=("unweave planted", "unweave planted --features 128 --width 64", "unweave planted my/sae"),
)
