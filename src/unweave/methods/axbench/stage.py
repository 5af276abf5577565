"""Comparing steering methods on labelled latents, and everything that can be refused before a model is loaded."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from importlib import resources
from pathlib import Path

from unweave.core.errors import UnweaveError
from unweave.core.files import lines, parse_json
from unweave.core.progress import say
from unweave.core.stage import Context, stage
from unweave.inputs.saes import Opened, open_saes
from unweave.judge.base import REPLIES, Judge, check_judge, open_judge
from unweave.latents.annotations import Annotation, Pair, load, name_of, pairs, refuse_strangers
from unweave.methods.axbench import compare
from unweave.methods.axbench.checks import check, detect, known_cases
from unweave.methods.axbench.directions import peft_for_lora
from unweave.methods.axbench.forms import ChatRater, template_prompt, written_prompts
from unweave.methods.axbench.generate import Setting, draw_instructions
from unweave.methods.axbench.handles import find_handles
from unweave.methods.axbench.result import RATINGS, Comparison, Cost
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
    say(
        f"at most {cost.texts:,} texts for {cost.pairs} pairs ({cost.tokens:,} new tokens), and {cost.prompts:,} "
        "prompts to a judge"
    )
    tagged = open_tagged(spec.texts)
    texts = Texts(tagged, learning.examples, learning.heldout, 5 * learning.tokens, spec.seed)
    concepts, too_few = texts.of_all(dict.fromkeys(pair.label.label for pair in experiment.pairs))
    left_out = compare.left_out_of(experiment, too_few)
    opened = open_saes(spec)
    refuse_pairs(experiment.pairs, opened)
    ctx.log("cost", vars(cost))  # from here on the run has something to keep
    chat = open_judge(spec.judge, ctx.runs / REPLIES, spec.device) if "chat" in (*spec.raters, spec.writer) else None
    experiment = planned(spec, chat if spec.writer == "chat" else None, too_few)
    pairs = experiment.pairs
    setting = Setting(opened.lm, opened.saes, pairs, concepts, spec.seed)
    handles = find_handles(setting, texts.sample(_SAMPLE), spec.methods, spec.steering, learning, ctx.pieces)
    jobs, generated = compare.written(setting, experiment, handles, learning, ctx.pieces)
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
    ratings = [compare.rate_all(rater, cases, ctx.pieces, f"ratings-{i}") for i, rater in enumerate(raters)]
    found = detect(setting, handles, learning.tokens)
    compare.write_table(ctx.path / _TABLE, experiment, jobs, generated, ratings)
    return Comparison(
        subject=opened.subject,
        pairs=compare.pair_results(experiment, handles["sae"], scores, found["sae"]),
        left_out=left_out,
        instructions=n,
        texts=tagged.source,
        mode=spec.steering.mode,
        split=spec.protocol.split,
        cost=cost_of(spec, experiment),
        judged=tuple(
            compare.judge(experiment, jobs, one, splits, scores, check(one.rater, known[one.rater.name]), spec.seed)
            for one in ratings
        ),
        detection=compare.detections(experiment, found, spec.seed),
        hard_negatives=min(len(texts.hard) for texts in concepts.values()),
        generations=_TABLE,
    )


def _raters(
    spec: AxbenchSpec, setting: Setting, fluent: list[str], instructions: Sequence[str], chat: Judge | None
) -> list[compare.Rater]:
    raters: list[compare.Rater] = []
    if "truth" in spec.raters:
        most = spec.generation.max_new_tokens
        raters.append(TruthRater(setting.lm, setting.concepts, fluent, instructions, most))
    if chat is not None and "chat" in spec.raters:
        raters.append(ChatRater(chat))
    return raters


def planned(spec: AxbenchSpec, chat: Judge | None = None, without: Collection[str] = ()) -> compare.Experiment:
    """The experiment, but for pairs of the concepts ``without``; prompts are the template's where no chat model is
    given to write them.

    Raises UnweaveError for files without labelled latents or instructions, for too few instructions, for more texts
    than ``most_texts``, and for what LoRA or a judge needs and is not there.
    """
    chosen = pairs(load(spec.pairs))[: spec.most_pairs]
    if not chosen:
        raise UnweaveError(
            "no latent has a scored label", where=str(spec.pairs), remedy="give the file that `unweave labels` wrote"
        )
    chosen = [pair for pair in chosen if pair.label.label not in without]
    concepts = list(dict.fromkeys(pair.label.label for pair in chosen))
    wishes = [template_prompt(name) for name in concepts] if chat is None else written_prompts(chat, concepts)
    wish = dict(zip(concepts, wishes, strict=True))
    pool = instructions(spec.protocol.instructions)
    experiment = compare.Experiment(
        pairs=chosen,
        methods=spec.methods,
        factors=spec.steering.strengths,
        pool=pool,
        instructions=draw_instructions(pool, len(chosen), spec.protocol.per_pair, spec.seed),
        prompts=[wish[pair.label.label] for pair in chosen],
        suppression=spec.protocol.suppression,
        generation=spec.generation,
    )
    cost = cost_of(spec, experiment)
    if cost.texts > spec.most_texts:
        raise UnweaveError(
            f"this asks for {cost.texts:,} texts of up to {spec.generation.max_new_tokens} tokens ({cost.tokens:,} "
            f"tokens), and {cost.prompts:,} prompts to a judge; most_texts is {spec.most_texts:,}",
            where=f"{cost.pairs} pairs",
            remedy=f"raise most_texts to {cost.texts}, or ask for fewer pairs, methods, factors or instructions",
        )
    if "lora" in spec.methods:
        peft_for_lora()
    if "chat" in (*spec.raters, spec.writer):
        check_judge(spec.judge)
    return experiment


def cost_of(spec: AxbenchSpec, experiment: compare.Experiment) -> Cost:
    """What an experiment takes at most: equal texts are generated and rated once."""
    texts = experiment.n_texts
    prompts = len(RATINGS) * texts if "chat" in spec.raters else 0
    prompts += len(set(experiment.prompts)) if spec.writer == "chat" else 0
    return Cost(len(experiment.pairs), texts, texts * spec.generation.max_new_tokens, prompts)


def refuse_pairs(chosen: Sequence[Pair], opened: Opened) -> None:
    """Raises UnweaveError for pairs of another SAE than those that are open (trap 41), and of unknown latents."""
    names = {name_of(pair.site, pair.latent): pair for pair in chosen}
    digests = {site: sae.digest() for site, sae in opened.saes.items()}
    refuse_strangers({name: Annotation(name, sae=pair.sae) for name, pair in names.items()}, digests, "pairs")
    for name, pair in names.items():
        sae = opened.saes.get(pair.site)
        if sae is None or pair.latent >= sae.d_sae:
            there = f"SAEs at {', '.join(map(str, opened.saes))}" if sae is None else f"{sae.d_sae} latents"
            what = f"there is no latent {name}; there are {there}"
            remedy = "give the SAEs that the pairs are of (saes), or label these"
            raise UnweaveError(what, where=f"pairs, {pair.label.label}", remedy=remedy)


def instructions(path: Path | None) -> list[str]:
    """Distinct instructions, in order: a file's, or our own. UnweaveError for a file without any."""
    if path is None:
        text = resources.files("unweave.methods.axbench").joinpath("instructions.txt").read_text(encoding="utf-8")
        return text.splitlines()
    texts: dict[str, None] = {}
    for number, line in lines(path):
        where = f"{path}, line {number}"
        if line.lstrip().startswith("{"):
            row = parse_json(line, where)
            line = row.get("instruction") if isinstance(row, dict) else None
            if not isinstance(line, str):
                raise UnweaveError("there is no text instruction", where=where, remedy='write {"instruction": "..."}')
        if line.strip():
            texts.setdefault(line.strip())
    if not texts:
        raise UnweaveError("there are no instructions", where=str(path), remedy="write one a line")
    return list(texts)
