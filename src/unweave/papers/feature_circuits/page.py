"""The recipe's outcome as tables, figures, claims and one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unweave.circuits.graph import Circuit
from unweave.circuits.opened import FILE
from unweave.core.run import Run, atomic_write
from unweave.methods.behaviours import view as behaviours_view
from unweave.methods.behaviours.result import BehavioursResult
from unweave.methods.circuits.figures import curve_name
from unweave.methods.circuits.result import Errors, Faithfulness, Reached
from unweave.methods.shift import view as shift_view
from unweave.methods.shift.result import LEAST_GAP, Method, ShiftResult
from unweave.papers.claims import Claim, Verdict, markdown
from unweave.papers.feature_circuits.plan import Plan
from unweave.papers.feature_circuits.spec import FeatureCircuitsSpec
from unweave.papers.page import claims_html, document, figure
from unweave.show.pieces import esc, table

if TYPE_CHECKING:
    from unweave.papers.feature_circuits.recipe import Parts

_LEVEL = 0.8
_TIMES = 5
"""how many times fewer nodes than neurons, or random ones, count as few; the paper has fifteen times and more"""
_MUCH = 0.8
"""below this share of what is reached otherwise, much is lost"""
_RANDOM_AT_MOST = 0.1
"""the share of SHIFT's gap that random latents may close"""


def write(folder: Path, spec: FeatureCircuitsSpec, plan: Plan, parts: Parts) -> dict[str, Any]:
    """Writes ``table.md``, ``claims.md``, figures and ``report.html``; returns the run's result."""
    circuits = {name: Circuit.load(run.file(FILE)) for name, run in parts.found.items()}
    limits = (plan.thresholds["across_rc"][0], plan.thresholds["across_pp"][0])
    shared = overlap(circuits["across_rc"], circuits["across_pp"], limits)
    measured = {name: run.result for name, run in parts.evaluated.items()}
    claims = [*_agreement_claims(measured, shared), _shift_claim(parts.shifted.result)]
    claims.append(_behaviour_claim(parts.behaviours.result))
    heads, rows = ["structure", *_reached_heads()], [[name, *_reached(result)] for name, result in measured.items()]
    text = _markdown_table(heads, rows) + "\n" + shift_view.markdown(parts.shifted.result)
    _write_text(folder / "table.md", text)
    _write_text(folder / "claims.md", markdown(claims))
    sections = {
        "Claims": claims_html(claims),
        "How many nodes carry a behaviour": table([esc(h) for h in heads], [[esc(c) for c in row] for row in rows])
        + "".join(_curve_figure(run, name) for name, run in parts.evaluated.items()),
        "The circuit across a prepositional phrase": parts.drawn["across_pp"]
        .file("circuit.svg")
        .read_text(encoding="utf-8"),
        "SHIFT": shift_view.section(parts.shifted.result).body,
        "Behaviours": _behaviours_html(parts.behaviours),
    }
    subject = parts.found["across_pp"].result.subject
    lead = f"{subject.named_model}; {', '.join(str(sae.site) for sae in subject.saes)}; {spec.scale} scale."
    html = document("Sparse feature circuits", "Sparse feature circuits", lead, sections)
    _write_text(folder / "report.html", html)
    return {
        "summary": _summary(parts, shared),
        "claims": [claim.to_dict() for claim in claims],
        "overlap": {"latents": shared.sizes, "shared": shared.shared, "shared with errors": shared.with_errors},
        "report": "report.html",
        "table": "table.md",
    }


@dataclass(frozen=True)
class Overlap:
    """What two circuits have in common, positions apart: latents alone, and errors too."""

    sizes: tuple[int, int]
    shared: int
    with_errors: int

    @property
    def share(self) -> float | None:
        """Shared latents among those of the smaller circuit; None where one has none."""
        return self.shared / min(self.sizes) if min(self.sizes) else None


def overlap(a: Circuit, b: Circuit, thresholds: tuple[float, float]) -> Overlap:
    """The nodes that both circuits have, each above its threshold."""
    sets = [
        {(str(node.site), node.slot, node.is_error) for node in circuit.above(threshold)}
        for circuit, threshold in zip((a, b), thresholds, strict=True)
    ]
    latents = [{node for node in nodes if not node[2]} for nodes in sets]
    return Overlap((len(latents[0]), len(latents[1])), len(latents[0] & latents[1]), len(sets[0] & sets[1]))


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# -- agreement --------------------------------------------------------------------------------------------------------


def _reached_heads() -> list[str]:
    features, neurons = curve_name("default", False), curve_name("default", True)
    return [f"{features}: nodes for {_LEVEL:g}", "random nodes for it", f"{neurons}: nodes for {_LEVEL:g}", "random"]


def _of(result: Faithfulness, errors: Errors = "default", neurons: bool = False) -> Reached:
    """How many nodes one of the curves takes."""
    return next(one for one in result.reached if (one.errors, one.neurons) == (errors, neurons))


def _reached(result: Faithfulness) -> list[str]:
    cells = []
    for one in (_of(result), _of(result, neurons=True)):
        for value in (one.nodes, one.random_nodes):
            cells.append(f"never (of {one.changing:,})" if value is None else f"{value:,.0f}")
    return cells


def _highest(result: Faithfulness, errors: Errors) -> float:
    """The highest faithfulness with errors treated so, 1 at most."""
    curve = result.curve(errors)
    assert curve is not None
    return min(1.0, max(row.faithfulness for row in curve.rows))


