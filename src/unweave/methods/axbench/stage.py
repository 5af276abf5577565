"""Comparing steering methods on labelled latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from unweave.core.stage import Context, stage
from unweave.core.writing import atomic_write
from unweave.inputs.saes import open_saes
from unweave.judge.base import REPLIES, open_judge
from unweave.latents.annotations import name_of
from unweave.methods.axbench.checks import check, confidence_change, detect, known_cases
from unweave.methods.axbench.compare import Experiment, Rater, Ratings, judge, rate_all, written
from unweave.methods.axbench.forms import ChatRater
from unweave.methods.axbench.generate import Handle, Job
from unweave.methods.axbench.handles import find_handles
from unweave.methods.axbench.plan import cost_of, lora, planned, refuse_pairs, steering
from unweave.methods.axbench.result import RATINGS, Comparison, Detection, Pair
from unweave.methods.axbench.scores import Array, halves, harmonic, interval, repeated_folds
from unweave.methods.axbench.spec import AxbenchSpec
from unweave.methods.axbench.texts import Texts
from unweave.methods.axbench.truth import TruthRater
from unweave.tasks.tagged.texts import open_tagged

_SAMPLE = 200
"""texts of any kind over which largest activations are taken, beside the concepts' own"""
_FLUENT = 60
"""held-out texts that stand for fluent writing, and as many that check it"""
_TABLE = Path("generations.parquet")


@stage("axbench", version=1)
def run(spec: AxbenchSpec, ctx: Context) -> Comparison:
    """Generates, rates and compares; ``generations.parquet`` holds every text with every rating and who gave it."""
    experiment = planned(spec)
    ctx.log("cost", vars(cost_of(spec, experiment)))
    learning, pairs = spec.learning, experiment.pairs
    tagged = open_tagged(spec.texts)
    texts = Texts(tagged, learning.examples, learning.heldout, 5 * learning.tokens, spec.seed)
    concepts = {name: texts.of(name) for name in dict.fromkeys(pair.label.label for pair in pairs)}
    opened = open_saes(spec)
    lm = opened.lm
    refuse_pairs(pairs, opened)
    chat = open_judge(spec.judge, ctx.runs / REPLIES, spec.device) if "chat" in (*spec.raters, spec.writer) else None
    if chat is not None and spec.writer == "chat":
        experiment = planned(spec, chat)
    handles = find_handles(
        lm, opened.saes, pairs, concepts, texts.sample(_SAMPLE), spec.methods, steering(spec), ctx.pieces
    )
    jobs, generated = written(lm, experiment, handles, concepts, lora(spec), learning.tokens, ctx.pieces)
    fluent = texts.sample(2 * _FLUENT, heldout=True)
    most = spec.generation.max_new_tokens
    raters: list[Rater] = []
    if "truth" in spec.raters:
        raters.append(TruthRater(lm, concepts, fluent[:_FLUENT], experiment.pool, most))
    if chat is not None and "chat" in spec.raters:
        raters.append(ChatRater(chat))
    answers = [(case.instruction, case.text) for case in _cases(experiment, jobs, generated, "unedited")]
    known = known_cases(concepts, fluent[_FLUENT:], answers[:_FLUENT])
    confidence = confidence_change(lm, handles["sae"])
    scores = [
        {"calibrated F1": p.label.score, "output score": p.label.output_score, "token confidence": float(c)}
        for p, c in zip(pairs, confidence, strict=True)
    ]
    folds = repeated_folds(spec.per_pair, seed=spec.seed) if spec.split == "folds" else halves(spec.per_pair)
    ratings = [rate_all(rater, _cases(experiment, jobs, generated), ctx.pieces, f"r{i}") for i, rater in enumerate(raters)]
    judged = [judge(experiment, jobs, one, folds, scores, check(one.rater, known), spec.seed) for one in ratings]
    found = detect(lm, handles, pairs, concepts, learning.tokens)
    _write(ctx.path / _TABLE, experiment, jobs, generated, ratings)
    return Comparison(
        subject=opened.subject,
        pairs=tuple(_pairs(experiment, handles["sae"], scores, found["sae"])),
        instructions=spec.per_pair,
        texts=tagged.source,
        mode=spec.steering.mode,
        split=spec.split,
        cost=cost_of(spec, experiment),
        judged=tuple(judged),
        detection=tuple(_detections(experiment, found, spec.seed)),
        hard_negatives=learning.heldout,
        generations=_TABLE,
    )


def _cases(experiment: Experiment, jobs: Sequence[Job], texts: Sequence[str], block: str = ""):
    return [experiment.case(job, text) for job, text in zip(jobs, texts, strict=True) if block in ("", job.block)]
