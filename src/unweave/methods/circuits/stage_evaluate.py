"""How faithful and complete a circuit is on other texts, beside neurons and random nodes (the paper's Figure 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unweave.circuits.about import Ablation
from unweave.circuits.faithfulness import ablated_sites
from unweave.circuits.graph import Circuit
from unweave.circuits.opened import FILE, StoredCircuit, open_circuit
from unweave.core.errors import UnweaveError
from unweave.core.run import Run
from unweave.core.site import Site
from unweave.core.stage import Context, stage
from unweave.core.writing import write_file
from unweave.inputs import identity
from unweave.inputs.saes import Opened, open_saes
from unweave.methods.circuits import stage_find as find
from unweave.methods.circuits import view
from unweave.methods.circuits.result import Errors, Faithfulness, Reached, Sweep
from unweave.methods.circuits.spec import CircuitEvaluateSpec, CircuitFindSpec
from unweave.methods.circuits.sweep import PAPER_THRESHOLDS, spread_thresholds, sweep
from unweave.methods.circuits.texts import INPUTS, PAIRS, Examples, examples_of
from unweave.tasks import agreement, answers


@dataclass(frozen=True)
class Asked:
    """A finished search: its run, its circuit, and its question with the SAEs where they are now."""

    run: Run[Any]
    stored: StoredCircuit
    spec: CircuitFindSpec

    @property
    def known(self) -> set[str]:
        """The texts that the circuit was found on."""
        if (self.run.path / INPUTS).exists():
            return {given.context for given in answers.load(self.run.file(INPUTS))}
        pairs = agreement.load(self.run.file(PAIRS))
        return {text for pair in pairs for text in (pair.clean_prefix, pair.patch_prefix)}

    @property
    def width(self) -> int | None:
        """How many tokens its texts have, where positions are kept."""
        circuit = self.stored.circuit
        return next(iter(circuit.nodes.values())).shape[0] if circuit.positions else None


def asked_of(spec: CircuitEvaluateSpec) -> Asked:
    """The finished ``circuit find`` that is asked about. No weights are loaded.

    Raises UnweaveError for a folder of anything else, and for SAEs that are not those of the search.
    """
    run = Run.at(spec.circuit)
    asked = run.asked
    if asked["stage"] != "circuit-find" or not run.done:
        raise UnweaveError(
            "this is no finished circuit find", where=str(spec.circuit), remedy="give the run directory that it printed"
        )
    stored = open_circuit(run.path)
    of = stored.saes_spec(spec.saes)
    known = CircuitFindSpec.from_dict(asked["spec"], where=str(spec.circuit))
    now = replace(known, device=spec.device, saes=of.saes if of is not None else ())
    if identity.saes(now.saes) != asked["inputs"].get("saes", ""):
        raise UnweaveError(
            "these SAEs are not those that the circuit was found with",
            where=", ".join(now.saes),
            remedy="name where those are with --saes, or find the circuit anew",
        )
    return Asked(run, stored, now)


def _question(spec: CircuitEvaluateSpec, _handle: Any) -> dict[str, str]:
    """What was asked says which examples and neurons belong to the circuit; folders may have any name."""
    asked = asked_of(spec)
    return {"asked": asked.spec.digest(), "saes": identity.saes(asked.spec.saes)}


@stage("circuit-evaluate", version=4, also=_question)
def run(spec: CircuitEvaluateSpec, ctx: Context) -> Faithfulness:
    """Sweeps over thresholds for the circuit in each way with errors and for neurons; figure and table."""
    asked = asked_of(spec)
    opened = open_saes(asked.spec)
    examples = _examples(spec, asked, opened)
    first = spec.start_layer
    if first is None:
        first = min((site.layer for site in opened.saes if site.layer is not None), default=-1)
    curves = _Curves(spec, ctx, examples, first, asked.spec.skip_first)
    circuit = asked.stored.circuit
    for errors in dict.fromkeys(spec.errors):
        curves.add(opened, circuit, errors)
    if spec.neurons and not circuit.about.neurons:
        curves.add(*_neurons(asked, opened, ctx))
    result = Faithfulness(
        subject=opened.subject,
        circuit=asked.run.path.name,
        task=find.task_of(asked.spec),
        used=examples.used,
        level=spec.level,
        reached=tuple(_reached(curve, spec.level) for curve in curves.sweeps),
        curves=tuple(curves.sweeps),
        figure=Path("faithfulness.png"),
        table=Path("faithfulness.csv"),
    )
    write_file(ctx.path / result.figure, view.curves_png(result))
    write_file(ctx.path / result.table, view.curves_csv(result))
    return result


def _reached(curve: Sweep, level: float) -> Reached:
    nodes, random = curve.nodes_for(level), curve.random_nodes_for(level)
    return Reached(curve.neurons, curve.errors, nodes, random, curve.changing)


class _Curves:
    """Sweeps; each is a piece that an interruption leaves."""

    def __init__(
        self, spec: CircuitEvaluateSpec, ctx: Context, examples: Examples, start_layer: int, skip_first: int
    ) -> None:
        self.spec, self.ctx, self.examples = spec, ctx, examples
        self.start_layer, self.skip_first = start_layer, skip_first
        self.sweeps: list[Sweep] = []

    def add(self, opened: Opened, circuit: Circuit, errors: Errors) -> None:
        """The circuit's, with its errors treated as ``errors`` says."""
        name = f"{'neurons' if circuit.about.neurons else 'latents'}-{errors}"
        self.sweeps.append(self.ctx.pieces.value(name, Sweep, lambda: self._sweep(opened, circuit, errors)))

    def _sweep(self, opened: Opened, circuit: Circuit, errors: Errors) -> Sweep:
        spec = self.spec
        sites = list(ablated_sites(opened.lm, opened.saes, self.start_layer))
        return sweep(
            opened.lm,
            opened.saes,
            self.examples.batches,
            circuit,
            thresholds=self._thresholds(circuit, sites),
            start_layer=self.start_layer,
            errors=errors,
            ablation=self._ablation(),
            draws=spec.draws,
            seed=spec.seed,
            skip_first=self.skip_first,
            max_tokens=spec.max_tokens,
        )

    def _thresholds(self, circuit: Circuit, sites: Sequence[Site]) -> list[float]:
        if self.spec.thresholds:
            return list(self.spec.thresholds)
        return spread_thresholds(circuit, sites) if self.spec.spaced == "range" else list(PAPER_THRESHOLDS)

    def _ablation(self) -> Ablation:
        paired = self.examples.batches[0][1] is not None
        return self.spec.ablation or ("patch" if paired else "clean")


