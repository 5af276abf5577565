"""Options for tracing a behaviour. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from unweave.core.command import Command
from unweave.core.rules import at_least
from unweave.core.spec import Spec
from unweave.inputs.spec import UseSpec
from unweave.methods.trace.result import Trace


@dataclass(frozen=True, kw_only=True)
class TraceOptions(Spec):
    """Which latents are measured, and how their effects are estimated."""

    top: Annotated[int, at_least(2)] = 20
    """How many of the strongest latents to check by their exact effect."""
    random: Annotated[int, at_least(0)] = 20
    """How many random latents to check beside them."""
    steps: Annotated[int, at_least(1)] = 10
    """Steps of integrated gradients."""
    rule: Literal["left", "midpoint", "right"] = "midpoint"
    """Where in each step the gradient is taken: left is the feature-circuits code's convention, right the paper's."""
    seed: int = 0
    """Choice of pairs and of random latents."""


@dataclass(frozen=True, kw_only=True)
class TraceSpec(TraceOptions, UseSpec):
    """Finding the latents that cause a behaviour."""

    task: Literal["simple", "within_rc", "across_rc", "across_pp"] = "across_pp"
    """Subject-verb agreement: alone, within or across a relative clause, or across a prepositional phrase."""
    pairs: Annotated[int, at_least(1)] = 128
    """How many pairs of a clean and a changed sentence."""


COMMAND = Command(
    words="trace",
    spec=TraceSpec,
    result=Trace,
    stage="unweave.methods.trace.stage:run",
    summary="Find the latents that cause a behaviour, and measure the strongest.",
    about=(
        "Attribution patching and integrated gradients over minimal pairs of subject-verb agreement, next to the "
        "effects of the strongest latents measured from both ends, and how much of the whole they carry together."
    ),
    examples=("unweave trace --sae runs/train-0123456789ab/sae",),
)
