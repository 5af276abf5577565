"""What the kinds of SAE do with a batch: which entries of the pre-activations they select, and which terms they sum.

1. ``choose`` selects entries by the kind's rule: the k largest of each row, the k N largest of the batch, or those
   above a bound of their latent. Selected entries are sparse; for the bounded kinds they are dense while many.
2. ``latents`` makes the latents at these entries, ``reconstructions`` one or several weighted reconstructions of them.
3. ``penalty`` sums the other terms: sparsity, a gate's own reconstruction, pre-activations of silent latents.
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

from unweave.core.dist import Group
from unweave.sae import kernels, objectives, schedule
from unweave.sae.entries import Entries
from unweave.sae.objectives import total
from unweave.sae.spec import SAESpec
from unweave.sae.weights import Weights

SPARSE_BELOW = 0.1
"""share of entries up to which the bounded kinds handle them sparsely"""
_TRY_AGAIN = 16
"""steps to stay dense after sparse handling was tried in vain"""
_EMA = 0.95
"""how much of BatchTopK's threshold each batch keeps; a slower mean lags behind and lets too many latents by"""
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
    """of batchtopk kinds: a running mean of the smallest winner"""
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
            first = self.batch_threshold is None
            kept = found.smallest if first else self.batch_threshold or 0.0
            self.batch_threshold = _EMA * kept + (1 - _EMA) * found.smallest if not first else kept
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


def choose(spec: SAESpec, w: Weights, x: Tensor, state: State, group: Group) -> Entries:
    """The pre-activations that the kind selects of x [N, D], with a graph to x, W_enc and b_enc."""
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
            state.wait = 0 if found is not None else _TRY_AGAIN
        if found is None:
            return Entries(torch.addmm(w.b_enc, x, w.W_enc.T))
        values, choice = found
    return Entries(kernels.attach(x, w.W_enc, w.b_enc, values, choice), choice)


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
    """Matryoshka: how many latents each group adds, from the shares; at least one each."""
    shares = torch.tensor(spec.groups, dtype=torch.float64).cumsum(0)
    ends = [round(float(share) * n_latents) for share in shares[:-1]] + [n_latents]
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]


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


# -- the other terms --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A batch on its way: what the terms are made of."""

    spec: SAESpec
    w: Weights
    x: Tensor
    goal: Tensor
    entries: Entries
    f: Tensor
    dead: Tensor
    """int64 indices"""
    rows: int
    """of the whole batch, in all processes"""
    group: Group


def penalty(step: Step, state: State, tokens_seen: int) -> tuple[Tensor | None, Found]:
    """The kind's terms other than the goal's reconstruction and AuxK, None where it has none; and what was found."""
    spec, f, rows, group = step.spec, step.f, step.rows, step.group
    weight = state.weight(spec, tokens_seen)
    if spec.winners:
        return None, Found(smallest=None if spec.kind == "topk" else _smallest(step.entries, group))
    if spec.kind == "jumprelu":
        return _jumprelu_penalty(step, weight), Found()
    if spec.kind == "gated":
        return _gated_penalty(step, weight), Found()
    if spec.kind == "relu":
        return weight * total(objectives.l1(f, rows), group), Found()
    now, then = schedule.power(spec, state.stage), schedule.power(spec, state.stage + 1)
    size = total(objectives.lp(f, now, rows), group)
    following = total(objectives.lp(f.detach(), then, rows), group)
    return weight * size, Found(sizes=(float(size.detach()), float(following)))


def _gated_penalty(step: Step, weight: float) -> Tensor:
    """L1 on relu(gate), and the reconstruction that the gate would make, through a decoder held fixed."""
    w, gate = step.w, torch.relu(step.entries.values)
    said = step.entries.decode(gate, w.W_dec.detach()) + w.base(step.x).detach()
    own = objectives.reconstruction(said, step.goal) * (len(step.x) / step.rows)
    return total(weight * objectives.l1(gate, step.rows) + own, step.group)


def _jumprelu_penalty(step: Step, weight: float) -> Tensor:
    spec, w, entries = step.spec, step.w, step.entries
    threshold = w.threshold
    assert threshold is not None
    if spec.penalty == "tanh":
        term = weight * total(objectives.tanh(step.f, spec.tanh_scale, step.rows), step.group)
    else:
        l0 = total(objectives.l0(entries.values, entries.of(threshold), spec.bandwidth, step.rows), step.group)
        term = weight * (objectives.off_target(l0, spec.k) if spec.penalty == "target" else l0)
    if spec.preact_weight > 0 and (spec.preact_on == "all" or len(step.dead) > 0):
        counted = None
        if spec.preact_on == "dead":
            counted = torch.zeros(len(w.b_enc), dtype=torch.bool, device=w.b_enc.device)
            counted[step.dead] = True
        silent = objectives.below_threshold(step.x, w.W_enc, w.b_enc, threshold, entries, counted, step.rows)
        term = term + spec.preact_weight * total(silent, step.group)
    return term


def _smallest(entries: Entries, group: Group) -> float:
    """The smallest winner of the whole batch, at least 0; 0 where nothing won."""
    values = entries.values.detach()
    least = values.min() if len(values) else values.new_tensor(math.inf)
    smallest = -float(group.max(-least[None]))
    return max(smallest, 0.0) if math.isfinite(smallest) else 0.0