def _examples(spec: CircuitEvaluateSpec, asked: Asked, opened: Opened) -> Examples:
    """Texts that the circuit was not found on: those given, or the test split of its task."""
    given = spec.pairs is not None or spec.inputs is not None
    of = asked.spec
    if (spec.inputs is not None) != (of.inputs is not None) and given:
        kinds = ("pairs", "single texts") if of.inputs is None else ("single texts", "pairs")
        raise UnweaveError(f"the circuit is one of {kinds[0]}, not of {kinds[1]}", where=str(spec.circuit))
    if not given and (of.pairs is not None or of.inputs is not None or of.split == "test"):
        raise UnweaveError(
            "a circuit must be measured on other texts than it was found on",
            where=find.task_of(of),
            remedy="give some with --inputs" if of.inputs is not None else "give some with --pairs",
        )
    task = None if given else of.task
    wanted = replace(
        of, task=task, pairs=spec.pairs, inputs=spec.inputs, examples=spec.examples, seed=spec.seed,
        split="train" if given else "test",
    )  # fmt: skip
    return examples_of(opened.lm, wanted, known=asked.known, width=asked.width)


def _neurons(asked: Asked, opened: Opened, ctx: Context) -> tuple[Opened, Circuit, Errors]:
    """The circuit of neurons at the same sites of the same model, found with the same options on the same examples."""
    sites = tuple(str(site) for site in opened.saes)
    same = replace(
        asked.spec, saes=(), sites=(), accept_mismatch=None, neurons=sites, model=opened.model, edges=False,
        edge_threshold=CircuitFindSpec.edge_threshold, upstream=CircuitFindSpec.upstream,
    )  # fmt: skip
    run = find.run(same, ctx.runs, opened.lm)
    ctx.log("neurons", {"run": run.path.name})
    return open_saes(same, opened.lm), Circuit.load(run.file(FILE)), "default"
