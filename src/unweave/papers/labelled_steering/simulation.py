"""The paper's simulation of the calibrated F1 (appendix A.2.1, Figures 3 and 4), and its use on planted pairs.

A probe's activity is N(0, 1) on texts without the label, N(distance, 1) on those with it; it fires above a threshold.

1. ``by_prevalence`` (Figure 3): ordinary and calibrated F1 of drawn texts as the label gets rarer.
2. ``by_prior`` (Figure 4): calibrated F1 by reference prior for probes that fire too often and too seldom.
3. ``by_distance`` (Figure 4, last): the best threshold's score by reference prior, for classes ever further apart.
4. ``recovery``: of labels with a latent planted for each, among latents that are wider, narrower or idle, how many are
   in the best pairs. A latent also fires, less often, in texts that touch a topic without its label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from unweave.methods.labels.levels import Array, level_of
from unweave.methods.labels.matching import Entries, TextLabels, best_scores, calibrated_f1

PRIORS = tuple(float(f"{value:.3g}") for value in np.logspace(-4, -0.31, 13))
THRESHOLDS = (-0.5, 0.25, 1.0, 1.75, 2.5)
DISTANCES = (0.5, 1.0, 2.0, 3.0)
DISTANCE = 2.0
_N = 10_000
_FIXED = 0.1
_QUANTILES = (0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995)


@dataclass(frozen=True)
class Curve:
    """Scores over prevalences or reference priors."""

    name: str
    x: tuple[float, ...]
    y: tuple[float | None, ...]


@dataclass(frozen=True)
class Simulation:
    """All four; ``recovered`` is the share of planted pairs among as many best ones, by reference prior."""

    by_prevalence: tuple[Curve, ...]
    by_prior: tuple[Curve, ...]
    by_distance: tuple[Curve, ...]
    recovered: Curve
    recovered_ordinary: float


def simulate(seed: int = 0) -> Simulation:
    """Everything, from one seed."""
    shares = [recovery(prior, seed) for prior in PRIORS]
    return Simulation(
        by_prevalence(PRIORS, seed), by_prior(THRESHOLDS), by_distance(DISTANCES),
        Curve("calibrated F1", PRIORS, tuple(shares)), recovery(None, seed),
    )  # fmt: skip


def by_prevalence(prevalences: Sequence[float], seed: int = 0) -> tuple[Curve, ...]:
    """Ordinary and calibrated F1 (reference prior 0.1) of 10,000 drawn texts at each prevalence, threshold 1."""
    draw = np.random.default_rng(seed)
    scores: dict[str, list[float | None]] = {"ordinary F1": [], "calibrated F1": []}
    for prevalence in prevalences:
        label = draw.random(_N) < prevalence
        fires = draw.normal(DISTANCE * label) > DISTANCE / 2
        counts = (fires & label).sum(), (fires & ~label).sum(), label.sum()
        for name, prior in (("ordinary F1", None), ("calibrated F1", _FIXED)):
            score = float(calibrated_f1(*counts, _N, prior))
            scores[name].append(None if np.isnan(score) else score)
    return tuple(Curve(name, tuple(prevalences), tuple(values)) for name, values in scores.items())


def score(threshold: float, distance: float, prior: float) -> float:
    """The calibrated F1 of a probe over infinitely many texts: 2 R / (R + 1 + (1 - prior) / prior FPR)."""
    normal = NormalDist()
    recall, false = 1 - normal.cdf(threshold - distance), 1 - normal.cdf(threshold)
    return 2 * recall / (recall + 1 + (1 - prior) / prior * false)


def by_prior(thresholds: Sequence[float]) -> tuple[Curve, ...]:
    """A curve for each threshold; the classes' middle is best where both errors weigh the same."""
    middle = DISTANCE / 2
    words = {True: "hyperactive", False: "hypoactive"}
    return tuple(
        Curve(
            f"{words[t < middle] if t != middle else 'middle'} ({t:g})",
            PRIORS,
            tuple(score(t, DISTANCE, prior) for prior in PRIORS),
        )
        for t in thresholds
    )


def by_distance(distances: Sequence[float]) -> tuple[Curve, ...]:
    """The score of the best threshold for each distance of the classes."""
    grid = np.linspace(-2, 8, 201).tolist()
    return tuple(
        Curve(f"distance {d:g}", PRIORS, tuple(max(score(t, d, prior) for t in grid) for prior in PRIORS))
        for d in distances
    )


def recovery(prior: float | None, seed: int = 0, texts: int = 4000, labels: int = 24) -> float:
    """The share of planted pairs among the ``labels`` best ones; prior None is the ordinary F1.

    Each label (on 2 to 20 % of texts) has one latent that tells it: it fires in nine of ten of its texts and, on fewer
    tokens, in a tenth of the others. Beside it stand a wider latent, which fires alike for two other labels, a narrower
    one for a quarter of its texts that fires at random elsewhere as well, and one that does nothing but chance.
    """
    draw = np.random.default_rng(seed)
    has = draw.random((texts, labels)) < np.geomspace(0.02, 0.2, labels)
    wider = has | has[:, np.roll(np.arange(labels), 1)] | has[:, np.roll(np.arange(labels), 2)]
    planted = np.where(has, draw.random(has.shape) < 0.9, False)
    touched = (draw.random(has.shape) < 0.1) & ~planted
    own = planted * draw.lognormal(np.log(0.15), 0.6, has.shape) + touched * draw.lognormal(
        np.log(0.03), 0.6, has.shape
    )
    wide = (wider & (draw.random(has.shape) < 0.9)) * draw.lognormal(np.log(0.15), 0.6, has.shape)
    narrow = ((has & (draw.random(has.shape) < 0.25)) | (draw.random(has.shape) < 0.02)) * 0.15
    chance = (draw.random(has.shape) < draw.random(labels)) * draw.lognormal(np.log(0.1), 0.6, has.shape)
    best = _best(np.minimum(np.concatenate([own, wide, narrow, chance], 1), 1.0), has, prior)
    return float(np.mean([latent == label for latent, label in best]))


def _best(frequency: Array, has: Array, prior: float | None) -> list[tuple[int, int]]:
    """As many of the best pairs (latent, label) as there are labels."""
    text, latent = np.nonzero(frequency)
    entries = Entries(text, latent, level_of(frequency[text, latent]))
    offsets = np.concatenate([[0], np.cumsum(has.sum(1))])
    labels = TextLabels(offsets, np.nonzero(has)[1].astype(np.int32), has.shape[1], np.ones(len(has), dtype=bool))
    scores = best_scores(lambda _: iter([entries]), frequency.shape[1], labels, _QUANTILES, prior).score
    order = np.argsort(-scores, axis=None, kind="stable")[: has.shape[1]]
    return [(int(place) // has.shape[1], int(place) % has.shape[1]) for place in order]
