"""The paper from text to table: SAEs, the circuits of four structures, SHIFT, behaviours, a page.

Each part is a run of its own, so an interrupted recipe goes on where it was and a finished part is not done again.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unweave.circuits.graph import Circuit
from unweave.circuits.opened import FILE
from unweave.core.run import Run
from unweave.core.stage import Context, stage
from unweave.methods.behaviours import stage as behaviours
from unweave.methods.behaviours.result import BehavioursResult
from unweave.methods.behaviours.spec import CircuitBehavioursSpec
from unweave.methods.circuits import stage_draw as draw
from unweave.methods.circuits import stage_evaluate as evaluate
from unweave.methods.circuits import stage_find as find
from unweave.methods.circuits.result import CircuitSearch, Drawing, Faithfulness
from unweave.methods.circuits.spec import CircuitDrawSpec, CircuitEvaluateSpec, CircuitFindSpec
from unweave.methods.shift import stage as shift
from unweave.methods.shift.result import ShiftResult
from unweave.methods.shift.spec import CircuitShiftSpec
from unweave.methods.train import stage as train
from unweave.methods.train.result import Training
from unweave.papers.feature_circuits import view
from unweave.papers.feature_circuits.plan import Plan, plan_of
from unweave.papers.feature_circuits.result import FeatureCircuits, Overlap, PartRun, Structure
from unweave.papers.feature_circuits.spec import FeatureCircuitsSpec
from unweave.tasks.agreement import STRUCTURES


@dataclass(frozen=True)
class Parts:
    """The finished runs that the result is made from; agreement's by structure."""

    trained: Run[Training] | None
    found: Mapping[str, Run[CircuitSearch]]
    evaluated: Mapping[str, Run[Faithfulness]]
    drawn: Mapping[str, Run[Drawing]]
    shifted: Run[ShiftResult]
    behaviours: Run[BehavioursResult]

    def all(self) -> tuple[PartRun, ...]:
        """Every run by what it is of."""
        named = [] if self.trained is None else [PartRun("train", None, self.trained.path.name)]
        named += [PartRun("find", name, run.path.name) for name, run in self.found.items()]
        named += [PartRun("evaluate", name, run.path.name) for name, run in self.evaluated.items()]
        named += [PartRun("draw", name, run.path.name) for name, run in self.drawn.items()]
        named.append(PartRun("shift", None, self.shifted.path.name))
        return (*named, PartRun("behaviours", None, self.behaviours.path.name))


def run(spec: FeatureCircuitsSpec, runs: Path) -> Run[FeatureCircuits]:
    """Everything of the paper at one scale. The run holds the tables and ``report.html``.

    Parts are asked for every time, at little cost where they are finished, so that a page is never of other parts.
    """
    plan = plan_of(spec)
    trained = train.run(plan.training, runs) if plan.training is not None else None
    gc.collect()  # trainers and activations take gigabytes
    return together(spec, runs, _parts(spec, plan, trained, runs))


def _named(_spec: FeatureCircuitsSpec, parts: Parts) -> dict[str, str]:
    return {f"{one.part} {one.structure or ''}".strip(): one.run for one in parts.all()}


@stage("paper-feature-circuits", version=2, also=_named)
def together(spec: FeatureCircuitsSpec, ctx: Context) -> FeatureCircuits:
    """The result and pages of parts that are finished; the handle is ``Parts``."""
    parts: Parts = ctx.handle
    thresholds = plan_of(spec).thresholds
    clause, phrase = (Circuit.load(parts.found[name].file(FILE)) for name in ("across_rc", "across_pp"))
    result = FeatureCircuits(
        scale=spec.scale,
        subject=parts.found["across_pp"].result.subject,
        structures=tuple(Structure(name, done.result) for name, done in parts.evaluated.items()),
        overlap=overlap(clause, phrase, (thresholds["across_rc"][0], thresholds["across_pp"][0])),
        shift=parts.shifted.result,
        behaviours=parts.behaviours.result,
        runs=parts.all(),
    )
    view.write(result, ctx.path)
    return result


def overlap(a: Circuit, b: Circuit, thresholds: tuple[float, float]) -> Overlap:
    """The nodes that both circuits have, each above its threshold."""
    sets = [
        {(str(node.site), node.slot, node.is_error) for node in circuit.above(threshold)}
        for circuit, threshold in zip((a, b), thresholds, strict=True)
    ]
    latents = [{node for node in nodes if not node[2]} for nodes in sets]
    return Overlap((len(latents[0]), len(latents[1])), len(latents[0] & latents[1]), len(sets[0] & sets[1]))


def _parts(spec: FeatureCircuitsSpec, plan: Plan, trained: Run[Training] | None, runs: Path) -> Parts:
    saes = list(plan.saes) if trained is None else [str(train.sae_folder(trained))]
    asked: dict[str, Any] = {"saes": saes, "model": plan.model, "device": spec.device}
    found, evaluated, drawn = {}, {}, {}
    for structure in STRUCTURES:
        node, edge = plan.thresholds[structure]
        limits = {"task": structure, "node_threshold": node, "edge_threshold": edge}
        found[structure] = find.run(CircuitFindSpec.from_dict({**asked, **limits, **plan.find}), runs)
        folder = found[structure].path
        evaluated[structure] = evaluate.run(
            CircuitEvaluateSpec(circuit=folder, start_layer=plan.start_layer, device=spec.device), runs
        )
        drawn[structure] = draw.run(CircuitDrawSpec(circuit=folder), runs)
    given = {"biographies": spec.biographies} if spec.biographies is not None else {}
    if spec.annotations is not None:
        given |= {"judge": "file", "annotations": str(spec.annotations)}
    of_judge = {name: value for name, value in plan.shift.items() if spec.annotations is None or name != "data"}
    shifted = shift.run(CircuitShiftSpec.from_dict({**asked, **of_judge, **given}), runs)
    discovered = behaviours.run(CircuitBehavioursSpec.from_dict({**asked, **plan.behaviours}), runs)
    return Parts(trained, found, evaluated, drawn, shifted, discovered)
