"""The latents that cause subject-verb agreement, by estimate and by exact effect."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from unweave.core.run import Run
from unweave.jobs.common import open_sae, sae_digest
from unweave.jobs.specs import TraceSpec
from unweave.sae.comparison import Comparison, Diagnosis, LatentEffect, compare, diagnose
from unweave.sae.comparison import correlations as correlate
from unweave.tasks import agreement

VERSION = 1
_AGREES = 0.95
"""the correlation below which the difference is looked into"""


def run(spec: TraceSpec, runs: Path) -> Run:
    """Attribution patching and integrated gradients for every latent, exact effects for the strongest and for some
    random ones, and how well they agree."""
    with Run.open(runs, "trace", spec, version=VERSION, inputs={"sae": sae_digest(spec.sae)}) as run:
        if run.done:
            return run
        started = time.monotonic()
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
        result = record | _result(spec, pairs[0], right, found, rest, explanation)
        run.finish(result | {"seconds": round(time.monotonic() - started, 1)})
    return run


def _by_strength(found: Comparison) -> list[LatentEffect]:
    return sorted((e for e in found.latents if e.chosen == "top"), key=lambda e: -abs(e.exact))


def _without_strongest(found: Comparison) -> dict[str, dict[str, float]]:
    """The correlations without the latent of the largest exact effect, which can make them on its own."""
    rest = _by_strength(found)[1:]
    exact = [e.exact for e in rest]
    return {name: correlate([getattr(e, name) for e in rest], exact) for name in ("ig", "attribution")}


def _finding(found: Comparison, rest: dict[str, dict[str, float]], explanation: Diagnosis | None) -> str:
    strongest = _by_strength(found)[0]
    total = found.metric_patched - found.metric_clean
    words = (
        f"Patching the whole site changes the metric by {total:+.2f}; latent {strongest.latent} alone changes it by "
        f"{strongest.exact:+.2f}. Without that latent the correlation of integrated gradients with the exact effect is "
        f"{rest['ig']['pearson']:.2f} (Pearson) and {rest['ig']['spearman']:.2f} (Spearman), that of attribution "
        f"patching {rest['attribution']['pearson']:.2f} and {rest['attribution']['spearman']:.2f}."
    )
    return words if explanation is None else f"{words} {explanation.text}"


def _result(
    spec: TraceSpec,
    example: agreement.Pair,
    right: agreement.Accuracy,
    found: Comparison,
    rest: dict[str, dict[str, float]],
    explanation: Diagnosis | None,
) -> dict[str, Any]:
    correlations = {
        f"{prefix}{short}_{kind}": value
        for prefix, by_method in (("", found.top), ("random_", found.random), ("weaker_", rest))
        for short, method in (("ig", "ig"), ("ap", "attribution"))
        for kind, value in by_method[method].items()
        if math.isfinite(value)
    }
    rows = [
        {"latent": e.latent, "exact": e.exact, "ig": e.ig, "ap": e.attribution, "chosen": e.chosen == "top"}
        for e in found.latents
    ]
    return {
        "task": f"subject-verb agreement: {spec.task.replace('_', ' ')}",
        "pairs": found.n_examples,
        "accuracy": {"clean": right.clean, "patch": right.patch},
        "metric": f"logit({example.patch_answer.strip()}) - logit({example.clean_answer.strip()}) and the like at the "
        f"last token: {found.metric_clean:.2f} on the clean sentences, {found.metric_patched:.2f} with the whole site "
        "patched",
        "example": [
            ["clean", f"{example.clean_prefix} →{example.clean_answer}"],
            ["patch", f"{example.patch_prefix} →{example.patch_answer}"],
        ],
        "rows": rows,
        "correlations": correlations,
        "totals": {
            "metric_clean": found.metric_clean,
            "metric_patched": found.metric_patched,
            "ig_total": found.ig_total,
            "ig_error": found.ig_error,
            "attribution_total": found.attribution_total,
            "attribution_error": found.attribution_error,
        },
        "finding": _finding(found, rest, explanation),
    }
