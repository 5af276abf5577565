"""How far the quick estimates of a latent's effect can be believed: next to the exact effect, on the same examples.

1. Attribution patching and integrated gradients (IG) give an effect for every latent, summed over positions and
   averaged over examples.
2. The latents with the largest |IG|, and random ones among those that change at all, get their exact effect.
3. Where IG and exact correlate less than they should, two causes are told apart. Too few steps: then more steps bring
   IG closer. Interactions: IG moves all latents at once, exact moves one while the others stay clean; then more steps
   change nothing, IG along the path of one latent alone agrees with exact, and IG lies nearer to the mean of the exact
   effects at the two ends of the path.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.progress import task
from unweave.lm.model import LM, Tokens
from unweave.sae.attribution import Metric, Rule, alone_effects, endpoints, exact_effects, node_effects
from unweave.sae.module import SAE

Batch = tuple[Tokens, "Tokens | None", Metric]
"""clean tokens, patch tokens (None: ablation), metric"""

Cause = Literal["steps", "interactions", "steps and interactions", "neither"]
_MEANING: dict[Cause, str] = {
    "steps": "So the steps explain the difference.",
    "interactions": "So latents interact: moved together they do not do what they do one at a time.",
    "steps and interactions": "So both the steps and interactions between latents play a part.",
    "neither": "Neither steps nor interactions explain it: the effects may be too small to tell apart.",
}

_FINE_STEPS = 32
_ALONE_STEPS = 16
_DIAGNOSED_EXAMPLES = 32
_DIAGNOSED_LATENTS = 8


@dataclass(frozen=True)
class LatentEffect:
    """One latent's effect on the metric by three methods: summed over positions, mean over examples."""

    latent: int
    chosen: Literal["top", "random"]
    attribution: float
    ig: float
    exact: float
    changed: int
    """in how many examples the latent changes at all"""


