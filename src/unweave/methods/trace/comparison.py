"""How far the quick estimates of a latent's effect can be believed: next to measured effects, on the same examples.

1. Attribution patching and integrated gradients (IG) give an effect for every latent, summed over positions and
   averaged over examples.
2. The latents with the largest |IG|, and random ones among those that change at all, are measured one at a time: from
   the clean end (one latent takes its patch value, the rest stays clean), and from the patched end (the rest has its
   patch value, and what the metric loses when this latent alone goes back). Where latents interact the two differ, and
   neither is a latent's share of the whole change. Their mean is, where only pairs of latents interact: then it is the
   Shapley value, and IG with enough steps (all three average over what the others do). So estimates are set beside it.
3. All top latents moved together say how much of the whole change they carry.
4. Where IG and the exact effects from the clean end correlate less than they should, or differ in size, two causes are
   told apart. Too few steps: then more steps bring IG closer. Interactions: then more steps change nothing, IG along
   the path of one latent alone agrees with exact, and IG lies nearer to the mean of both ends.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from unweave.attribute.attribution import (
    Method,
    Rule,
    alone_effects,
    endpoints,
    exact_effects,
    node_effects,
    together_effects,
)
from unweave.attribute.runner import Batch, Shifted
from unweave.core.errors import UnweaveError
from unweave.core.progress import Task, task
from unweave.lm.model import LM
from unweave.methods.trace.correlation import correlations, scale
from unweave.sae.module import SAE

Cause = Literal["steps", "interactions", "steps and interactions", "neither"]
_MEANING: dict[Cause, str] = {
    "steps": "So the steps explain the difference.",
    "interactions": "So latents interact: moved together they act differently than one at a time.",
    "steps and interactions": "So both the steps and interactions between latents play a part.",
    "neither": "Neither steps nor interactions explain it: the effects may be too small to tell apart.",
}

_ESTIMATES = ("ig", "attribution", "exact")
"""what is set beside the mean of both ends: two estimates, and the exact effect from the clean end alone"""
_FINE_STEPS = 20
_ALONE_STEPS = 4
_DIAGNOSED_EXAMPLES = 24
_DIAGNOSED_LATENTS = 4
_SAME_SIZE = (0.8, 1.25)
_PIECE = 32
"""examples that are measured at a time, so that progress shows"""


@dataclass(frozen=True)
class LatentEffect:
    """One latent's effect on the metric, estimated and measured: summed over positions, mean over examples."""

    latent: int
    chosen: Literal["top", "random"]
    attribution: float
    ig: float
    exact: float
    """measured from the clean end: it alone takes its patch value"""
    exact_patch: float
    """measured from the patched end: what its going back to its clean value takes away"""
    changed: int
    """in how many examples the latent changes at all"""

    @property
    def measured(self) -> float:
        """The mean of the effects from both ends."""
        return (self.exact + self.exact_patch) / 2


@dataclass(frozen=True)
class Diagnosis:
    """Why IG differs from exact, measured on the first ``examples`` examples over the top latents."""

    examples: int
    coarse: float
    """Pearson correlation of IG with exact, as in the comparison"""
    fine: float
    """the same with ``fine_steps`` midpoint steps"""
    fine_steps: int
    coarse_scale: float
    """how many times larger than exact IG is: the least-squares factor over the top latents"""
    fine_scale: float
    """the same with ``fine_steps`` midpoint steps"""
    alone_error: float
    """largest |IG along one latent's own path - exact| over the strongest latents, relative to the largest |exact|"""
    other_end: float
    """Pearson correlation of fine IG with the exact effects measured from the patched end"""
    both_ends: float
    """Pearson correlation of fine IG with the mean of the exact effects at the two ends"""
    cause: Cause
    text: str


