"""Options for steering. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from unweave.core.command import Command
from unweave.core.rules import at_least, not_empty, rule
from unweave.inputs.spec import UseSpec
from unweave.methods.steer.result import Steering

_OF_WORDS = rule("of words, each of them", lambda prompts: all(prompt.strip() for prompt in prompts))


@dataclass(frozen=True, kw_only=True)
class SteerSpec(UseSpec):
    """Generating text with a latent turned up."""

    latent: int | None = None
    """Which latent; by default one with a clear theme that shows in what the model then writes."""
    prompts: Annotated[tuple[str, ...], not_empty(), _OF_WORDS] = ("Tell me about the sea.",)
    """What to ask the model."""
    strengths: Annotated[tuple[float, ...], not_empty()] = (0.5, 1.0, 2.0)
    """Strengths, as multiples of the latent's largest activation in the records."""
    mode: Literal["clamp", "add"] = "clamp"
    """Set the latent to that value, or add that much of its direction."""
    max_new_tokens: Annotated[int, at_least(1)] = 60
    """Length of the generated text."""
    latents_tokens: int | None = None
    """How many tokens the latents' records are taken from; as in `unweave latents`, whose run is shared."""


COMMAND = Command(
    words="steer",
    spec=SteerSpec,
    result=Steering,
    stage="unweave.methods.steer.stage:run",
    summary="Generate text with a latent turned up, at several strengths, beside the unchanged model.",
    about=("Only the latent's own part of the activation changes; what the SAE does not explain stays."),
    examples=("unweave steer --sae runs/train-0123456789ab/sae --latent 1234",),
)
