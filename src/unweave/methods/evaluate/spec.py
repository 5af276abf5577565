"""Options for measuring an SAE. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from unweave.core.command import Command
from unweave.core.rules import at_least
from unweave.core.spec import operational
from unweave.data.spec import DataSpec
from unweave.inputs.spec import UseSpec
from unweave.methods.evaluate.result import Evaluation


@dataclass(frozen=True, kw_only=True)
class EvalSpec(UseSpec):
    """Measuring an SAE on held-out text."""

    data: DataSpec | None = None
    """Other text to measure on; by default held-out documents of the training text."""
    tokens: Annotated[int | None, at_least(1)] = None
    """How many tokens to measure on, special tokens included; by default as many as the text's heldout_tokens."""
    batch_tokens: Annotated[int, at_least(1)] = operational(1024)
    """Tokens that go through the model at once."""


COMMAND = Command(
    words="eval",
    spec=EvalSpec,
    result=Evaluation,
    stage="unweave.methods.evaluate.stage:run",
    summary="Measure an SAE: fit, sparsity, and what the model loses when it is spliced in.",
    about=(
        "Held-out text, special tokens and norm outliers left out; cross-entropy is compared with zero- and "
        "mean-ablation of the same site."
    ),
    examples=("unweave eval --sae runs/train-0123456789ab/sae",),
)
