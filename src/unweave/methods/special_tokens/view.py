"""The figures of ``unweave special-tokens``, as SVG and PNG files that stand alone, in the report's colours."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unweave.core.run import atomic_write
from unweave.methods.special_tokens.degradation import Interval, Level, SweetSpot
from unweave.methods.special_tokens.errors import GROUPS, TokenErrors
from unweave.methods.special_tokens.maxima import AlphaSweep
from unweave.show.theme import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NAMES = {
    "all": "all tokens",
    "special": "special tokens",
    "other": "all but special",
    "text": "plain text",
    "template": "rest of template",
}


def save(folder: Path, errors: TokenErrors, swept: AlphaSweep, spot: SweetSpot | None, unit: str) -> list[str]:
    """Draws both figures; the names of the files written."""
    import matplotlib

    written = []
    with matplotlib.rc_context(_settings()):
        for name, figure in (("errors", _errors(errors)), ("steering", _steering(swept, spot, unit))):
            for kind in ("svg", "png"):
                buffer = io.BytesIO()
                metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {}
                figure.savefig(buffer, format=kind, dpi=160, metadata=metadata)
                with atomic_write(folder / f"{name}.{kind}") as temporary:
                    temporary.write_bytes(buffer.getvalue())
                written.append(f"{name}.{kind}")
    return written


def _settings() -> dict[Any, Any]:
    c = LIGHT
    return {
        "svg.hashsalt": "unweave", "font.size": 8.5, "font.family": "DejaVu Sans",
        "figure.facecolor": c["panel"], "axes.facecolor": c["panel"], "savefig.facecolor": c["panel"],
        "axes.edgecolor": c["line"], "axes.labelcolor": c["soft"], "xtick.color": c["line"], "ytick.color": c["line"],
        "xtick.labelcolor": c["soft"], "ytick.labelcolor": c["soft"], "text.color": c["ink"],
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": c["grid"],
        "grid.linewidth": 0.8, "axes.axisbelow": True, "axes.linewidth": 0.8, "legend.frameon": False,
        "legend.fontsize": 8.5, "axes.labelpad": 5, "xtick.major.size": 3, "ytick.major.size": 0,
        "figure.constrained_layout.use": True, "svg.fonttype": "none",
    }  # fmt: skip


def _errors(errors: TokenErrors) -> Figure:
    """The paper's error of each group of tokens, with and without norm outliers, on an axis of powers of two."""
    from matplotlib.figure import Figure

    shown = [group for group in GROUPS if errors.everything[group].log2_mse is not None]
    figure = Figure(figsize=(5.2, 0.9 + 0.32 * len(shown)))
    axes = figure.add_subplot()
    for row, group in enumerate(shown):
        whole, rest = errors.everything[group].log2_mse, errors.without_outliers[group].log2_mse
        assert whole is not None
        if rest is not None:
            axes.plot([rest, whole], [row, row], color=LIGHT["mute"], linewidth=1.2, zorder=1)
            axes.scatter([rest], [row], s=42, color=LIGHT["accent"], zorder=3)
        # Wider than the dot, so that both show where they coincide.
        axes.scatter([whole], [row], s=90, facecolor=LIGHT["panel"], edgecolor=LIGHT["warm"], linewidths=1.3, zorder=2)
    axes.scatter([], [], s=42, color=LIGHT["accent"], label="without norm outliers")
    ring = f"with all tokens ({errors.outliers:,} {'outlier' if errors.outliers == 1 else 'outliers'})"
    axes.scatter([], [], s=90, facecolor=LIGHT["panel"], edgecolor=LIGHT["warm"], linewidths=1.3, label=ring)
    labels = [f"{_NAMES.get(group, group)}  ({errors.everything[group].tokens:,})" for group in shown]
    axes.set_yticks(range(len(shown)), labels)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.08)
    axes.set_xlabel(f"log2 of the mean squared error at {errors.site}")
    figure.legend(loc="outside upper right", ncols=2, handletextpad=0.3, columnspacing=1.2)
    return figure


def _steering(swept: AlphaSweep, spot: SweetSpot | None, unit: str) -> Figure:
    """Words changed, distinct 3-grams and perplexity against alpha, beside the random latents."""
    from matplotlib.figure import Figure

    panels: tuple[tuple[str, Callable[[Level], Interval | None]], ...] = (
        ("Words changed", lambda level: level.words_changed),
        ("Distinct 3-grams", lambda level: level.distinct),
        ("Perplexity, unedited model", lambda level: level.perplexity),
    )
    figure = Figure(figsize=(8.6, 3.0))
    every = figure.subplots(1, 3)
    for axes, (name, value) in zip(every, panels, strict=True):
        if spot is not None and spot.alphas:  # the line's width makes a single alpha visible
            axes.axvspan(spot.alphas[0], spot.alphas[-1], color=LIGHT["heat"], alpha=0.18, linewidth=3)
        n = len(swept.controls)
        _line(axes, swept.control_levels, value, "mute", f"{n} random {'latent' if n == 1 else 'latents'}")
        _line(axes, swept.levels, value, "accent", f"latent {swept.latent}")
        axes.set_title(name, loc="left", fontsize=8.5, color=LIGHT["ink"])
        axes.set_xlabel("alpha" if unit == "absolute" else "alpha, in median norms")
    for axes in every[:2]:
        axes.set_ylim(0, 1.05)
    every[2].set_yscale("log")
    every[2].yaxis.set_major_formatter(lambda x, _position: f"{x:g}")
    every[2].yaxis.set_minor_formatter(lambda x, _position: "")
    handles, labels = every[0].get_legend_handles_labels()
    if spot is not None and spot.alphas:
        from matplotlib.patches import Patch

        handles.append(Patch(color=LIGHT["heat"], alpha=0.18, linewidth=0))
        labels.append("changed, not degraded")
    figure.legend(handles, labels, loc="outside upper right", ncols=3, handletextpad=0.5)
    return figure


def _line(
    axes: Axes, levels: Sequence[Level], value: Callable[[Level], Interval | None], colour: str, label: str
) -> None:
    points = [(level.alpha, found) for level in levels if (found := value(level)) is not None]
    if not points:
        return
    alphas, found = [alpha for alpha, _ in points], [interval for _, interval in points]
    axes.fill_between(
        alphas, [i.low for i in found], [i.high for i in found], color=LIGHT[colour], alpha=0.2, linewidth=0
    )
    axes.plot(
        alphas, [i.mean for i in found], color=LIGHT[colour], linewidth=1.6, marker="o", markersize=3.5, label=label
    )
