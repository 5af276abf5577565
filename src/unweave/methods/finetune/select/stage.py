"""Selecting latents to ablate: opened, judged, chosen; the selection, its controls and the diagnosis kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.core.stage import Context, stage
from unweave.inputs.saes import Opened, open_saes
from unweave.judge.base import REPLIES, check_judge, open_judge
from unweave.latents import annotations as notes
from unweave.latents import relevance, selection
from unweave.latents.annotations import Annotation, name_of
from unweave.latents.latent_record import LatentRecord
from unweave.latents.selection import Chosen, Selection, SiteChoice
from unweave.latents.stage import records_of
from unweave.methods.finetune.attribute.result import AttributeResult, Candidate, attribution_at
from unweave.methods.finetune.attribute.spec import FinetuneAttributeSpec
from unweave.methods.finetune.diagnose import diagnose
from unweave.methods.finetune.diagnosis import Diagnosis
from unweave.methods.finetune.select.result import Line, SelectResult, Weighed
from unweave.methods.finetune.select.select import (
    Key,
    Limits,
    Verdict,
    by_annotation,
    by_label,
    by_relevance,
    by_rule,
    choose,
    described,
    draws,
    key_of,
    random_directions,
)  # fmt: skip
from unweave.methods.finetune.select.spec import FinetuneSelectSpec
from unweave.sae.subset import orthonormal_basis
from unweave.tasks.choices.choices import open_choices
from unweave.tasks.choices.encode import encode_choices

_LINES = 4


@stage("finetune-select", version=1)
def run(spec: FinetuneSelectSpec, ctx: Context) -> SelectResult:
    """Writes ``selection.json``, ``random-0.json`` and so on, ``directions-0.json``, and ``candidates.jsonl``."""
    done = attribution_at(spec.attribution)
    found = done.result
    if spec.by == "query" and spec.query.by == "judge":
        check_judge(spec.judge)
    said = _said(spec, found)
    asked = FinetuneAttributeSpec.from_dict(done.asked["spec"])
    opened: Opened = ctx.handle or open_saes(asked)
    _refuse_others(found, opened)
    records = _records(spec, found, opened, ctx.runs)
    words = {key: one.annotation or "; ".join(label.label for label in one.labels) for key, one in said.items()}
    words |= {key: described(record) for key, record in records.items() if not words.get(key)}
    words = {key: text for key, text in words.items() if text}
    verdicts = _verdicts(spec, found, said, words, ctx.runs)
    chosen = choose(found.candidates, verdicts, Limits(spec.top, spec.sign, spec.sites))
    drawn = draws(found.candidates, chosen, spec.controls.random, spec.controls.seed)
    rows = None if found.directions is None else load_file(done.file(str(found.directions)))
    best = _selection(spec, found, "chosen", chosen, rows, verdicts)
    controls = [_selection(spec, found, f"random-{i}", one, rows) for i, one in enumerate(drawn)]
    controls += [_at_random(spec, found, best, opened, i) for i in range(spec.controls.directions)]
    path = selection.write(ctx.path / "selection.json", best)
    paths = [selection.write(ctx.path / f"{one.name}.json", one) for one in controls]
    _annotate(ctx.path / "candidates.jsonl", found, verdicts, words, {key_of(one) for one in chosen})
    return SelectResult(
        subject=opened.subject,
        attribution=done.path.name,
        metric=found.metric,
        by=spec.by,
        query=_query(spec),
        weighed=_weighed(found, verdicts, words, records, {key_of(one) for one in chosen}),
        unknown=sum(key_of(one) not in verdicts for one in found.candidates),
        selection=path.relative_to(ctx.path),
        controls=tuple(one.relative_to(ctx.path) for one in paths),
        annotations=Path("candidates.jsonl"),
        diagnosis=_diagnosis(spec, asked, best, opened),
    )


# -- what is known of candidates --------------------------------------------------------------------------------------


def _said(spec: FinetuneSelectSpec, found: AttributeResult) -> dict[Key, Annotation]:
    """What the file of annotations says of candidates. UnweaveError where it is about other SAEs."""
    if spec.annotations is None:
        return {}
    digests = {one.site: one.digest for one in found.sites if one.digest is not None}
    there = notes.load(spec.annotations, [one.site for one in found.sites])
    notes.refuse_strangers(there, digests, str(spec.annotations))
    keys = {key_of(one) for one in found.candidates}
    named = (((one.site, one.latent), one) for one in there.values() if one.latent is not None)
    return {key: one for key, one in named if key in keys}


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
    return {(site, number): records[site].latent(number) for site, some in by_site.items() for number in some}


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


# -- selections -------------------------------------------------------------------------------------------------------


def _selection(
    spec: FinetuneSelectSpec,
    found: AttributeResult,
    name: str,
    some: list[Candidate],
    rows: Mapping[str, Any] | None,
    verdicts: Mapping[Key, Verdict] | None = None,
) -> Selection:
    """Candidates as a selection: the chosen ones where their verdicts are given, else a random control."""
    about = {one.site: one for one in found.sites}
    why = {} if verdicts is None else {key: verdict.why for key, verdict in verdicts.items()}
    grouped = selection.by_site((one.site, Chosen(one.number, one.score, why.get(key_of(one), ""))) for one in some)
    return Selection(
        name=name,
        kind="latents" if rows is None else "directions",
        sites=tuple(SiteChoice(site, chosen, about[site].sae, about[site].digest) for site, chosen in grouped.items()),
        model=found.model,
        candidates=len(found.candidates),
        by="random" if verdicts is None else spec.by,
        query="" if verdicts is None else _query(spec),
        seed=spec.controls.seed if verdicts is None else None,
        directions={} if rows is None else {
            site: rows[str(site)][[one.number for one in chosen]] for site, chosen in grouped.items()
        },
    )  # fmt: skip


def _at_random(
    spec: FinetuneSelectSpec, found: AttributeResult, best: Selection, opened: Opened, draw: int
) -> Selection:
    """Random directions that span as much at each site as the chosen ones."""
    sizes = {}
    for one in best.sites:
        rows = best.directions.get(one.site)
        rows = opened.saes[one.site].W_dec[list(one.numbers)] if rows is None else rows
        sizes[one.site] = len(orthonormal_basis(rows)), rows.shape[1]
    seed = spec.controls.seed * 1000 + draw
    directions = random_directions(sizes, seed)
    sites = tuple(SiteChoice(site, tuple(map(Chosen, range(len(rows))))) for site, rows in directions.items())
    return Selection(
        f"directions-{draw}", "directions", sites, found.model, len(found.candidates), "random", "", seed, directions
    )


# -- what a person sees -----------------------------------------------------------------------------------------------


def _annotate(
    path: Path, found: AttributeResult, verdicts: Mapping[Key, Verdict], words: Mapping[Key, str], chosen: set[Key]
) -> None:
    """A line for every candidate, to be changed by hand: ``relevant`` says whether it is chosen."""
    digests = {one.site: one.digest for one in found.sites}
    lines = []
    for one in found.candidates:
        key = key_of(one)
        reason = f"; {verdicts[key].why}" if key in verdicts and verdicts[key].relevance is not None else ""
        about = f"score {one.score:+.4g} +- {one.margin:.2g}{reason}"
        lines.append(
            Annotation(name_of(*key), words.get(key, ""), about, relevant=key in chosen, sae=digests[one.site])
        )
    notes.write(path, lines)


def _weighed(
    found: AttributeResult,
    verdicts: Mapping[Key, Verdict],
    words: Mapping[Key, str],
    records: Mapping[Key, LatentRecord],
    chosen: set[Key],
) -> tuple[Weighed, ...]:
    rows = []
    for one in found.candidates:
        key = key_of(one)
        verdict, record = verdicts.get(key), records.get(key)
        rows.append(
            Weighed(
                candidate=one,
                words=words.get(key, ""),
                relevance=None if verdict is None else verdict.relevance,
                chosen=key in chosen,
                why=verdict.why if verdict is not None and key in chosen else "",
                promoted=() if record is None else tuple(text for text, _ in record.promoted),
                lines=() if record is None else tuple(map(_line, record.top[:_LINES])),
                maximum=0.0 if record is None else record.maximum,
            )
        )
    return tuple(rows)


def _line(context: Any) -> Line:
    shown = context.shown()
    peak = next(place for place, one in enumerate(shown) if one.focus)
    return Line(tuple(one.text for one in shown), tuple(one.value for one in shown), peak)


def _diagnosis(
    spec: FinetuneSelectSpec, asked: FinetuneAttributeSpec, best: Selection, opened: Opened
) -> Diagnosis | None:
    """What the ablation does to the untrained model, on training items of the task; None without a task."""
    if not spec.items or asked.data is not None:
        return None
    items = open_choices(asked.task).splits["train"][: spec.items]
    encoded = encode_choices(opened.lm, items, chat=asked.chat, skip=True)
    return diagnose(opened.lm, opened.saes, best, encoded, max_tokens=asked.batch_tokens)
