"""Losses as bars, and how often latents fire."""

from __future__ import annotations

import math
from itertools import pairwise

from unweave.sae.measure.result import Density
from unweave.show.figures import COLOURS, HEIGHT, as_svg, drawing, finite


def density(histogram: Density) -> str:
    """Return how many latents fire how often, on a logarithmic axis; latents that never fired stand apart at left."""
    filled = [place for place, count in enumerate(histogram.counts) if count] or [0]
    edges = list(histogram.edges[filled[0] : filled[-1] + 2])
    counts = list(histogram.counts[filled[0] : filled[-1] + 1])
    with drawing(HEIGHT) as figure:
        axes = figure.add_subplot()
        axes.grid(axis="x", visible=False)
        widths = [b - a for a, b in pairwise(edges)]
        axes.bar(edges[:-1], counts, width=[0.92 * w for w in widths], align="edge", color=COLOURS["accent"])
        low, high = edges[0], edges[-1]
        ticks = list(range(math.ceil(low), math.floor(high) + 1))
        names = [f"{10.0 ** (tick + 2):g} %" for tick in ticks]
        if histogram.never:
            # a label's width away from the first decade's tick
            place, width = min(low, *ticks, high) - 0.2 * (high - low) - 0.1, widths[0]
            axes.bar([place], [histogram.never], width=width, color=COLOURS["warm"])
            axes.annotate(f"{histogram.never:,}", (place, histogram.never), xytext=(0, 3), textcoords="offset points",
                          ha="center", color=COLOURS["warm"])  # fmt: skip
            ticks, names, low = [place, *ticks], ["never", *names], place - width
        axes.set_xticks(ticks, names)
        axes.set_xlim(low - 0.1, high + 0.1)
        axes.set_xlabel("Share of tokens a latent fires on")
        axes.set_ylabel("Latents")
        return as_svg(figure, "density", "Histogram of the latents' firing frequencies")


def cross_entropy_bars(clean: float | None, sae: float | None, mean: float | None, zero: float | None) -> str:
    """Return the model's loss untouched, with the SAE, and under mean and zero ablation as bars, nats per token."""
    losses = [("Untouched", clean, "mute"), ("SAE in place", sae, "accent")]
    losses += [("Mean ablation", mean, "warm"), ("Zero ablation", zero, "warm")]
    bars = [(name, value, colour) for name, value, colour in losses if finite(value)]
    values = [value for _, value, _ in bars]
    with drawing(HEIGHT) as figure:
        axes = figure.add_subplot()
        axes.grid(axis="y", visible=False)
        rows = range(len(bars))
        axes.barh(rows, values, height=0.55, color=[COLOURS[colour] for _, _, colour in bars])
        for row, value in zip(rows, values, strict=True):
            axes.annotate(f"{value:.2f}", (value, row), xytext=(5, 0), textcoords="offset points", va="center",
                          fontweight="bold")  # fmt: skip
        axes.set_yticks(rows, [name for name, _, _ in bars])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.14 * max(values, default=1.0))
        axes.set_xlabel("Cross-entropy, nats per token")
        return as_svg(figure, "ce", "; ".join(f"{name}: {value:.2f}" for name, value, _ in bars))
