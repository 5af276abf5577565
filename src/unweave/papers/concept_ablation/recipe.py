"""The paper from texts to table: SAEs, candidates, what is chosen of them, fine-tuning under every condition, a page.

Each part is a run of its own, so an interrupted recipe goes on where it was and a finished part is not done again.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from unweave.core.run import Run
from unweave.core.stage import Context, stage
from unweave.inputs.saes import Opened, open_saes
from unweave.inputs.spec import OfSAEsSpec
from unweave.methods.finetune.attribute import stage as attribute
from unweave.methods.finetune.attribute.result import AttributeResult
from unweave.methods.finetune.attribute.spec import FinetuneAttributeSpec
from unweave.methods.finetune.select import stage as select
from unweave.methods.finetune.select.result import SelectResult
from unweave.methods.finetune.select.spec import FinetuneSelectSpec
from unweave.methods.finetune.spec import FinetuneSpec
from unweave.methods.train import stage as train
from unweave.methods.train.result import Training
from unweave.papers.concept_ablation import cue, trials, view
from unweave.papers.concept_ablation.plan import Plan, line_of, plan_of
from unweave.papers.concept_ablation.result import (
    ConceptAblation,
    CueResult,
    Name,
    SiteEffects,
    Task,
    Trial,
    TrialsResult,
)
from unweave.papers.concept_ablation.spec import ConceptAblationSpec, CueSpec, TrialsSpec
from unweave.papers.parts import PartRun, named
from unweave.tasks.choices.spec import ChoiceSpec


@dataclass
class Parts:
    """The finished runs that the result is made from, by task."""

    trained: Run[Training] | None = None
    attributed: dict[str, Run[AttributeResult]] = field(default_factory=dict)
    cued: dict[str, Run[CueResult]] = field(default_factory=dict)
    selected: dict[str, Run[SelectResult]] = field(default_factory=dict)
    tried: dict[str, Run[TrialsResult]] = field(default_factory=dict)

    def all(self) -> Iterator[PartRun]:
        """Every run by what it is of."""
        if self.trained is not None:
            yield PartRun("train", "", self.trained.path.name)
        for name, one in self.attributed.items():
            yield PartRun("attribute", name, one.path.name)
        for name, one in self.cued.items():
            yield PartRun("cue", name, one.path.name)
        for name, one in self.selected.items():
            yield PartRun("select", name, one.path.name)
        for name, one in self.tried.items():
            yield PartRun("trials", name, one.path.name)


def run(spec: ConceptAblationSpec, runs: Path) -> Run[ConceptAblation]:
    """Everything of the paper at one scale. The run holds the tables and ``report.html``.

    Parts are asked for every time, at little cost where they are finished, so that a page is never of other parts.
    """
    plan = plan_of(spec)
    parts, saes = Parts(), plan.saes
    if plan.training is not None:
        parts.trained = train.run(plan.training, runs)
        saes = tuple(str(train.sae_folder(parts.trained, sae.name)) for sae in parts.trained.result.saes)
        gc.collect()  # trainers and activations take gigabytes
    opened = _Later(OfSAEsSpec(saes=saes, model=plan.model, device=spec.device))
    for name, task in plan.tasks.items():
        asked = {"model": plan.model, "saes": saes, "task": task.to_dict(), "device": spec.device, **plan.attribute}
        parts.attributed[name] = attribute.run(FinetuneAttributeSpec.from_dict(asked), runs, opened)
        parts.selected[name] = _selected(plan, name, parts, runs, opened)
        wanted = TrialsSpec(trials=_trials(plan, task, parts.selected[name], spec.device), splits=plan.splits)
        parts.tried[name] = trials.run(wanted, runs, opened)
    return together(spec, runs, parts)


class _Later:
    """The model and the SAEs, opened by the first part that has something to do."""

    def __init__(self, spec: OfSAEsSpec) -> None:
        self._spec = spec

    @cached_property
    def _opened(self) -> Opened:
        return open_saes(self._spec)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)


def _selected(plan: Plan, name: str, parts: Parts, runs: Path, opened: _Later) -> Run[SelectResult]:
    """By a query to a chat model where the plan has one, else by the rule of ``cue.py``."""
    attribution = str(parts.attributed[name].path)
    given = dict(plan.select)
    if plan.queries:
        given["query"] = {**given["query"], "text": plan.queries[name]}
    else:
        parts.cued[name] = cue.run(CueSpec.from_dict({"attribution": attribution}), runs, opened)
        given["annotations"] = str(parts.cued[name].file(cue.FILE))
    return select.run(FinetuneSelectSpec.from_dict({"attribution": attribution, **given}), runs, opened)


def _trials(plan: Plan, task: ChoiceSpec, selected: Run[SelectResult], device: str | None) -> tuple[FinetuneSpec, ...]:
    """Every condition with every seed; each seed has random latents of its own."""
    asked = []
    for name, condition in plan.conditions.items():
        own = {**condition, **({"line": line_of(task)} if name == "inoculate" else {})}
        for seed in range(plan.seeds):
            controls = selected.result.controls
            file = controls[seed % len(controls)] if name == "random" else selected.result.selection
            given = {
                "model": plan.model, "device": device, "task": task.to_dict(), "condition": own, "seed": seed,
                "selection": str(selected.file(str(file))), "split": "skyline" if name == "skyline" else "train",
                **plan.tuning,
            }  # fmt: skip
            asked.append(FinetuneSpec.from_dict(given))
    return tuple(asked)


@stage("paper-concept-ablation", version=2, also=named)
def together(spec: ConceptAblationSpec, ctx: Context) -> ConceptAblation:
    """The result and pages of parts that are finished; the handle is ``Parts``."""
    parts, plan = ctx.handle, plan_of(spec)
    assert isinstance(parts, Parts)
    result = ConceptAblation(
        scale=spec.scale,
        subject=next(iter(parts.attributed.values())).result.subject,
        tasks=tuple(_task(plan, name, parts) for name in plan.tasks),
        runs=tuple(parts.all()),
    )
    view.write(result, ctx.path)
    return result


def _task(plan: Plan, name: str, parts: Parts) -> Task:
    found, selected = parts.attributed[name].result, parts.selected[name].result
    chosen = {(one.candidate.site, one.candidate.number) for one in selected.weighed if one.chosen}
    sites = []
    for total in found.sites:
        own = [one for one in found.candidates if one.site == total.site]
        some = [one.score for one in own if (one.site, one.number) in chosen]
        sites.append(SiteEffects(total.site, len(own), total.total, len(some), sum(some)))
    done = parts.tried[name].result.trials
    names: list[tuple[Name, int]] = [(one, seed) for one in plan.conditions for seed in range(plan.seeds)]
    tried = [Trial(*key, own) for key, own in zip(names, done, strict=True)]
    also: dict[Name, Name] = {"test": "none", "zero": "both"}
    tried += [replace(one, condition=also[one.condition]) for one in tried if one.condition in also]
    return Task(name, tuple(sites), len(found.candidates), len(chosen), tuple(tried))
