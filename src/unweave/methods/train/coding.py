"""What a kind of SAE makes of a batch: latents, reconstructions, and the sums that the other terms consist of.

1. The kind selects entries of the pre-activations (``selection``).
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
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from unweave.core.dist import Group
from unweave.methods.train.entries import Entries
from unweave.methods.train.kinds import Part, SAESpec
from unweave.methods.train.objectives import total
from unweave.methods.train.parameters import Weights
from unweave.methods.train.selection import every
from unweave.methods.train.state import Observed, State
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
        positive = f.detach() > 0
        return Coded(ys, sums, entries.fired(f.detach()), positive.sum(), _least(spec, entries))

    wide = spec.select(w, x, state, group)
    step = kernels.chunk_rows(len(w.W_enc), x.element_size())
    if wide is not None or len(x) <= step:
        return coded(x, goal, wide)
    parts = [
        checkpoint(coded, x_part, goal_part, use_reentrant=False, preserve_rng_state=False)
        for x_part, goal_part in zip(x.split(step), goal.split(step), strict=True)
    ]
    return _joined(parts)


def _least(spec: SAESpec, entries: Entries) -> Tensor | None:
    if not spec.one_threshold:
        return None
    values = entries.values.detach()
    return values.min() if len(values) else values.new_tensor(math.inf)


def _joined(parts: list[Coded]) -> Coded:
    """Chunks of rows one below the other."""
    weights = [weight for weight, _ in parts[0].reconstructions]
    ys = [(weight, torch.cat([part.reconstructions[i][1] for part in parts])) for i, weight in enumerate(weights)]
    sums = {name: torch.stack([part.sums[name] for part in parts]).sum() for name in parts[0].sums}
    fired = torch.stack([part.fired for part in parts]).any(0)
    return Coded(ys, sums, fired, torch.stack([part.active for part in parts]).sum())


def penalty(
    spec: SAESpec, coded: Coded, state: State, tokens_seen: int, group: Group
) -> tuple[Tensor | None, Observed]:
    """The kind's terms other than the goal's reconstruction and AuxK, None where it has none; and what was observed."""
    sums = {name: total(share, group) for name, share in coded.sums.items()}
    smallest = None if coded.smallest is None else _smallest(coded.smallest, group)
    return spec.terms(sums, state, tokens_seen), Observed(smallest, spec.sizes(sums))


def follow(spec: SAESpec, state: State, observed: Observed, l0: float, n_latents: int, tokens_seen: int) -> None:
    """Brings ``state`` up to date after a step: ``l0`` of the whole batch, ``tokens_seen`` before it."""
    state.density, state.wait = l0 / n_latents, max(0, state.wait - 1)
    spec.follow(state, observed, l0, tokens_seen)


def _smallest(least: Tensor, group: Group) -> float:
    """The smallest winner of the whole batch, at least 0; 0 where nothing won."""
    smallest = -float(group.max(-least[None]))
    return max(smallest, 0.0) if math.isfinite(smallest) else 0.0
