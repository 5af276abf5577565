"""What a comparison can be asked. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from unweave.core.command import Command
from unweave.core.refs import Content
from unweave.core.rules import at_least, not_empty
from unweave.core.spec import Spec
from unweave.methods.saebench.compare.result import ComparedSAEs


@dataclass(frozen=True, kw_only=True)
class CompareSpec(Spec):
    """SAEs side by side, from finished runs of `unweave saebench`."""

    of: Annotated[tuple[Path, ...], not_empty(), Content("unweave.methods.saebench.compare.stage:content")]
    """Run directories, as `unweave saebench` prints them."""
    l0_ratio: Annotated[float, at_least(1)] = 1.1
    """SAEs are ranked as they are where the largest L0 is at most so many times the smallest."""


COMMAND = Command(
    words="compare",
    spec=CompareSpec,
    result=ComparedSAEs,
    stage="unweave.methods.saebench.compare.stage:run",
    positional="of",
    summary="SAEs side by side: SAEBench's headline numbers, ranked only where a ranking means something.",
    about=(
        "Reads finished runs of saebench. SAEs of unequal L0 are not ranked: a sparser SAE does worse on most "
        "measures, and that says nothing of how good it is. Kinds of SAE with several L0 each are compared on their "
        "curves, at one L0."
    ),
    examples=("unweave compare runs/saebench-0123456789ab runs/saebench-ba9876543210",),
)
