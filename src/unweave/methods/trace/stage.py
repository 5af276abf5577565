"""The latents that cause subject-verb agreement, by estimate and by measured effect."""

from __future__ import annotations

import warnings
from dataclasses import fields
from pathlib import Path

from unweave.attribute.result import incomplete
from unweave.core.errors import UnweaveWarning
from unweave.core.stage import Context, stage
from unweave.inputs.saes import open_one
from unweave.methods.trace.comparison import compare
from unweave.methods.trace.result import Comparison, Example, Trace
from unweave.methods.trace.spec import TraceSpec
from unweave.tasks import agreement

PAIRS = "pairs.jsonl"
_LEAST_CHANGE = 0.1
"""of the metric, in logits, by the whole site; less is made up of the pairs' chance"""


@stage("trace", version=5)
def run(spec: TraceSpec, ctx: Context) -> Trace:
    """Attribution patching and integrated gradients for every latent, effects measured from both ends for the strongest
    and for some random ones, how well they agree, and how much of the whole change the strongest carry.

    Warns where integrated gradients do not add up to the measured change."""
    opened = open_one(spec)
    pairs = agreement.pairs(opened.lm, spec.task, spec.pairs, seed=spec.seed)
    compared = compare(opened.lm, opened.sae, agreement.batches(opened.lm, pairs), spec)
    if words := incomplete(compared.sums):
        warnings.warn(words, UnweaveWarning, stacklevel=2)
    agreement.save(ctx.path / PAIRS, pairs)
    right = agreement.accuracy(opened.lm, pairs)
    problem = _problem(right, compared)
    values = {field.name: getattr(compared, field.name) for field in fields(Comparison)}
    first = pairs[0]
    return Trace(
        **values | ({} if problem is None else {"agreements": (), "share": None}),
        subject=opened.subject,
        task=spec.task,
        right_clean=right.clean,
        right_patch=right.patch,
        example=Example(first.clean_prefix, first.clean_answer, first.patch_prefix, first.patch_answer),
        problem=problem,
        pairs_file=Path(PAIRS),
    )


def _problem(right: agreement.Accuracy, compared: Comparison) -> str | None:
    """Why the causes cannot be measured: the model fails the task, or the effect does not pass through this site."""
    change = compared.totals.change
    if right.problem is not None or abs(change) >= _LEAST_CHANGE:
        return right.problem
    return (
        f"patching the whole site changes the metric by {change:+.3f}, which is next to nothing: at {compared.site} "
        f"there is no effect to share out (at least {_LEAST_CHANGE} is needed)"
    )
