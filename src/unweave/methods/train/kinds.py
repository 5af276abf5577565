"""What the kinds of SAE do with a batch: which entries of the pre-activations they select, and which terms they sum.

1. ``choose`` selects entries by the kind's rule: the k largest of each row, the k N largest of the batch, or those
   above a bound of their latent. Selected entries are sparse; for the bounded kinds they are dense while many.
2. ``code`` makes the latents at these entries, one or several weighted reconstructions of them, and the sums over rows
   that the other terms are made of. Dense entries are made for one chunk of rows at a time: the backward pass makes
   them again, so that no more than a chunk of dense latents is ever held.
3. ``penalty`` makes the other terms of them: sparsity, a gate's own reconstruction, pre-activations of silent latents.
4. ``State`` holds what a kind remembers between steps, and ``State.follow`` brings it up to date after one.

Everything is written once for both forms of ``Entries`` and for one process or several. In several, x is the process's
own part of the batch; terms are means over the whole batch in value, and one's own share of that in gradient.
Shapes: N rows, D width, F latents.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from unweave.core.dist import Group
from unweave.core.errors import UnweaveError
from unweave.methods.train import objectives, schedule
from unweave.methods.train.entries import Entries
from unweave.methods.train.objectives import total
from unweave.methods.train.sae_spec import SAESpec
from unweave.methods.train.weights import Weights
from unweave.sae.sparse import kernels

SPARSE_BELOW = 0.1
"""share of entries up to which the bounded kinds handle them sparsely"""
_TRY_AGAIN = 16
"""steps to stay dense after sparse handling was tried in vain"""
_RATE = 0.02
"""how fast a steered coefficient follows the ratio of L0 to k, per step"""
_RECENT = 10
"""p-anneal: how many steps the sizes of the penalty at both powers are averaged over"""
_WIDER = 4
"""multi-TopK: how many times k the second reconstruction has"""


@dataclass
class State:
    """What a kind remembers between steps. Plain values, so that checkpoints hold them as they are."""

    coefficient: float
    """of the sparsity penalty, where it is steered"""
    batch_threshold: float | None = None
    """of batchtopk kinds: the smallest winner of the last batch, near which the next one's is looked for"""
    density: float = 1.0
    """share of entries that were active in the last step"""
    wait: int = 0
    """steps before sparse handling is tried again"""
    stage: int = 0
    """p-anneal: how many falls the power has behind it"""
    ratio: float = 1.0
    """p-anneal: what the coefficient is multiplied with to keep the penalty's size"""
    recent: list[tuple[float, float]] = field(default_factory=list)
    """p-anneal: the last sizes of the penalty, at this power and at the next"""

    @classmethod
    def first(cls, spec: SAESpec) -> State:
        return cls(1e-3 if spec.kind == "jumprelu" else 1e-2)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> State:
        recent = [(float(now), float(then)) for now, then in values["recent"]]
        return cls(**{**values, "recent": recent})

    def weight(self, spec: SAESpec, tokens_seen: int) -> float:
        """The sparsity coefficient of the step after ``tokens_seen`` tokens."""
        if spec.steered:
            return self.coefficient * self.ratio
        fixed = 1.0 if spec.sparsity is None else spec.sparsity
        return fixed * self.ratio * schedule.sparsity_rise(spec, tokens_seen)

    def follow(self, spec: SAESpec, found: Found, l0: float, n_latents: int, tokens_seen: int) -> None:
        """After a step: ``l0`` of the whole batch, ``tokens_seen`` before it."""
        self.density, self.wait = l0 / n_latents, max(0, self.wait - 1)
        if found.smallest is not None:
            self.batch_threshold = found.smallest
        if spec.steered:
            error = math.log(max(l0, 1e-3) / spec.k)
            self.coefficient *= math.exp(_RATE * max(-1.0, min(1.0, error)))
        if found.sizes is not None:
            self.recent = [*self.recent, found.sizes][-_RECENT:]
            if schedule.stage(spec, tokens_seen) > self.stage:
                now, then = (sum(column) for column in zip(*self.recent, strict=True))
                self.ratio *= now / then if then > 0 else 1.0
                self.stage, self.recent = self.stage + 1, []


@dataclass
class Found:
    """What a step learns beside gradients, equal in every process."""

    smallest: float | None = None
    """batchtopk kinds: the smallest winner of the batch"""
    sizes: tuple[float, float] | None = None
    """p-anneal: the penalty before its coefficient, at this power and at the next"""

    def joined(self, other: Found) -> Found:
        """Of two parts of a batch: the smaller of the smallest, sizes added up."""
        smallest, sizes = self.smallest, self.sizes
        if smallest is not None and other.smallest is not None:
            smallest = min(smallest, other.smallest)
        if sizes is not None and other.sizes is not None:
            sizes = (sizes[0] + other.sizes[0], sizes[1] + other.sizes[1])
        return Found(smallest, sizes)


# -- which entries ----------------------------------------------------------------------------------------------------


