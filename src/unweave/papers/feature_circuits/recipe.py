"""The paper from text to table: SAEs, the circuits of four structures, SHIFT, behaviours, a page.

Each part is a run of its own, so an interrupted recipe goes on where it was and a finished part is not done again.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unweave.core.run import Run
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
from unweave.papers.feature_circuits import page
from unweave.papers.feature_circuits.plan import Plan, plan_of
from unweave.papers.feature_circuits.spec import FeatureCircuitsSpec
from unweave.tasks.agreement import STRUCTURES

VERSION = 1


@dataclass(frozen=True)
class Parts:
    """The finished runs that the page is made from; agreement's by structure."""

    trained: Run | None
    found: Mapping[str, Run[CircuitSearch]]
    evaluated: Mapping[str, Run[Faithfulness]]
    drawn: Mapping[str, Run[Drawing]]
    shifted: Run[ShiftResult]
    behaviours: Run[BehavioursResult]

    def all(self) -> dict[str, Run]:
        """Every run by a name for people."""
        named = {"train": self.trained} if self.trained is not None else {}
        for kind, runs in (("find", self.found), ("evaluate", self.evaluated), ("draw", self.drawn)):
            named |= {f"{kind} {structure}": run for structure, run in runs.items()}
        return named | {"SHIFT": self.shifted, "behaviours": self.behaviours}


def run(spec: FeatureCircuitsSpec, runs: Path) -> Run:
    """Everything of the paper at one scale. The run holds the tables, the figures and ``report.html``.

    Parts are asked for every time, at little cost where they are finished, so that a page is never of other parts.
    """
    plan = plan_of(spec)
    inputs = {"training": plan.training.digest()} if plan.training is not None else {}
    with Run.open(runs, "paper-feature-circuits", spec, version=VERSION, inputs=inputs) as done:
        trained = train.run(plan.training, runs) if plan.training is not None else None
        gc.collect()  # trainers and activations take gigabytes
        parts = _parts(spec, plan, trained, runs)
        names = {name: part.path.name for name, part in parts.all().items()}
        if done.done and done.result["runs"] == names:
            return done
        done.reused = False
        result = page.write(done.path, spec, plan, parts)
        done.finish(result | {"runs": names})
    return done


def _parts(spec: FeatureCircuitsSpec, plan: Plan, trained: Run | None, runs: Path) -> Parts:
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
