"""What moving activations did to a model's answers, as far as it can be told without a reader.

1. How much of the text changed: answers that differ at all, and words without a partner in the unedited answer.
2. How far it fell apart: how much less of it is distinct 3-grams (it repeats itself), and how much less probable it is
   to the unedited model. A loop can be very probable, so that neither number will do alone.
3. Every mean is over questions, with an interval from drawing the questions again.

The FAST paper (section 6) speaks of a range of alpha in which answers improve. ``sweet_spot`` finds the range in which
they change and do not degrade in those two ways; whether they improve is for a reader to say.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence

import numpy as np

from unweave.methods.special_tokens.result import Answer, Interval, Level, SweetSpot


def sweet_spot(
    levels: Sequence[Level],
    *,
    max_distinct_loss: float = 0.1,
    max_perplexity_ratio: float = 1.25,
    min_answers_changed: float = 0.5,
) -> SweetSpot:
    """The longest run of neighbouring alphas above 0 at which, on the mean over questions, ``distinct`` is lower by at
    most ``max_distinct_loss``, perplexity is higher by at most the factor ``max_perplexity_ratio``, no more answers
    are empty than at alpha 0, and at least ``min_answers_changed`` of them differ; the first of equally long runs.

    This is no statement about quality: a text can change for the worse in many ways that neither number sees.
    """
    runs: list[list[Level]] = [[]]
    for level in levels[1:]:
        ratio = level.perplexity_ratio
        fine = level.distinct_loss.mean <= max_distinct_loss and level.empty <= levels[0].empty
        fine = fine and ratio is not None and ratio.mean <= max_perplexity_ratio
        if fine and level.answers_changed.mean >= min_answers_changed:
            runs[-1].append(level)
        else:
            runs.append([])
    best = max(runs, key=len)
    certain = bool(best) and all(
        level.distinct_loss.high <= max_distinct_loss
        and level.perplexity_ratio is not None
        and level.perplexity_ratio.high <= max_perplexity_ratio
        for level in best
    )
    return SweetSpot(
        tuple(level.alpha for level in best), certain, max_distinct_loss, max_perplexity_ratio, min_answers_changed
    )


def words_changed(before: str, after: str) -> float:
    """1 - 2 M / T, with T words in the two texts and M of them matched in order: 0 for equal texts, 1 for strangers."""
    if before == after:
        return 0.0
    return 1.0 - difflib.SequenceMatcher(None, before.split(), after.split(), autojunk=False).ratio()


def levels_of(
    by_latent: Sequence[Sequence[Answer]],
    questions: Sequence[str],
    alphas: Sequence[float],
    unit: float,
    draws: np.ndarray,
) -> tuple[Level, ...]:
    """One level per alpha; ``draws`` [resamples, Q] are the questions of each resample."""

    asked = [{(answer.question, answer.alpha): answer for answer in answers} for answers in by_latent]

    def at(alpha: float, value: Callable[[Answer, Answer], float]) -> np.ndarray:
        """A value of each answer and the unedited one, averaged over latents, [Q]."""
        return np.array([_mean([value(a[question, alpha], a[question, 0.0]) for a in asked]) for question in questions])

    levels = []
    for alpha in alphas:
        levels.append(
            Level(
                alpha=alpha,
                length=alpha * unit,
                distinct=_sure(interval(at(alpha, lambda a, _: a.distinct), draws)),
                distinct_loss=_sure(interval(at(alpha, lambda a, z: z.distinct - a.distinct), draws)),
                perplexity=_exp(interval(at(alpha, lambda a, _: _nats(a)), draws)),
                perplexity_ratio=_exp(interval(at(alpha, lambda a, z: _nats(a) - _nats(z)), draws)),
                answers_changed=_sure(interval(at(alpha, lambda a, z: float(a.text != z.text)), draws)),
                words_changed=_sure(interval(at(alpha, lambda a, _: a.words_changed), draws)),
                empty=float(at(alpha, lambda a, _: float(a.n_tokens == 0)).mean()),
            )
        )
    return tuple(levels)


def _nats(answer: Answer) -> float:
    return math.nan if answer.perplexity is None else math.log(answer.perplexity)


def _mean(values: Sequence[float]) -> float:
    """The mean of what is not NaN; NaN where nothing is."""
    there = [value for value in values if not math.isnan(value)]
    return sum(there) / len(there) if there else math.nan


def interval(values: np.ndarray, draws: np.ndarray) -> Interval | None:
    """The mean of values [Q] (NaN: no value) and the 2.5 % and 97.5 % quantiles of its resamples ``draws`` [n, Q]."""
    there = ~np.isnan(values)
    if not there.any():
        return None
    picked, counted = np.where(there, values, 0.0)[draws].sum(1), there[draws].sum(1)
    means = picked[counted > 0] / counted[counted > 0]
    low, high = np.quantile(means, [0.025, 0.975]).tolist()
    return Interval(float(values[there].mean()), low, high)


def _sure(known: Interval | None) -> Interval:
    assert known is not None  # these values are never missing
    return known


def _exp(nats: Interval | None) -> Interval | None:
    return None if nats is None else Interval(math.exp(nats.mean), math.exp(nats.low), math.exp(nats.high))
