"""Options for the demo. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unweave.core.command import Command
from unweave.core.spec import Spec, operational
from unweave.methods.demo.result import Demo


@dataclass(frozen=True, kw_only=True)
class DemoSpec(Spec):
    """The main job on the default model and text."""

    scale: Literal["smoke", "demo", "long"] = "demo"
    """smoke: about two minutes, for a quick check; demo: about eight on two cores; long: more text and training."""
    device: str | None = operational(None)
    """cpu, cuda, cuda:1...; by default a GPU where there is one."""


COMMAND = Command(
    words="demo",
    spec=DemoSpec,
    result=Demo,
    stage="unweave.methods.demo.stage:run",
    summary="The main job from nothing to a report, on a small real model.",
    about=(
        "Fetches the default model and text, harvests activations, trains a sparse autoencoder (SAE), measures it, "
        "collects what each latent responds to, finds the latents behind subject-verb agreement, steers with one of "
        "them, and writes report.html. About ten minutes on two cores; a second call returns at once, and after an "
        "interruption the same command goes on where it was."
    ),
    examples=("unweave demo", "unweave demo --scale smoke --runs elsewhere    # everything smaller: two minutes"),
)
