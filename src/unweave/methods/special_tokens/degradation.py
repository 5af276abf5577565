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
from unweave.methods.special_tokens.spec import Tolerance

_DEFAULT = Tolerance()


def sweet_spot(levels: Sequence[Level], tolerance: Tolerance = _DEFAULT) -> SweetSpot:
    """The longest run of neighbouring alphas above 0 at which, on the mean over questions, ``distinct`` and perplexity
    stay within the tolerance, no more answers are empty than at alpha 0, and enough of them differ; the first of
    equally long runs.

    This is no statement about quality: a text can change for the worse in many ways that neither number sees.
    """

    def within(loss: float, ratio: float) -> bool:
        return loss <= tolerance.max_distinct_loss and ratio <= tolerance.max_perplexity_ratio

    runs: list[list[Level]] = [[]]
    certain: dict[float, bool] = {}
    for level in levels[1:]:
        loss, ratio = level.distinct_loss, level.perplexity_ratio
        changed = level.answers_changed.mean >= tolerance.min_answers_changed and level.empty <= levels[0].empty
        if changed and ratio is not None and within(loss.mean, ratio.mean):
            runs[-1].append(level)
            certain[level.alpha] = within(loss.high, ratio.high)
        else:
            runs.append([])
    alphas = tuple(level.alpha for level in max(runs, key=len))
    return SweetSpot(alphas, bool(alphas) and all(certain[alpha] for alpha in alphas), **tolerance.to_dict())


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

    answered = [{(answer.question, answer.alpha): answer for answer in answers} for answers in by_latent]

    def level(alpha: float) -> Level:
        def at(value: Callable[[Answer, Answer], float]) -> np.ndarray:
            """A value of each answer and the unedited one, averaged over latents, [Q]."""
            return np.array([_mean([value(a[q, alpha], a[q, 0.0]) for a in answered]) for q in questions])

        def sure(value: Callable[[Answer, Answer], float]) -> Interval:
            known = interval(at(value), draws)
            assert known is not None  # these values are never missing
            return known

        return Level(
            alpha=alpha,
            length=alpha * unit,
            distinct=sure(lambda a, _: a.distinct),
            distinct_loss=sure(lambda a, z: z.distinct - a.distinct),
            perplexity=_exp(interval(at(lambda a, _: _nats(a)), draws)),
            perplexity_ratio=_exp(interval(at(lambda a, z: _nats(a) - _nats(z)), draws)),
            answers_changed=sure(lambda a, z: float(a.text != z.text)),
            words_changed=sure(lambda a, _: a.words_changed),
            empty=float(at(lambda a, _: float(a.n_tokens == 0)).mean()),
        )

    return tuple(level(alpha) for alpha in alphas)


def _nats(answer: Answer) -> float:
    return math.nan if answer.perplexity is None else math.log(answer.perplexity)


def _mean(values: Sequence[float]) -> float:
    """The mean of what is not NaN; NaN where nothing is."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def interval(values: np.ndarray, draws: np.ndarray) -> Interval | None:
    """The mean of values [Q] (NaN: no value) and the 2.5 % and 97.5 % quantiles of its resamples ``draws`` [n, Q]."""
    known = ~np.isnan(values)
    if not known.any():
        return None
    sums, counts = np.where(known, values, 0.0)[draws].sum(1), known[draws].sum(1)
    low, high = np.quantile(sums[counts > 0] / counts[counts > 0], [0.025, 0.975]).tolist()
    return Interval(float(values[known].mean()), low, high)


def _exp(nats: Interval | None) -> Interval | None:
    return None if nats is None else Interval(math.exp(nats.mean), math.exp(nats.low), math.exp(nats.high))
