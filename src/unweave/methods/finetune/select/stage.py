"""Selecting latents to ablate: opened, judged, chosen; the selection, its controls and the diagnosis kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.core.stage import Context, stage
from unweave.inputs.saes import Opened, open_saes
from unweave.judge.base import REPLIES, check_judge, open_judge
from unweave.latents import annotations, relevance, selection
from unweave.latents.annotations import Annotation
from unweave.latents.latent_record import Context as Shown
from unweave.latents.latent_record import LatentRecord
from unweave.latents.selection import Chosen, Selection, SiteChoice
from unweave.latents.stage import records_of
from unweave.methods.finetune.attribute.result import AttributeResult, Candidate, attribution_at
from unweave.methods.finetune.attribute.spec import FinetuneAttributeSpec
from unweave.methods.finetune.diagnose import diagnose
from unweave.methods.finetune.diagnosis import Diagnosis
from unweave.methods.finetune.select.result import SelectResult, Weighed
from unweave.methods.finetune.select.select import (
    Key,
    Verdict,
    by_annotation,
    by_label,
    by_relevance,
    by_rule,
    choose,
    described,
    draws,
    random_directions,
)  # fmt: skip
from unweave.methods.finetune.select.spec import FinetuneSelectSpec
from unweave.sae.subset import orthonormal_basis
from unweave.tasks.choices.choices import open_choices
from unweave.tasks.choices.encode import encode_choices

_CONTEXTS = 4


@stage("finetune-select", version=1)
def run(spec: FinetuneSelectSpec, ctx: Context) -> SelectResult:
    """Writes ``selection.json``, ``random-0.json`` and so on, ``directions-0.json``, and ``candidates.jsonl``. The
    handle is the SAEs where they are open already."""
    done = attribution_at(spec.attribution)
    found = done.result
    asked = replace(FinetuneAttributeSpec.from_dict(done.asked["spec"]), device=spec.device)
    if spec.by == "query" and spec.query.by == "judge":
        check_judge(spec.judge)
    said = _said(spec, found)
    opened: Opened = ctx.handle or open_saes(asked)
    _refuse_others(found, opened)
    records = _records(spec, found, opened, ctx.runs)
    words = {key: described(record) for key, record in records.items()}
    words |= {key: one.annotation for key, one in said.items() if one.annotation}
    verdicts = _verdicts(spec, found, said, {key: text for key, text in words.items() if text}, ctx.runs)
    chosen = choose(found.candidates, verdicts, top=spec.top, sign=spec.sign, sites=spec.sites)
    drawn = draws(found.candidates, chosen, spec.controls.random, spec.controls.seed)
    rows = None if found.directions is None else load_file(done.file(str(found.directions)))
    why = {one.key: verdicts[one.key].why for one in chosen}
    best = _selection(found, "chosen", chosen, rows, why, by=spec.by, query=_query(spec))
    controls = [_selection(found, f"random-{i}", one, rows, seed=spec.controls.seed) for i, one in enumerate(drawn)]
    controls += [_at_random(found, best, opened, i, spec.controls.seed) for i in range(spec.controls.directions)]
    selection.write(ctx.path / "selection.json", best)
    for one in controls:
        selection.write(ctx.path / f"{one.name}.json", one)
    weighed = tuple(_weighed(one, verdicts.get(one.key), words, records, why) for one in found.candidates)
    annotations.write(ctx.path / "candidates.jsonl", _lines(found, weighed))
    return SelectResult(
        subject=opened.subject,
        attribution=done.path.name,
        metric=found.metric,
        by=spec.by,
        query=best.query,
        weighed=weighed,
        unknown=sum(one.key not in verdicts for one in found.candidates),
        selection=Path("selection.json"),
        controls=tuple(Path(f"{one.name}.json") for one in controls),
        annotations=Path("candidates.jsonl"),
        diagnosis=_diagnosis(spec, asked, best, opened),
    )


# -- what is known of candidates --------------------------------------------------------------------------------------


def _said(spec: FinetuneSelectSpec, found: AttributeResult) -> dict[Key, Annotation]:
    """What the file of annotations says of candidates. UnweaveError where it is about other SAEs."""
    if spec.annotations is None:
        return {}
    there = annotations.load(spec.annotations, [one.site for one in found.sites])
    digests = {one.site: one.digest for one in found.sites if one.digest is not None}
    annotations.refuse_strangers(there, digests, str(spec.annotations))
    return {one.key: there[one.name] for one in found.candidates if one.name in there}


def _refuse_others(found: AttributeResult, opened: Opened) -> None:
    """The SAEs, and so the candidates' numbers, must be those of the attribution."""
    for one in found.sites:
        if one.digest is not None and one.digest != opened.saes[one.site].digest():
            what = f"the SAE at {one.site} has changed since the attribution"
            raise UnweaveError(what, where=opened.names[one.site], remedy="attribute again")


