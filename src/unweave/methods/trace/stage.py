"""The latents that cause subject-verb agreement, by estimate and by measured effect."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from unweave.attribute.completeness import Completeness
from unweave.core.run import Run
from unweave.inputs.inputs import open_sae, sae_digest
from unweave.methods.trace.comparison import Comparison, Diagnosis, LatentEffect, compare, diagnose
from unweave.methods.trace.correlation import correlations
from unweave.methods.trace.spec import TraceSpec
from unweave.tasks import agreement

VERSION = 3
_LEAST_CHANGE = 0.1
"""of the metric, in logits, by the whole site; less is made up of the pairs' chance"""
_AGREES = 0.95
"""the correlation below which the difference is looked into"""


def run(spec: TraceSpec, runs: Path) -> Run:
    """Attribution patching and integrated gradients for every latent, effects measured from both ends for the strongest
    and for some random ones, how well they agree, and how much of the whole change the strongest carry.

    Warns where integrated gradients do not add up to the measured change."""
    with Run.open(runs, "trace", spec, version=VERSION, inputs={"sae": sae_digest(spec.sae)}) as run:
        if run.done:
            return run
        lm, sae, record = open_sae(spec)
        pairs = agreement.pairs(lm, spec.task, spec.pairs, seed=spec.seed)
        right = agreement.accuracy(lm, pairs)
        found = compare(
            lm,
            sae,
            agreement.batches(lm, pairs),
            top=spec.top,
            n_random=spec.random,
            steps=spec.steps,
            rule=spec.rule,
            seed=spec.seed,
        )
        rest = _without_strongest(found)
        explanation = found.diagnosis
        if explanation is None and not rest["ig"]["pearson"] >= _AGREES:
            others = [e.latent for e in _by_strength(found)[1:]]
            explanation = diagnose(lm, sae, agreement.batches(lm, pairs), others, steps=spec.steps, rule=spec.rule)
        agreement.save(run.path / "pairs.jsonl", pairs)
        complete = Completeness()
        change = found.metric_patched - found.metric_clean
        sums = torch.tensor([found.ig_total, change, found.change_size, 1.0], dtype=torch.float64) * found.n_examples
        complete.add_sums(lm.site(found.site), sums)
        result = record | _result(spec, pairs[0], right, found, rest, explanation)
        result |= {"completeness": complete.to_dict(), "incomplete": complete.warn()}
        run.finish(result)
    return run


def _by_strength(found: Comparison) -> list[LatentEffect]:
    return sorted((e for e in found.latents if e.chosen == "top"), key=lambda e: -abs(e.measured))


def _without_strongest(found: Comparison) -> dict[str, dict[str, float]]:
    """The correlations without the latent of the largest measured effect, which can make them on its own."""
    rest = _by_strength(found)[1:]
    measured = [e.measured for e in rest]
    return {name: correlations([getattr(e, name) for e in rest], measured) for name in ("ig", "attribution", "exact")}


def _problem(right: agreement.Accuracy, found: Comparison) -> str | None:
    """Why nothing can be said of what causes the behaviour: there is none, or it does not pass through this site."""
    total = found.metric_patched - found.metric_clean
    if right.problem is not None:
        return right.problem
    if abs(total) < _LEAST_CHANGE:
        return (
            f"patching the whole site changes the metric by {total:+.3f}, which is next to nothing: at {found.site} "
            f"there is no effect to share out (at least {_LEAST_CHANGE} is wanted)"
        )
    return None


def _share(found: Comparison) -> float | None:
    return found.top_share if math.isfinite(found.top_share) else None


def _finding(found: Comparison, rest: dict[str, dict[str, float]], explanation: Diagnosis | None) -> str:
    strongest = _by_strength(found)[0]
    total = found.metric_patched - found.metric_clean
    top = sum(e.chosen == "top" for e in found.latents)
    share = "" if _share(found) is None else f" ({found.top_share:.0%} of it)"
    names = {"ig": "integrated gradients", "attribution": "attribution patching", "exact": "the clean end alone"}
    orders = "; ".join(
        f"{name} {found.top[key]['spearman']:.2f}, without that latent {rest[key]['spearman']:.2f}"
        for key, name in names.items()
    )
    words = (
        f"Patching the whole site changes the metric by {total:+.2f}. The {top} strongest latents together change it "
        f"by {found.top_together:+.2f}{share}, latent {strongest.latent} alone by {strongest.exact:+.2f} from the "
        f"clean end and {strongest.exact_patch:+.2f} from the patched one. Agreement in order (Spearman) with the mean "
        f"of both ends: {orders}."
    )
    return words if explanation is None else f"{words} {explanation.text}"


