"""The recipe's outcome as tables, figures, claims and one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unweave.circuits.figures import FEATURES, NEURONS
from unweave.circuits.graph import Circuit
from unweave.core.run import Run, atomic_write, read_json
from unweave.jobs.circuit.find import CIRCUIT
from unweave.jobs.circuit.shift_table import FEATURES as FEATURE_SKYLINE
from unweave.jobs.circuit.shift_table import METHODS, ORACLE, ORIGINAL, RANDOM, RETRAIN, SHIFT
from unweave.papers.claims import Claim, Verdict, markdown
from unweave.papers.feature_circuits.plan import Plan
from unweave.papers.feature_circuits.spec import FeatureCircuitsSpec
from unweave.papers.page import claims_html, document, figure
from unweave.report.pieces import esc, table

if TYPE_CHECKING:
    from unweave.papers.feature_circuits.recipe import Parts

_LEVEL = 0.8
_NO_STREAM_ERRORS, _NO_INNER_ERRORS = "without errors", "without attention and MLP errors"


def write(folder: Path, spec: FeatureCircuitsSpec, plan: Plan, parts: Parts) -> dict[str, Any]:
    """Writes ``table.md``, ``claims.md``, figures and ``report.html``; returns the run's result."""
    circuits = {name: Circuit.load(run.path / CIRCUIT) for name, run in parts.found.items()}
    shared = overlap(circuits["across_rc"], circuits["across_pp"], plan.node_threshold)
    curves = {name: read_json(run.path / "faithfulness.json") for name, run in parts.evaluated.items()}
    claims = [*_agreement_claims(parts, curves, shared), *_shift_claims(parts.shifted), _behaviour_claim(parts)]
    heads, rows = ["structure", *_reached_heads()], [[name, *_reached(run)] for name, run in parts.evaluated.items()]
    text = _markdown_table(heads, rows) + "\n" + (parts.shifted.path / "table.md").read_text(encoding="utf-8")
    _write_text(folder / "table.md", text)
    _write_text(folder / "claims.md", markdown(claims))
    sections = {
        "Claims": claims_html(claims),
        "How many nodes carry a behaviour": table([esc(h) for h in heads], [[esc(c) for c in row] for row in rows])
        + "".join(_curve_figure(run, name) for name, run in parts.evaluated.items()),
        "The circuit across a prepositional phrase": (parts.drawn["across_pp"].path / "circuit.svg").read_text(
            encoding="utf-8"
        ),
        "SHIFT": _shift_html(parts.shifted),
        "Behaviours": _behaviours_html(parts.behaviours),
    }
    found = parts.found["across_pp"].result
    note = f" ({found['model_note']})" if found["model_note"] else ""
    lead = f"{found['model']}{note}; {', '.join(found['sites'])}; {spec.scale} scale."
    html = document("Sparse feature circuits", "Sparse feature circuits", lead, sections)
    _write_text(folder / "report.html", html)
    return {
        "summary": _summary(parts, shared),
        "claims": [claim.to_dict() for claim in claims],
        "overlap": shared,
        "report": "report.html",
        "table": "table.md",
    }


def overlap(a: Circuit, b: Circuit, threshold: float) -> float | None:
    """The share of the smaller circuit's nodes, positions apart, that the other has too; None where one is empty."""
    sets = [{(str(node.site), node.slot) for node in circuit.above(threshold)} for circuit in (a, b)]
    smaller = min(map(len, sets))
    return len(sets[0] & sets[1]) / smaller if smaller else None


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# -- agreement --------------------------------------------------------------------------------------------------------


def _reached_heads() -> list[str]:
    return [f"{FEATURES}: nodes for {_LEVEL:g}", "random nodes for it", f"{NEURONS}: nodes for {_LEVEL:g}", "random"]


def _reached(run: Run) -> list[str]:
    found = run.result["reached"]
    cells = []
    for name in (FEATURES, NEURONS):
        for kind in ("nodes", "random"):
            value = found[name][kind]
            cells.append(f"never (of {found[name]['all']:,})" if value is None else f"{value:,.0f}")
    return cells


