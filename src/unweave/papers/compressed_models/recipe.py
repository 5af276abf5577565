"""The paper from a model to a table: SAEs, compressed models, SAEs trained on one of these, and all of them compared.

Each part is a run of its own, so an interrupted recipe goes on where it was and a finished part is not done again.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unweave.core.run import Run
from unweave.core.stage import Context, stage
from unweave.methods.compress import stage as compress
from unweave.methods.compress.result import Compressed
from unweave.methods.compress.spec import CompressSpec, LowRankSpec, PruneSpec, QuantiseSpec
from unweave.methods.compress.transfer import stage as transfer
from unweave.methods.compress.transfer.result import ORIGINAL, RETRAINED, pruned
from unweave.methods.compress.transfer.spec import TransferSpec
from unweave.methods.labels import stage as labels
from unweave.methods.labels.spec import LabelsSpec
from unweave.methods.saebench import stage as saebench
from unweave.methods.saebench.spec import SaebenchSpec
from unweave.methods.train import stage as train
from unweave.methods.train.result import Training
from unweave.papers.compressed_models import view
from unweave.papers.compressed_models.plan import StudyPlan, plan_of
from unweave.papers.compressed_models.result import Bench, CompressedModels, Group, Study
from unweave.papers.compressed_models.spec import CompressedModelsSpec
from unweave.papers.parts import PartRun, named

_WHY = "SAEs of the original model are measured in the compressed one"
_BENCHED = (0.25, 0.5)
"""shares of weights that SAEs with SAEBench's scores lost"""


@dataclass
class Parts:
    """The finished studies, and every run by what it is of."""

    studies: list[Study] = field(default_factory=list)
    runs: list[PartRun] = field(default_factory=list)

    def all(self) -> Iterable[PartRun]:
        """Every run."""
        return self.runs

    def add(self, part: str, about: str, run: Run[Any]) -> Run[Any]:
        """Notes a run, and returns it."""
        self.runs.append(PartRun(part, about, run.path.name))
        gc.collect()  # models, trainers and activations take gigabytes
        return run


def run(spec: CompressedModelsSpec, runs: Path) -> Run[CompressedModels]:
    """Everything of the paper at one scale. The run holds the tables and ``report.html``.

    Parts are asked for every time, at little cost where they are finished, so that a page is never of other parts.
    """
    parts = Parts()
    for plan in plan_of(spec):
        parts.studies.append(_study(plan, parts, runs))
    return together(spec, runs, parts)


@stage("paper-compressed-models", version=1, also=named)
def together(spec: CompressedModelsSpec, ctx: Context) -> CompressedModels:
    """The result and pages of parts that are finished; the handle is ``Parts``."""
    parts: Parts = ctx.handle
    result = CompressedModels(spec.scale, tuple(parts.studies), tuple(parts.runs))
    view.write(result, ctx.path)
    return result


Saes = Mapping[str, Mapping[str, str]]
"""of each group, the SAEs by site"""


def _study(plan: StudyPlan, parts: Parts, runs: Path) -> Study:
    """Everything of one model."""
    saes: Saes = plan.saes
    if plan.training is not None:
        saes = _by_group(plan, parts.add("train", plan.name, train.run(plan.training, runs)))
    compressed = [_compressed(one, runs) for one in plan.compressions]
    for one in compressed:
        parts.add("compress", f"{plan.name}, {one.result.method}", one)
    folders = [str(one.path / "model") for one in compressed]
    again = parts.add("retrain", plan.name, train.run(replace(plan.retraining, model=folders[0]), runs))
    retrained = _by_group(plan, again)
    first, groups = next(iter(saes)), []
    for name, own in saes.items():
        fresh = {site: sae for site, sae in (retrained.get(name) or retrained[""]).items() if site in own}
        asked = {"saes": _written(own), "retrained": _written(fresh), "model": plan.model, "device": plan.device,
                 "compressed": folders if name == first else folders[:1], **plan.transfer}  # fmt: skip
        if plan.labels is not None and name == first:
            given = {"saes": _written(own), "model": plan.model, "device": plan.device, **plan.labels}
            told = parts.add("labels", f"{plan.name}, {name}", labels.run(LabelsSpec.from_dict(given), runs))
            asked["told"] = {"labels": str(told.file(labels.ANNOTATIONS)), "texts": plan.labels["texts"],
                             "context": plan.labels["context"]}  # fmt: skip
        done = parts.add("transfer", f"{plan.name}, {name}", transfer.run(TransferSpec.from_dict(asked), runs))
        groups.append(Group(name, done.result))
    benches = []
    for site in plan.bench_sites:
        name, own = next((name, own) for name, own in saes.items() if site in own)
        fresh = (retrained.get(name) or retrained[""])[site]
        benches.append(_bench(plan, site, own[site], fresh, folders[0], parts, runs))
    return Study(plan.name, tuple(groups), tuple(benches))


def _compressed(spec: CompressSpec, runs: Path) -> Run[Compressed]:
    if isinstance(spec, PruneSpec):
        return compress.prune(spec, runs)
    if isinstance(spec, QuantiseSpec):
        return compress.quantise(spec, runs)
    assert isinstance(spec, LowRankSpec)
    return compress.low_rank(spec, runs)


def _written(saes: Mapping[str, str]) -> list[str]:
    return [f"{site}={name}" for site, name in saes.items()]


def _by_group(plan: StudyPlan, trained: Run[Training]) -> Saes:
    """The SAEs of a training by variant; all of them under "" where it has one."""
    by: dict[str, dict[str, str]] = {name: {} for name in plan.groups or ("",)}
    for sae in trained.result.saes:
        by[Path(sae.name).name if plan.groups else ""][str(sae.write)] = str(train.sae_folder(trained, sae.name))
    return by


def _bench(plan: StudyPlan, site: str, own: str, fresh: str, model: str, parts: Parts, runs: Path) -> Bench:
    """SAEBench's tasks on an SAE as it is, pruned, and trained anew, in the compressed model."""
    forms = {ORIGINAL: own}
    data = plan.transfer.get("data") or plan.retraining.data.to_dict()
    few = {"tokens": plan.transfer["pruning"]["tokens"], "heldout_tokens": 1024}
    given = {"model": model, "accept_mismatch": _WHY, "device": plan.device}
    for share in _BENCHED:
        asked = {"saes": [f"{site}={own}"], "sparsity": share, "data": data | few, **given}
        less = parts.add(
            "prune SAE", f"{plan.name}, {site}, {share:g}", compress.prune(PruneSpec.from_dict(asked), runs)
        )
        forms[pruned(share)] = str(less.path / less.result.saes[0].folder)
    forms[RETRAINED] = fresh
    spec = SaebenchSpec.from_dict({"saes": [f"{site}={name}" for name in forms.values()], **given, **plan.bench})
    scores = parts.add("saebench", f"{plan.name}, {site}", saebench.run(spec, runs))
    return Bench(site, {name: form for form, name in forms.items()}, scores.result)
