"""The paper from text to table: SAEs, the circuits of four structures, SHIFT, behaviours, a page.

Each part is a run of its own, so an interrupted recipe goes on where it was and a finished part is not done again.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from unweave.circuits.graph import Circuit
from unweave.circuits.opened import FILE
from unweave.core.run import Run
from unweave.core.stage import Context, stage
from unweave.methods.behaviours import stage as behaviours
from unweave.methods.behaviours.spec import CircuitBehavioursSpec
from unweave.methods.circuits import stage_draw as draw
from unweave.methods.circuits import stage_evaluate as evaluate
from unweave.methods.circuits import stage_find as find
from unweave.methods.circuits.spec import CircuitDrawSpec, CircuitEvaluateSpec, CircuitFindSpec
from unweave.methods.shift import stage as shift
from unweave.methods.shift.spec import CircuitShiftSpec
from unweave.methods.train import stage as train
from unweave.methods.train.result import Training
from unweave.papers.feature_circuits import view
from unweave.papers.feature_circuits.plan import Plan, plan_of
from unweave.papers.feature_circuits.result import FeatureCircuits, Overlap, Part, PartRun, Structure
from unweave.papers.feature_circuits.spec import FeatureCircuitsSpec
from unweave.tasks.agreement import STRUCTURES

Parts = dict[tuple[Part, str | None], Run[Any]]
"""The finished runs that the result is made from, by part and structure."""


def run(spec: FeatureCircuitsSpec, runs: Path) -> Run[FeatureCircuits]:
    """Everything of the paper at one scale. The run holds the tables and ``report.html``.

    Every part is run each time, which costs little where it is finished, so that a page never shows other parts.
    """
    plan = plan_of(spec)
    trained = train.run(plan.training, runs) if plan.training is not None else None
    gc.collect()  # trainers and activations take gigabytes
    return together(spec, runs, _parts(spec, plan, trained, runs))


def _named(_spec: FeatureCircuitsSpec, parts: Parts) -> dict[str, str]:
    return {f"{part} {structure or ''}".strip(): run.path.name for (part, structure), run in parts.items()}


@stage("paper-feature-circuits", version=3, also=_named)
def together(spec: FeatureCircuitsSpec, ctx: Context) -> FeatureCircuits:
    """The result and pages of parts that are finished; the handle is ``Parts``."""
    parts: Parts = ctx.handle
    thresholds = plan_of(spec).thresholds
    clause, phrase = (Circuit.load(parts["find", name].file(FILE)) for name in ("across_rc", "across_pp"))
    result = FeatureCircuits(
        scale=spec.scale,
        subject=parts["find", "across_pp"].result.subject,
        structures=tuple(Structure(name, parts["evaluate", name].result) for name in STRUCTURES),
        overlap=overlap(clause, phrase, (thresholds["across_rc"][0], thresholds["across_pp"][0])),
        shift=parts["shift", None].result,
        behaviours=parts["behaviours", None].result,
        runs=tuple(PartRun(part, structure, run.path.name) for (part, structure), run in parts.items()),
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
    of: dict[str, Any] = {"saes": saes, "model": plan.model, "device": spec.device}
    parts: Parts = {} if trained is None else {("train", None): trained}
    for structure in STRUCTURES:
        node, edge = plan.thresholds[structure]
        limits = {"task": structure, "node_threshold": node, "edge_threshold": edge}
        parts["find", structure] = find.run(CircuitFindSpec.from_dict(of | limits | dict(plan.find)), runs)
    for structure in STRUCTURES:
        measured = CircuitEvaluateSpec(
            circuit=parts["find", structure].path, start_layer=plan.start_layer, device=spec.device
        )
        parts["evaluate", structure] = evaluate.run(measured, runs)
    for structure in STRUCTURES:
        parts["draw", structure] = draw.run(CircuitDrawSpec(circuit=parts["find", structure].path), runs)
    shifted = of | dict(plan.shift) | ({"biographies": spec.biographies} if spec.biographies is not None else {})
    if spec.annotations is not None:
        shifted |= {"judge": "file", "annotations": str(spec.annotations)}
        shifted.pop("data", None)
    parts["shift", None] = shift.run(CircuitShiftSpec.from_dict(shifted), runs)
    parts["behaviours", None] = behaviours.run(CircuitBehavioursSpec.from_dict(of | dict(plan.behaviours)), runs)
    return parts
