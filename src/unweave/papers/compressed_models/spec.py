"""What ``unweave paper compressed-models`` can be asked. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unweave.core.command import Command
from unweave.core.spec import Spec, operational
from unweave.papers.compressed_models.result import CompressedModels


@dataclass(frozen=True, kw_only=True)
class CompressedModelsSpec(Spec):
    """SAEs of a model, pruned ones and ones trained anew, when the model is compressed."""

    scale: Literal["smoke", "paper"] = "smoke"
    """smoke: SmolLM2-135M at three layers and three sites, two seeds, SAEs that are trained first; paper: GPT-2 small
    at all layers and Gemma-2-2B at layer 12, with published SAEs."""
    device: str | None = operational(None)
    """cpu, cuda, cuda:1...; by default a GPU where there is one."""


COMMAND = Command(
    words="paper compressed-models",
    spec=CompressedModelsSpec,
    result=CompressedModels,
    stage="unweave.papers.compressed_models.recipe:run",
    summary="Prune a model, and see whether SAEs of the original one still describe it.",
    about=(
        "Prunes, rounds and factors a model; measures SAEs of the original one, the same SAEs pruned, and SAEs trained "
        "on the pruned model, in both models: fit, losses, SAEBench's tasks, which latents survive. Writes tables, "
        "figures and report.html beside the paper's claims. Finished parts are kept: after an interruption the same "
        "command goes on."
    ),
    examples=(
        "unweave paper compressed-models --scale smoke    # under an hour on two cores",
        "unweave paper compressed-models --scale paper --device cuda",
    ),
)