def choose(spec: SAESpec, w: Weights, x: Tensor, state: State, group: Group) -> Entries | None:
    """The pre-activations that the kind selects of x [N, D], with a graph to x, W_enc and b_enc; None: all of them,
    because too many are selected for sparse handling to pay, in this process or in another of the group."""
    W, b = w.W_enc.detach(), w.b_enc.detach()
    if spec.kind == "topk":
        k = spec.k if spec.multi_topk == 0 else min(_WIDER * spec.k, len(W))
        values, choice = kernels.choose_topk(x.detach(), W, b, k)
    elif spec.winners:
        guess = 0.8 * (state.batch_threshold or 0.0)
        values, choice = kernels.choose_batch_topk(x.detach(), W, b, spec.k, guess=guess, group=group)
    else:
        found = None
        if state.density <= SPARSE_BELOW and state.wait == 0:
            found = kernels.choose_above(x.detach(), W, b, _bound(spec, w), limit=SPARSE_BELOW)
            if group.size > 1 and int(group.max(torch.tensor(int(found is None), device=x.device))):
                found = None  # all do the same, so that all remember the same
            state.wait = 0 if found is not None else _TRY_AGAIN
        if found is None:
            return None
        values, choice = found
    return Entries(kernels.attach(x, w.W_enc, w.b_enc, values, choice), choice)


def every(w: Weights, x: Tensor) -> Entries:
    """All pre-activations of x [N, D], dense."""
    return Entries(torch.addmm(w.b_enc, x, w.W_enc.T))


def _bound(spec: SAESpec, w: Weights) -> Tensor:
    """Per latent the value that a pre-activation must exceed to matter, [F]: its threshold's window begins there."""
    threshold = w.threshold
    return torch.zeros_like(w.b_enc) if threshold is None else threshold.detach() - spec.bandwidth / 2


# -- latents and reconstructions ------------------------------------------------------------------------------------


def latents(spec: SAESpec, w: Weights, entries: Entries) -> Tensor:
    """The latents at the entries, laid out like them; zero at entries that are not active."""
    z = entries.values
    if w.r_mag is not None and w.b_mag is not None:
        magnitude = (z - entries.of(w.b_enc)) * entries.of(w.r_mag.exp()) + entries.of(w.b_mag)
        return torch.relu(magnitude) * (z.detach() > 0)
    threshold = w.threshold
    if threshold is not None:
        return objectives.jump_relu(z, entries.of(threshold), spec.bandwidth)
    return torch.relu(z)


def group_sizes(spec: SAESpec, n_latents: int) -> list[int]:
    """Matryoshka: how many latents each group adds, from the shares. UnweaveError where a group would have none."""
    shares = torch.tensor(spec.groups, dtype=torch.float64).cumsum(0)
    ends = [round(float(share) * n_latents) for share in shares[:-1]] + [n_latents]
    sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    if min(sizes) < 1:
        raise UnweaveError(
            f"of {n_latents} latents, groups {spec.groups} have {sizes}: one has none",
            where="groups",
            remedy="use fewer or larger shares, or more latents",
        )
    return sizes


def reconstructions(
    spec: SAESpec, w: Weights, x: Tensor, wide: Entries, entries: Entries, f: Tensor
) -> list[tuple[float, Tensor]]:
    """Weighted reconstructions [N, D_out] of which the loss is the sum; the last is the SAE's own."""
    base = w.base(x)
    if spec.kind == "matryoshka":
        sizes = group_sizes(spec, len(w.W_enc))
        parts = zip(entries.split(f, sizes), w.W_dec.split(sizes), strict=True)
        out, y = [], base
        for (part, values), rows in parts:
            y = part.decode(values, rows) + y
            out.append((1 / len(sizes), y))
        return out
    y = entries.decode(f, w.W_dec) + base
    if wide is entries:
        return [(1.0, y)]
    return [(spec.multi_topk, wide.decode(torch.relu(wide.values), w.W_dec) + base), (1.0, y)]


# -- a batch coded ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coded:
    """A batch, or a chunk of its rows, coded."""

    said: list[tuple[float, Tensor]]
    """weighted reconstructions [N, D_out] of which the loss is the sum; the last is the SAE's own"""
    sums: dict[str, Tensor]
    """what ``penalty`` is made of: sums over rows, divided by the rows of the whole batch"""
    fired: Tensor
    """latents that are active anywhere, bool [F]"""
    active: Tensor
    """how many latents are active, over all rows, int64 []"""
    smallest: Tensor | None = None
    """batchtopk kinds: the smallest winner, []"""


