"""The paper's figures on our numbers: errors by layer and recipe, L0-MSE curves, ratings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from unweave.papers.instruct_saes.compare import Cell, Measured, curve
from unweave.papers.instruct_saes.plan import RECIPES
from unweave.show.plots import quiet
from unweave.show.theme import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = dict(zip(RECIPES, (LIGHT["mute"], LIGHT["warm"], LIGHT["accent"]), strict=True))
_MARKS = dict(zip(RECIPES, ("s", "D", "o"), strict=True))
_NAMES = {"relu": "ReLU", "jumprelu": "JumpReLU"}


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


def errors(by_measure: Mapping[str, Sequence[Cell]]) -> Figure:
    """One row of panels per kind, one column per measure: a point per seed, a bar at the mean (figures 4 and 6)."""
    measures = list(by_measure)
    kinds = list(dict.fromkeys(cell.kind for found in by_measure.values() for cell in found))
    figure, axes = _figure(len(measures), len(kinds), 3.6 * len(measures), 2.9 * len(kinds) + 0.4)
    for row, kind in enumerate(kinds):
        for column, measure in enumerate(measures):
            ax = axes[row * len(measures) + column]
            found = [cell for cell in by_measure[measure] if cell.kind == kind]
            sites = list(dict.fromkeys(cell.site for cell in found))
            for cell in found:
                x = sites.index(cell.site) + 0.22 * (RECIPES.index(cell.recipe) - 1)
                label = cell.recipe if cell.site == sites[0] else None
                ax.plot([x - 0.09, x + 0.09], [cell.mean] * 2, color=COLOURS[cell.recipe], linewidth=2.2)
                ax.plot(
                    [x] * len(cell.values), cell.values, linestyle="none", marker=_MARKS[cell.recipe], markersize=5,
                    color=COLOURS[cell.recipe], alpha=0.75, label=label,
                )  # fmt: skip
            ax.set_xticks(range(len(sites)), [f"layer {site.rpartition('.')[2]}" for site in sites])
            ax.set_xlim(-0.5, len(sites) - 0.5)
            if row == 0:
                ax.set_title(measure, fontsize=10, color=LIGHT["ink"])
            if column == 0:
                ax.set_ylabel(f"{_NAMES.get(kind, kind)}: log2 MSE", fontsize=9, color=LIGHT["soft"])
    _legend(figure, axes[0])
    return figure


def curves(rows: Sequence[Measured], measure: str, seed: int) -> Figure:
    """Error over L0, a panel per site and kind: lower and further left is better."""
    kinds, sites = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("kind", "site"))
    figure, axes = _figure(len(sites), len(kinds), 3.4 * len(sites), 2.7 * len(kinds) + 0.4)
    for number, ax in enumerate(axes):
        kind, site = kinds[number // len(sites)], sites[number % len(sites)]
        for recipe in RECIPES:
            group = [row for row in rows if (row.recipe, row.kind, row.site) == (recipe, kind, site)]
            points = curve(group, measure, seed)
            if points:
                ax.plot(
                    [2**x for x, _ in points], [y for _, y in points], color=COLOURS[recipe], marker=_MARKS[recipe],
                    markersize=4.5, linewidth=1.6, label=recipe,
                )  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:.0f}")
        ax.set_title(f"{_NAMES.get(kind, kind)}, layer {site.rpartition('.')[2]}", fontsize=10, color=LIGHT["ink"])
        if number % len(sites) == 0:
            ax.set_ylabel(measure, fontsize=9, color=LIGHT["soft"])
        if number // len(sites) == len(kinds) - 1:
            ax.set_xlabel("active latents per token (L0)", fontsize=9, color=LIGHT["soft"])
    _legend(figure, axes[0])
    return figure


def ratings(by_recipe: Mapping[str, Mapping[int, int]], controls: Mapping[str, Mapping[int, int]]) -> Figure:
    """Share of latents with each score from 1 to 5; below each recipe the same judge on shuffled contexts."""
    figure, (ax,) = _figure(1, 1, 7.2, 0.5 + 0.62 * 2 * len(by_recipe))
    shades = ("#e4e0d6", "#c9d6d3", "#9dbfc0", "#5a98a0", LIGHT["accent"])
    names: list[str] = []
    for recipe, scores in by_recipe.items():
        for name, counted in ((recipe, scores), (f"{recipe}, shuffled", controls.get(recipe, {}))):
            total = sum(counted.values())
            if not total:
                continue
            left = 0.0
            for score, shade in zip(range(1, 6), shades, strict=True):
                share = counted.get(score, 0) / total
                label = str(score) if not names else None
                ax.barh(len(names), share, left=left, color=shade, edgecolor=LIGHT["panel"], label=label)
                left += share
            names.append(f"{name} ({total})")
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlim(0, 1)
    ax.set_xlabel(
        "share of rated latents with each score, 1 (no pattern) to 5 (clear)", fontsize=9, color=LIGHT["soft"]
    )
    ax.grid(visible=False)
    _legend(figure, ax)
    return figure