def _agreement_claims(parts: Parts, curves: Mapping[str, Any], shared: float | None) -> list[Claim]:
    reached = {name: run.result["reached"] for name, run in parts.evaluated.items()}
    features = {name: found[FEATURES]["nodes"] for name, found in reached.items()}
    neurons = {name: found[NEURONS]["nodes"] for name, found in reached.items()}

    def words(values: Mapping[str, float | None]) -> str:
        return ", ".join(f"{name} {'never' if v is None else f'{v:,.0f}'}" for name, v in values.items())

    fewer = [_fewer(features[name], neurons[name]) for name in features]
    best = {
        name: max(row["faithfulness"] for row in curve[_NO_STREAM_ERRORS]["rows"]) for name, curve in curves.items()
    }
    inner = {
        name: max(row["faithfulness"] for row in curve[_NO_INNER_ERRORS]["rows"]) for name, curve in curves.items()
    }
    worse = [best[name] < inner[name] for name in best]
    return [
        Claim(
            "small circuits of latents and errors explain most of the behaviour (about 100 nodes in Pythia-70M, 500 in "
            "Gemma-2-2B), where half of it takes about 1,500 (50,000) neurons",
            f"nodes for a faithfulness of {_LEVEL:g} on held-out sentences: {words(features)}; of neurons: "
            f"{words(neurons)}",
            _verdict(fewer),
        ),
        Claim(
            "without residual errors circuits lose much of what they can reach, without attention and MLP errors less",
            "the highest faithfulness without any errors: "
            + ", ".join(f"{name} {value:.2f}" for name, value in best.items())
            + "; without those of attention and MLPs only: "
            + ", ".join(f"{name} {value:.2f}" for name, value in inner.items()),
            _verdict(worse),
        ),
        Claim(
            "the circuits across a relative clause and across a prepositional phrase share over 85 % of their nodes",
            "" if shared is None else f"they share {100 * shared:.0f} % of the smaller one's nodes, positions apart",
            "not measured" if shared is None else "as claimed" if shared > 0.85 else "not as claimed",
        ),
    ]


def _fewer(features: float | None, neurons: float | None) -> bool:
    return features is not None and (neurons is None or features < neurons)


def _verdict(holds: list[bool]) -> Verdict:
    return "as claimed" if all(holds) else "partly" if any(holds) else "not as claimed"


def _curve_figure(run: Run, structure: str) -> str:
    caption = (
        f"{structure.replace('_', ' ')}: faithfulness of the circuit alone, and of everything but it, on sentences "
        "that it was not found on. Dotted: as many random nodes."
    )
    return figure((run.path / "faithfulness.png").read_bytes(), caption)


# -- SHIFT ------------------------------------------------------------------------------------------------------------


def _shift_claims(run: Run) -> list[Claim]:
    found = run.result

    def worst(method: str) -> float:
        return found["table"][method]["worst"]["mean"]

    back, gap = found["recovered"], found["gap"]
    said = ", ".join(f"{m} {100 * worst(m):.1f} %" for m in (ORIGINAL, SHIFT, RETRAIN, RANDOM, FEATURE_SKYLINE, ORACLE))
    note = f" ({found['note']})" if found["note"] else ""
    enough = back[SHIFT] is not None and back[SHIFT] >= 0.5
    better = worst(SHIFT) > worst(RANDOM)
    share = "-" if back[SHIFT] is None else f"{100 * back[SHIFT]:.0f} %"
    return [
        Claim(
            "SHIFT lifts the worst group's accuracy from 24.4 % to 76.0 %, with retraining to 89.0 % (Pythia-70M); "
            "random latents do not",
            f"worst group: {said}; SHIFT makes good {share} of the gap of {100 * gap:.0f} points{note}",
            "as claimed" if enough and better else "partly" if better else "not as claimed",
        )
    ]


def _shift_html(run: Run) -> str:
    found = run.result["table"]
    rows = [
        [
            esc(method),
            *(f"{100 * found[method][m]['mean']:.1f} ± {100 * found[method][m]['std']:.1f}" for m in found[method]),
        ]
        for method in METHODS
    ]
    picture = figure((run.path / "accuracies.png").read_bytes(), "Accuracies, mean and standard deviation over seeds.")
    note = f"<p>{esc(run.result['note'])}.</p>" if run.result["note"] else ""
    return table(["method", "profession", "gender", "worst group"], rows) + note + picture


# -- behaviours -------------------------------------------------------------------------------------------------------


def _behaviour_claim(parts: Parts) -> Claim:
    found = parts.behaviours.result
    means = found["coherence"] or {}
    said = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
    return Claim(
        "circuits are found without supervision for thousands of behaviours that clustering discovers",
        f"{found['behaviours']} behaviours with a circuit each, of {found['clusters']} clusters; coherence: {said}",
        "not measured",  # how clear the clusters are was judged by people in the paper, and by nobody here
    )


def _behaviours_html(run: Run) -> str:
    rows = [[esc(cell) for cell in row] for row in run.result["summary"]]
    return table(["behaviour", "what comes next", "size"], rows) + (
        f"<p>Contexts and circuits of each: <code>{esc(run.path.name)}/{esc(run.result['page'])}</code>.</p>"
    )


# -- tables -----------------------------------------------------------------------------------------------------------


def _markdown_table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _summary(parts: Parts, shared: float | None) -> list[list[Any]]:
    rows: list[list[Any]] = []
    for name, run in parts.evaluated.items():
        features, random, neurons, _ = _reached(run)
        rows.append([f"nodes for {_LEVEL:g}: {name}", features, f"random: {random}; neurons: {neurons}"])
    rows.append(
        ["across RC and PP share", "-" if shared is None else f"{100 * shared:.0f} %", "of the smaller circuit"]
    )
    rows += [row for row in parts.shifted.result["summary"] if row[0] in (ORIGINAL, SHIFT, RETRAIN, RANDOM, ORACLE)]
    rows.append(["behaviours", parts.behaviours.result["behaviours"], f"page: {parts.behaviours.path.name}/index.html"])
    return rows
