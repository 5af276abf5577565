"""What ``unweave paper feature-circuits`` can be asked. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unweave.core.command import Command
from unweave.core.errors import UnweaveError
from unweave.core.spec import Spec, operational
from unweave.papers.feature_circuits.result import FeatureCircuits

MODELS = ("EleutherAI/pythia-70m-deduped", "google/gemma-2-2b")
"""The paper's models."""


@dataclass(frozen=True, kw_only=True)
class FeatureCircuitsSpec(Spec):
    """Sparse feature circuits: agreement, SHIFT, behaviours."""

    scale: Literal["smoke", "paper"] = "smoke"
    """smoke: SmolLM2-135M with SAEs that are trained first, about an hour on two cores; paper: its models with the
    published SAEs, and its settings where they are known."""
    model: str | None = None
    """paper scale: one of its models, by default EleutherAI/pythia-70m-deduped. The smoke scale has one model."""
    device: str | None = operational(None)
    """cpu, cuda, cuda:1...; by default a GPU where there is one."""
    biographies: str | None = None
    """Biographies for SHIFT as `unweave circuit shift` takes them; by default templated ones at smoke scale and
    LabHC/bias_in_bios at paper scale."""
    annotations: Path | None = None
    """A file of annotations that says which latents SHIFT is to ablate; by default a rule decides."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is not None and self.scale != "paper":
            raise UnweaveError(
                "the smoke scale has its own model", where="model", remedy="leave model out, or give scale: paper"
            )
        if self.model is not None and self.model not in MODELS:
            raise UnweaveError(
                f"{self.model!r} is not one of the paper's models", where="model", remedy=f"models: {', '.join(MODELS)}"
            )


COMMAND = Command(
    words="paper feature-circuits",
    spec=FeatureCircuitsSpec,
    result=FeatureCircuits,
    stage="unweave.papers.feature_circuits.recipe:run",
    summary="Sparse feature circuits: agreement, SHIFT, and behaviours found without supervision.",
    about=(
        "Trains SAEs at attention, MLP and residual stream of four layers and the embedding; finds the circuits "
        "of subject-verb agreement in four structures and measures how faithful they are beside neurons; makes a "
        "classifier forget gender (SHIFT); finds behaviours and their circuits. Writes tables, figures and "
        "report.html. Finished parts are kept: after an interruption the same command goes on."
    ),
    examples=(
        "unweave paper feature-circuits --scale smoke    # about an hour and a half on two cores",
        "unweave paper feature-circuits --scale paper --model EleutherAI/pythia-70m-deduped --device cuda",
    ),
)
