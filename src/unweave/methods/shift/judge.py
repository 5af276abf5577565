"""Who says which latents of a classifier's circuits are irrelevant: a rule, a file of annotations, or a chat model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from unweave.circuits.about import by_site
from unweave.core.site import Site
from unweave.inputs.saes import Opened
from unweave.judge.base import REPLIES, Judge, open_judge
from unweave.latents import annotations as annotated
from unweave.latents.records import LatentRecord, Records
from unweave.latents.stage import records_of
from unweave.methods.shift import relevance
from unweave.methods.shift.relevance import Latent
from unweave.methods.shift.result import Judgement
from unweave.methods.shift.shift import Judging
from unweave.methods.shift.spec import CircuitShiftSpec, RuleOptions
from unweave.sae.module import SAE

RecordsOf = Callable[[Sequence[Latent]], Mapping[Latent, LatentRecord]]


def of(records: Mapping[Site, Records]) -> RecordsOf:
    """The records of latents, from those of whole SAEs."""
    return lambda latents: {(site, latent): records[site].latent(latent) for site, latent in latents}


def by_rule(records: RecordsOf, rule: RuleOptions | None = None) -> Judging:
    """By what latents respond to and promote: are these words for gender?"""
    return lambda latents: Judgement("rule", tuple(relevance.by_rule(records(latents), rule)))


def by_file(path: Path, saes: Mapping[Site, SAE]) -> Judging:
    """By what people wrote down about these SAEs; annotations of others are refused."""

    def judging(latents: Sequence[Latent]) -> Judgement:
        known = annotated.load(path, saes)
        annotated.refuse_strangers(known, {site: sae.digest() for site, sae in saes.items()}, str(path))
        return Judgement("file", tuple(relevance.by_annotation(latents, known)))

    return judging


def by_chat(records: RecordsOf, judge: Callable[[], Judge]) -> Judging:
    """By a chat model, opened when it is needed."""

    def judging(latents: Sequence[Latent]) -> Judgement:
        known, chat = records(latents), judge()
        return Judgement("chat", tuple(relevance.by_chat(known, chat)), chat.name, chat.note)

    return judging


def judge_of(spec: CircuitShiftSpec, opened: Opened, runs: Path) -> Judging:
    """The judge that the question names."""
    if spec.judge == "file":
        assert spec.annotations is not None  # the spec's own check
        return by_file(spec.annotations, opened.saes)

    def records(latents: Sequence[Latent]) -> Mapping[Latent, LatentRecord]:
        return of(records_of(opened, spec.data, spec.latents_tokens, runs, by_site(latents)))(latents)

    if spec.judge == "rule":
        return by_rule(records, spec.gender)
    return by_chat(records, lambda: open_judge(spec.chat, Path(runs) / REPLIES, spec.device))
