"""What ``unweave paper instruct-saes`` can be asked. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unweave.core.command import Command
from unweave.core.errors import UnweaveError
from unweave.core.spec import Spec, operational
from unweave.data.spec import DataSpec
from unweave.judge.spec import JudgeSpec
from unweave.methods.train.spec import TrainSpec
from unweave.papers.instruct_saes.result import InstructSaes

LAYERS = {
    "meta-llama/Llama-3.1-8B-Instruct": (4, 12, 18, 20, 25),
    "meta-llama/Llama-3.2-3B-Instruct": (4, 12, 20),
    "meta-llama/Llama-3.2-1B-Instruct": (4, 9, 14),
    "Qwen/Qwen2.5-7B-Instruct": (4, 12, 18, 20, 25),
    "Qwen/Qwen2.5-3B-Instruct": (4, 18, 32),
    "Qwen/Qwen2.5-1.5B-Instruct": (4, 14, 24),
    "Qwen/Qwen2.5-0.5B-Instruct": (4, 12, 20),
}
"""The paper's models and the layers whose residual stream it reads (its table 1)."""


@dataclass(frozen=True, kw_only=True)
class InstructSaesSpec(Spec):
    """The FAST paper: whole conversations against block training."""

    scale: Literal["smoke", "paper"] = "smoke"
    """smoke: SmolLM2-135M, 300,000 tokens per SAE, under an hour on two cores; paper: its models and 40.96 M tokens."""
    model: str | None = None
    """paper scale: one of its models, by default Qwen/Qwen2.5-0.5B-Instruct. The smoke scale has one model."""
    device: str | None = operational(None)
    """cpu, cuda, cuda:1...; by default a GPU where there is one."""
    rubric: bool = True
    """Have a chat model rate latents of one JumpReLU SAE per recipe: 8 of each at smoke scale, 128 at paper scale."""
    judge: JudgeSpec = JudgeSpec()
    """The chat model that rates."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is not None and self.scale != "paper":
            remedy = "leave model out, or give scale: paper"
            raise UnweaveError("the smoke scale has its own model", where="model", remedy=remedy)
        if self.model is not None and self.model not in LAYERS:
            what, remedy = f"{self.model!r} is not one of the paper's models", f"models: {', '.join(LAYERS)}"
            raise UnweaveError(what, where="model", remedy=remedy)
        if not self.rubric and self.judge != JudgeSpec():
            raise UnweaveError("a judge without a rubric has nothing to do", where="judge", remedy="leave one of them")


@dataclass(frozen=True, kw_only=True)
class RecipeErrorsSpec(Spec):
    """Measuring every SAE of several trainings on the same conversations."""

    trainings: tuple[TrainSpec, ...]
    """one per recipe, in the order of ``RECIPES``"""
    data: DataSpec
    """the conversations: its held-out part"""
    special_ids: tuple[int, ...] = ()
    """which ids are special; none: the tokenizer's, and the template's words for who speaks"""
    where: Literal["template", "anywhere"] = "template"
    """whether such an id counts only where the chat template wrote it, or wherever it stands"""


COMMAND = Command(
    words="paper instruct-saes",
    spec=InstructSaesSpec,
    result=InstructSaes,
    stage="unweave.papers.instruct_saes.recipe:run",
    summary="FAST: train SAEs of a chat model on whole conversations, and compare with block training.",
    about="Trains ReLU and JumpReLU SAEs at three layers with three initialisations on pre-training text in "
    "blocks, conversations in blocks, and conversations each on its own; measures errors of all and special tokens "
    "at the same number of active latents; has a judge rate latents; steers with latents of special tokens. Writes "
    "tables, figures and report.html. Finished parts are kept: after an interruption the same command goes on.",
    examples=(
        "unweave paper instruct-saes --scale smoke --no-rubric    # under an hour on two cores",
        "unweave paper instruct-saes --scale paper --model Qwen/Qwen2.5-0.5B-Instruct --device cuda",
    ),
)
