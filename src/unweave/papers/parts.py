"""The runs that a recipe consists of: each finished part is found again, and a page is never of other parts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class PartRun:
    """One of the runs that a recipe consists of, in the same folder."""

    part: str
    about: str
    run: str


class Parts(Protocol):
    """The finished runs of a recipe."""

    def all(self) -> Iterable[PartRun]: ...


def named(_spec: Any, parts: Parts) -> dict[str, str]:
    """Every run by what it is of: what the page's own stage reads beside its Spec."""
    return {f"{one.part} {one.about}".strip(): one.run for one in parts.all()}
