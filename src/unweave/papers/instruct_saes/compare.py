"""Errors of the three recipes at the same L0, over seeds.

SAEs that were asked for the same L0 still differ in it on the text they are measured on, and an SAE with more active
latents has less error whatever it was trained on (trap 35). So every recipe, kind and site has an L0-MSE curve, from
SAEs of one seed with half, once and twice the L0. Along it each SAE's error is moved to the common L0:

    log2 MSE at L = log2 MSE + slope * (log2 L - log2 L0)

with the slope of the curve between its points on both sides of L.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from unweave.papers.instruct_saes.result import RECIPES, Measure, Measured, Recipe

_SAME = 0.02
"""octaves of L0 that make no difference"""
_REACH = 0.5
"""how far beyond its ends a curve may be drawn on, in octaves of L0"""


@dataclass(frozen=True)
class Cell:
    """One recipe, kind, width and site: values of a measure, one per seed."""

    recipe: Recipe
    kind: str
    expansion: int
    site: str
    values: tuple[float, ...]
    raw: tuple[float, ...]
    l0: tuple[float, ...]
    """active latents per token, over all tokens"""
    own_l0: tuple[float, ...]
    """on the measure's own tokens"""
    comparable: bool
    """``values`` are at the common L0; or no common L0 was asked for. Otherwise the curve does not come within half an
    octave of it, ``values`` are ``raw``, and no contest counts the cell"""

    @property
    def place(self) -> tuple[str, int, str]:
        """Kind, width and site: what the recipes are compared at."""
        return self.kind, self.expansion, self.site

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; 0 for one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


def cells(rows: Sequence[Measured], measure: Measure, k: int | None) -> list[Cell]:
    """Every recipe, kind, width and site with its SAEs of ``k``, moved to L0 = k along its curve.

    With None every SAE is taken as it was trained, at whatever L0 that is: the paper's comparison, of equal
    coefficients.
    """
    groups = grouped(rows)
    kinds = dict.fromkeys((row.kind, row.expansion) for row in rows)
    sites = dict.fromkeys(row.site for row in rows)
    places: list[tuple[Recipe, str, int, str]] = [
        (recipe, *kind, site) for kind in kinds for site in sites for recipe in RECIPES
    ]
    every = [_cell(groups.get(place, []), measure, k) for place in places]
    return [cell for cell in every if cell is not None]


def grouped(rows: Sequence[Measured]) -> dict[tuple[Recipe, str, int, str], list[Measured]]:
    """SAEs by recipe, kind, width and site; all that is left to differ are L0 and seed."""
    groups: dict[tuple[Recipe, str, int, str], list[Measured]] = {}
    for row in rows:
        groups.setdefault((row.recipe, row.kind, row.expansion, row.site), []).append(row)
    return groups


def _cell(group: Sequence[Measured], measure: Measure, k: int | None) -> Cell | None:
    chosen = [row for row in group if k is None or row.k == k]
    seeds = [(row, value) for row in chosen if (value := measure.of(row.errors).log2_mse) is not None]
    if not seeds:
        return None
    first = seeds[0][0]
    raw = tuple(value for _, value in seeds)
    l0 = tuple(measure.whole(row.errors).l0 or 0.0 for row, _ in seeds)
    own = tuple(measure.of(row.errors).l0 or 0.0 for row, _ in seeds)
    moved = None if k is None else _moved(curve(group, measure, first.seed), math.log2(k), raw, l0)
    values, comparable = raw if moved is None else moved, k is None or moved is not None
    return Cell(first.recipe, first.kind, first.expansion, first.site, values, raw, l0, own, comparable)


def _moved(
    points: Sequence[tuple[float, float]], at: float, raw: Sequence[float], l0: Sequence[float]
) -> tuple[float, ...] | None:
    """Errors at log2 L0 = ``at``; None where the curve says nothing of it, and the L0 are not that anyway."""
    if all(abs(math.log2(max(n, 1e-9)) - at) < _SAME for n in l0):
        return tuple(raw)
    slope = slope_at(points, at)
    if slope is None or not points[0][0] - _REACH <= at <= points[-1][0] + _REACH:
        return None
    return tuple(v + slope * (at - math.log2(max(n, 1e-9))) for v, n in zip(raw, l0, strict=True))


def curve(group: Sequence[Measured], measure: Measure, seed: int) -> list[tuple[float, float]]:
    """(log2 L0, log2 MSE) of the SAEs of one seed, by L0."""
    pairs = [(measure.whole(row.errors).l0, measure.of(row.errors).log2_mse) for row in group if row.seed == seed]
    return sorted((math.log2(l0), value) for l0, value in pairs if l0 and value is not None)


def slope_at(points: Sequence[tuple[float, float]], at: float) -> float | None:
    """The slope of the line between the two points around ``at``, or the two nearest; None for fewer than two L0."""
    apart = [p for i, p in enumerate(points) if i == 0 or p[0] - points[i - 1][0] > 1e-6]
    if len(apart) < 2:
        return None
    right = next((i for i in range(1, len(apart)) if apart[i][0] >= at), len(apart) - 1)
    (x0, y0), (x1, y1) = apart[right - 1], apart[right]
    return (y1 - y0) / (x1 - x0)


@dataclass(frozen=True)
class Contest:
    """How often one recipe had the lower error than another, over kinds and sites."""

    cells: int
    left_out: int
    """cells of which one side could not be moved to the common L0"""
    lower: int
    clearly: int
    """of at least two seeds each, every one of the one below every one of the other"""
    clearly_higher: int
    mean_difference: float
    """in log2 MSE; below 0: the first recipe's error is lower"""


def contest(every: Sequence[Cell], recipe: Recipe, other: Recipe) -> Contest:
    """Compares two recipes cell by cell, where both are comparable."""
    ours = {cell.place: cell for cell in every if cell.recipe == recipe}
    theirs = {cell.place: cell for cell in every if cell.recipe == other}
    both = [(ours[key], theirs[key]) for key in ours if key in theirs]
    pairs = [(a, b) for a, b in both if a.comparable and b.comparable]
    seeded = [(a, b) for a, b in pairs if min(len(a.values), len(b.values)) > 1]
    differences = [a.mean - b.mean for a, b in pairs]
    return Contest(
        cells=len(pairs),
        left_out=len(both) - len(pairs),
        lower=sum(d < 0 for d in differences),
        clearly=sum(max(a.values) < min(b.values) for a, b in seeded),
        clearly_higher=sum(min(a.values) > max(b.values) for a, b in seeded),
        mean_difference=statistics.fmean(differences) if differences else 0.0,
    )