def code(
    spec: SAESpec, w: Weights, x: Tensor, goal: Tensor, dead: Tensor, state: State, rows: int, group: Group
) -> Coded:
    """What the kind makes of x [N, D], which should become ``goal`` [N, D_out]. ``rows``: of the whole batch."""
    wide = choose(spec, w, x, state, group)
    if wide is not None:
        return _coded(spec, w, x, goal, wide, dead, state.stage, rows)
    step = kernels.chunk_rows(len(w.W_enc), x.element_size())
    if len(x) <= step:
        return _coded(spec, w, x, goal, every(w, x), dead, state.stage, rows)

    def chunk(x: Tensor, goal: Tensor) -> Coded:
        return _coded(spec, w, x, goal, every(w, x), dead, state.stage, rows)

    parts = [
        checkpoint(chunk, x_part, goal_part, use_reentrant=False, preserve_rng_state=False)
        for x_part, goal_part in zip(x.split(step), goal.split(step), strict=True)
    ]
    return _joined(parts)


def _coded(
    spec: SAESpec, w: Weights, x: Tensor, goal: Tensor, wide: Entries, dead: Tensor, stage: int, rows: int
) -> Coded:
    entries = wide.largest(spec.k) if spec.multi_topk > 0 else wide
    f = latents(spec, w, entries)
    said = reconstructions(spec, w, x, wide, entries, f)
    positive = f.detach() > 0
    smallest = None
    if spec.one_threshold:
        values = entries.values.detach()
        smallest = values.min() if len(values) else values.new_tensor(math.inf)
    sums = _sums(spec, w, x, goal, entries, f, dead, stage, rows)
    return Coded(said, sums, entries.fired(f.detach()), positive.sum(), smallest)


def _joined(parts: list[Coded]) -> Coded:
    """Chunks of rows one below the other."""
    said = [(weight, torch.cat([part.said[i][1] for part in parts])) for i, (weight, _) in enumerate(parts[0].said)]
    sums = {name: torch.stack([part.sums[name] for part in parts]).sum() for name in parts[0].sums}
    fired = torch.stack([part.fired for part in parts]).any(0)
    return Coded(said, sums, fired, torch.stack([part.active for part in parts]).sum())


def _sums(
    spec: SAESpec, w: Weights, x: Tensor, goal: Tensor, entries: Entries, f: Tensor, dead: Tensor, stage: int, rows: int
) -> dict[str, Tensor]:
    if spec.winners:
        return {}
    if spec.kind == "relu":
        return {"l1": objectives.l1(f, rows)}
    if spec.kind == "p-anneal":
        now, then = schedule.power(spec, stage), schedule.power(spec, stage + 1)
        return {"now": objectives.lp(f, now, rows), "then": objectives.lp(f.detach(), then, rows)}
    if spec.kind == "gated":
        # The gate's own reconstruction goes through a decoder held fixed.
        gate = torch.relu(entries.values)
        said = entries.decode(gate, w.W_dec.detach()) + w.base(x).detach()
        own = objectives.reconstruction(said, goal) * (len(x) / rows)
        return {"l1": objectives.l1(gate, rows), "own": own}
    return _jumprelu_sums(spec, w, x, entries, f, dead, rows)


def _jumprelu_sums(
    spec: SAESpec, w: Weights, x: Tensor, entries: Entries, f: Tensor, dead: Tensor, rows: int
) -> dict[str, Tensor]:
    threshold = w.threshold
    assert threshold is not None
    if spec.penalty == "tanh":
        found = {"tanh": objectives.tanh(f, spec.tanh_scale, rows)}
    else:
        found = {"l0": objectives.l0(entries.values, entries.of(threshold), spec.bandwidth, rows)}
    if spec.preact_weight > 0 and (spec.preact_on == "all" or len(dead) > 0):
        counted = None
        if spec.preact_on == "dead":
            counted = torch.zeros(len(w.b_enc), dtype=torch.bool, device=w.b_enc.device)
            counted[dead] = True
        found["silent"] = objectives.below_threshold(x, w.W_enc, w.b_enc, threshold, entries, counted, rows)
    return found


# -- the other terms --------------------------------------------------------------------------------------------------


def penalty(spec: SAESpec, coded: Coded, state: State, tokens_seen: int, group: Group) -> tuple[Tensor | None, Found]:
    """The kind's terms other than the goal's reconstruction and AuxK, None where it has none; and what was found."""
    if spec.winners:
        return None, Found(smallest=None if coded.smallest is None else _smallest(coded.smallest, group))
    weight = state.weight(spec, tokens_seen)
    sums = {name: total(share, group) for name, share in coded.sums.items()}
    if spec.kind == "relu":
        return weight * sums["l1"], Found()
    if spec.kind == "gated":
        return weight * sums["l1"] + sums["own"], Found()
    if spec.kind == "p-anneal":
        return weight * sums["now"], Found(sizes=(float(sums["now"].detach()), float(sums["then"])))
    if spec.penalty == "tanh":
        term = weight * sums["tanh"]
    else:
        term = weight * (objectives.off_target(sums["l0"], spec.k) if spec.penalty == "target" else sums["l0"])
    return (term + spec.preact_weight * sums["silent"] if "silent" in sums else term), Found()


def _smallest(least: Tensor, group: Group) -> float:
    """The smallest winner of the whole batch, at least 0; 0 where nothing won."""
    smallest = -float(group.max(-least[None]))
    return max(smallest, 0.0) if math.isfinite(smallest) else 0.0
