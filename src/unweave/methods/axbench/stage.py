"""Comparing steering methods on labelled latents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unweave.core.progress import say
from unweave.core.stage import Context, stage
from unweave.inputs.saes import open_saes
from unweave.judge.base import REPLIES, Judge, open_judge
from unweave.methods.axbench.checks import check, detect, known_cases
from unweave.methods.axbench.compare import Rater, judge, rate_all, written
from unweave.methods.axbench.forms import ChatRater
from unweave.methods.axbench.generate import Setting
from unweave.methods.axbench.handles import find_handles
from unweave.methods.axbench.outcome import detections, left_out_of, pair_results, write_table
from unweave.methods.axbench.plan import cost_of, planned, refuse_pairs
from unweave.methods.axbench.result import Comparison
from unweave.methods.axbench.scores import halves, repeated_folds
from unweave.methods.axbench.spec import AxbenchSpec
from unweave.methods.axbench.texts import Texts
from unweave.methods.axbench.truth import TruthRater
from unweave.sae.steered import confidence_changes
from unweave.tasks.tagged.texts import open_tagged

_SAMPLE = 200
"""texts of any kind over which largest activations are taken, beside the concepts' own"""
_FLUENT = 60
"""held-out texts that stand for fluent writing; as many others check it"""
_NEUTRAL = ("From my experience,", "The most important thing is", "Yesterday I", "It is well known that")
"""prompts on which a latent's effect on the next token is measured"""
_TABLE = Path("generations.parquet")


@stage("axbench", version=3)
def run(spec: AxbenchSpec, ctx: Context) -> Comparison:
    """Generates, rates and compares; ``generations.parquet`` holds every text with every rating and who gave it."""
    experiment, learning = planned(spec), spec.learning
    cost = cost_of(spec, experiment)
    ctx.log("cost", vars(cost))
    say(
        f"at most {cost.texts:,} texts for {cost.pairs} pairs ({cost.tokens:,} new tokens), and {cost.prompts:,} "
        "prompts to a judge"
    )
    tagged = open_tagged(spec.texts)
    texts = Texts(tagged, learning.examples, learning.heldout, 5 * learning.tokens, spec.seed)
    concepts, too_few = texts.of_all(dict.fromkeys(pair.label.label for pair in experiment.pairs))
    left_out = left_out_of(experiment, too_few)
    opened = open_saes(spec)
    refuse_pairs(experiment.pairs, opened)
    chat = open_judge(spec.judge, ctx.runs / REPLIES, spec.device) if "chat" in (*spec.raters, spec.writer) else None
    experiment = planned(spec, chat if spec.writer == "chat" else None, too_few)
    pairs = experiment.pairs
    setting = Setting(opened.lm, opened.saes, pairs, concepts, spec.seed)
    handles = find_handles(setting, texts.sample(_SAMPLE), spec.methods, spec.steering, learning, ctx.pieces)
    jobs, generated = written(setting, experiment, handles, learning, ctx.pieces)
    cases = [experiment.case(job, text) for job, text in zip(jobs, generated, strict=True)]

    fluent = texts.sample(2 * _FLUENT, heldout=True)
    raters = _raters(spec, setting, fluent[::2], experiment.pool, chat)
    answers = [(case.instruction, case.text) for case, job in zip(cases, jobs, strict=True) if job.block == "unedited"]
    known = {
        rater.name: known_cases(concepts, fluent[1::2], answers[:_FLUENT], any_concept=isinstance(rater, ChatRater))
        for rater in raters
    }
    changes = confidence_changes(setting.lm, [handle.steered(1.0) for handle in handles["sae"]], _NEUTRAL)
    scores = [
        {"calibrated F1": pair.label.score, "output score": pair.label.output_score, "token confidence": change}
        for pair, change in zip(pairs, changes, strict=True)
    ]
    n = spec.protocol.per_pair
    splits = halves(n) if spec.protocol.split == "halves" else repeated_folds(n, seed=spec.seed)
    ratings = [rate_all(rater, cases, ctx.pieces, f"ratings-{i}") for i, rater in enumerate(raters)]
    found = detect(setting, handles, learning.tokens)
    write_table(ctx.path / _TABLE, experiment, jobs, generated, ratings)
    return Comparison(
        subject=opened.subject,
        pairs=pair_results(experiment, handles["sae"], scores, found["sae"]),
        left_out=left_out,
        instructions=n,
        texts=tagged.source,
        mode=spec.steering.mode,
        split=spec.protocol.split,
        cost=cost_of(spec, experiment),
        judged=tuple(
            judge(experiment, jobs, one, splits, scores, check(one.rater, known[one.rater.name]), spec.seed)
            for one in ratings
        ),
        detection=detections(experiment, found, spec.seed),
        hard_negatives=min(len(texts.hard) for texts in concepts.values()),
        generations=_TABLE,
    )


def _raters(
    spec: AxbenchSpec, setting: Setting, fluent: list[str], instructions: Sequence[str], chat: Judge | None
) -> list[Rater]:
    raters: list[Rater] = []
    if "truth" in spec.raters:
        most = spec.generation.max_new_tokens
        raters.append(TruthRater(setting.lm, setting.concepts, fluent, instructions, most))
    if chat is not None and "chat" in spec.raters:
        raters.append(ChatRater(chat))
    return raters
