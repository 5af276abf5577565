"""Which label each latent tells: the calibrated F1 of a probe on its activation frequency (METHODS 3.1).

    a_ij = share of text i's counted tokens on which latent j fires            probe p_ij = 1[a_ij > tau]
    c = pi (1 - pi0) / (pi0 (1 - pi)),  F1_c = 2 TP / (2 TP + c FP + FN)       match score: the largest over tau

pi is a label's prevalence, pi0 the reference prior (Siblini et al. 2020). With pi0 = pi it is the ordinary F1; it does
not change when all negatives are duplicated.

1. A first look at a latent's texts gives its thresholds; a second counts, for each label and threshold, the texts that
   lie between one threshold and the next. Both go over the sparse texts x latents, some latents at a time.
2. Sums from the highest threshold down are the true positives of every pair at every threshold: no loop over pairs.

Memory: 5 bytes a pair of latent and label, and 4 a pair and threshold of the 1,024 latents under way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from unweave.methods.labels.levels import LEVELS, Array, candidates

BLOCK = 1024
"""latents that are matched at a time"""
_AT_ONCE = 1 << 20


class Entries(NamedTuple):
    """Some non-zero frequencies: text int [n], latent of the block int [n], level uint8 [n]."""

    text: Array
    latent: Array
    level: Array


Blocks = Callable[[int], Iterator[Entries]]
"""The entries of the latents of block b, ``BLOCK`` of them; each call goes over them anew."""


@dataclass(frozen=True)
class TextLabels:
    """The labels of N texts as CSR: offsets int64 [N+1], labels int32, of ``n_labels``. ``counted`` bool [N] are the
    texts with a counted token; the others are neither positive nor negative."""

    offsets: Array
    labels: Array
    n_labels: int
    counted: Array

    @property
    def n_texts(self) -> int:
        """Counted texts."""
        return int(self.counted.sum())

    @property
    def support(self) -> Array:
        """How many counted texts have each label, int64 [n_labels]."""
        counted = np.repeat(self.counted, np.diff(self.offsets))
        return np.bincount(self.labels[counted], minlength=self.n_labels)

    def of(self, labels: Array) -> TextLabels:
        """Only some labels (ascending), numbered anew."""
        place = np.full(self.n_labels, -1, dtype=np.int32)
        place[labels] = np.arange(len(labels))
        new = place[self.labels]
        text = np.repeat(np.arange(len(self.counted)), np.diff(self.offsets))[new >= 0]
        offsets = np.concatenate([[0], np.cumsum(np.bincount(text, minlength=len(self.counted)))])
        return TextLabels(offsets, new[new >= 0], len(labels), self.counted)

    def shuffled(self, seed: int) -> TextLabels:
        """Every counted text with the labels of another: what is left is chance."""
        order = np.arange(len(self.counted))
        places = np.flatnonzero(self.counted)
        order[places] = np.random.default_rng(seed).permutation(places)
        lengths = np.diff(self.offsets)[order]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        at = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][order] - offsets[:-1], lengths)
        return TextLabels(offsets, self.labels[at], self.n_labels, self.counted)


@dataclass(frozen=True)
class Scores:
    """The best score of each latent and label, float32 [F, M], -inf where none is defined, and the level of its
    threshold, uint8 [F, M]; ``firing`` int64 [F] counts the texts in which each latent fires."""

    score: Array
    level: Array
    firing: Array


def calibrated_f1(tp: Array, fp: Array, positive: Array, n: int, prior: float | None) -> Array:
    """F1_c of counts that broadcast: true and false positives, how many of the ``n`` texts have the label. ``prior``
    None is the label's own prevalence: the ordinary F1. NaN where it is undefined, as with no or only positives."""
    tp, fp, positive = (np.asarray(values, np.float64) for values in (tp, fp, positive))
    with np.errstate(divide="ignore", invalid="ignore"):
        c = 1.0 if prior is None else (positive / (n - positive)) * ((1 - prior) / prior)
        score = 2 * tp / (tp + c * fp + positive)  # TP + FN are the positives
    return np.where((positive > 0) & (positive < n), score, np.nan)


def best_scores(
    blocks: Blocks, n_latents: int, labels: TextLabels, quantiles: tuple[float, ...], prior: float | None
) -> Scores:
    """The match score of every latent and label."""
    score = np.full((n_latents, labels.n_labels), -np.inf, dtype=np.float32)
    level = np.zeros((n_latents, labels.n_labels), dtype=np.uint8)
    firing = np.zeros(n_latents, dtype=np.int64)
    support = labels.support
    for block, first in enumerate(range(0, n_latents, BLOCK)):
        size = min(BLOCK, n_latents - first)
        histogram = np.zeros(size * LEVELS, dtype=np.int64)
        for entries in blocks(block):
            histogram += np.bincount(entries.latent.astype(np.int64) * LEVELS + entries.level, minlength=len(histogram))
        histogram = histogram.reshape(size, LEVELS)
        firing[first : first + size] = histogram.sum(1)
        levels = candidates(histogram, quantiles)
        between = _between(blocks(block), levels, labels)
        above = histogram[:, ::-1].cumsum(1)[:, ::-1]
        tp = np.zeros((size, labels.n_labels), dtype=np.int64)
        here, at = score[first : first + size], level[first : first + size]
        for t in reversed(range(levels.shape[1])):  # of equal scores the lowest threshold stays
            tp += between[:, t]
            fp = np.take_along_axis(above, levels[:, t : t + 1].astype(np.int64), 1) - tp
            new = calibrated_f1(tp, fp, support, labels.n_texts, prior).astype(np.float32)
            better = new >= here
            here[better] = new[better]
            at[better] = np.broadcast_to(levels[:, t : t + 1], at.shape)[better]
    return Scores(score, level, firing)


def _between(parts: Iterator[Entries], levels: Array, labels: TextLabels) -> Array:
    """How many texts with each label have a frequency from threshold t up to the next, int32 [n, T, M]."""
    size, steps = levels.shape
    # the last threshold that each level reaches, by latent
    reached = (np.arange(LEVELS)[None, :, None] >= levels[:, None, :]).sum(2).astype(np.int64) - 1
    counts = np.zeros(size * steps * labels.n_labels, dtype=np.int32)
    for entries in parts:
        for start in range(0, len(entries.text), _AT_ONCE):
            text, latent, level = (column[start : start + _AT_ONCE].astype(np.int64) for column in entries)
            first, many = labels.offsets[text], labels.offsets[text + 1] - labels.offsets[text]
            cell = np.repeat((latent * steps + reached[latent, level]) * labels.n_labels, many)
            ends = np.cumsum(many)
            places = np.arange(len(cell)) + np.repeat(first - ends + many, many)
            np.add.at(counts, cell + labels.labels[places], 1)
    return counts.reshape(size, steps, labels.n_labels)
