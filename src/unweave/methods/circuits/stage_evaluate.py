"""How faithful and complete a circuit is on other texts, beside neurons and random nodes (the paper's Figure 3)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unweave.circuits.faithfulness import ablated_sites
from unweave.circuits.graph import Circuit
from unweave.circuits.opened import FILE, StoredCircuit, open_circuit
from unweave.core.errors import UnweaveError
from unweave.core.run import Run
from unweave.core.stage import Context, stage
from unweave.core.writing import write_file
from unweave.inputs import identity
from unweave.inputs.saes import Opened, open_saes
from unweave.methods.circuits import figures, view
from unweave.methods.circuits import stage_find as find
from unweave.methods.circuits.result import Errors, Faithfulness, Sweep
from unweave.methods.circuits.spec import CircuitEvaluateSpec, CircuitFindSpec
from unweave.methods.circuits.sweep import PAPER_THRESHOLDS, SweepOptions, spread_thresholds, sweep
from unweave.methods.circuits.texts import Examples, examples_of, texts_in


@dataclass(frozen=True)
class FinishedSearch:
    """A finished search: its run, its circuit, and its question with the SAEs where they are now."""

    run: Run[Any]
    stored: StoredCircuit
    spec: CircuitFindSpec

    @property
    def width(self) -> int | None:
        """How many tokens its texts have, where positions are kept."""
        circuit = self.stored.circuit
        return next(iter(circuit.nodes.values())).shape[0] if circuit.positions else None


def search_of(spec: CircuitEvaluateSpec) -> FinishedSearch:
    """The finished ``circuit find`` that is to be measured. No weights are loaded.

    Raises UnweaveError for a folder of anything else, and for SAEs that are not those of the search.
    """
    run = Run.at(spec.circuit)
    if run.asked["stage"] != "circuit-find" or not run.done:
        raise UnweaveError(
            "this is no finished circuit find", where=str(spec.circuit), remedy="give the run directory that it printed"
        )
    stored = open_circuit(run.path)
    of = stored.saes_spec(spec.saes)
    known = CircuitFindSpec.from_dict(run.spec, where=str(spec.circuit))
    now = replace(known, device=spec.device, saes=of.saes if of is not None else ())
    if identity.saes(now.saes) != run.asked["inputs"].get("saes", ""):
        what = "these SAEs are not those that the circuit was found with"
        remedy = "name where those are with --saes, or find the circuit anew"
        raise UnweaveError(what, where=", ".join(now.saes), remedy=remedy)
    return FinishedSearch(run, stored, now)


def _also(spec: CircuitEvaluateSpec, _handle: Any) -> dict[str, str]:
    """The search's question says which examples and neurons belong to the circuit; folders may have any name."""
    search = search_of(spec)
    return {"asked": search.spec.digest(), "saes": identity.saes(search.spec.saes)}


@stage("circuit-evaluate", version=5, also=_also)
def run(spec: CircuitEvaluateSpec, ctx: Context) -> Faithfulness:
    """Sweeps over thresholds for the circuit in each way with errors and for neurons; figure and table."""
    search = search_of(spec)
    opened, circuit = open_saes(search.spec), search.stored.circuit
    examples = _examples(spec, search, opened)
    first = min((site.layer for site in opened.saes if site.layer is not None), default=-1)
    options = SweepOptions(
        start_layer=first if spec.start_layer is None else spec.start_layer,
        ablation=spec.ablation or ("clean" if examples.used.accuracy is None else "patch"),
        skip_first=search.spec.skip_first,
        draws=spec.draws,
        seed=spec.seed,
        max_tokens=spec.max_tokens,
    )

    def curve(opened: Opened, circuit: Circuit, errors: Errors) -> Sweep:
        """A piece that an interruption leaves."""
        lm, saes = opened.lm, opened.saes

        def work() -> Sweep:
            thresholds = spec.thresholds or PAPER_THRESHOLDS
            if not spec.thresholds and spec.spaced == "range":
                thresholds = spread_thresholds(circuit, list(ablated_sites(lm, saes, options.start_layer)))
            return sweep(lm, saes, examples.batches, circuit, replace(options, errors=errors), thresholds)

        return ctx.pieces.value(f"{'neurons' if circuit.about.neurons else 'latents'}-{errors}", Sweep, work)

    curves = [curve(opened, circuit, errors) for errors in dict.fromkeys(spec.errors)]
    if spec.neurons and not circuit.about.neurons:
        curves.append(curve(*_neurons(search, opened, ctx), "default"))
    result = Faithfulness(
        subject=opened.subject,
        circuit=search.run.path.name,
        task=find.task_of(search.spec),
        used=examples.used,
        level=spec.level,
        reached=tuple(c.reached(spec.level) for c in curves),
        curves=tuple(curves),
        figure=Path("faithfulness.png"),
        table=Path("faithfulness.csv"),
    )
    write_file(ctx.path / result.figure, figures.curves_png(result))
    write_file(ctx.path / result.table, view.curves_csv(result))
    return result


def _examples(spec: CircuitEvaluateSpec, search: FinishedSearch, opened: Opened) -> Examples:
    """Texts that the circuit was not found on: those named, or the test split of its task."""
    named = spec.pairs is not None or spec.inputs is not None
    of = search.spec
    if (spec.inputs is not None) != (of.inputs is not None) and named:
        kinds = ("pairs", "single texts") if of.inputs is None else ("single texts", "pairs")
        raise UnweaveError(f"the circuit is one of {kinds[0]}, not of {kinds[1]}", where=str(spec.circuit))
    if not named and (of.pairs is not None or of.inputs is not None or of.split == "test"):
        what = "a circuit must be measured on other texts than it was found on"
        remedy = "give some with --inputs" if of.inputs is not None else "give some with --pairs"
        raise UnweaveError(what, where=find.task_of(of), remedy=remedy)
    wanted = replace(
        of, task=None if named else of.task, pairs=spec.pairs, inputs=spec.inputs, examples=spec.examples,
        seed=spec.seed, split="train" if named else "test",
    )  # fmt: skip
    return examples_of(opened.lm, wanted, known=texts_in(search.run), width=search.width)


def _neurons(search: FinishedSearch, opened: Opened, ctx: Context) -> tuple[Opened, Circuit]:
    """The circuit of neurons at the same sites of the same model, found with the same options on the same examples."""
    sites = tuple(str(site) for site in opened.saes)
    same = replace(
        search.spec, saes=(), sites=(), accept_mismatch=None, neurons=sites, model=opened.model, edges=False,
        edge_threshold=CircuitFindSpec.edge_threshold, upstream=CircuitFindSpec.upstream,
    )  # fmt: skip
    run = find.run(same, ctx.runs, opened.lm)
    ctx.log("neurons", {"run": run.path.name})
    return open_saes(same, opened.lm), Circuit.load(run.file(FILE))