def _records(spec: FinetuneSelectSpec, found: AttributeResult, opened: Opened, runs: Path) -> dict[Key, LatentRecord]:
    if not spec.contexts:
        return {}
    if found.directions is not None:
        raise UnweaveError("components have no contexts", where="contexts", remedy="leave contexts out")
    by_site: dict[Site, list[int]] = {}
    for one in found.candidates:
        by_site.setdefault(one.site, []).append(one.number)
    records = records_of(opened, None, spec.contexts, runs, by_site)
    return {one.key: records[one.site].latent(one.number) for one in found.candidates}


def _verdicts(
    spec: FinetuneSelectSpec,
    found: AttributeResult,
    said: Mapping[Key, Annotation],
    words: Mapping[Key, str],
    runs: Path,
) -> dict[Key, Verdict]:
    if spec.by == "rule":
        return by_rule(found.candidates)
    if spec.by == "label":
        return by_label(said, spec.labels, spec.auroc)
    if spec.by == "annotations":
        return by_annotation(said)
    query = spec.query
    if not words:
        remedy = "give explanations of these latents with --annotations, or more text with --contexts"
        raise UnweaveError("no candidate has an explanation", where="annotations", remedy=remedy)
    if query.by == "embedding":
        rated = relevance.cosines(query.text, words, query.embedder, spec.device)
    else:
        rated, _ = relevance.rate_relevance(open_judge(spec.judge, runs / REPLIES, spec.device), query.text, words)
    return by_relevance(rated, words, query.at_least)


def _query(spec: FinetuneSelectSpec) -> str:
    if spec.by == "query":
        return f"{spec.query.text} (at least {spec.query.at_least:g} by {spec.query.by})"
    if spec.by == "label":
        return f"{', '.join(spec.labels)} (AUROC at least {spec.auroc:g})"
    return str(spec.annotations.name) if spec.annotations is not None and spec.by == "annotations" else ""


# -- what is written --------------------------------------------------------------------------------------------------


def _selection(
    found: AttributeResult,
    name: str,
    some: Collection[Candidate],
    rows: Mapping[str, Tensor] | None,
    why: Mapping[Key, str] | None = None,
    *,
    by: str = "random",
    query: str = "",
    seed: int | None = None,
) -> Selection:
    """Candidates as a selection."""
    about, reasons = {one.site: one for one in found.sites}, why or {}
    grouped = selection.by_site((one.site, Chosen(one.number, one.score, reasons.get(one.key, ""))) for one in some)
    sites = tuple(SiteChoice(site, chosen, about[site].sae, about[site].digest) for site, chosen in grouped.items())
    directions = {} if rows is None else {one.site: rows[str(one.site)][list(one.numbers)] for one in sites}
    kind = "latents" if rows is None else "directions"
    return Selection(name, kind, sites, found.model, len(found.candidates), by, query, seed, directions)


def _at_random(found: AttributeResult, best: Selection, opened: Opened, draw: int, seed: int) -> Selection:
    """Random directions that span as much at each site as the chosen ones."""
    sizes = {}
    for one in best.sites:
        rows = best.directions.get(one.site)
        rows = opened.saes[one.site].W_dec[list(one.numbers)] if rows is None else rows
        sizes[one.site] = len(orthonormal_basis(rows)), rows.shape[1]
    directions = random_directions(sizes, 1000 * seed + draw)
    sites = tuple(SiteChoice(site, tuple(map(Chosen, range(len(rows))))) for site, rows in directions.items())
    name = f"directions-{draw}"
    return Selection(name, "directions", sites, found.model, best.candidates, "random", "", seed, directions)


def _weighed(
    one: Candidate,
    verdict: Verdict | None,
    words: Mapping[Key, str],
    records: Mapping[Key, LatentRecord],
    why: Mapping[Key, str],
) -> Weighed:
    relevant = None if verdict is None else verdict.relevance
    contexts = records[one.key].top[:_CONTEXTS] if one.key in records else ()
    shown = tuple(map(_marked, contexts))
    return Weighed(one, words.get(one.key, ""), relevant, one.key in why, why.get(one.key, ""), shown)


def _marked(context: Shown) -> str:
    return "".join(f"[{one.text}]" if one.focus else one.text for one in context.shown())


def _lines(found: AttributeResult, weighed: Collection[Weighed]) -> list[Annotation]:
    """A line for every candidate, to be changed by hand: ``relevant`` says whether it is chosen."""
    digests = {one.site: one.digest for one in found.sites}
    return [
        Annotation(
            one.candidate.name,
            one.words,
            f"score {one.candidate.score:+.4g} +- {one.candidate.margin:.2g}",
            relevant=one.chosen,
            sae=digests[one.candidate.site],
        )
        for one in weighed
    ]


def _diagnosis(
    spec: FinetuneSelectSpec, asked: FinetuneAttributeSpec, best: Selection, opened: Opened
) -> Diagnosis | None:
    """What the ablation does to the untrained model, on training items of the task; None without a task."""
    if not spec.items or asked.data is not None:
        return None
    items = open_choices(asked.task).splits["train"][: spec.items]
    encoded = encode_choices(opened.lm, items, chat=asked.chat, skip=True)
    return diagnose(opened.lm, opened.saes, best, encoded, max_tokens=asked.batch_tokens)