@dataclass(frozen=True)
class Diagnosis:
    """Why IG differs from exact, measured on the first ``examples`` examples over the top latents."""

    examples: int
    coarse: float
    """Pearson correlation of IG with exact, as in the comparison"""
    fine: float
    """the same with ``fine_steps`` midpoint steps"""
    fine_steps: int
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
    """Attribution patching and IG against exact effects at one site. Effects are in units of the metric."""

    site: str
    n_examples: int
    steps: int
    rule: str
    metric_clean: float
    """mean metric of the clean run"""
    metric_patched: float
    """mean metric of the clean run with the whole site patched"""
    ig_total: float
    """IG of all latents and the error together: metric_patched - metric_clean, up to the error of the steps"""
    ig_error: float
    """IG of the SAE's error alone: what the latents do not explain"""
    attribution_total: float
    attribution_error: float
    latents: tuple[LatentEffect, ...]
    """the top latents by |IG|, then the random ones"""
    top: dict[str, dict[str, float]]
    """{"ig" or "attribution": {"pearson", "spearman"}} with exact, over the top latents"""
    random: dict[str, dict[str, float]]
    """the same over the random latents; NaN where there are too few or their effects are all the same"""
    diagnosis: Diagnosis | None
    """where Pearson of IG over the top latents is below ``threshold``"""
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
    """Measures attribution patching and IG against exact effects on all examples of ``batches``.

    Each batch holds examples of equal length (``tasks.agreement.batches`` makes them). Raises UnweaveError when fewer
    than ``top`` latents change anywhere, naming both numbers.
    """
    began = time.perf_counter()
    if not batches:
        raise UnweaveError("there are no examples", remedy="give at least one batch")
    with task("attribution", total=5 * len(batches), unit="passes") as shown:
        ap = _Means(lm, sae, batches, "attribution", steps, rule, max_tokens)
        shown.advance(len(batches))
        ig = _Means(lm, sae, batches, "ig", steps, rule, max_tokens)
        shown.advance(2 * len(batches))
        chosen, others = _choose(ig, top, n_random, seed)
        both = [*chosen, *others]
        exact = torch.cat(
            [exact_effects(lm, sae, *batch, both, max_tokens=max_tokens) for batch in batches], dim=1
        ).double()
        ends = [endpoints(lm, sae, *batch, max_tokens=max_tokens) for batch in batches]
        shown.advance(2 * len(batches))
        effects = exact.mean(1).tolist()
        rows = tuple(
            LatentEffect(
                latent,
                "top" if place < len(chosen) else "random",
                float(ap.latents[latent]),
                float(ig.latents[latent]),
                effects[place],
                int(ig.changed[latent]),
            )
            for place, latent in enumerate(both)
        )
        correlated = {name: _correlate(rows, name) for name in ("top", "random")}
        diagnosis = None
        if not correlated["top"]["ig"]["pearson"] >= threshold:
            diagnosis = diagnose(lm, sae, batches, chosen, steps=steps, rule=rule, max_tokens=max_tokens)
    clean, patched = (torch.cat([end[side] for end in ends]) for side in (0, 1))
    return Comparison(
        site=str(sae.write),
        n_examples=len(clean),
        steps=steps,
        rule=rule,
        metric_clean=float(clean.mean()),
        metric_patched=float(patched.mean()),
        ig_total=float(ig.latents.sum() + ig.error),
        ig_error=float(ig.error),
        attribution_total=float(ap.latents.sum() + ap.error),
        attribution_error=float(ap.error),
        latents=rows,
        top=correlated["top"],
        random=correlated["random"],
        diagnosis=diagnosis,
        seconds=time.perf_counter() - began,
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
    coarse = _Means(lm, sae, few, "ig", steps, rule, max_tokens).latents[index]
    fine_steps = max(_FINE_STEPS, 2 * steps)
    fine = _Means(lm, sae, few, "ig", fine_steps, "midpoint", max_tokens).latents[index]
    here, there = (
        torch.cat([exact_effects(lm, sae, *b, latents, origin=end, max_tokens=max_tokens) for b in few], 1)
        for end in ("clean", "patch")
    )
    strong = list(latents[:_DIAGNOSED_LATENTS])
    alone = torch.cat([alone_effects(lm, sae, *b, strong, steps=_ALONE_STEPS, max_tokens=max_tokens) for b in few], 1)
    exact = here.mean(1).double().cpu()
    gap = float((alone.mean(1) - here[: len(strong)].mean(1)).abs().max())
    r = {
        "coarse": correlations(coarse, exact)["pearson"],
        "fine": correlations(fine, exact)["pearson"],
        "other_end": correlations(fine, there.mean(1))["pearson"],
        "both_ends": correlations(fine, (here + there).mean(1))["pearson"],
    }
    alone_error = gap / max(float(exact.abs().max()), 1e-30)
    cause = _cause(r["coarse"], r["fine"], alone_error)
    text = (
        f"On {n} examples IG correlates with exact at {r['coarse']:.3f}, with {fine_steps} midpoint steps at "
        f"{r['fine']:.3f}. Along one latent's own path IG meets exact to {alone_error:.1%}. IG correlates with exact "
        f"effects from the patched end at {r['other_end']:.3f}, with the mean of both ends at {r['both_ends']:.3f}. "
        + _MEANING[cause]
    )
    return Diagnosis(examples=n, fine_steps=fine_steps, alone_error=alone_error, cause=cause, text=text, **r)


def _cause(coarse: float, fine: float, alone_error: float) -> Cause:
    # Steps: better ones gain a good part of what is missing to a perfect correlation. Interactions: something is still
    # missing then, although along one latent's own path nothing is.
    steps = fine - coarse > 0.2 * (1 - coarse)
    interactions = fine < 0.99 and alone_error < 0.05
    if steps and interactions:
        return "steps and interactions"
    return "steps" if steps else "interactions" if interactions else "neither"


def correlations(a: Sequence[float] | Tensor, b: Sequence[float] | Tensor) -> dict[str, float]:
    """Pearson's and Spearman's correlation (ties share their mean rank).

    NaN where a correlation is not defined: fewer than two values, or all values of one side the same.
    """
    x, y = (np.asarray(torch.as_tensor(v, dtype=torch.float64).cpu()) for v in (a, b))
    if x.shape != y.shape or x.ndim != 1:
        raise UnweaveError(f"cannot correlate {list(x.shape)} with {list(y.shape)} values", remedy="pair them")
    return {"pearson": _pearson(x, y), "spearman": _pearson(_ranks(x), _ranks(y))}


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip((x @ y) / np.sqrt((x @ x) * (y @ y)), -1.0, 1.0))


def _ranks(x: np.ndarray) -> np.ndarray:
    _, group, sizes = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[group]


class _Means:
    """Effects summed over positions, mean over the examples of all batches: ``latents`` [F] and ``error``, on the CPU.

    ``changed`` int64 [F] counts the examples in which a latent has an effect at all.
    """

    def __init__(
        self, lm: LM, sae: SAE, batches: Sequence[Batch], method: Any, steps: int, rule: Rule, max_tokens: int
    ) -> None:
        self.latents = torch.zeros(sae.d_sae, dtype=torch.float64)
        self.changed = torch.zeros(sae.d_sae, dtype=torch.int64)
        error, n = 0.0, 0
        for clean, patch, metric in batches:
            (found,) = node_effects(
                lm, sae, clean, patch, metric, method=method, steps=steps, rule=rule, max_tokens=max_tokens
            ).values()
            latents, errors = found.over_positions()
            self.latents += latents.double().sum(0).cpu()
            self.changed += (found.latents != 0).any(1).sum(0).cpu()
            error, n = error + float(errors.double().sum()), n + len(clean)
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
    exact = [row.exact for row in mine]
    return {name: correlations([getattr(row, name) for row in mine], exact) for name in ("ig", "attribution")}


def _first(batches: Sequence[Batch], n: int) -> list[Batch]:
    """The first ``n`` examples; their metric still gets the row numbers of the whole batch, which start at 0."""
    found: list[Batch] = []
    for clean, patch, metric in batches:
        if n <= 0:
            break
        rows = slice(0, min(n, len(clean)))
        found.append((clean.rows(rows), None if patch is None else patch.rows(rows), metric))
        n -= rows.stop
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
