"""How faithful and complete a circuit is on other texts, beside neurons and random nodes (the paper's Figure 3)."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unweave.circuits.faithfulness import Ablation, ablated_sites
from unweave.circuits.graph import Circuit
from unweave.circuits.opened import open_circuit
from unweave.core.contents import content_of
from unweave.core.errors import UnweaveError
from unweave.core.files import read_json
from unweave.core.run import Run, atomic_write, write_json
from unweave.core.site import Site
from unweave.core.spec import digest
from unweave.inputs.saes import Opened, digest_of, open_saes
from unweave.methods.circuits import stage_find as find
from unweave.methods.circuits.figures import FEATURES, NEURONS, faithfulness_figure
from unweave.methods.circuits.spec import CircuitEvaluateSpec, CircuitFindSpec
from unweave.methods.circuits.stage_examples import INPUTS, PAIRS, Examples, accuracy_row, examples_of, file_digests
from unweave.methods.circuits.sweep import PAPER_THRESHOLDS, Errors, Sweep, spread_thresholds, sweep
from unweave.show.plots import png
from unweave.tasks import agreement, answers

VERSION = 3
NAMES: dict[Errors, str] = {
    "default": FEATURES,
    "remove-attn-mlp": "without attention and MLP errors",
    "remove": "without errors",
    "keep": "all errors kept",
}
"""what each way with errors is called in figures and tables"""


@dataclass(frozen=True)
class Found:
    """A finished search and what it asked."""

    run: Run
    spec: CircuitFindSpec
    circuit: Circuit

    @property
    def known(self) -> set[str]:
        """The texts it was found on."""
        if (self.run.path / INPUTS).exists():
            return {given.context for given in answers.load(self.run.file(INPUTS))}
        pairs = agreement.load(self.run.file(PAIRS))
        return {text for pair in pairs for text in (pair.clean_prefix, pair.patch_prefix)}

    @property
    def width(self) -> int | None:
        """How many tokens its texts have, where positions are kept."""
        return next(iter(self.circuit.nodes.values())).shape[0] if self.circuit.positions else None


def found_circuit(folder: Path, saes: tuple[str, ...] = (), device: str | None = None) -> Found:
    """A finished ``circuit find``; ``saes`` says where its autoencoders are now.

    Raises UnweaveError for a folder of anything else, and for autoencoders that are not those of the search.
    """
    run = Run.at(folder)
    asked = run.asked
    if asked["stage"] != "circuit-find" or not run.done:
        raise UnweaveError(
            "this is no finished circuit find", where=str(folder), remedy="give the run directory that it printed"
        )
    spec = CircuitFindSpec.from_dict(asked["spec"], where=str(folder))
    drawn_from = open_circuit(run.path)
    of = drawn_from.saes_spec(saes)
    spec = replace(spec, device=device, saes=of.saes if of is not None else ())
    now = digest_of(spec).get("saes")
    if now != asked["inputs"].get("saes"):
        raise UnweaveError(
            "these autoencoders are not those that the circuit was found with",
            where=", ".join(spec.saes),
            remedy="name where those are with --saes, or find the circuit anew",
        )
    return Found(run, spec, drawn_from.circuit)


def run(spec: CircuitEvaluateSpec, runs: Path) -> Run:
    """Sweeps over thresholds for the circuit in each way with errors and for neurons; figure, table and numbers."""
    found = found_circuit(spec.circuit, spec.saes, spec.device)
    # What was asked says which examples and which neurons belong to the circuit; folders may have any name.
    inputs = {"circuit": content_of(found.run.path / find.CIRCUIT), "asked": found.spec.digest()}
    inputs |= file_digests(spec.pairs, spec.inputs)
    with Run.open(runs, "circuit-evaluate", spec, version=VERSION, inputs=inputs) as run:
        if run.done:
            return run
        opened = open_saes(found.spec)
        examples = _examples(spec, found, opened)
        start_layer = spec.start_layer
        if start_layer is None:
            start_layer = min((site.layer for site in opened.saes if site.layer is not None), default=-1)
        curves = _Curves(spec, run, examples, start_layer, found.spec.skip_first)
        for errors in spec.errors:
            curves.add(NAMES[errors], opened, found.circuit, errors)
        if spec.neurons:
            units, circuit, neuron_run = _neurons(found, opened, runs)
            curves.add(NEURONS, units, circuit, "default")
            run.log("neurons", {"run": str(neuron_run.path.name)})
        result = _result(spec, found, examples, curves.found, start_layer)
        title = f"{find.task_of(found.spec)[:1].upper()}{find.task_of(found.spec)[1:]}"
        title += " (the model does not do this task)" if examples.about.get("problem") else ""
        figure = faithfulness_figure(curves.found, level=spec.level, title=title)
        with atomic_write(run.path / "faithfulness.png") as temporary:
            temporary.write_bytes(png(figure))
        write_json(run.path / "faithfulness.json", {name: curve.to_dict() for name, curve in curves.found.items()})
        with atomic_write(run.path / "faithfulness.csv") as temporary:
            temporary.write_text(table(curves.found), encoding="utf-8")
        run.finish(opened.record | result)
    return run


class _Curves:
    """Sweeps by name; each is written when it is finished, and read where it was before an interruption."""

    def __init__(
        self, spec: CircuitEvaluateSpec, run: Run, examples: Examples, start_layer: int, skip_first: int
    ) -> None:
        self.spec, self.run, self.examples = spec, run, examples
        self.start_layer, self.skip_first = start_layer, skip_first
        self.found: dict[str, Sweep] = {}

    def add(self, name: str, opened: Opened, circuit: Circuit, errors: Errors) -> None:
        path = self.run.path / "curves" / f"{digest(name)}.json"
        if path.exists():
            self.found[name] = _read_curve(path)
            return
        spec = self.spec
        sites = list(ablated_sites(opened.lm, opened.saes, self.start_layer))
        self.found[name] = sweep(
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
        write_json(path, self.found[name].to_dict())

    def _thresholds(self, circuit: Circuit, sites: list[Site]) -> list[float]:
        if self.spec.thresholds:
            return list(self.spec.thresholds)
        return spread_thresholds(circuit, sites) if self.spec.spaced == "range" else list(PAPER_THRESHOLDS)

    def _ablation(self) -> Ablation:
        paired = self.examples.batches[0][1] is not None
        return self.spec.ablation or ("patch" if paired else "clean")


def _read_curve(path: Path) -> Sweep:
    try:
        return Sweep.from_dict(read_json(path))
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        what = "this curve is damaged"
        raise UnweaveError(what, where=str(path), remedy="delete this file and run again") from error


def _examples(spec: CircuitEvaluateSpec, found: Found, opened: Opened) -> Examples:
    """Texts that the circuit was not found on: those given, or the test split of its task."""
    given = spec.pairs is not None or spec.inputs is not None
    asked = found.spec
    if (spec.inputs is not None) != (asked.inputs is not None) and given:
        kinds = ("pairs", "single texts") if asked.inputs is None else ("single texts", "pairs")
        raise UnweaveError(f"the circuit is one of {kinds[0]}, not of {kinds[1]}", where=str(spec.circuit))
    if not given and (asked.pairs is not None or asked.inputs is not None or asked.split == "test"):
        raise UnweaveError(
            "a circuit must be measured on other texts than it was found on",
            where=find.task_of(asked),
            remedy="give some with --inputs" if asked.inputs is not None else "give some with --pairs",
        )
    task = None if given else asked.task
    wanted = replace(
        asked, task=task, pairs=spec.pairs, inputs=spec.inputs, examples=spec.examples, seed=spec.seed,
        split="train" if given else "test",
    )  # fmt: skip
    return examples_of(opened.lm, wanted, known=found.known, width=found.width)


def _neurons(found: Found, opened: Opened, runs: Path) -> tuple[Opened, Circuit, Run]:
    """The circuit of neurons at the same sites of the same model, found with the same options on the same examples."""
    spec = found.spec
    model = spec.model
    if model is None:
        model = next(sae.provenance["train"]["model"] for sae in opened.saes.values() if "train" in sae.provenance)
    sites = tuple(str(site) for site in opened.saes)
    same = replace(
        spec, saes=(), sites=(), accept_mismatch=None, neurons=sites, model=model, edges=False,
        edge_threshold=CircuitFindSpec.edge_threshold, upstream=CircuitFindSpec.upstream,
    )  # fmt: skip
    run = find.run(same, runs, opened.lm)
    return open_saes(same, opened.lm), Circuit.load(run.file(find.CIRCUIT)), run


def table(curves: dict[str, Sweep]) -> str:
    """All rows as CSV."""
    out = io.StringIO()
    names = ("threshold", "nodes", "latents", "errors", "faithfulness", "completeness", "random")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("circuit", *names))
    for name, curve in curves.items():
        writer.writerows((name, *(getattr(row, column) for column in names)) for row in curve.rows)
    return out.getvalue()


def _result(
    spec: CircuitEvaluateSpec, found: Found, examples: Examples, curves: dict[str, Sweep], start_layer: int
) -> dict[str, Any]:
    first = next(iter(curves.values()))
    level, problem = spec.level, examples.about.get("problem")
    reached = {
        name: {"nodes": curve.nodes_for(level), "random": curve.random_nodes_for(level), "all": curve.changing}
        for name, curve in curves.items()
    }
    rows = []
    for name, numbers in reached.items():
        nodes, random = ("never" if n is None else f"{n:,.0f}" for n in (numbers["nodes"], numbers["random"]))
        beside = f"; random ones: {random}" if spec.draws else ""
        if problem:
            rows.append([name, "-", "the model does not do this task, see its right answers"])
            continue
        rows.append([name, nodes, f"nodes for faithfulness {level:g}, of {numbers['all']:,}{beside}"])
    left = "; ".join(f"{n} left out: {why}" for why, n in examples.about["skipped"].items())
    return {
        "circuit": found.run.path.name,
        "task": find.task_of(found.spec),
        "examples": examples.about,
        "start_layer": start_layer,
        "means": first.means,
        "metric": {"model": first.model, "empty": first.empty},
        "level": level,
        "reached": reached,
        "figure": "faithfulness.png",
        "table": "faithfulness.csv",
        "summary": [
            ["task", find.task_of(found.spec), ""],
            ["examples", examples.about["examples"], left],
            *accuracy_row(examples.about),
            ["metric of the model", first.model, "mean"],
            ["metric of no nodes", first.empty, f"everything from layer {start_layer} on ablated"],
            *rows,
            ["figure", "faithfulness.png", "faithfulness and completeness over the number of nodes"],
        ],
    }
