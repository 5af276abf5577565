"""From a number of each seed to its interval, what difference it can detect, and its distance from a baseline.

Seeds draw data or probes anew. Where they divide the same texts again and again the draws are not independent, and a
plain standard error is too small. Nadeau and Bengio (2003) add the share of the test to the training texts:

    se^2 = s^2 (1 / n + n_test / n_train),   interval = mean +- t(0.975, n - 1) se

With disjoint data that share is 0. Two SAEs measured so are told apart with a probability of 0.8, at a level of 0.05,
from a difference of (t(0.975) + t(0.8)) sqrt(2) se on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from unweave.methods.saebench.result import Gap, Measure

OWN = "the model's own activations"
WITHIN = {"llm_": OWN, "random_": "latents drawn at random", "shuffled_": "other latents' explanations"}
"""baselines that a task measures along with each SAE, by what their keys begin with"""


@dataclass(frozen=True)
class Scored:
    """What a task measures of one SAE: numbers by SAEBench's keys, and the same of each seed."""

    value: dict[str, float]
    draws: dict[str, tuple[float, ...]]
    overlap: float = 0.0
    """test over training texts where seeds divide the same texts anew; 0 where they share nothing"""
    details: tuple[dict[str, Any], ...] = field(default_factory=tuple)
    """SAEBench's eval_result_details"""

    @classmethod
    def of(cls, draws: Sequence[Mapping[str, float]], overlap: float, details: Sequence[dict[str, Any]] = ()) -> Scored:
        """The mean of each number that every seed has."""
        keys = [key for key in draws[0] if all(key in one for one in draws)]
        columns = {key: tuple(float(one[key]) for one in draws) for key in keys}
        return cls({key: float(np.mean(of)) for key, of in columns.items()}, columns, overlap, tuple(details))


def half_width(draws: Sequence[float], overlap: float, *, power: float | None = None) -> float:
    """Half of the mean's 95 % interval; with ``power`` the difference of two such means that is detected so often."""
    from scipy.stats import t

    n = len(draws)
    se = float(np.std(draws, ddof=1)) * math.sqrt(1 / n + overlap)
    quantile = t.ppf(0.975, n - 1)
    return float(quantile * se if power is None else (quantile + t.ppf(power, n - 1)) * math.sqrt(2) * se)


def measure(scored: Scored, key: str, better: int, baselines: Mapping[str, Scored]) -> Measure:
    """One number with its interval; a headline number (``better`` is 1 or -1) with its distance from baselines."""
    value, draws = scored.value[key], scored.draws[key]
    half = half_width(draws, scored.overlap)
    for prefix, name in WITHIN.items():
        beside = prefix + key.removeprefix("sae_")
        if beside in scored.draws:
            baselines = {**baselines, name: Scored({key: scored.value[beside]}, {key: scored.draws[beside]})}
    gaps = [gap(scored, other, key, name) for name, other in baselines.items() if better and key in other.draws]
    smallest = half_width(draws, scored.overlap, power=0.8)
    return Measure(key, value, draws, value - half, value + half, smallest, better, tuple(gaps))


def gap(scored: Scored, other: Scored, key: str, name: str) -> Gap:
    """The distance from a baseline, paired by seed."""
    differences = np.subtract(scored.draws[key], other.draws[key])
    mean, half = float(differences.mean()), half_width(differences.tolist(), scored.overlap)
    return Gap(name, other.value[key], mean, mean - half, mean + half)