@dataclass(frozen=True)
class Comparison:
    """Attribution patching and IG against measured effects at one site. Effects are in units of the metric."""

    site: str
    n_examples: int
    steps: int
    rule: str
    metric_clean: float
    """mean metric of the clean run"""
    metric_patched: float
    """mean metric of the clean run with the whole site patched"""
    change_size: float
    """mean |change| of the metric over examples"""
    top_together: float
    """how the metric changes when all top latents move together: the mean from both ends"""
    top_share: float
    """the same as a share of metric_patched - metric_clean; NaN where that is 0"""
    ig_total: float
    """IG of all latents and the error together: metric_patched - metric_clean, up to the error of the steps"""
    ig_error: float
    """IG of the SAE's error alone: what the latents do not explain"""
    attribution_total: float
    attribution_error: float
    latents: tuple[LatentEffect, ...]
    """the top latents by |IG|, then the random ones"""
    top: dict[str, dict[str, float]]
    """{"ig", "attribution" or "exact": {"pearson", "spearman"}} with the mean of both ends, over the top latents"""
    random: dict[str, dict[str, float]]
    """the same over the random latents; NaN where there are too few or their effects are all the same"""
    scale: dict[str, float]
    """{"ig", "attribution" or "exact": how many times larger than the mean of both ends it is over the top latents, by
    least squares}"""
    diagnosis: Diagnosis | None
    """where Pearson of IG with exact from the clean end over the top latents is below ``threshold``, or its size is not
    0.8 to 1.25 times exact's"""
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN becomes None."""
        return _plain(asdict(self))


def compare(
    lm: LM,
    sae: SAE,
    batches: Sequence[Batch],
    *,
    top: int = 20,
    n_random: int = 20,
    steps: int = 10,
    rule: Rule = "midpoint",
    threshold: float = 0.95,
    seed: int = 0,
    max_tokens: int = 1024,
) -> Comparison:
    """Sets attribution patching and IG beside measured effects on all examples of ``batches``.

    Each batch holds examples of equal length (``tasks.agreement.batches`` makes them). Raises UnweaveError when fewer
    than ``top`` latents change anywhere, naming both numbers.
    """
    began = time.perf_counter()
    if not batches:
        raise UnweaveError("there are no examples", remedy="give at least one batch")
    pieces = _pieces(batches)
    with task("attribution", total=len(pieces) * (steps + 8), unit="passes") as shown:
        ap = _Means(lm, sae, pieces, "attribution", steps, rule, max_tokens, shown)
        ig = _Means(lm, sae, pieces, "ig", steps, rule, max_tokens, shown)
        chosen, others = _choose(ig, top, n_random, seed)
        measured = _measure(lm, sae, pieces, chosen, others, max_tokens, shown)
    rows = tuple(
        LatentEffect(
            latent,
            "top" if place < len(chosen) else "random",
            float(ap.latents[latent]),
            float(ig.latents[latent]),
            measured.clean[place],
            measured.patch[place],
            int(ig.changed[latent]),
        )
        for place, latent in enumerate([*chosen, *others])
    )
    best = rows[:top]
    means = [row.measured for row in best]
    diagnosis = None
    exact = [row.exact for row in best]
    agrees = correlations([row.ig for row in best], exact)["pearson"] >= threshold
    if not (agrees and _SAME_SIZE[0] <= scale([row.ig for row in best], exact) <= _SAME_SIZE[1]):
        diagnosis = diagnose(lm, sae, batches, chosen, steps=steps, rule=rule, max_tokens=max_tokens)
    start, end = (float(side.mean()) for side in measured.ends)
    return Comparison(
        site=str(sae.write),
        n_examples=len(measured.ends[0]),
        steps=steps,
        rule=rule,
        metric_clean=start,
        metric_patched=end,
        change_size=float((measured.ends[1] - measured.ends[0]).abs().mean()),
        top_together=measured.together,
        top_share=measured.together / (end - start) if end != start else math.nan,
        ig_total=float(ig.latents.sum() + ig.error),
        ig_error=float(ig.error),
        attribution_total=float(ap.latents.sum() + ap.error),
        attribution_error=float(ap.error),
        latents=rows,
        top=_correlate(rows, "top"),
        random=_correlate(rows, "random"),
        scale={name: scale([getattr(row, name) for row in best], means) for name in _ESTIMATES},
        diagnosis=diagnosis,
        seconds=time.perf_counter() - began,
    )


@dataclass(frozen=True)
class _Measured:
    """Exact effects of some latents from the clean and the patched end, means over examples; that of the top ones
    together, mean of both ends; the metric [N] clean and with the whole site patched."""

    clean: list[float]
    patch: list[float]
    together: float
    ends: tuple[Tensor, Tensor]


def _measure(
    lm: LM, sae: SAE, pieces: Sequence[Batch], top: list[int], others: list[int], max_tokens: int, shown: Task
) -> _Measured:
    measured: list[list[Tensor]] = [[], [], [], [], []]
    for piece in pieces:
        for place, origin in enumerate(("clean", "patch")):
            each = exact_effects(lm, sae, *piece, [*top, *others], origin=origin, max_tokens=max_tokens)
            measured[place].append(each.double().cpu())
            shown.advance(3)
        measured[2].append(together_effects(lm, sae, *piece, top, max_tokens=max_tokens).double().cpu())
        for place, end in enumerate(endpoints(lm, sae, *piece, max_tokens=max_tokens), 3):
            measured[place].append(end.double().cpu())
        shown.advance()
    clean, patch = (torch.cat(part, 1).mean(1).tolist() for part in measured[:2])
    return _Measured(
        clean, patch, float(torch.cat(measured[2], 1).mean()), (torch.cat(measured[3]), torch.cat(measured[4]))
    )


def diagnose(
    lm: LM,
    sae: SAE,
    batches: Sequence[Batch],
    latents: Sequence[int],
    *,
    steps: int = 10,
    rule: Rule = "midpoint",
    max_tokens: int = 1024,
) -> Diagnosis:
    """Whether steps or interactions make IG differ from exact for ``latents``, strongest first; see the module."""
    few = _first(batches, _DIAGNOSED_EXAMPLES)
    n = sum(len(clean) for clean, _, _ in few)
    index = torch.as_tensor(latents)
    fine_steps = max(_FINE_STEPS, 2 * steps)
    with task("why the estimates differ", total=len(few) * (steps + fine_steps + 20), unit="passes") as shown:
        coarse = _Means(lm, sae, few, "ig", steps, rule, max_tokens, shown).latents[index]
        fine = _Means(lm, sae, few, "ig", fine_steps, "midpoint", max_tokens, shown).latents[index]
        strong = list(latents[:_DIAGNOSED_LATENTS])
        effects: list[list[Tensor]] = [[], [], []]
        for piece in few:
            effects[0].append(exact_effects(lm, sae, *piece, latents, max_tokens=max_tokens))
            effects[1].append(exact_effects(lm, sae, *piece, latents, origin="patch", max_tokens=max_tokens))
            effects[2].append(alone_effects(lm, sae, *piece, strong, steps=_ALONE_STEPS, max_tokens=max_tokens))
            shown.advance(20)
    here, there, alone = (torch.cat(part, 1).double().mean(1).cpu() for part in effects)
    alone_error = float((alone - here[: len(strong)]).abs().max() / here.abs().max().clamp(min=1e-30))
    r = [correlations(a, b)["pearson"] for a, b in ((coarse, here), (fine, here), (fine, there), (fine, here + there))]
    sizes = scale(coarse, here), scale(fine, here)
    cause = _cause(r[0], r[1], sizes, alone_error)
    text = (
        f"On {n} examples IG correlates with exact at {r[0]:.3f} and is {sizes[0]:.2g} times as large; with "
        f"{fine_steps} midpoint steps at {r[1]:.3f} and {sizes[1]:.2g} times. Along one latent's own path IG meets "
        f"exact to {alone_error:.1%}. IG correlates with exact effects from the patched end at {r[2]:.3f}, with the "
        f"mean of both ends at {r[3]:.3f}. {_MEANING[cause]}"
    )
    return Diagnosis(n, r[0], r[1], fine_steps, *sizes, alone_error, r[2], r[3], cause, text)


def _cause(coarse: float, fine: float, sizes: tuple[float, float], alone_error: float) -> Cause:
    # Steps: better ones gain a good part of what is missing to a perfect correlation. Interactions: something is still
    # missing then, although along one latent's own path nothing is.
    steps = fine - coarse > 0.2 * (1 - coarse) or abs(sizes[1] - sizes[0]) > 0.2 * abs(1 - sizes[0])
    same = fine >= 0.99 and _SAME_SIZE[0] <= sizes[1] <= _SAME_SIZE[1]
    interactions = not same and alone_error < 0.05
    if steps and interactions:
        return "steps and interactions"
    return "steps" if steps else "interactions" if interactions else "neither"


class _Means:
    """Effects summed over positions, mean over the examples of all batches: ``latents`` [F] and ``error``, on the CPU.

    ``changed`` int64 [F] counts the examples in which a latent has an effect at all.
    """

    def __init__(
        self,
        lm: LM,
        sae: SAE,
        batches: Sequence[Batch],
        method: Method,
        steps: int,
        rule: Rule,
        max_tokens: int,
        shown: Task,
    ) -> None:
        self.latents = torch.zeros(sae.d_sae, dtype=torch.float64)
        self.changed = torch.zeros(sae.d_sae, dtype=torch.int64)
        error, n = 0.0, 0
        for clean, patch, metric in batches:
            (effects,) = node_effects(
                lm, sae, clean, patch, metric, method=method, steps=steps, rule=rule, max_tokens=max_tokens
            ).values()
            latents, errors = effects.over_positions()
            self.latents += latents.double().sum(0).cpu()
            self.changed += (effects.latents != 0).any(1).sum(0).cpu()
            error, n = error + float(errors.double().sum()), n + len(clean)
            shown.advance(steps if method == "ig" else 1)
        self.latents /= n
        self.error = error / n


def _choose(ig: _Means, top: int, n_random: int, seed: int) -> tuple[list[int], list[int]]:
    changing = ig.changed.nonzero()[:, 0]
    if len(changing) < top:
        raise UnweaveError(
            f"the {top} strongest latents were asked for, but only {len(changing)} change between clean and patch",
            remedy="ask for fewer, or give more or other examples",
        )
    strength = ig.latents.abs()
    chosen = sorted(changing.tolist(), key=lambda j: (-float(strength[j]), j))[:top]
    rest = sorted(set(changing.tolist()) - set(chosen))
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed)).tolist()
    return chosen, sorted(rest[i] for i in order[:n_random])


def _correlate(rows: Sequence[LatentEffect], chosen: str) -> dict[str, dict[str, float]]:
    mine = [row for row in rows if row.chosen == chosen]
    measured = [row.measured for row in mine]
    return {name: correlations([getattr(row, name) for row in mine], measured) for name in _ESTIMATES}


def _part(batch: Batch, start: int, stop: int) -> Batch:
    """Some of a batch's examples; their metric still gets the numbers they have in the whole batch."""
    clean, patch, metric = batch
    rows = slice(start, stop)
    return clean.rows(rows), None if patch is None else patch.rows(rows), Shifted(metric, start)


def _pieces(batches: Sequence[Batch]) -> list[Batch]:
    return [_part(b, start, start + _PIECE) for b in batches for start in range(0, len(b[0]), _PIECE)]


def _first(batches: Sequence[Batch], n: int) -> list[Batch]:
    first: list[Batch] = []
    for batch in batches:
        if n > 0:
            first.append(_part(batch, 0, n))
            n -= len(batch[0])
    return first


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
