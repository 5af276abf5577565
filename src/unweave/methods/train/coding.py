"""What a kind of SAE makes of a batch: latents, reconstructions, and the sums that the other terms consist of.

1. The kind selects entries of the pre-activations (``entries``).
2. ``code`` makes the latents at these entries, one or several weighted reconstructions of them, and the sums over rows
   that the other terms are made of. Dense entries are made for one chunk of rows at a time: the backward pass makes
   them again, so that no more than a chunk of dense latents is ever held.
3. ``penalty`` makes the other terms of them: sparsity, a gate's own reconstruction, pre-activations of silent latents.
4. ``follow`` brings what the kind remembers (``state``) up to date after a step.

Everything is written once for both forms of ``Entries`` and for one process or several. In several, x is the process's
own part of the batch; terms are means over the whole batch in value, and one's own share of that in gradient.
Shapes: N rows, D width, F latents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from unweave.core.dist import Group
from unweave.methods.train.entries import Entries, every
from unweave.methods.train.init import Affine
from unweave.methods.train.kinds import Part, SAESpec
from unweave.methods.train.objectives import total
from unweave.methods.train.state import Observed, State
from unweave.methods.train.weights import Weights
from unweave.sae.sparse import kernels


@dataclass(frozen=True)
class Coded:
    """A batch, or a chunk of its rows, coded."""

    reconstructions: list[tuple[float, Tensor]]
    """weighted reconstructions [N, D_out] of which the loss is the sum; the last is the SAE's own"""
    sums: dict[str, Tensor]
    """what ``penalty`` is made of: sums over rows, divided by the rows of the whole batch"""
    fired: Tensor
    """latents that are active anywhere, bool [F]"""
    active: Tensor
    """how many latents are active, over all rows, int64 []"""
    smallest: Tensor | None = None
    """of kinds that choose over a batch: the smallest winner, []"""


def code(
    spec: SAESpec, w: Weights, x: Tensor, goal: Tensor, dead: Tensor, state: State, rows: int, group: Group
) -> Coded:
    """What the kind makes of x [N, D], which should become ``goal`` [N, D_out]. ``rows``: of the whole batch."""

    def coded(x: Tensor, goal: Tensor, wide: Entries | None = None) -> Coded:
        wide = every(w, x) if wide is None else wide
        entries = spec.narrowed(wide)
        f = spec.latents(w, entries)
        ys = spec.reconstructions(w, x, wide, entries, f)
        sums = spec.sums(Part(w, x, goal, dead, rows, state, entries, f))
        smallest = _smallest_of(entries) if spec.one_threshold else None
        return Coded(ys, sums, entries.fired(f.detach()), (f.detach() > 0).sum(), smallest)

    selected = spec.select(w, x, state, group)
    step = kernels.chunk_rows(len(w.W_enc), x.element_size())
    if selected is not None or len(x) <= step:
        return coded(x, goal, selected)
    chunks = zip(x.split(step), goal.split(step), strict=True)
    return _joined([checkpoint(coded, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks])


def _smallest_of(entries: Entries) -> Tensor:
    values = entries.values.detach()
    return values.min() if len(values) else values.new_tensor(math.inf)


def _joined(chunks: list[Coded]) -> Coded:
    """Chunks of rows one below the other."""
    columns = zip(*(chunk.reconstructions for chunk in chunks), strict=True)
    ys = [(column[0][0], torch.cat([y for _, y in column])) for column in columns]
    sums = {name: torch.stack([chunk.sums[name] for chunk in chunks]).sum() for name in chunks[0].sums}
    fired = torch.stack([chunk.fired for chunk in chunks]).any(0)
    return Coded(ys, sums, fired, torch.stack([chunk.active for chunk in chunks]).sum())


def penalty(
    spec: SAESpec, coded: Coded, state: State, tokens_seen: int, group: Group
) -> tuple[Tensor | None, Observed]:
    """The kind's terms other than the goal's reconstruction and AuxK, None where it has none; and what was observed."""
    sums = {name: total(share, group) for name, share in coded.sums.items()}
    smallest = None
    if coded.smallest is not None:  # at least 0; 0 where nothing won
        least = -float(group.max(-coded.smallest[None]))
        smallest = max(least, 0.0) if math.isfinite(least) else 0.0
    return spec.terms(sums, state, tokens_seen), Observed(smallest, spec.sizes(sums))


def follow(spec: SAESpec, state: State, observed: Observed, l0: float, n_latents: int, tokens_seen: int) -> None:
    """Brings ``state`` up to date after a step: ``l0`` of the whole batch, ``tokens_seen`` before it."""
    state.density, state.wait = l0 / n_latents, max(0, state.wait - 1)
    spec.follow(state, observed, l0, tokens_seen)


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
