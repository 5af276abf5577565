"""The paper's Figure 3 on our numbers: faithfulness and completeness over the number of nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from unweave.methods.circuits.result import Errors, Faithfulness, Sweep
from unweave.show.figures import COLOURS, as_svg, settings
from unweave.show.pieces import capital
from unweave.show.plots import png, quiet
from unweave.show.theme import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES: dict[Errors, str] = {
    "default": "latents and errors",
    "remove-attn-mlp": "without attention and MLP errors",
    "remove": "without errors",
    "keep": "all errors kept",
}
"""what a curve is called, by what happens to errors"""
_STYLES = {
    "default": ("accent", "o"),
    "remove-attn-mlp": ("#5a98a0", "s"),
    "remove": ("#9dbfc0", "D"),
    "keep": ("#3f4a78", "^"),
}


def curve_name(errors: Errors, neurons: bool) -> str:
    """What a curve is called."""
    return "neurons" if neurons else NAMES[errors]


def curves_png(result: Faithfulness) -> bytes:
    """The figure as a file, with its task above it."""
    failed = " (the model fails this task)" if result.used.problem else ""
    return png(_figure(result, capital(result.task) + failed, LIGHT))


def curves_svg(result: Faithfulness) -> str:
    """The figure inside a page, in the page's colours."""
    import matplotlib

    with matplotlib.rc_context(settings()):
        return as_svg(
            _figure(result, "", COLOURS), "faithfulness", "Faithfulness and completeness over the number of nodes"
        )


def _figure(result: Faithfulness, title: str, colours: Mapping[str, str]) -> Figure:
    """Two panels over the number of nodes: F of circuits beside random ones, and F of everything but the circuit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.1), layout="constrained", facecolor=colours["bg"])
    left, right = figure.subplots(1, 2)
    for ax in (left, right):
        _panel(ax, colours)
        ax.set_xlabel("nodes in the circuit", fontsize=9, color=colours["soft"])
    for curve in result.curves:
        name = curve_name(curve.errors, curve.neurons)
        hue, mark = ("warm", "v") if curve.neurons else _STYLES[curve.errors]
        colour = colours.get(hue, hue)
        rows = sorted((row for row in curve.rows if row.nodes), key=lambda row: row.nodes)
        nodes = [row.nodes for row in rows]
        for ax, values in ((left, [row.faithfulness for row in rows]), (right, [row.completeness for row in rows])):
            ax.plot(nodes, values, color=colour, marker=mark, markersize=4, linewidth=1.6, label=name)
        if curve.errors == "default":
            _random(left, curve, colour, name)
    _framed(left, [row.faithfulness for curve in result.curves for row in curve.rows])
    _framed(right, [row.completeness for curve in result.curves for row in curve.rows])
    left.axhline(result.level, color=colours["mute"], linewidth=0.9, dashes=(4, 3))
    left.set_title("Faithfulness: only the circuit is left", fontsize=10, color=colours["ink"])
    right.set_title("Completeness: the circuit is taken out (low is good)", fontsize=10, color=colours["ink"])
    if title:
        figure.suptitle(title, fontsize=11, color=colours["ink"])
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=9)
    return figure


def _random(ax: Axes, curve: Sweep, colour: str, name: str) -> None:
    """Random nodes, dotted; where there were several draws, from the lowest to the highest in a shade."""
    drawn = sorted((row.nodes, row.random) for row in curve.rows if row.random is not None and row.nodes)
    if not drawn:
        return
    nodes = [n for n, _ in drawn]
    ax.plot(nodes, [r.mean for _, r in drawn], color=colour, linestyle=":", linewidth=1.4, label=f"random {name}")
    if drawn[0][1].draws > 1:
        ax.fill_between(nodes, [r.low for _, r in drawn], [r.high for _, r in drawn], color=colour, alpha=0.15, lw=0)


def _panel(ax: Axes, colours: Mapping[str, str]) -> None:
    quiet(ax, colours)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(lambda value, _position: f"{value:,.0f}")
    for height in (0.0, 1.0):
        ax.axhline(height, color=colours["line"], linewidth=1.0)


def _framed(ax: Axes, values: Sequence[float]) -> None:
    """Shows 0 to 1 and what lies near; what lies far beyond is cut off, so that one outlier does not flatten all."""
    low, high = min([0.0, *values]), max([1.0, *values])
    ax.set_ylim(max(low, -0.6) - 0.05, min(high, 1.6) + 0.05)
