"""Bootstrap intervals against all resamples there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from unweave.core.intervals import RESAMPLES, Interval, interval, resampled


def test_the_bounds_are_percentiles_of_all_resamples() -> None:
    values = [0.0, 1.0, 3.0, 9.0]
    means = [np.mean(drawn) for drawn in itertools.product(values, repeat=4)]
    low, high = np.percentile(means, [2.5, 97.5], method="inverted_cdf")
    got = interval([values[0], None, *values[1:], float("nan")])
    assert got is not None and (got.value, got.low, got.high) == pytest.approx((3.25, low, high))
    assert interval(values, seed=1) == interval(values, seed=1)
    assert len(resampled(np.array(values))) == RESAMPLES


def test_the_bootstrap_resamples_concepts_with_all_their_pairs() -> None:
    """Four concepts have 256 resamples: their percentiles are the exact interval."""
    groups = {"a": [0.0, 1.0, 4.0], "b": [2.0], "c": [9.0, 8.0], "d": [5.0]}
    values, concepts = zip(*[(value, name) for name, several in groups.items() for value in several], strict=True)
    means = [np.mean([v for name in drawn for v in groups[name]]) for drawn in itertools.product(groups, repeat=4)]
    low, high = np.percentile(means, [2.5, 97.5], method="inverted_cdf")
    got = interval(np.array(values), concepts)
    assert got is not None and got.low is not None and got.high is not None
    assert got.value == pytest.approx(29 / 7)
    assert got.low == pytest.approx(low) and got.high == pytest.approx(high)


def test_there_is_no_interval_of_one_concept_and_none_of_nothing() -> None:
    got = interval([1.0, 2.0, np.nan], ["a", "a", "b"])
    assert got == Interval(1.5, None, None)
    assert interval([np.nan], ["a"]) is None
    assert interval([None, float("nan")]) is None and interval([]) is None
    assert interval([2.0]) == Interval(2.0, None, None)
