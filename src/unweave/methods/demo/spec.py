"""What the demo can be asked. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unweave.core.spec import Spec, operational


@dataclass(frozen=True, kw_only=True)
class DemoSpec(Spec):
    """The main job on the default model and text."""

    scale: Literal["smoke", "demo", "long"] = "demo"
    """smoke: about two minutes, for a quick check; demo: about seven on two cores; long: more text and training."""
    device: str | None = operational(None)
    """cpu, cuda, cuda:1...; by default a GPU where there is one."""
