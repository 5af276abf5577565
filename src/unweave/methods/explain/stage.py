"""Explanations of an SAE's latents, tested; the answers, annotations and Neuronpedia's form beside them."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unweave.core.errors import UnweaveError
from unweave.core.stage import Context, stage
from unweave.core.writing import atomic_write
from unweave.inputs.inputs import load_lm
from unweave.inputs.saes import Opened, open_one
from unweave.judge.base import REPLIES, CachedJudge, check_judge, open_judge
from unweave.latents import annotations
from unweave.latents import stage as latents
from unweave.latents.annotations import Annotation, name_of
from unweave.latents.logit_weights import writes_into_stream
from unweave.latents.records import Records
from unweave.latents.relevance import cosines
from unweave.latents.spec import LatentsSpec, RecordsSpec
from unweave.methods.explain import neuronpedia
from unweave.methods.explain.costs import estimate
from unweave.methods.explain.examples import Examples, choose_examples, choose_latents
from unweave.methods.explain.explain import (
    Explained,
    check_reading,
    explain,
    explain_and_score,
    input_scores,
    rate_relevance,
)  # fmt: skip
from unweave.methods.explain.result import Estimate, ExplainedLatent, ExplainResult
from unweave.methods.explain.rubric.result import JudgeInfo
from unweave.methods.explain.rubric.rubric import CONTEXTS, eligible
from unweave.methods.explain.scores import Labels
from unweave.methods.explain.spec import ExplainSpec
from unweave.sae.output_score import output_scores

_BANDS = 5


class _Chosen(NamedTuple):
    records: Records
    run: str
    examples: list[Examples]
    random: tuple[int, ...]
    too_few: tuple[int, ...]


@stage("explain", version=2)
def run(spec: ExplainSpec, ctx: Context) -> ExplainResult:
    """Explains latents and scores what was said. ``answers.parquet`` holds every prompt and reply about latents,
    ``annotations.jsonl`` and ``neuronpedia.jsonl`` the explanations. Raises UnweaveError where no latent has contexts
    enough, and where the estimate is above the price allowed."""
    check_judge(spec.judge)
    opened = open_one(spec)
    if spec.query.text and spec.query.by == "embedding":
        cosines(spec.query.text, {}, spec.query.embedder, spec.device)  # what cannot be loaded shows before the work
    latents.refuse_absent(dict.fromkeys(opened.saes, spec.latents), opened)
    given = None if spec.explanations is None else _given(spec.explanations, opened)
    chosen = _chosen(spec, opened, ctx.runs, given)
    plan = _estimate(spec, chosen, given)
    reads, says = _reads_and_says(opened, chosen.examples)
    subject = opened.subject
    del opened
    load_lm.cache_clear()  # the records are all that is needed; the judge may want the memory
    judge = open_judge(spec.judge, ctx.runs / REPLIES, spec.device)
    info = JudgeInfo(judge.name, judge.note, spec.judge.base_url is None)
    if not spec.ask:
        seconds = _seconds(judge, chosen.examples, plan)
        return ExplainResult(subject, info, chosen.run, chosen.too_few, plan, seconds, None, (), (), 0, 0)
    check = check_reading(judge) if spec.check_judge else None
    explained = explain_and_score(
        judge, chosen.records, chosen.examples, spec.scores,
        given=given, random=chosen.random, seed=spec.examples.seed,
    )  # fmt: skip
    about = _relevances(spec, judge, explained)
    rows = tuple(
        ExplainedLatent(
            j, j in chosen.random, explained.labels.get(j, ""), explained.failures.get(j, ""),
            {name: values.get(j) for name, values in explained.own.items()},
            {name: values.get(j) for name, values in explained.shuffled.items()},
            reads.get(j), says.get(j), about.get(j),
            j in about and about[j] >= spec.query.at_least if spec.query.text else None,
        )
        for j in (one.latent for one in chosen.examples)
    )  # fmt: skip
    tokens = [sum(row[name] for row in explained.answers) for name in ("prompt_tokens", "new_tokens")]
    result = ExplainResult(
        subject, info, chosen.run, chosen.too_few, plan, None, check, tuple(explained.summaries), rows, *tokens
    )
    _write(ctx.path, result, explained)
    return result


def _chosen(spec: ExplainSpec, opened: Opened, runs: Path, given: Labels | None) -> _Chosen:
    """The latents that are named, and some drawn at random (of those with an explanation, where these are given), with
    their contexts."""
    options = spec.examples
    base = LatentsSpec(
        sae=spec.sae, model=spec.model, device=spec.device, accept_mismatch=spec.accept_mismatch,
        data=spec.data, split=spec.split, tokens=options.tokens,
    )  # fmt: skip
    drawn: list[int] = []
    if spec.drawn:  # from the records that other commands use too
        alive = eligible(latents.load(latents.run(base, runs, opened)))
        order = np.random.default_rng([options.seed, 0]).permutation(alive).tolist()
        drawn = [j for j in order if j not in spec.latents and (given is None or j in given)]
        drawn = drawn[: spec.drawn + spec.drawn // 2 + 4]
    per_band = -(-(options.shown + options.tests) // _BANDS)
    contexts = RecordsSpec(top=max(CONTEXTS, options.shown), bands=_BANDS, per_band=per_band, random=3 * options.tests)
    names = tuple(str(j) for j in sorted({*spec.latents, *drawn}))
    if not names:
        of = "" if given is None else f" of the {len(given)} that explanations are given for"
        what = f"no latent{of} fires in {CONTEXTS} documents"
        raise UnweaveError(what, where="records", remedy="name others, or give more text")
    done = latents.run(
        LatentsSpec(**{**vars(base), "latents": names, "contexts": contexts, "seed": options.seed}), runs, opened
    )
    records = latents.load(done)
    choose = partial(choose_examples, shown=options.shown, tests=options.tests, seed=options.seed)
    named = choose_latents(records, spec.latents, len(spec.latents), choose)
    more = choose_latents(records, drawn, spec.drawn, choose)
    if not named and not more:
        raise UnweaveError("no latent has contexts enough", where="records", remedy="name others, or give more text")
    random = tuple(one.latent for one in more) if spec.latents else ()
    too_few = tuple(sorted({*spec.latents} - {one.latent for one in named}))
    return _Chosen(records, done.path.name, named + more, random, too_few)


def _estimate(spec: ExplainSpec, chosen: _Chosen, given: Labels | None) -> Estimate:
    prices, query = spec.prices, spec.query
    plan = estimate(
        chosen.records, chosen.examples, spec.scores, given=given, query=query.text if query.by == "judge" else "",
        checked=spec.check_judge, reads=spec.judge.base_url is None, prices=(prices.prompt, prices.reply),
    )  # fmt: skip
    if spec.ask and prices.most is not None and plan.price is not None and plan.price > prices.most:
        what = f"asking would take about {plan.price:.2f}, more than {prices.most:g} ({plan.prompts:,} prompts)"
        remedy = "explain fewer latents, use fewer scores or tests, or raise prices.most"
        raise UnweaveError(what, where="prices.most", remedy=remedy)
    return plan


def _seconds(judge: CachedJudge, examples: list[Examples], plan: Estimate) -> float | None:
    """What all would take at the pace of the first prompt; None where its reply was kept or failed."""
    started = time.monotonic()
    (row,) = explain(judge, examples[:1]).rows
    if row.reply.kept or not row.reply.tokens:
        return None
    return (time.monotonic() - started) * (plan.prompt_tokens + plan.new_tokens) / row.reply.tokens


def _reads_and_says(opened: Opened, examples: list[Examples]) -> tuple[dict[int, float], dict[int, float]]:
    lm, sae, names = opened.lm, opened.sae, [one.latent for one in examples]
    if not writes_into_stream(lm, sae.write, sae.d_out):
        return {}, {}
    says = [one.score for one in output_scores(lm, sae, names)]
    return dict(zip(names, input_scores(lm, sae, examples), strict=True)), dict(zip(names, says, strict=True))


def _relevances(spec: ExplainSpec, judge: CachedJudge, explained: Explained) -> dict[int, float]:
    query = spec.query
    if not query.text:
        return {}
    if query.by == "judge":
        return rate_relevance(judge, query.text, explained)
    return cosines(query.text, explained.labels, query.embedder, spec.device)


# -- files ------------------------------------------------------------------------------------------------------------


def _given(path: Path, opened: Opened) -> Labels:
    """The explanations in a file of annotations, or of Neuronpedia's."""
    ((site, sae),) = opened.saes.items()
    if b'"modelId"' in path.read_bytes()[:4096] or path.suffix == ".gz":
        return neuronpedia.read(path)
    known = annotations.load(path, [site])
    annotations.refuse_strangers(known, {site: sae.digest()}, str(path))
    return {one.latent: one.annotation for one in known.values()
            if one.site == site and one.latent is not None and one.annotation}  # fmt: skip


def _write(folder: Path, result: ExplainResult, explained: Explained) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (sae,), judge = result.subject.saes, result.judge.model
    with atomic_write(folder / "answers.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(explained.answers), temporary)
    labels = {one.latent: one.explanation for one in result.latents if one.explanation}
    neuronpedia.write(folder / "neuronpedia.jsonl", result.subject.model, str(sae.site), judge, labels)
    if sae.site is not None:
        site, by = sae.site, f"explained by {judge}"
        lines = (Annotation(name_of(site, j), words, by, sae=sae.digest) for j, words in labels.items())
        annotations.write(folder / "annotations.jsonl", lines)
