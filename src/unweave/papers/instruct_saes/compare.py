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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unweave.papers.instruct_saes.plan import RECIPES

MEASURES = {
    "log2 MSE": ("everything", "all"),
    "log2 MSE, special tokens": ("everything", "special"),
    "log2 MSE without outliers": ("without_outliers", "all"),
    "log2 MSE, special tokens without outliers": ("without_outliers", "special"),
    "log2 MSE, user's words": ("everything", "user"),
    "log2 MSE, assistant's words": ("everything", "assistant"),
}
"""Name of a measure -> where ``TokenErrors.to_dict`` keeps it."""


_REACH = 0.5
"""how far beyond its ends a curve may be drawn on, in octaves of L0"""


@dataclass(frozen=True)
class Measured:
    """One SAE and what was measured of it; ``errors`` is ``TokenErrors.to_dict()``."""

    recipe: str
    kind: str
    site: str
    k: int
    seed: int
    errors: Mapping[str, Any]

    def value(self, measure: str) -> float | None:
        """The measure's log2 MSE; None where there were no such tokens or no error at all."""
        part, group = MEASURES[measure]
        return self.errors[part][group]["log2_mse"]

    def l0(self, measure: str) -> float:
        """Active latents per token on the tokens of the measure's part."""
        part, _ = MEASURES[measure]
        return self.errors[part]["all"]["l0"]


@dataclass(frozen=True)
class Cell:
    """One recipe, kind and site: values of a measure at the common L0, one per seed."""

    recipe: str
    kind: str
    site: str
    values: tuple[float, ...]
    raw: tuple[float, ...]
    l0: tuple[float, ...]
    matched: bool
    """whether the curve comes within half an octave of the common L0. Elsewhere nothing can be said of it: ``values``
    are then ``raw``, and the comparison is of different L0"""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; 0 for one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


def cells(rows: Sequence[Measured], measure: str, k: int) -> list[Cell]:
    """Every recipe, kind and site with its SAEs of ``k``, moved to L0 = k along its curve."""
    found = []
    for kind in dict.fromkeys(row.kind for row in rows):
        for site in dict.fromkeys(row.site for row in rows):
            for recipe in RECIPES:
                group = [r for r in rows if (r.recipe, r.kind, r.site) == (recipe, kind, site)]
                if cell := _cell(group, measure, k):
                    found.append(cell)
    return found


def _cell(group: Sequence[Measured], measure: str, k: int) -> Cell | None:
    seeds = [(row, value) for row in group if row.k == k and (value := row.value(measure)) is not None]
    if not seeds:
        return None
    first = seeds[0][0]
    points = curve(group, measure, first.seed)
    slope = slope_at(points, math.log2(k))
    if slope is not None and not points[0][0] - _REACH <= math.log2(k) <= points[-1][0] + _REACH:
        slope = None
    raw = tuple(value for _, value in seeds)
    l0 = tuple(row.l0(measure) for row, _ in seeds)
    moved = tuple(v + (slope or 0.0) * (math.log2(k) - math.log2(max(n, 1e-9))) for v, n in zip(raw, l0, strict=True))
    return Cell(first.recipe, first.kind, first.site, moved, raw, l0, slope is not None)


def curve(group: Sequence[Measured], measure: str, seed: int) -> list[tuple[float, float]]:
    """(log2 L0, log2 MSE) of the SAEs of one seed, by L0."""
    pairs = [(row.l0(measure), row.value(measure)) for row in group if row.seed == seed]
    return sorted((math.log2(l0), value) for l0, value in pairs if l0 > 0 and value is not None)


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
    lower: int
    clearly: int
    """every seed of the one below every seed of the other"""
    clearly_higher: int
    mean_difference: float
    """in log2 MSE; below 0: the first recipe's error is lower"""

    def words(self) -> str:
        """`lower in 5 of 6 cells (4 clearly, 0 clearly higher), by 0.31 on average`."""
        by = f"{abs(self.mean_difference):.2f} {'lower' if self.mean_difference < 0 else 'higher'} on average"
        return (
            f"lower in {self.lower} of {self.cells} cells ({self.clearly} by every seed; {self.clearly_higher} higher "
            f"by every seed), {by}"
        )


def contest(found: Sequence[Cell], one: str, other: str) -> Contest:
    """Compares two recipes cell by cell."""
    pairs = [
        (a, b)
        for a in found
        for b in found
        if (a.recipe, b.recipe) == (one, other) and (a.kind, a.site) == (b.kind, b.site)
    ]
    differences = [a.mean - b.mean for a, b in pairs]
    return Contest(
        cells=len(pairs),
        lower=sum(d < 0 for d in differences),
        clearly=sum(max(a.values) < min(b.values) for a, b in pairs),
        clearly_higher=sum(min(a.values) > max(b.values) for a, b in pairs),
        mean_difference=statistics.fmean(differences) if differences else 0.0,
    )
