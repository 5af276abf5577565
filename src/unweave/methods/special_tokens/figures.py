"""The figures of special tokens: errors by group, and answers along alpha. Drawn in the colours that are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from unweave.core.intervals import Interval
from unweave.methods.special_tokens.result import GROUPS, Group, Level, Steering, TokenErrors
from unweave.show.figures import COLOURS, as_svg, settings
from unweave.show.plots import png
from unweave.show.theme import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = {
    "all": "all tokens",
    "special": "special tokens",
    "other": "all but special",
    "text": "plain text",
    "template": "rest of template",
}
Draw = Callable[[Mapping[str, str]], "Figure"]


def as_picture(draw: Draw) -> bytes:
    """A PNG file of a figure, in the light colours."""
    import matplotlib

    drawn: dict[Any, Any] = settings(LIGHT)
    drawn |= {f"{part}.facecolor": LIGHT["panel"] for part in ("figure", "axes", "savefig")}
    with matplotlib.rc_context(drawn):
        return png(draw(LIGHT))


def as_text(draw: Draw, name: str, description: str) -> str:
    """A figure as SVG text that follows the page's colours."""
    import matplotlib

    with matplotlib.rc_context(settings()):
        return as_svg(draw(COLOURS), name, description)


def errors(measured: TokenErrors, colours: Mapping[str, str]) -> Figure:
    """The paper's error of each group of tokens, with and without norm outliers, on an axis of powers of two."""
    from matplotlib.figure import Figure

    shown: list[Group] = [group for group in GROUPS if measured.everything.of(group).log2_mse is not None]
    figure = Figure(figsize=(5.2, 0.9 + 0.32 * len(shown)))
    axes = figure.add_subplot()
    for row, group in enumerate(shown):
        whole, rest = measured.everything.of(group).log2_mse, measured.without_outliers.of(group).log2_mse
        assert whole is not None
        if rest is not None:
            axes.plot([rest, whole], [row, row], color=colours["mute"], linewidth=1.2, zorder=1)
            axes.scatter([rest], [row], s=42, color=colours["accent"], zorder=3)
        # Wider than the dot, so that both show where they coincide.
        axes.scatter([whole], [row], s=90, facecolor="none", edgecolor=colours["warm"], linewidths=1.3, zorder=2)
    axes.scatter([], [], s=42, color=colours["accent"], label="without norm outliers")
    ring = f"with all tokens ({measured.outliers:,} {'outlier' if measured.outliers == 1 else 'outliers'})"
    axes.scatter([], [], s=90, facecolor="none", edgecolor=colours["warm"], linewidths=1.3, label=ring)
    labels = [f"{NAMES.get(group, group)}  ({measured.everything.of(group).tokens:,})" for group in shown]
    axes.set_yticks(range(len(shown)), labels)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.08)
    axes.set_xlabel(f"log2 of the mean squared error at {measured.site}")
    figure.legend(loc="outside upper right", ncols=2, handletextpad=0.3, columnspacing=1.2)
    return figure


def steering(steered: Steering, colours: Mapping[str, str]) -> Figure:
    """Words changed, distinct 3-grams and perplexity against alpha, beside the random latents."""
    from matplotlib.figure import Figure

    panels: tuple[tuple[str, Callable[[Level], Interval | None]], ...] = (
        ("Words changed", lambda level: level.words_changed),
        ("Distinct 3-grams", lambda level: level.distinct),
        ("Perplexity, unedited model", lambda level: level.perplexity),
    )
    swept, spot = steered.sweep, steered.sweet_spot
    figure = Figure(figsize=(8.6, 3.0))
    every = figure.subplots(1, 3)
    for axes, (name, value) in zip(every, panels, strict=True):
        if spot.alphas:  # the line's width makes a single alpha visible
            axes.axvspan(spot.alphas[0], spot.alphas[-1], color=colours["heat"], alpha=0.18, linewidth=3)
        n = len(swept.controls)
        _line(axes, swept.control_levels, value, colours["mute"], f"{n} random {'latent' if n == 1 else 'latents'}")
        _line(axes, swept.levels, value, colours["accent"], f"latent {swept.latent}")
        axes.set_title(name, loc="left", fontsize=8.5, color=colours["ink"])
        axes.set_xlabel("alpha" if steered.unit == "absolute" else "alpha, in median norms")
    for axes in every[:2]:
        axes.set_ylim(0, 1.05)
    every[2].set_yscale("log")
    every[2].yaxis.set_major_formatter(lambda x, _position: f"{x:g}")
    every[2].yaxis.set_minor_formatter(lambda x, _position: "")
    handles, labels = every[0].get_legend_handles_labels()
    if spot.alphas:
        from matplotlib.patches import Patch

        handles.append(Patch(color=colours["heat"], alpha=0.18, linewidth=0))
        labels.append("changed, not degraded")
    figure.legend(handles, labels, loc="outside upper right", ncols=3, handletextpad=0.5)
    return figure


def _line(
    axes: Axes, levels: Sequence[Level], value: Callable[[Level], Interval | None], colour: str, label: str
) -> None:
    points = [(level.alpha, interval) for level in levels if (interval := value(level)) is not None]
    if not points:
        return
    alphas, intervals = [alpha for alpha, _ in points], [interval for _, interval in points]
    low, high = np.array([(i.low, i.high) for i in intervals], dtype=float).T  # no bounds: no band
    axes.fill_between(alphas, low, high, color=colour, alpha=0.2, linewidth=0)
    means = [i.value for i in intervals]
    axes.plot(alphas, means, color=colour, linewidth=1.6, marker="o", markersize=3.5, label=label)
