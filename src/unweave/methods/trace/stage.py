"""The latents that cause subject-verb agreement, by estimate and by measured effect."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from unweave.attribute.completeness import Completeness
from unweave.core.site import Site
from unweave.core.stage import Context, stage
from unweave.inputs.saes import Opened, open_one
from unweave.lm.model import LM
from unweave.methods.trace.comparison import Comparison, LatentEffect, compare, diagnose
from unweave.methods.trace.correlation import correlations
from unweave.methods.trace.result import Agreement, Effect, Estimate, Example, Group, Totals, Trace
from unweave.methods.trace.spec import TraceSpec
from unweave.tasks import agreement

PAIRS = "pairs.jsonl"
_LEAST_CHANGE = 0.1
"""of the metric, in logits, by the whole site; less is made up of the pairs' chance"""
_AGREES = 0.95
"""the correlation below which the difference is looked into"""


@stage("trace", version=4)
def run(spec: TraceSpec, ctx: Context) -> Trace:
    """Attribution patching and integrated gradients for every latent, effects measured from both ends for the strongest
    and for some random ones, how well they agree, and how much of the whole change the strongest carry.

    Warns where integrated gradients do not add up to the measured change."""
    opened = open_one(spec)
    lm, sae = opened.lm, opened.sae
    pairs = agreement.pairs(lm, spec.task, spec.pairs, seed=spec.seed)
    batches = agreement.batches(lm, pairs)
    compared = compare(
        lm, sae, batches, top=spec.top, n_random=spec.random, steps=spec.steps, rule=spec.rule, seed=spec.seed
    )
    explanation = compared.diagnosis
    weaker = _without_strongest(compared)
    if explanation is None and not weaker["ig"]["pearson"] >= _AGREES:
        others = [e.latent for e in _by_strength(compared)[1:]]
        explanation = diagnose(lm, sae, batches, others, steps=spec.steps, rule=spec.rule)
    agreement.save(ctx.path / PAIRS, pairs)
    right = agreement.accuracy(lm, pairs)
    return _result(spec, opened, pairs[0], right, compared, weaker, explanation.text if explanation else None)


def _result(
    spec: TraceSpec,
    opened: Opened,
    example: agreement.Pair,
    right: agreement.Accuracy,
    compared: Comparison,
    weaker: dict[str, dict[str, float]],
    explanation: str | None,
) -> Trace:
    problem = _problem(right, compared)
    return Trace(
        subject=opened.subject,
        task=spec.task,
        site=Site.parse(compared.site),
        pairs=compared.n_examples,
        right_clean=right.clean,
        right_patch=right.patch,
        example=Example(example.clean_prefix, example.clean_answer, example.patch_prefix, example.patch_answer),
        effects=tuple(
            Effect(e.latent, e.chosen == "top", e.ig, e.attribution, e.exact, e.exact_patch) for e in compared.latents
        ),
        agreements=_agreements(compared, weaker) if problem is None else (),
        share=_number(compared.top_share) if problem is None else None,
        totals=Totals(
            compared.metric_clean,
            compared.metric_patched,
            compared.top_together,
            compared.ig_total,
            compared.ig_error,
            compared.attribution_total,
            compared.attribution_error,
        ),
        sums=_sums(opened.lm, compared).rows(),
        problem=problem,
        explanation=explanation,
        pairs_file=Path(PAIRS),
    )


def _agreements(compared: Comparison, weaker: dict[str, dict[str, float]]) -> tuple[Agreement, ...]:
    groups: dict[Group, dict[str, dict[str, float]]] = {
        "chosen": compared.top,
        "weaker": weaker,
        "random": compared.random,
    }
    estimates: tuple[Estimate, ...] = ("ig", "attribution", "exact")
    return tuple(
        Agreement(estimate, among, _number(by[estimate]["pearson"]), _number(by[estimate]["spearman"]))
        for among, by in groups.items()
        for estimate in estimates
    )


def _sums(lm: LM, compared: Comparison) -> Completeness:
    """Of the SAE's site, with a warning where sum and change differ."""
    complete = Completeness()
    change = compared.metric_patched - compared.metric_clean
    sums = torch.tensor([compared.ig_total, change, compared.change_size, 1.0], dtype=torch.float64)
    complete.add_sums(lm.site(compared.site), sums * compared.n_examples)
    complete.warn()
    return complete


def _by_strength(compared: Comparison) -> list[LatentEffect]:
    return sorted((e for e in compared.latents if e.chosen == "top"), key=lambda e: -abs(e.measured))


def _without_strongest(compared: Comparison) -> dict[str, dict[str, float]]:
    """The correlations without the latent of the largest measured effect, which can make them on its own."""
    rest = _by_strength(compared)[1:]
    measured = [e.measured for e in rest]
    return {name: correlations([getattr(e, name) for e in rest], measured) for name in ("ig", "attribution", "exact")}


def _problem(right: agreement.Accuracy, compared: Comparison) -> str | None:
    """Why the causes cannot be measured: the model fails the task, or the effect does not pass through this site."""
    total = compared.metric_patched - compared.metric_clean
    if right.problem is not None:
        return right.problem
    if abs(total) < _LEAST_CHANGE:
        return (
            f"patching the whole site changes the metric by {total:+.3f}, which is next to nothing: at {compared.site} "
            f"there is no effect to share out (at least {_LEAST_CHANGE} is needed)"
        )
    return None


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
