"""How far the quick estimates of a latent's effect can be believed: beside measured effects, on the same examples.

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
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from unweave.attribute.attribution import Interventions, node_effects
from unweave.attribute.completeness import Completeness
from unweave.attribute.options import AttributionOptions, Rule
from unweave.attribute.runner import Batch, rows_of
from unweave.core.errors import UnweaveError
from unweave.core.progress import Task, task
from unweave.lm.model import LM
from unweave.methods.trace.result import Agreement, Cause, Comparison, Diagnosis, Effect, Estimate, Group, Totals
from unweave.methods.trace.spec import TraceOptions
from unweave.sae.module import SAE

_MEANING: dict[Cause, str] = {
    "steps": "So the steps explain the difference.",
    "interactions": "So latents interact: moved together they act differently than one at a time.",
    "steps and interactions": "So both the steps and interactions between latents play a part.",
    "neither": "Neither steps nor interactions explain it: the effects may be too small to tell apart.",
}
_AGREES = 0.95
"""the correlation below which the difference is looked into"""
_FINE_STEPS = 20
_ALONE_STEPS = 4
_DIAGNOSED_EXAMPLES = 24
_DIAGNOSED_LATENTS = 4
_SAME_SIZE = (0.8, 1.25)
_PIECE = 32
"""examples that are measured at a time, so that progress shows"""


def compare(
    lm: LM, sae: SAE, batches: Sequence[Batch], options: TraceOptions | None = None, max_tokens: int = 1024
) -> Comparison:
    """Sets attribution patching and IG beside measured effects on all examples of ``batches``.

    Each batch holds examples of equal length (``tasks.agreement.batches`` makes them). Where Pearson of IG with the
    effects from the clean end is below 0.95 over the top latents, or its size is not 0.8 to 1.25 times theirs, or it
    does not correlate with the mean of both ends without the strongest latent, the cause is looked for.

    Raises UnweaveError when fewer than ``top`` latents change anywhere, naming both numbers.
    """
    o = options or TraceOptions()
    if not batches:
        raise UnweaveError("there are no examples", remedy="give at least one batch")
    pieces = [rows_of(b, slice(start, start + _PIECE)) for b in batches for start in range(0, len(b[0]), _PIECE)]
    ig_options = AttributionOptions(method="ig", steps=o.steps, rule=o.rule, max_tokens=max_tokens)
    with task("attribution", total=len(pieces) * (o.steps + 8), unit="passes") as shown:
        ap, ap_error, _ = _means(lm, sae, pieces, AttributionOptions(max_tokens=max_tokens), shown)
        ig, ig_error, changing = _means(lm, sae, pieces, ig_options, shown)
        top, others = _choose(ig, changing, o)
        (exact, exact_patch), together, (before, after) = _measure(lm, sae, pieces, top, others, max_tokens, shown)
    effects = tuple(
        Effect(latent, place < o.top, float(ig[latent]), float(ap[latent]), exact[place], exact_patch[place])
        for place, latent in enumerate([*top, *others])
    )
    best, n = effects[: o.top], len(before)
    weaker = sorted(best, key=lambda e: -abs(e.measured))[1:]
    groups: dict[Group, Sequence[Effect]] = {"chosen": best, "weaker": weaker, "random": effects[o.top :]}
    estimated, measured = [e.ig for e in best], [e.exact for e in best]
    diagnosed: Sequence[int] = ()
    if not (correlations(estimated, measured)["pearson"] >= _AGREES and _same_size(scale(estimated, measured))):
        diagnosed = top
    elif not correlations([e.ig for e in weaker], [e.measured for e in weaker])["pearson"] >= _AGREES:
        diagnosed = [e.latent for e in weaker]
    start, end, size = float(before.mean()), float(after.mean()), float((after - before).abs().mean())
    totals = Totals(start, end, together, float(ig.sum()) + ig_error, ig_error, float(ap.sum()) + ap_error, ap_error)
    site = lm.site(str(sae.write))
    return Comparison(
        site=site,
        examples=n,
        effects=effects,
        agreements=tuple(_agreement(e, among, rows) for among, rows in groups.items() for e in get_args(Estimate)),
        share=together / totals.change if totals.change else None,
        totals=totals,
        sums=Completeness({site: [totals.ig * n, totals.change * n, size * n, n]}).rows(),
        diagnosis=diagnose(lm, sae, batches, diagnosed, o.steps, o.rule, max_tokens) if diagnosed else None,
    )


def _means(
    lm: LM, sae: SAE, batches: Sequence[Batch], options: AttributionOptions, shown: Task
) -> tuple[Tensor, float, Tensor]:
    """Effects summed over positions, mean over the examples of all batches: of latents, float64 [F] on the CPU, and of
    the error; and which latents have an effect in any example, bool [F]."""
    means, error, n = torch.zeros(sae.d_sae, dtype=torch.float64), 0.0, 0
    changing = torch.zeros(sae.d_sae, dtype=torch.bool)
    for batch in batches:
        (effects,) = node_effects(lm, sae, *batch, options).values()
        latents, errors = effects.over_positions()
        means += latents.double().sum(0).cpu()
        changing |= (effects.latents != 0).flatten(0, 1).any(0).cpu()
        error, n = error + float(errors.double().sum()), n + len(batch[0])
        shown.advance(options.steps if options.method == "ig" else 1)
    return means / n, error / n, changing


def _choose(ig: Tensor, changing: Tensor, options: TraceOptions) -> tuple[list[int], list[int]]:
    """The strongest of the latents that change, and random others of them."""
    candidates = changing.nonzero()[:, 0].tolist()
    if len(candidates) < options.top:
        raise UnweaveError(
            f"the {options.top} strongest latents were asked for, but only {len(candidates)} change between clean and "
            "patch",
            remedy="ask for fewer, or give more or other examples",
        )
    ordered = sorted(candidates, key=lambda j: (-abs(float(ig[j])), j))
    rest = sorted(ordered[options.top :])
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(options.seed)).tolist()
    return ordered[: options.top], sorted(rest[i] for i in order[: options.random])


def _measure(
    lm: LM, sae: SAE, pieces: Sequence[Batch], top: list[int], others: list[int], max_tokens: int, shown: Task
) -> tuple[tuple[list[float], list[float]], float, tuple[Tensor, Tensor]]:
    """Exact effects of some latents from the clean and from the patched end, means over examples; that of the top ones
    together, mean of both ends; the metric [N] clean, and with the whole site patched."""
    measured: list[list[Tensor]] = [[], [], [], [], []]
    for piece in pieces:
        moves = Interventions(lm, sae, *piece, max_tokens=max_tokens)
        values = [moves.exact([*top, *others]), moves.exact([*top, *others], "patch"), moves.together(top)]
        for part, value in zip(measured, [*values, *moves.endpoints()], strict=True):
            part.append(value.double().cpu())
        shown.advance(7)
    clean, patch, together, before, after = (torch.cat(part, -1) for part in measured)
    return (clean.mean(1).tolist(), patch.mean(1).tolist()), float(together.mean()), (before, after)


def _agreement(estimate: Estimate, among: Group, effects: Sequence[Effect]) -> Agreement:
    both = correlations([getattr(e, estimate) for e in effects], [e.measured for e in effects])
    pearson, spearman = (value if math.isfinite(value) else None for value in (both["pearson"], both["spearman"]))
    return Agreement(estimate, among, pearson, spearman)


def _same_size(ratio: float) -> bool:
    return _SAME_SIZE[0] <= ratio <= _SAME_SIZE[1]


def diagnose(
    lm: LM,
    sae: SAE,
    batches: Sequence[Batch],
    latents: Sequence[int],
    steps: int = 10,
    rule: Rule = "midpoint",
    max_tokens: int = 1024,
) -> Diagnosis:
    """Whether steps or interactions make IG differ from exact for ``latents``, strongest first; see the module."""
    few = _first(batches, _DIAGNOSED_EXAMPLES)
    n = sum(len(clean) for clean, _, _ in few)
    index, strong = torch.as_tensor(latents), list(latents[:_DIAGNOSED_LATENTS])
    fine_steps = max(_FINE_STEPS, 2 * steps)
    way = AttributionOptions(method="ig", steps=steps, rule=rule, max_tokens=max_tokens)
    ways = (way, replace(way, steps=fine_steps, rule="midpoint"))
    with task("why the estimates differ", total=len(few) * (steps + fine_steps + 20), unit="passes") as shown:
        coarse, fine = (_means(lm, sae, few, way, shown)[0][index] for way in ways)
        effects: list[list[Tensor]] = [[], [], []]
        for piece in few:
            moves = Interventions(lm, sae, *piece, max_tokens=max_tokens)
            values = (moves.exact(latents), moves.exact(latents, "patch"), moves.alone(strong, _ALONE_STEPS))
            for part, value in zip(effects, values, strict=True):
                part.append(value)
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
    interactions = not (fine >= 0.99 and _same_size(sizes[1])) and alone_error < 0.05
    if steps and interactions:
        return "steps and interactions"
    return "steps" if steps else "interactions" if interactions else "neither"


def _first(batches: Sequence[Batch], n: int) -> list[Batch]:
    first: list[Batch] = []
    for batch in batches:
        if n > 0:
            first.append(rows_of(batch, slice(0, n)))
            n -= len(batch[0])
    return first


# -- how two lists of effects agree -----------------------------------------------------------------------------------

Values = Sequence[float] | Tensor


def correlations(a: Values, b: Values) -> dict[str, float]:
    """Pearson's and Spearman's correlation (ties share their mean rank).

    NaN where a correlation is not defined: fewer than two values, or all values of one side the same.
    """
    x, y = (np.asarray(torch.as_tensor(v, dtype=torch.float64).cpu()) for v in (a, b))
    if x.shape != y.shape or x.ndim != 1:
        raise UnweaveError(f"cannot correlate {list(x.shape)} with {list(y.shape)} values", remedy="pair them")
    return {"pearson": _pearson(x, y), "spearman": _pearson(rankdata(x), rankdata(y))}


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def scale(estimates: Values, measured: Values) -> float:
    """The factor c for which c times ``measured`` is nearest to ``estimates``; NaN where all measured are 0."""
    x, y = (np.asarray(torch.as_tensor(v, dtype=torch.float64).cpu()) for v in (measured, estimates))
    return float(x @ y / (x @ x)) if bool(x.any()) else math.nan
