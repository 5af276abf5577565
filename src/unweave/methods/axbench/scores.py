"""From ratings to scores: the harmonic mean, each pair's strength, the bootstrap over concepts.

1. A text's rating is the harmonic mean of its three ratings, 0 where one of them is 0 (Wu et al. 2025).
2. A pair's strength is the one with the highest mean rating on some of its instructions; its score is the mean on the
   others. The splits are 10 repeats of 4 folds, or AxBench's first and second half.
3. Intervals resample concepts with replacement, with all pairs of a concept: pairs of one concept are not independent.

Ratings that failed are NaN. They are left out of means, never taken for 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unweave.core.errors import UnweaveError

Array = np.ndarray[Any, Any]
Split = tuple[Array, Array]
"""(the instructions that choose, those that report)"""


def harmonic(ratings: Array) -> Array:
    """The harmonic mean over the last axis of ratings [..., R] >= 0: 0 where one is 0, NaN where one is NaN."""
    with np.errstate(divide="ignore"):
        return ratings.shape[-1] / (1.0 / ratings).sum(-1)  # 1 / inf is the 0 that one 0 makes of it


def scored(ratings: Array) -> Array:
    """Ratings [..., R] behind their harmonic mean, [..., 1 + R]."""
    return np.concatenate([harmonic(ratings)[..., None], ratings], -1)


def plain(value: float) -> float | None:
    """None for NaN, as results hold it."""
    return None if np.isnan(value) else float(value)


def repeated_folds(n: int, repeats: int = 10, folds: int = 4, seed: int = 0) -> list[Split]:
    """``repeats`` times a random division of n instructions into ``folds``: each reports once, the others choose."""
    if not 2 <= folds <= n:
        remedy = "use at least as many instructions as folds, and at least two folds"
        raise UnweaveError(f"{n} instructions cannot be divided into {folds} folds", remedy=remedy)
    draw = np.random.default_rng(seed)
    splits = []
    for _ in range(repeats):
        parts = np.array_split(draw.permutation(n), folds)
        splits += [(np.concatenate(parts[:i] + parts[i + 1 :]), part) for i, part in enumerate(parts)]
    return splits


def halves(n: int) -> list[Split]:
    """AxBench's split: the first half chooses, the second reports."""
    if n < 2:
        raise UnweaveError(f"{n} instructions have no two halves", remedy="use at least two")
    return [(np.arange(n // 2), np.arange(n // 2, n))]


@dataclass(frozen=True)
class Chosen:
    """A pair's score: ``rating``, the harmonic mean's mean, and the means of the single ratings, ``parts`` [R]; all on
    instructions that did not choose the strength. ``strength``: the index chosen most often."""

    rating: float
    parts: Array
    strength: int


def choose(ratings: Array, splits: Sequence[Split]) -> Chosen:
    """The score of one pair from ratings [strengths, instructions, R].

    Of equally good strengths the first is chosen. A split whose ratings failed on one side is left out; NaN where all
    did.
    """
    together = scored(ratings)
    chosen, reported = [], []
    for choosing, reporting in splits:
        means = nanmean(together[:, choosing, 0], 1)
        if np.isnan(means).all():
            continue
        best = int(np.nanargmax(means))
        scores = nanmean(together[best, reporting], 0)
        if not np.isnan(scores[0]):
            chosen.append(best)
            reported.append(scores)
    if not reported:
        return Chosen(float("nan"), np.full(ratings.shape[-1], np.nan), 0)
    mean = np.mean(reported, 0)
    return Chosen(float(mean[0]), mean[1:], int(np.bincount(chosen).argmax()))


def nanmean(values: Array, axis: int | tuple[int, ...]) -> Array:
    """The mean of what is not NaN; NaN where everything is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        return np.nanmean(values, axis)
