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

from unweave.core.intervals import Interval, interval
from unweave.methods.special_tokens.result import Answer, Level, SweetSpot
from unweave.methods.special_tokens.spec import Tolerance

_DEFAULT = Tolerance()


def sweet_spot(levels: Sequence[Level], tolerance: Tolerance = _DEFAULT) -> SweetSpot:
    """The longest run of neighbouring alphas above 0 at which, on the mean over questions, ``distinct`` and perplexity
    stay within the tolerance, no more answers are empty than at alpha 0, and enough of them differ; the first of
    equally long runs.

    This is no statement about quality: a text can change for the worse in many ways that neither number sees.
    """

    def within(loss: float | None, ratio: float | None) -> bool:
        losses = (loss, tolerance.max_distinct_loss), (ratio, tolerance.max_perplexity_ratio)
        return all(one is not None and one <= most for one, most in losses)

    runs: list[list[Level]] = [[]]
    certain: dict[float, bool] = {}
    for level in levels[1:]:
        loss, ratio = level.distinct_loss, level.perplexity_ratio
        changed = level.answers_changed.value >= tolerance.min_answers_changed and level.empty <= levels[0].empty
        if changed and ratio is not None and within(loss.value, ratio.value):
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
) -> tuple[Level, ...]:
    """One level per alpha."""

    answered = [{(answer.question, answer.alpha): answer for answer in answers} for answers in by_latent]

    def level(alpha: float) -> Level:
        def at(value: Callable[[Answer, Answer], float]) -> np.ndarray:
            """A value of each answer and the unedited one, averaged over latents, [Q]."""
            return np.array([_mean([value(a[q, alpha], a[q, 0.0]) for a in answered]) for q in questions])

        def sure(value: Callable[[Answer, Answer], float]) -> Interval:
            known = interval(at(value))
            assert known is not None  # these values are never missing
            return known

        return Level(
            alpha=alpha,
            length=alpha * unit,
            distinct=sure(lambda a, _: a.distinct),
            distinct_loss=sure(lambda a, z: z.distinct - a.distinct),
            perplexity=_exp(interval(at(lambda a, _: _nats(a)))),
            perplexity_ratio=_exp(interval(at(lambda a, z: _nats(a) - _nats(z)))),
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


def _exp(nats: Interval | None) -> Interval | None:
    if nats is None:
        return None
    low, high = (None if bound is None else math.exp(bound) for bound in (nats.low, nats.high))
    return Interval(math.exp(nats.value), low, high)
