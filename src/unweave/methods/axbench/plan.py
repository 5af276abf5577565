"""From a spec to an experiment, and everything that can be refused before a model is loaded."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from importlib import resources
from pathlib import Path

from unweave.core.errors import UnweaveError
from unweave.core.files import lines, parse_json
from unweave.inputs.saes import Opened
from unweave.judge.base import Judge, check_judge
from unweave.latents.annotations import Annotation, Pair, load, name_of, pairs, refuse_strangers
from unweave.methods.axbench.compare import Experiment
from unweave.methods.axbench.forms import template_prompt, written_prompts
from unweave.methods.axbench.generate import draw_instructions
from unweave.methods.axbench.lora import peft_for_lora
from unweave.methods.axbench.result import RATINGS, Cost
from unweave.methods.axbench.spec import AxbenchSpec


def planned(spec: AxbenchSpec, chat: Judge | None = None, without: Collection[str] = ()) -> Experiment:
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
    experiment = Experiment(
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


def cost_of(spec: AxbenchSpec, experiment: Experiment) -> Cost:
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
