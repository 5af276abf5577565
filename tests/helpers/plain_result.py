"""A result of any values, for tests of runs themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from unweave.core.result import Result


@dataclass(frozen=True)
class Plain(Result):
    """Values by name."""

    values: dict[str, Any]
