"""The paper's figures on our numbers: errors by layer and recipe, L0-MSE curves, ratings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from unweave.papers.instruct_saes.compare import Cell, curve, grouped
from unweave.papers.instruct_saes.result import RECIPES, Measure, Measured, Rated
from unweave.show.plots import quiet
from unweave.show.theme import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = dict(zip(RECIPES, (LIGHT["mute"], LIGHT["warm"], LIGHT["accent"]), strict=True))
_MARKS = dict(zip(RECIPES, ("s", "D", "o"), strict=True))
_NAMES = {"relu": "ReLU", "jumprelu": "JumpReLU"}
_WHOSE = {"all": "", "special": ", special tokens", "user": ", user's words", "assistant": ", assistant's words"}


def measure_name(measure: Measure) -> str:
    """ "log2 MSE, special tokens without outliers"."""
    return f"log2 MSE{_WHOSE[measure.group]}{'' if measure.outliers else ' without outliers'}"


def kind_name(kind: str, expansion: int, among: Sequence[Measured]) -> str:
    """A kind, with its width where there are several."""
    return kind if len({row.expansion for row in among}) == 1 else f"{kind} {expansion}x"


def _title(kind: str) -> str:
    name, _, rest = kind.partition(" ")
    return f"{_NAMES.get(name, name)} {rest}".strip()


def _figure(columns: int, rows: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor=LIGHT["bg"])
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for ax in axes:
        quiet(ax)
    return figure, axes


def _legend(figure: Figure, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=9)


def errors(rows: Sequence[Measured], by_measure: Sequence[tuple[Measure, Sequence[Cell]]]) -> Figure:
    """One row of panels per kind, one column per measure: a point per seed, a bar at the mean (figures 4 and 6)."""
    kinds = list(dict.fromkeys((cell.kind, cell.expansion) for _, cells in by_measure for cell in cells))
    columns = len(by_measure)
    figure, axes = _figure(columns, len(kinds), 3.6 * columns, 2.9 * len(kinds) + 0.4)
    for row, kind in enumerate(kinds):
        for column, (measure, cells) in enumerate(by_measure):
            ax = axes[row * columns + column]
            _panel(ax, [cell for cell in cells if (cell.kind, cell.expansion) == kind])
            if row == 0:
                ax.set_title(measure_name(measure), fontsize=10, color=LIGHT["ink"])
            if column == 0:
                ax.set_ylabel(f"{_title(kind_name(*kind, rows))}: log2 MSE", fontsize=9, color=LIGHT["soft"])
    _legend(figure, axes[0])
    return figure


def _panel(ax: Axes, cells: Sequence[Cell]) -> None:
    sites = list(dict.fromkeys(cell.site for cell in cells))
    for cell in cells:
        x = sites.index(cell.site) + 0.22 * (RECIPES.index(cell.recipe) - 1)
        label = cell.recipe if cell.site == sites[0] else None
        ax.plot([x - 0.09, x + 0.09], [cell.mean] * 2, color=COLOURS[cell.recipe], linewidth=2.2)
        ax.plot(
            [x] * len(cell.values), cell.values, linestyle="none", marker=_MARKS[cell.recipe], markersize=5,
            color=COLOURS[cell.recipe], alpha=0.75, label=label,
        )  # fmt: skip
    ax.set_xticks(range(len(sites)), [f"layer {site.rpartition('.')[2]}" for site in sites])
    ax.set_xlim(-0.5, len(sites) - 0.5)


def curves(rows: Sequence[Measured], measure: Measure, seed: int) -> Figure:
    """Error over L0, a panel per site and kind: lower and further left is better."""
    kinds = list(dict.fromkeys((row.kind, row.expansion) for row in rows))
    sites, groups = list(dict.fromkeys(row.site for row in rows)), grouped(rows)
    figure, axes = _figure(len(sites), len(kinds), 3.4 * len(sites), 2.7 * len(kinds) + 0.4)
    for number, ax in enumerate(axes):
        kind, site = kinds[number // len(sites)], sites[number % len(sites)]
        for recipe in RECIPES:
            points = curve(groups.get((recipe, *kind, site), []), measure, seed)
            if points:
                ax.plot(
                    [2**x for x, _ in points], [y for _, y in points], color=COLOURS[recipe], marker=_MARKS[recipe],
                    markersize=4.5, linewidth=1.6, label=recipe,
                )  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:.0f}")
        name = _title(kind_name(*kind, rows))
        ax.set_title(f"{name}, layer {site.rpartition('.')[2]}", fontsize=10, color=LIGHT["ink"])
        if number % len(sites) == 0:
            ax.set_ylabel(measure_name(measure), fontsize=9, color=LIGHT["soft"])
        if number // len(sites) == len(kinds) - 1:
            ax.set_xlabel("active latents per token (L0)", fontsize=9, color=LIGHT["soft"])
    _legend(figure, axes[0])
    return figure


def ratings(every: Sequence[Rated]) -> Figure:
    """Share of latents with each score from 1 to 5; below each recipe the same judge on shuffled contexts."""
    figure, (ax,) = _figure(1, 1, 7.2, 0.5 + 0.62 * 2 * len(every))
    shades = ("#e4e0d6", "#c9d6d3", "#9dbfc0", "#5a98a0", LIGHT["accent"])
    names: list[str] = []
    for rated in every:
        control = rated.rubric.shuffled
        counted = [(rated.recipe, rated.rubric.real)]
        for name, scores in counted + ([(f"{rated.recipe}, shuffled", control)] if control is not None else []):
            if not scores.scored:
                continue
            left = 0.0
            for score, (count, shade) in enumerate(zip(scores.distribution, shades, strict=True), 1):
                share = count / scores.scored
                label = str(score) if not names else None
                ax.barh(len(names), share, left=left, color=shade, edgecolor=LIGHT["panel"], label=label)
                left += share
            names.append(f"{name} ({scores.scored})")
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlim(0, 1)
    what = "share of rated latents with each score, 1 (no pattern) to 5 (clear)"
    ax.set_xlabel(what, fontsize=9, color=LIGHT["soft"])
    ax.grid(visible=False)
    _legend(figure, ax)
    return figure
