"""Options for steering. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unweave.core.command import Command
from unweave.core.spec import require
from unweave.inputs.spec import UseSpec
from unweave.methods.steer.result import Steering


@dataclass(frozen=True, kw_only=True)
class SteerSpec(UseSpec):
    """Generating text with a latent turned up."""

    latent: int | None = None
    """Which latent; by default one with a clear theme that shows in what the model then writes."""
    prompts: tuple[str, ...] = ("Tell me about the sea.",)
    """What to ask the model."""
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Strengths, as multiples of the latent's largest activation in the records."""
    mode: Literal["clamp", "add"] = "clamp"
    """Set the latent to that value, or add that much of its direction."""
    max_new_tokens: int = 60
    """Length of the generated text."""
    latents_tokens: int | None = None
    """How many tokens the latents' records are taken from; as in `unweave latents`, whose run is shared."""

    def __post_init__(self) -> None:
        lists = {
            "prompts": len(self.prompts) > 0 and all(prompt.strip() for prompt in self.prompts),
            "strengths": len(self.strengths) > 0,
        }
        require(self, lists | {"max_new_tokens": self.max_new_tokens > 0})


COMMAND = Command(
    words="steer",
    spec=SteerSpec,
    result=Steering,
    stage="unweave.methods.steer.stage:run",
    summary="Generate text with a latent turned up, at several strengths, beside the unchanged model.",
    about=("Only the latent's own part of the activation changes; what the SAE does not explain stays."),
    examples=("unweave steer --sae runs/train-0123456789ab/sae --latent 1234",),
)
