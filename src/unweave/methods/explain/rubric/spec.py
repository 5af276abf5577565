"""What the rubric can be asked. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from unweave.core.command import Command
from unweave.core.rules import at_least
from unweave.data.spec import DataSpec
from unweave.inputs.spec import UseSpec
from unweave.judge.spec import JudgeSpec
from unweave.methods.explain.rubric.result import RubricResult


@dataclass(frozen=True, kw_only=True)
class RubricSpec(UseSpec):
    """Having a chat model score how clear latents are."""

    judge: JudgeSpec = JudgeSpec()
    """The chat model that scores."""
    latents: Annotated[int, at_least(1)] = 16
    """How many latents to score, drawn at random; the FAST paper takes 128."""
    shuffled: Annotated[int | None, at_least(0)] = None
    """How many sets of contexts of five different latents to score beside them; by default as many as latents."""
    data: DataSpec | None = None
    """Other text to take contexts from; by default the training text."""
    split: Literal["train", "heldout"] = "train"
    """Which documents of that text: those to train on, or those held out."""
    latents_tokens: Annotated[int | None, at_least(1)] = None
    """How many tokens the latents' records are taken from; as in `unweave latents`, whose run is shared."""
    seed: int = 0
    """Choice of the latents and of the shuffled sets."""


COMMAND = Command(
    words="rubric",
    spec=RubricSpec,
    result=RubricResult,
    stage="unweave.methods.explain.rubric.stage:run",
    summary="Have a chat model score how clear latents are, from 1 to 5.",
    about="The judge sees the five strongest contexts of random latents, and beside them sets of contexts of five "
    "different latents, which should score low. By default a small judge runs here (a download of 1.1 GB, once, "
    "and 7 GB of memory); with --judge.base-url any OpenAI-compatible server. Every reply is kept: after an "
    "interruption, none is asked again.",
    examples=(
        "unweave rubric --sae runs/train-0123456789ab/sae --latents 8",
        "unweave rubric --sae runs/train-0123456789ab/sae --latents 128 --judge.model gpt-4o-2024-11-20 "
        "--judge.base-url https://api.openai.com/v1 --judge.api-key-env OPENAI_API_KEY",
    ),
)
