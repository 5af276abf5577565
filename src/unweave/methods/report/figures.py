"""The report's figures as SVG text that follows the page's colour scheme.

Drawn with matplotlib's SVG backend, without pyplot and its global state. Colours are drawn as stand-ins and replaced
with ``var(--uw-name, light colour)``: inside the page they follow its scheme, alone the file shows the light one.
Text stays text, identifiers are prefixed by the figure's name, and equal input gives equal bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeGuard

from unweave.show.model import Attribution, AttributionRow, DensityHistogram, TrainingCurve
from unweave.show.theme import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# one stand-in per colour of the scheme, far from anything matplotlib draws by itself
_STAND_IN = {name: f"#0a{index:02x}fe" for index, name in enumerate(LIGHT)}
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_WIDTH, _HEIGHT = 4.7, 3.2  # inches; two figures side by side on a wide page, one on a phone
_MAX_POINTS = 600


def _settings() -> dict[Any, Any]:
    c = _STAND_IN
    return {
        "svg.fonttype": "none", "svg.hashsalt": "unweave", "font.size": 8.5, "font.family": "DejaVu Sans",
        "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
        "axes.edgecolor": c["line"], "axes.labelcolor": c["soft"], "xtick.color": c["line"], "ytick.color": c["line"],
        "xtick.labelcolor": c["soft"], "ytick.labelcolor": c["soft"], "text.color": c["ink"],
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": c["grid"],
        "grid.linewidth": 0.8, "axes.axisbelow": True, "axes.linewidth": 0.8, "legend.frameon": False,
        "legend.fontsize": 8.5, "axes.unicode_minus": True, "lines.solid_capstyle": "round", "axes.labelpad": 5,
        "xtick.major.size": 3, "ytick.major.size": 0, "figure.constrained_layout.use": True, "path.simplify": False,
    }  # fmt: skip


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height))


def _svg(figure: Figure, name: str, description: str) -> str:
    """Return the figure as one <svg> element with themed colours, prefixed identifiers and a text description."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg ") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'(<use [^>]*?xlink:href="#)', rf"\g<1>{name}-", text)
    for key, colour in _STAND_IN.items():
        text = text.replace(colour, f"var(--uw-{key}, {LIGHT[key]})")
    text = re.sub(r"'DejaVu Sans'(?:, [^;\"]*)?", _FONT, text)
    head = f'<svg role="img" aria-label="{escape(description, quote=True)}" class="uw-figure" '
    return head + text[len("<svg ") :].strip()


def _thin(values: Sequence[float], most: int = _MAX_POINTS) -> list[int]:
    """Return positions that keep at most ``most`` points, first and last among them."""
    if len(values) <= most:
        return list(range(len(values)))
    return sorted({round(i * (len(values) - 1) / (most - 1)) for i in range(most)})


def _finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _tokens_axis(axes: Axes, largest: float) -> None:
    units = ((1e9, "billion "), (1e6, "million "), (1e3, "thousand "), (0.0, ""))
    unit, name = next((unit or 1.0, name) for unit, name in units if largest >= unit)
    axes.xaxis.set_major_formatter(lambda value, _position: f"{value / unit:g}")
    axes.set_xlabel(f"{name}tokens".capitalize())
    axes.set_xlim(0, largest or 1)


