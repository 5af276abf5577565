"""p-annealing: ReLU with a penalty on latents to a power p, which falls from 1."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from unweave.core.rules import above, at_least, at_most, share
from unweave.methods.train.kinds.base import Part, Penalised

if TYPE_CHECKING:
    from unweave.methods.train.kinds.base import Observed, State, Tensor


_RECENT = 10
"""how many steps the sizes of the penalty at both powers are averaged over"""


@dataclass(frozen=True, kw_only=True)
class PAnnealSpec(Penalised):
    """as relu, with a penalty whose power falls from 1 (Karvonen et al. 2024)"""

    kind: Literal["p-anneal"] = "p-anneal"
    p_end: Annotated[float, above(0), at_most(1)] = 0.2
    """the power at the end"""
    anneal_start: Annotated[float, share()] = 0.2
    """share of the tokens before the power first falls"""
    anneal_end: Annotated[float, at_least("anneal_start"), at_most(1)] = 0.8
    """share of the tokens after which it stays"""
    anneal_updates: Annotated[int, at_least(1)] = 10
    """in how many equal falls it gets there"""

    def stage(self, tokens_seen: int) -> int:
        """How many of its falls the power has behind it. The first is at anneal_start, the last at anneal_end."""
        part, updates = tokens_seen / self.tokens, self.anneal_updates
        if part < self.anneal_start:
            return 0
        span = self.anneal_end - self.anneal_start
        between = span / (updates - 1) if updates > 1 else 0.0
        passed = updates if between == 0 else 1 + math.floor((part - self.anneal_start) / between + 1e-9)
        return min(updates, passed)

    def power(self, stage: int) -> float:
        """The power after ``stage`` falls, from 1 to p_end in equal steps."""
        return 1 - (1 - self.p_end) * min(stage, self.anneal_updates) / self.anneal_updates

    def sums(self, part: Part) -> dict[str, Tensor]:
        from unweave.methods.train import objectives

        now, then = self.power(part.state.stage), self.power(part.state.stage + 1)
        return {"now": objectives.lp(part.f, now, part.rows), "then": objectives.lp(part.f.detach(), then, part.rows)}

    def terms(self, sums: Mapping[str, Tensor], state: State, tokens_seen: int) -> Tensor:
        return self.weight(state, tokens_seen) * sums["now"]

    def sizes(self, sums: Mapping[str, Tensor]) -> tuple[float, float]:
        return float(sums["now"].detach()), float(sums["then"])

    def follow(self, state: State, observed: Observed, l0: float, tokens_seen: int) -> None:
        """At a fall the coefficient is multiplied so that the penalty keeps its size."""
        super().follow(state, observed, l0, tokens_seen)
        if observed.sizes is None:
            return
        state.recent = [*state.recent, observed.sizes][-_RECENT:]
        if self.stage(tokens_seen) > state.stage:
            now, then = (sum(column) for column in zip(*state.recent, strict=True))
            state.ratio *= now / then if then > 0 else 1.0
            state.stage, state.recent = state.stage + 1, []

    def continues(self, threshold: Tensor) -> bool:
        return not bool(threshold.any())
