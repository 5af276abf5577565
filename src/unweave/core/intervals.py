"""Means with bootstrap intervals over independent items: texts, latents, or concepts with all their pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval; no bounds where there are fewer than two independent items."""

    value: float
    low: float | None
    high: float | None


def interval(
    values: Sequence[float | None] | Array, groups: Sequence[str] | None = None, seed: int = 0
) -> Interval | None:
    """The mean of values [n]; None and NaN are left out, and nothing else left is None.

    What is resampled with replacement are the values, or their ``groups`` [n] with all values of each. Paired
    comparisons give the differences.
    """
    numbers = np.asarray(values, dtype=np.float64)  # None becomes NaN
    there = ~np.isnan(numbers)
    if not there.any():
        return None
    numbers = numbers[there]
    mean = float(numbers.mean())
    own = np.arange(len(numbers)) if groups is None else np.unique(np.asarray(groups)[there], return_inverse=True)[1]
    if own.max() < 1:
        return Interval(mean, None, None)
    low, high = np.percentile(resampled(numbers, own, seed), [2.5, 97.5])
    return Interval(mean, float(low), float(high))


def resampled(values: Array, groups: Array | None = None, seed: int | list[int] = 0) -> Array:
    """Means of as many groups (numbered from 0 on, [n]; by default each value is one) as there are, drawn with
    replacement; float64 [RESAMPLES]."""
    groups = np.arange(len(values)) if groups is None else groups
    sums, counts = np.bincount(groups, weights=values), np.bincount(groups)
    generator = np.random.default_rng(seed)
    total, n = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    for _ in range(len(sums)):  # one draw for all resamples at a time: memory stays small
        drawn = generator.integers(0, len(sums), RESAMPLES)
        total += sums[drawn]
        n += counts[drawn]
    return total / n


def rank_correlation(a: Array, b: Array) -> float | None:
    """Spearman's of two lists [n], ties sharing their mean rank; None where one of them does not vary."""
    from scipy.stats import rankdata

    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])
