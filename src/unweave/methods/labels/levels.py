"""Activation frequencies on a grid, so that counts of texts by frequency take the place of the texts.

Frequencies above 0 are told apart by 16 steps an octave, from 2^-13 to 1. A frequency's level is how many of the grid's
edges lie below it; a probe with threshold level t fires where a frequency is above 0 and its level at least t. Level 0
stands for the threshold 0, level t for the t-th edge.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
EDGES = 2.0 ** (np.arange(-13 * 16, 1) / 16)
LEVELS = len(EDGES) + 1


def level_of(frequency: Array) -> Array:
    """The level of each frequency above 0, uint8."""
    return np.searchsorted(EDGES, frequency, side="left").astype(np.uint8)


def threshold_of(level: int) -> float:
    """The threshold that a level stands for: a probe fires where the frequency is above it."""
    return 0.0 if level == 0 else float(EDGES[level - 1])


def candidates(histogram: Array, quantiles: tuple[float, ...]) -> Array:
    """Threshold levels of each latent, ascending uint8 [n, 1 + Q]: 0, and the quantiles of its frequencies above 0,
    by ``histogram`` int [n, LEVELS] of the texts in which it fires."""
    below = histogram.cumsum(1)
    texts = below[:, -1:]
    levels = np.zeros((len(histogram), 1 + len(quantiles)), dtype=np.uint8)
    for i, quantile in enumerate(sorted(quantiles), 1):
        levels[:, i] = 1 + (below >= quantile * texts).argmax(1)
    return np.minimum(levels, LEVELS - 1)


def auroc(positive: Array, negative: Array) -> Array:
    """Area under the ROC curve of histograms by rising level, int [..., K] both; ties count half. NaN where either is
    empty."""
    positive, negative = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
    below = negative.cumsum(-1) - negative / 2
    with np.errstate(invalid="ignore"):
        return (positive * below).sum(-1) / (positive.sum(-1) * negative.sum(-1))