def loss_curve(curve: TrainingCurve) -> str:
    """Return the loss against the tokens seen and, below it, the share of dead latents where it was recorded."""
    import matplotlib

    keep = _thin(curve.tokens)
    tokens, loss = [curve.tokens[i] for i in keep], [curve.loss[i] for i in keep]
    finite = [value for value in loss[len(loss) // 50 :] if math.isfinite(value)]
    with matplotlib.rc_context(_settings()):
        figure = _figure(_HEIGHT)
        dead = curve.dead_fraction
        grid = figure.add_gridspec(2 if dead else 1, 1, height_ratios=[2.6, 1] if dead else [1])
        top = figure.add_subplot(grid[0])
        top.plot(tokens, loss, color=_STAND_IN["accent"], linewidth=1.6)
        top.set_ylim(0, 1.08 * max(finite, default=1.0) or 1.0)
        top.set_ylabel(curve.loss_name[:1].upper() + curve.loss_name[1:])
        if _finite(loss[-1]):
            top.annotate(
                f"{loss[-1]:.3g}", (tokens[-1], loss[-1]), xytext=(-3, 6), textcoords="offset points", ha="right",
                color=_STAND_IN["accent"], fontweight="bold",
            )  # fmt: skip
        bottom = top
        if dead:
            bottom = figure.add_subplot(grid[1], sharex=top)
            bottom.fill_between(tokens, [100 * dead[i] for i in keep], color=_STAND_IN["warm"], alpha=0.35, linewidth=0)
            bottom.plot(tokens, [100 * dead[i] for i in keep], color=_STAND_IN["warm"], linewidth=1.2)
            bottom.set_ylim(0, max(5.0, 110 * max(dead)))
            bottom.set_ylabel("Dead, %")
            top.tick_params(labelbottom=False)
        _tokens_axis(bottom, max(tokens, default=1.0))
        figure.align_ylabels()
        return _svg(figure, "loss", f"{curve.loss_name} against tokens of training")


def density(histogram: DensityHistogram) -> str:
    """Return how many latents fire how often, on a logarithmic axis; latents that never fired stand apart at left."""
    import matplotlib

    filled = [place for place, count in enumerate(histogram.counts) if count] or [0]
    edges = list(histogram.edges[filled[0] : filled[-1] + 2])
    counts = list(histogram.counts[filled[0] : filled[-1] + 1])
    with matplotlib.rc_context(_settings()):
        figure = _figure(_HEIGHT)
        axes = figure.add_subplot()
        axes.grid(axis="x", visible=False)
        widths = [b - a for a, b in pairwise(edges)]
        axes.bar(edges[:-1], counts, width=[0.92 * w for w in widths], align="edge", color=_STAND_IN["accent"])
        low, high = edges[0], edges[-1]
        ticks = list(range(math.ceil(low), math.floor(high) + 1))
        names = [f"{10.0 ** (tick + 2):g} %" for tick in ticks]
        if histogram.never:
            # a label's width away from the first decade's tick
            place, width = min(low, *ticks, high) - 0.2 * (high - low) - 0.1, widths[0]
            axes.bar([place], [histogram.never], width=width, color=_STAND_IN["warm"])
            axes.annotate(f"{histogram.never:,}", (place, histogram.never), xytext=(0, 3), textcoords="offset points",
                          ha="center", color=_STAND_IN["warm"])  # fmt: skip
            ticks, names, low = [place, *ticks], ["never", *names], place - width
        axes.set_xticks(ticks, names)
        axes.set_xlim(low - 0.1, high + 0.1)
        axes.set_xlabel("Share of tokens a latent fires on")
        axes.set_ylabel("Latents")
        return _svg(figure, "density", "Histogram of the latents' firing frequencies")


def cross_entropy_bars(clean: float | None, sae: float | None, mean: float | None, zero: float | None) -> str:
    """Return the model's loss untouched, with the SAE, and under mean and zero ablation as bars, nats per token."""
    import matplotlib

    given = [("Untouched", clean, "mute"), ("SAE in place", sae, "accent")]
    given += [("Mean ablation", mean, "warm"), ("Zero ablation", zero, "warm")]
    bars = [(name, value, colour) for name, value, colour in given if _finite(value)]
    values = [value for _, value, _ in bars]
    with matplotlib.rc_context(_settings()):
        figure = _figure(_HEIGHT)
        axes = figure.add_subplot()
        axes.grid(axis="y", visible=False)
        rows = range(len(bars))
        axes.barh(rows, values, height=0.55, color=[_STAND_IN[colour] for _, _, colour in bars])
        for row, value in zip(rows, values, strict=True):
            axes.annotate(f"{value:.2f}", (value, row), xytext=(5, 0), textcoords="offset points", va="center",
                          fontweight="bold")  # fmt: skip
        axes.set_yticks(rows, [name for name, _, _ in bars])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.14 * max(values, default=1.0))
        axes.set_xlabel("Cross-entropy, nats per token")
        return _svg(figure, "ce", "; ".join(f"{name}: {value:.2f}" for name, value, _ in bars))


def attribution_scatter(attribution: Attribution, estimate: str) -> str:
    """Return the measured effect (x) against one estimate (y), ``estimate`` "ig" or "ap", with the identity line.

    Chosen latents link to ``#latent-N``; latents drawn at random are grey. The legend holds the correlations.
    """
    import matplotlib

    names = {"ig": "Integrated gradients", "ap": "Attribution patching"}
    rows = [row for row in attribution.rows if _finite(row.measured) and _finite(getattr(row, estimate))]
    both = [value for row in attribution.rows for value in (row.measured, row.ig, row.ap) if _finite(value)]
    low, high = min([0.0, *both]), max([0.0, *both])
    pad = 0.08 * ((high - low) or 1.0)
    with matplotlib.rc_context(_settings()):
        figure = _figure(4.1)
        axes = figure.add_subplot()
        ends = [low - pad, high + pad]
        for chosen, name, colour, size in (
            (True, "chosen latents", "accent", 34),
            (False, "random latents", "mute", 16),
        ):
            group = [row for row in rows if row.chosen is chosen]
            if group:
                label = name + _correlations(attribution, estimate, chosen)
                _points(axes, group, estimate, _STAND_IN[colour], size, label)
        axes.plot(
            ends, ends, color=_STAND_IN["mute"], linewidth=1, dashes=(4, 3), label="estimate = measured", zorder=1
        )
        _name_largest(axes, [row for row in rows if row.chosen], estimate)
        axes.set_xlim(*ends)
        axes.set_ylim(*ends)
        axes.set_box_aspect(0.8)
        axes.set_xlabel("Measured effect, mean of both ends")
        axes.set_ylabel(names[estimate])
        axes.legend(loc="upper left", handletextpad=0.3, borderpad=0.1, labelcolor=_STAND_IN["ink"])
        svg = _svg(figure, estimate, f"{names[estimate]} against the measured effect of {len(rows)} latents")
    # the points lead into the explorer; a table with the same links serves the keyboard
    link = r'<a xlink:href="#latent-\1" tabindex="-1"\2><title>latent \1</title>'
    return re.sub(r'<a xlink:href="#latent-(\d+)"([^>]*)>', link, svg)


def _points(axes: Axes, rows: Sequence[AttributionRow], estimate: str, colour: str, size: int, label: str) -> None:
    measured, estimated = [row.measured or 0.0 for row in rows], [getattr(row, estimate) for row in rows]
    dots = axes.scatter(measured, estimated, s=size, color=colour, alpha=0.8, linewidths=0, label=label)
    dots.set_urls([f"#latent-{row.latent}" for row in rows])


def _correlations(attribution: Attribution, estimate: str, chosen: bool) -> str:
    prefix = "" if chosen else "random_"
    kinds = (("r", "pearson"), ("ρ", "spearman"))
    given = [(sign, attribution.correlations.get(f"{prefix}{estimate}_{kind}")) for sign, kind in kinds]
    text = ", ".join(f"{sign} = {value:.2f}" for sign, value in given if _finite(value))
    return f":  {text}" if text else ""


def _name_largest(axes: Axes, rows: Sequence[AttributionRow], estimate: str, most: int = 3) -> None:
    for row in sorted(rows, key=lambda row: (-abs(row.measured or 0.0), row.latent))[:most]:
        right = (row.measured or 0.0) <= 0
        place = (row.measured or 0.0, getattr(row, estimate))
        axes.annotate(str(row.latent), place, xytext=(6 if right else -6, -3), textcoords="offset points", fontsize=8,
                      ha="left" if right else "right", color=_STAND_IN["soft"])  # fmt: skip