def _agreement_claims(measured: Mapping[str, Faithfulness], shared: Overlap) -> list[Claim]:
    def words(errors: Errors = "default", neurons: bool = False, random: bool = False) -> str:
        curves = {name: _of(result, errors, neurons) for name, result in measured.items()}
        values = {name: one.random_nodes if random else one.nodes for name, one in curves.items()}
        return ", ".join(f"{name} {'never' if v is None else f'{v:,.0f}'}" for name, v in values.items())

    few = []
    for result in measured.values():
        latents, neurons = _of(result), _of(result, neurons=True)
        few.append(_fewer(latents.nodes, neurons.nodes) and _fewer(latents.nodes, latents.random_nodes))
    none = {name: _highest(result, "remove") for name, result in measured.items()}
    inner = {name: _highest(result, "remove-attn-mlp") for name, result in measured.items()}
    lost = [none[name] < _MUCH * inner[name] for name in none]
    share = shared.share
    return [
        Claim(
            "small circuits of latents and errors explain most of the behaviour (about 100 nodes in Pythia-70M, 500 in "
            "Gemma-2-2B), where half of it takes about 1,500 (50,000) neurons",
            f"nodes for a faithfulness of {_LEVEL:g} on held-out sentences: {words()}; without errors: "
            f"{words('remove')}; neurons: {words(neurons=True)}; random nodes: {words(random=True)}",
            _verdict(few),
        ),
        Claim(
            "without residual errors circuits lose much of what they can reach, without attention and MLP errors less",
            f"the highest faithfulness without any errors: {_numbers(none)}; without those of attention and MLPs only: "
            f"{_numbers(inner)}",
            _verdict(lost),
        ),
        Claim(
            "the circuits across a relative clause and across a prepositional phrase share over 85 % of their nodes",
            f"{shared.shared} latents are in both, positions apart, of {shared.sizes[0]} and {shared.sizes[1]}; with "
            f"errors {shared.with_errors} nodes are",
            "not measured" if share is None else "as claimed" if share > 0.85 else "not as claimed",
        ),
    ]


def _fewer(features: float | None, others: float | None) -> bool:
    """Whether latents need several times fewer nodes."""
    return features is not None and (others is None or others > _TIMES * features)


def _numbers(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in values.items())


def _verdict(holds: list[bool]) -> Verdict:
    return "as claimed" if all(holds) else "partly" if any(holds) else "not as claimed"


def _curve_figure(run: Run, structure: str) -> str:
    caption = (
        f"{structure.replace('_', ' ')}: faithfulness of the circuit alone, and of everything but it, on sentences "
        "that it was not found on. Dotted: as many random nodes."
    )
    return figure(run.file("faithfulness.png").read_bytes(), caption)


# -- SHIFT ------------------------------------------------------------------------------------------------------------


def _shift_claim(result: ShiftResult) -> Claim:
    shown: tuple[Method, ...] = ("original", "random", "shift", "retrain", "features", "neurons", "oracle")
    worst = ", ".join(f"{shift_view.NAMES[name]} {shift_view.accuracy(result, name, 'worst')}" for name in shown)
    back, random = result.recovered("shift"), result.recovered("random") or 0.0
    share = "-" if back is None else f"{100 * back:.0f} %"
    ours = f"worst group, %: {worst}; SHIFT makes good {share} of the gap of {100 * result.gap:.0f} points"
    notes = [note for note in (result.biographies_note, *shift_view.warnings(result)) if note]
    better = result.mean("retrain", "worst") >= result.mean("shift", "worst")
    verdict: Verdict = "partly"
    if result.gap < LEAST_GAP or back is None:
        verdict = "not measured"  # nothing to recover
    elif back <= 2 * random:
        verdict = "not as claimed"
    elif back >= 0.5 and better and random < _RANDOM_AT_MOST:
        verdict = "as claimed"
    claim = (
        "SHIFT lifts the worst group's accuracy from 24.4 % to 76.0 %, with retraining to 89.0 % (Pythia-70M); random "
        "latents do not"
    )
    return Claim(claim, ours + (f" ({'; '.join(notes)})" if notes else ""), verdict)


# -- behaviours -------------------------------------------------------------------------------------------------------


def _behaviour_claim(result: BehavioursResult) -> Claim:
    means = result.coherence()
    coherence = "" if means is None else f"clusters {means[0]:.3f}, random {means[1]:.3f}"
    return Claim(
        "circuits are found without supervision for thousands of behaviours that clustering discovers",
        f"{len(result.behaviours)} behaviours with a circuit each, of {len(result.clusters)} clusters; coherence: "
        f"{coherence}",
        "not measured",  # how clear the clusters are was judged by people in the paper, and by nobody here
    )


def _behaviours_html(run: Run[BehavioursResult]) -> str:
    rows = [[esc(cell) for cell in row] for row in behaviours_view.listing(run.result)]
    return table(["behaviour", "what comes next", "size"], rows) + (
        f"<p>Contexts and circuits of each: <code>{esc(run.path.name)}/{behaviours_view.INDEX}</code>.</p>"
    )


# -- tables -----------------------------------------------------------------------------------------------------------


def _markdown_table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _summary(parts: Parts, shared: Overlap) -> list[list[Any]]:
    rows: list[list[Any]] = []
    for name, run in parts.evaluated.items():
        features, random, neurons, _ = _reached(run.result)
        rows.append([f"nodes for {_LEVEL:g}: {name}", features, f"random: {random}; neurons: {neurons}"])
    rows.append(["latents in both across RC and PP", shared.shared, f"of {shared.sizes[0]} and {shared.sizes[1]}"])
    methods: tuple[Method, ...] = ("original", "random", "shift", "retrain", "oracle")
    names = [shift_view.NAMES[method] for method in methods]
    rows += [list(row) for row in parts.shifted.result.rows() if row[0] in names]
    discovered = parts.behaviours
    rows.append(
        ["behaviours", len(discovered.result.behaviours), f"page: {discovered.path.name}/{behaviours_view.INDEX}"]
    )
    return rows
