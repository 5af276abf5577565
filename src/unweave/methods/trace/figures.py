"""Estimates against measured effects."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from unweave.methods.trace.result import Effect, Estimate, Group, Trace
from unweave.show.figures import COLOURS, as_svg, drawing, finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def attribution_scatter(result: Trace, estimate: Estimate) -> str:
    """Return the measured effect (x) against one estimate (y), with the identity line.

    Chosen latents link to ``#latent-N``; latents drawn at random are grey. The legend holds the correlations.
    """
    names = {"ig": "Integrated gradients", "attribution": "Attribution patching"}
    rows = [row for row in result.effects if finite(row.measured) and finite(getattr(row, estimate))]
    both = [value for row in result.effects for value in (row.measured, row.ig, row.attribution) if finite(value)]
    low, high = min([0.0, *both]), max([0.0, *both])
    pad = 0.08 * ((high - low) or 1.0)
    with drawing(4.1) as figure:
        axes = figure.add_subplot()
        ends = [low - pad, high + pad]
        for chosen, name, colour, size in (
            (True, "chosen latents", "accent", 34),
            (False, "random latents", "mute", 16),
        ):
            group = [row for row in rows if row.chosen is chosen]
            if group:
                label = name + _correlations(result, estimate, chosen)
                _points(axes, group, estimate, COLOURS[colour], size, label)
        axes.plot(ends, ends, color=COLOURS["mute"], linewidth=1, dashes=(4, 3), label="estimate = measured", zorder=1)
        _name_largest(axes, [row for row in rows if row.chosen], estimate)
        axes.set_xlim(*ends)
        axes.set_ylim(*ends)
        axes.set_box_aspect(0.8)
        axes.set_xlabel("Measured effect, mean of both ends")
        axes.set_ylabel(names[estimate])
        axes.legend(loc="upper left", handletextpad=0.3, borderpad=0.1, labelcolor=COLOURS["ink"])
        drawn = as_svg(figure, estimate, f"{names[estimate]} against the measured effect of {len(rows)} latents")
    # the points lead into the explorer; a table with the same links serves the keyboard
    link = r'<a xlink:href="#latent-\1" tabindex="-1"\2><title>latent \1</title>'
    return re.sub(r'<a xlink:href="#latent-(\d+)"([^>]*)>', link, drawn)


def _points(axes: Axes, rows: Sequence[Effect], estimate: Estimate, colour: str, size: int, label: str) -> None:
    measured, estimated = [row.measured or 0.0 for row in rows], [getattr(row, estimate) for row in rows]
    dots = axes.scatter(measured, estimated, s=size, color=colour, alpha=0.8, linewidths=0, label=label)
    dots.set_urls([f"#latent-{row.latent}" for row in rows])


def _correlations(result: Trace, estimate: Estimate, chosen: bool) -> str:
    if not result.agreements:
        return ""
    group: Group = "chosen" if chosen else "random"
    coefficients = (("r", result.pearson(estimate, group)), ("ρ", result.spearman(estimate, group)))
    text = ", ".join(f"{sign} = {value:.2f}" for sign, value in coefficients if finite(value))
    return f":  {text}" if text else ""


def _name_largest(axes: Axes, rows: Sequence[Effect], estimate: Estimate, most: int = 3) -> None:
    for row in sorted(rows, key=lambda row: (-abs(row.measured or 0.0), row.latent))[:most]:
        right = (row.measured or 0.0) <= 0
        place = (row.measured or 0.0, getattr(row, estimate))
        axes.annotate(str(row.latent), place, xytext=(6 if right else -6, -3), textcoords="offset points", fontsize=8,
                      ha="left" if right else "right", color=COLOURS["soft"])  # fmt: skip