def _summary(
    task: str,
    right: agreement.Accuracy,
    found: Comparison,
    rest: dict[str, dict[str, float]],
    problem: str | None,
) -> list[list[Any]]:
    """What the terminal shows: how much the strongest carry, and whether their order can be believed."""
    strongest = _by_strength(found)[0]
    total = found.metric_patched - found.metric_clean
    top = sum(e.chosen == "top" for e in found.latents)
    head: list[list[Any]] = [
        ["task", task, ""],
        ["pairs", found.n_examples, f"the model is right on {right.clean:.0%} (clean) and {right.patch:.0%} (patch)"],
        ["change", total, "of the metric, when the whole site is patched"],
    ]
    if problem is not None:
        return [*head, ["strongest together", None, problem], ["order, Spearman", None, problem]]
    one_by_one = f"{strongest.exact:+.3f} from the clean end, {strongest.exact_patch:+.3f} from the patched one"
    return [
        *head,
        ["strongest together", _share(found), f"of the change: the {top} latents with the largest estimate"],
        ["strongest latent", strongest.latent, one_by_one],
        ["sum of estimates", found.ig_total, "integrated gradients of all latents and the error; should be the change"],
        ["error", found.ig_error, "of that is what the autoencoder does not explain"],
        ["order, Spearman", _number(found.top["ig"]["spearman"]), "integrated gradients with the mean of both ends"],
        ["... but the strongest", _number(rest["ig"]["spearman"]), "the same without the strongest latent"],
        ["... random latents", _number(found.random["ig"]["spearman"]), "the same of latents drawn at random"],
    ]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _result(
    spec: TraceSpec,
    example: agreement.Pair,
    right: agreement.Accuracy,
    found: Comparison,
    rest: dict[str, dict[str, float]],
    explanation: Diagnosis | None,
) -> dict[str, Any]:
    agreements = {
        f"{prefix}{short}_{kind}": value
        for prefix, by_method in (("", found.top), ("random_", found.random), ("weaker_", rest))
        for short, method in (("ig", "ig"), ("ap", "attribution"), ("exact", "exact"))
        for kind, value in by_method[method].items()
        if math.isfinite(value)
    }
    rows = [
        {
            "latent": e.latent,
            "exact": e.exact,
            "exact_patch": e.exact_patch,
            "ig": e.ig,
            "ap": e.attribution,
            "chosen": e.chosen == "top",
        }
        for e in found.latents
    ]
    task = f"subject-verb agreement: {spec.task.replace('_', ' ')}"
    problem = _problem(right, found)
    return {
        "task": task,
        "pairs": found.n_examples,
        "accuracy": {"clean": right.clean, "patch": right.patch},
        "metric": f"logit({example.patch_answer.strip()}) - logit({example.clean_answer.strip()}) and the like at the "
        f"last token: {found.metric_clean:.2f} on the clean sentences, {found.metric_patched:.2f} with the whole site "
        f"patched. The model prefers the right answer in {right.clean:.0%} of the clean and {right.patch:.0%} of the "
        "patch sentences; chance is half",
        "problem": problem,
        "example": [
            ["clean", f"{example.clean_prefix} →{example.clean_answer}"],
            ["patch", f"{example.patch_prefix} →{example.patch_answer}"],
        ],
        "rows": rows,
        "correlations": agreements if problem is None else {},
        "share": _share(found) if problem is None else None,
        "totals": {
            "top_together": found.top_together,
            "metric_clean": found.metric_clean,
            "metric_patched": found.metric_patched,
            "ig_total": found.ig_total,
            "ig_error": found.ig_error,
            "attribution_total": found.attribution_total,
            "attribution_error": found.attribution_error,
        },
        "finding": _finding(found, rest, explanation) if problem is None else f"{problem[0].upper()}{problem[1:]}.",
        "summary": _summary(task, right, found, rest, problem),
    }
