"""Scores against exact enumeration and closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from unweave.core.errors import UnweaveError
from unweave.methods.axbench.scores import choose, halves, harmonic, repeated_folds


def test_the_harmonic_mean_is_zero_where_one_rating_is_and_unknown_where_one_failed() -> None:
    ratings = np.array([[2, 2, 2], [0, 2, 2], [1, 2, 2], [1, 1, 2], [2, np.nan, 2], [0, np.nan, 2]])
    expected = [2, 0, 3 / (1 + 0.5 + 0.5), 3 / (1 + 1 + 0.5), np.nan, np.nan]
    np.testing.assert_allclose(harmonic(ratings), expected)


def test_folds_divide_the_instructions_and_halves_are_axbenchs() -> None:
    splits = repeated_folds(20, repeats=10, folds=4, seed=3)
    assert len(splits) == 40
    for choosing, reporting in splits:
        assert len(reporting) == 5 and sorted([*choosing, *reporting]) == list(range(20))
    for repeat in range(10):
        assert sorted(np.concatenate([r for _, r in splits[4 * repeat : 4 * repeat + 4]])) == list(range(20))
    assert len({tuple(sorted(reporting)) for _, reporting in splits}) > 30  # drawn anew each time
    ((first, last),) = halves(10)
    assert list(first) == [0, 1, 2, 3, 4] and list(last) == [5, 6, 7, 8, 9]
    for wrong in (lambda: repeated_folds(3, folds=4), lambda: halves(1)):
        with pytest.raises(UnweaveError, match="instructions"):
            wrong()


def test_a_strength_is_chosen_on_other_instructions_than_it_is_reported_on() -> None:
    """Brute force over the definition, with three ratings so that the harmonic mean matters."""
    ratings = np.random.default_rng(0).integers(0, 3, (5, 12, 3)).astype(float)
    splits = repeated_folds(12, repeats=3, folds=4, seed=1)
    scores, parts = [], []
    for choosing, reporting in splits:
        means = [np.mean([3 / sum(1 / r for r in row) if all(row) else 0.0 for row in s[choosing]]) for s in ratings]
        best = means.index(max(means))
        scores.append(np.mean([3 / sum(1 / r for r in row) if all(row) else 0.0 for row in ratings[best][reporting]]))
        parts.append(ratings[best][reporting].mean(0))
    chosen = choose(ratings, splits)
    assert chosen.rating == pytest.approx(np.mean(scores))
    np.testing.assert_allclose(chosen.parts, np.mean(parts, 0))


def test_noise_alone_gains_nothing_from_a_choice_of_strength() -> None:
    """A maximum over strengths of the reported mean would be far above the true mean; cross-validation is not."""
    draw = np.random.default_rng(0)
    noise = [draw.choice([1.0, 2.0], (14, 20, 1)) for _ in range(300)]
    fair = np.mean([choose(pair, repeated_folds(20, seed=i)).rating for i, pair in enumerate(noise[:60])])
    greedy = np.mean([pair.mean(1).max() for pair in noise])
    assert greedy > 1.65 and abs(fair - 1.5) < 0.03


def test_failed_ratings_are_left_out() -> None:
    ratings = np.full((2, 4, 3), 2.0)
    ratings[0, :, 0] = 1.0
    ratings[1, 0] = np.nan
    chosen = choose(ratings, [(np.array([0, 1]), np.array([2, 3])), (np.array([2, 3]), np.array([0, 1]))])
    assert chosen.rating == 2 and chosen.strength == 1
    assert np.isnan(choose(np.full((2, 4, 3), np.nan), halves(4)).rating)
