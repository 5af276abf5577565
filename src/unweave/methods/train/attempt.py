"""One attempt at a batch, and what the attempts of one optimiser step add up to."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from unweave.core.dist import Group
from unweave.methods.train.init import Affine
from unweave.methods.train.state import Observed


@dataclass(frozen=True)
class Attempt:
    """What the SAE makes of a batch as it stands.

    The three scalars are of the whole batch in value, and in gradient one's own share of it; all else is of one's own
    rows.
    """

    loss: Tensor
    """reconstruction + penalty: what ``step`` descends"""
    reconstruction: Tensor
    """squared error in scaled units, summed over dimensions, averaged over tokens (nested or several: their sum)"""
    penalty: Tensor
    """every other term: sparsity, AuxK, a gate's own reconstruction, pre-activations"""
    scaled: Tensor
    """the reconstruction in scaled units, [N, D_out], with its graph"""
    x: Tensor
    goal: Tensor
    """inputs [N, D] and what they should become [N, D_out], scaled, without a graph"""
    rows: int
    """how many rows the batch has in all processes"""
    fired: Tensor
    """which latents are active anywhere, bool [F]"""
    active: Tensor
    """how many latents are active, over all rows, int64 []"""
    observed: Observed
    output: Affine

    @cached_property
    def y(self) -> Tensor:
        """The reconstruction in the units of the data, [N, D_out], with its graph to the parameters and to x."""
        return self.output.back(self.scaled)


@dataclass
class Tally:
    """What the attempts of one step have in common: sums over their rows, in one process."""

    loss: float
    fired: Tensor
    active: Tensor
    rows: int
    error: Tensor
    goal_sum: Tensor
    goal_square: Tensor
    observed: Observed
    inputs: tuple[Tensor, ...]
    """the attempts' rows [n, D], of one's own"""

    @classmethod
    def of(cls, attempt: Attempt, loss: float) -> Tally:
        goal = attempt.goal
        error = torch.linalg.vector_norm(attempt.scaled.detach() - goal).square()
        square = torch.linalg.vector_norm(goal).square()
        return cls(
            loss, attempt.fired, attempt.active, len(goal), error, goal.sum(0), square, attempt.observed, (attempt.x,)
        )

    def __add__(self, other: Tally) -> Tally:
        """Of both; ``fired`` where either has."""
        return Tally(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Tally)))

    def over(self, group: Group) -> Tally:
        """Over all processes: one exchange of sums, one of what fired."""
        if group.size == 1:
            return self
        counts = torch.stack([self.active.double(), self.error.double(), self.goal_square.double()])
        sums = group.sum(torch.cat([counts, counts.new_tensor([self.rows]), self.goal_sum.double()]))
        fired = group.max(self.fired.to(torch.uint8)).bool()
        return replace(
            self, fired=fired, active=sums[0], error=sums[1], goal_square=sums[2], rows=int(sums[3]), goal_sum=sums[4:]
        )

    @property
    def fvu(self) -> float:
        """Squared error over squared distance to the mean."""
        variance = self.goal_square / self.rows - (self.goal_sum / self.rows).square().sum()
        return float(self.error) / self.rows / max(float(variance), 1e-30)
