"""The paper's Figure 3 on our numbers: faithfulness and completeness over the number of nodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from unweave.methods.circuits.sweep import Sweep
from unweave.show.plots import quiet
from unweave.show.theme import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEATURES, NEURONS = "latents and errors", "neurons"
_STYLES = {
    FEATURES: (LIGHT["accent"], "o", "-"),
    "without attention and MLP errors": ("#5a98a0", "s", "-"),
    "without errors": ("#9dbfc0", "D", "-"),
    "all errors kept": ("#3f4a78", "^", "-"),
    NEURONS: (LIGHT["warm"], "v", "-"),
}
_OTHER = (LIGHT["mute"], "x", "-")


def faithfulness_figure(curves: Mapping[str, Sweep], *, level: float = 0.8, title: str = "") -> Figure:
    """Two panels over the number of nodes: F of circuits beside random ones, and F of everything but the circuit.

    ``curves`` by what they are called; FEATURES and NEURONS and their variants have colours of their own.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.1), layout="constrained", facecolor=LIGHT["bg"])
    left, right = figure.subplots(1, 2)
    for ax, what in ((left, "faithfulness"), (right, "completeness")):
        _panel(ax)
        for name, curve in curves.items():
            colour, mark, line = _STYLES.get(name, _OTHER)
            rows = sorted((row for row in curve.rows if row.nodes), key=lambda row: row.nodes)
            nodes, values = [row.nodes for row in rows], [getattr(row, what) for row in rows]
            ax.plot(nodes, values, color=colour, marker=mark, linestyle=line, markersize=4, linewidth=1.6, label=name)
            drawn = [(row.nodes, row.random) for row in rows if row.random is not None]
            if what == "faithfulness" and drawn and name in (FEATURES, NEURONS):
                ax.plot(*zip(*drawn, strict=True), color=colour, linestyle=":", linewidth=1.4, label=f"random {name}")
        _framed(ax, [getattr(row, what) for curve in curves.values() for row in curve.rows])
        ax.set_xlabel("nodes in the circuit", fontsize=9, color=LIGHT["soft"])
    left.axhline(level, color=LIGHT["mute"], linewidth=0.9, dashes=(4, 3))
    left.set_title("Faithfulness: only the circuit is left", fontsize=10, color=LIGHT["ink"])
    right.set_title("Completeness: the circuit is taken out (low is good)", fontsize=10, color=LIGHT["ink"])
    if title:
        figure.suptitle(title, fontsize=11, color=LIGHT["ink"])
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=9)
    return figure


def _panel(ax: Axes) -> None:
    quiet(ax)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(lambda value, _position: f"{value:,.0f}")
    for height in (0.0, 1.0):
        ax.axhline(height, color=LIGHT["line"], linewidth=1.0)


def _framed(ax: Axes, values: list[float]) -> None:
    """Shows 0 to 1 and what lies near; what lies far beyond is cut off, so that one outlier does not flatten all."""
    low, high = min([0.0, *values]), max([1.0, *values])
    ax.set_ylim(max(low, -0.6) - 0.05, min(high, 1.6) + 0.05)
