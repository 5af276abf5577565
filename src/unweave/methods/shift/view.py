"""SHIFT's table and figure: three accuracies per method, mean and standard deviation over seeds."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unweave.core.run import atomic_write
from unweave.methods.shift.spec import CircuitShiftSpec
from unweave.show.plots import quiet
from unweave.show.theme import LIGHT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ORIGINAL, CONCEPTS, RANDOM = "original", "concept bottleneck", "random latents"
SHIFT, RETRAIN = "SHIFT", "SHIFT + retrain"
NEURONS, FEATURES, ORACLE = "neuron skyline", "feature skyline", "oracle"
METHODS = (ORIGINAL, CONCEPTS, RANDOM, SHIFT, RETRAIN, NEURONS, FEATURES, ORACLE)
"""In the order of the paper's Table 2."""
MEASURES = ("profession", "gender", "worst")
_HEADS = {"profession": "profession ↑", "gender": "gender ↓", "worst": "worst group ↑"}
_COLOURS = {"profession": LIGHT["accent"], "gender": LIGHT["mute"], "worst": LIGHT["warm"]}

Table = Mapping[str, Mapping[str, Mapping[str, float | None]]]


def of_seeds(rows: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """{method: {measure: {mean, std}}} of every seed's {method: {measure: share}}; std is None for one seed."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for method in METHODS:
        table[method] = {}
        for measure in MEASURES:
            values = [row[method][measure] for row in rows]
            spread = statistics.stdev(values) if len(values) > 1 else None
            table[method][measure] = {"mean": statistics.fmean(values), "std": spread}
    return table


def summarised(
    spec: CircuitShiftSpec,
    table: Table,
    gap: float,
    back: Mapping[str, float | None],
    told: Mapping[str, tuple[str, str]],
    warnings: Sequence[str],
) -> dict[str, Any]:
    """The rows that the command line shows. ``told`` is {name: (value, what a reader must know of it)}."""
    rows: list[list[Any]] = []
    for method in METHODS:
        shown = " / ".join(_percent(table[method][measure]) for measure in MEASURES)
        rows.append([method, shown, "profession / gender / worst group, %"])
    rows.append(["gap of the worst group", f"{100 * gap:.1f}", "points from the original to the oracle"])
    for name, share in back.items():
        value = "-" if share is None else f"{100 * share:.0f} %"
        rows.append([f"recovered by {name}", value, f"of that gap; {spec.seeds} seed{'s' * (spec.seeds > 1)}"])
    rows += [[name, value, meaning] for name, (value, meaning) in told.items()]
    rows += [["warning", "", warning] for warning in warnings]
    return {"summary": rows}


def _percent(value: Mapping[str, Any]) -> str:
    spread = "" if value["std"] is None else f" ± {100 * value['std']:.1f}"
    return f"{100 * value['mean']:.1f}{spread}"


def markdown(found: Mapping[str, Any]) -> str:
    """The table as the paper has it, with what a reader must know below it."""
    lines = ["| Method | " + " | ".join(_HEADS[m] for m in MEASURES) + " |", "|---" * (len(MEASURES) + 1) + "|"]
    for method in METHODS:
        cells = " | ".join(_percent(found["table"][method][measure]) for measure in MEASURES)
        lines.append(f"| {method} | {cells} |")
    counts, n = ", ".join(map(str, found["ablated"])), len(found["ablated"])
    over = "one seed" if n == 1 else f"mean ± standard deviation over {n} seeds"
    lines += [
        "",
        f"Accuracies in %, {over}. Classifier at {found['probe']}; latents ablated per seed: {counts}.",
        f"Judgement ({found['judge']['kind']}): {found['judged']}.",
    ]
    if found["note"]:
        lines.append(f"Data: {found['note']}.")
    lines += [f"Warning: {warning}." for warning in found["warnings"]]
    return "\n".join(lines) + "\n"


def save(folder: Path, found: Mapping[str, Any]) -> list[str]:
    """Writes table.md and accuracies.svg and .png; their names."""
    with atomic_write(folder / "table.md") as temporary:
        temporary.write_text(markdown(found), encoding="utf-8")
    written = ["table.md"]
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "unweave", "svg.fonttype": "none"}):
        drawn = figure(found["table"])
        for kind in ("svg", "png"):
            buffer = io.BytesIO()
            metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {"Software": None}
            drawn.savefig(buffer, format=kind, dpi=144, metadata=metadata)
            with atomic_write(folder / f"accuracies.{kind}") as temporary:
                temporary.write_bytes(buffer.getvalue())
            written.append(f"accuracies.{kind}")
    return written


def figure(table: Table) -> Figure:
    """Three bars per method, with the standard deviation over seeds; a dotted line at chance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 3.6), layout="constrained", facecolor=LIGHT["bg"])
    ax = figure.subplots()
    quiet(ax)
    for place, measure in enumerate(MEASURES):
        values: list[Any] = [table[method][measure] for method in METHODS]
        at = [i + 0.26 * (place - 1) for i in range(len(METHODS))]
        ax.bar(
            at, [100 * v["mean"] for v in values], 0.23, yerr=[100 * (v["std"] or 0.0) for v in values],
            color=_COLOURS[measure], label=_HEADS[measure], error_kw={"ecolor": LIGHT["ink"], "elinewidth": 0.9},
        )  # fmt: skip
    ax.axhline(50, color=LIGHT["faint"], linewidth=0.8, linestyle=":")
    ax.set_xticks(range(len(METHODS)), [method.replace(" ", "\n", 1) for method in METHODS])
    ax.set_ylim(0, 104)
    ax.set_ylabel("accuracy, %", fontsize=9, color=LIGHT["soft"])
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=9)
    return figure
