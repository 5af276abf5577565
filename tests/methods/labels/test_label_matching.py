"""methods/labels: match scores against brute force, the calibrated F1, thresholds, AUROC, and planted pairs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata
from sklearn.metrics import f1_score, roc_auc_score

from unweave.methods.labels.heldout import told
from unweave.methods.labels.labels import _by_score
from unweave.methods.labels.levels import EDGES, LEVELS, auroc, candidates, level_of, threshold_of
from unweave.methods.labels.matching import BLOCK, Blocks, Entries, Scores, TextLabels, best_scores, calibrated_f1

QUANTILES = (0.25, 0.5, 0.75, 0.9)


def csr(dense: np.ndarray, counted: np.ndarray | None = None) -> TextLabels:
    """bool [N, M] as the labels of texts."""
    offsets = np.concatenate([[0], np.cumsum(dense.sum(1))])
    everything = np.ones(len(dense), bool) if counted is None else counted
    return TextLabels(offsets, np.nonzero(dense)[1].astype(np.int32), dense.shape[1], everything)


def blocks_of(frequency: np.ndarray, pieces: int = 3) -> Blocks:
    """A dense [N, F] matrix of frequencies as entries, in several pieces."""

    def of(block: int) -> Iterator[Entries]:
        part = frequency[:, block * BLOCK : (block + 1) * BLOCK]
        for rows in np.array_split(np.arange(len(part)), pieces):
            text, latent = np.nonzero(part[rows])
            yield Entries(rows[text], latent, level_of(part[rows][text, latent]))

    return of


def brute_force(frequency: np.ndarray, labels: np.ndarray, levels: np.ndarray, prior: float | None) -> float:
    """The match score of one latent and label, threshold by threshold."""
    best = -np.inf
    n, positive = len(labels), labels.sum()
    if not 0 < positive < n:
        return best
    pi = positive / n
    pi0 = pi if prior is None else prior
    c = pi * (1 - pi0) / (pi0 * (1 - pi))
    for level in levels:
        probe = frequency > threshold_of(int(level))
        tp, fp = (probe & labels).sum(), (probe & ~labels).sum()
        fn = positive - tp
        best = max(best, 2 * tp / (2 * tp + c * fp + fn))
    return best


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), n=st.integers(2, 60), prior=st.sampled_from([None, 0.001, 0.1, 0.5]))
def test_match_scores_are_those_of_a_loop_over_pairs_and_thresholds(seed: int, n: int, prior: float | None) -> None:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 40, n)
    fired = draw.binomial(lengths[:, None], draw.choice([0.0, 0.02, 0.3, 1.0], (n, 7)))
    counted = draw.random(n) < 0.9
    frequency = np.where(counted[:, None], fired / lengths[:, None], 0.0)
    dense = draw.random((n, 5)) < draw.choice([0.0, 0.2, 0.6, 1.0], 5)
    scores = best_scores(blocks_of(frequency), 7, csr(dense, counted), QUANTILES, prior)
    assert scores.firing.tolist() == (frequency > 0).sum(0).tolist()
    histogram = np.stack([np.bincount(level_of(f[f > 0]), minlength=LEVELS) for f in frequency.T])
    levels = candidates(histogram, QUANTILES)
    for j in range(7):
        for m in range(5):
            own, has = frequency[counted, j], dense[counted, m]
            expected = brute_force(own, has, levels[j], prior)
            assert scores.score[j, m] == pytest.approx(expected, rel=1e-6)
            if np.isfinite(expected):
                assert brute_force(own, has, scores.level[j, m : m + 1], prior) == pytest.approx(expected, rel=1e-6)
                each = np.float32([brute_force(own, has, levels[j, t : t + 1], prior) for t in range(len(levels[j]))])
                assert scores.level[j, m] == levels[j][each.argmax()], "of equal scores the lowest threshold"


def test_latents_beyond_one_block_are_matched_alike() -> None:
    draw = np.random.default_rng(0)
    frequency = np.zeros((40, 2 * BLOCK + 3))
    frequency[:, [0, BLOCK - 1, BLOCK, 2 * BLOCK + 2]] = draw.random((40, 1)) * (draw.random((40, 1)) < 0.5)
    scores = best_scores(blocks_of(frequency), frequency.shape[1], csr(draw.random((40, 2)) < 0.4), QUANTILES, 0.1)
    same = scores.score[[0, BLOCK - 1, BLOCK, 2 * BLOCK + 2]]
    assert (same == same[0]).all() and (same > 0).any() and scores.score.shape == (2 * BLOCK + 3, 2)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(counts=st.tuples(*4 * [st.integers(0, 50)]), prior=st.floats(0.001, 0.999), times=st.integers(2, 50))
def test_identities_of_the_calibrated_f1(counts: tuple[int, ...], prior: float, times: int) -> None:
    tp, fp, fn, tn = counts
    n, positive = sum(counts), tp + fn
    score = float(calibrated_f1(tp, fp, positive, n, prior))
    if positive == 0 or positive == n:
        assert np.isnan(score), "undefined, and never 1"
        return
    assert 0 <= score <= 1
    more = float(calibrated_f1(tp, times * fp, positive, positive + times * (fp + tn), prior))
    assert more == pytest.approx(score), "negatives that are there several times change nothing"
    ordinary = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else np.nan
    assert float(calibrated_f1(tp, fp, positive, n, positive / n)) == pytest.approx(ordinary)
    assert float(calibrated_f1(tp, fp, positive, n, None)) == pytest.approx(ordinary)


def test_the_ordinary_f1_is_scikit_learns() -> None:
    draw = np.random.default_rng(1)
    labels, probe = draw.random(200) < 0.3, draw.random(200) < 0.4
    ours = calibrated_f1((labels & probe).sum(), (~labels & probe).sum(), labels.sum(), 200, None)
    assert float(ours) == pytest.approx(f1_score(labels, probe))


def test_candidate_thresholds_are_quantiles_to_a_step_of_the_grid() -> None:
    draw = np.random.default_rng(2)
    frequency = draw.beta(0.4, 8, 5000) * (draw.random(5000) < 0.7)
    own = frequency[frequency > 0]
    (levels,) = candidates(np.bincount(level_of(own), minlength=LEVELS)[None], QUANTILES)
    thresholds = [threshold_of(int(level)) for level in levels]
    assert thresholds[0] == 0
    inside = np.maximum(np.quantile(own, QUANTILES, method="inverted_cdf"), EDGES[0])
    for threshold, exact in zip(thresholds[1:], inside, strict=True):
        assert exact <= threshold * (1 + 1e-12) < exact * 2 ** (1 / 16)
    assert level_of(np.array([1e-9, EDGES[0], 1.0])).tolist() == [0, 0, LEVELS - 2]
    never = candidates(np.zeros((1, LEVELS), dtype=int), QUANTILES)
    assert np.isfinite([threshold_of(int(level)) for level in never[0]]).all()


def test_auroc_and_its_interval_are_those_of_the_texts_themselves() -> None:
    draw = np.random.default_rng(3)
    labels = draw.random(400) < 0.2
    level = np.minimum(draw.poisson(np.where(labels, 3, 1.5)), 8)
    histogram = np.stack([np.bincount(level[labels == side], minlength=1 + LEVELS) for side in (False, True)])
    exact = roc_auc_score(labels, level)
    assert float(auroc(histogram[1], histogram[0])) == pytest.approx(exact)
    test = told(histogram, level=2, prior=0.1, seed=0)
    assert test.auroc == pytest.approx(exact) and test.positive == labels.sum()
    values = []
    without, having = level[~labels], level[labels]
    for _ in range(600):  # the bootstrap that resamples texts with the label and without it
        rank = rankdata(np.concatenate([draw.choice(having, len(having)), draw.choice(without, len(without))]))
        above = rank[: len(having)].sum() - len(having) * (len(having) + 1) / 2
        values.append(above / len(having) / len(without))
    low, high = np.percentile(values, [2.5, 97.5])
    assert test.low == pytest.approx(low, abs=0.015) and test.high == pytest.approx(high, abs=0.015)
    probe = level > 2  # column 1 + level 2, and above
    expected = calibrated_f1((probe & labels).sum(), (probe & ~labels).sum(), labels.sum(), 400, 0.1)
    assert test.score == pytest.approx(float(expected))
    chance = [told(histogram, 2, 0.1, seed).shuffled for seed in range(50)]
    assert abs(np.mean(chance) - 0.5) < 0.02 and np.std(chance) > 0
    assert told(histogram * [[1], [0]], 2, 0.1, 0).auroc is None and told(histogram * [[0], [1]], 2, 0.1, 0).low is None


@pytest.mark.parametrize("positive", [1, 7, 8, 293, 294])
def test_few_texts_with_or_without_the_label_have_an_auroc_and_no_interval(positive: int) -> None:
    """A bootstrap of 2 texts excluded 0.5 in a quarter of draws by chance, of 8 in 1 of 25."""
    level = np.random.default_rng(5).integers(0, 5, 300)
    histogram = np.stack([np.bincount(level[:-positive], minlength=1 + LEVELS),
                          np.bincount(level[-positive:], minlength=1 + LEVELS)])  # fmt: skip
    test = told(histogram, level=2, prior=0.1, seed=0)
    assert test.auroc is not None and test.shuffled is not None
    assert (test.low is not None) == (test.high is not None) == (8 <= positive <= 292)


def test_shuffled_labels_keep_their_support_among_counted_texts_and_some_labels_keep_their_texts() -> None:
    draw = np.random.default_rng(4)
    dense, counted = draw.random((300, 6)) < 0.2, draw.random(300) < 0.8
    labels = csr(dense, counted)
    other = labels.shuffled(0)
    assert other.support.tolist() == labels.support.tolist() == dense[counted].sum(0).tolist()
    assert other.labels.tolist() != labels.labels.tolist()
    some = labels.of(np.array([1, 4]))
    assert some.support.tolist() == labels.support[[1, 4]].tolist() and some.n_labels == 2
    assert np.diff(some.offsets).tolist() == dense[:, [1, 4]].sum(1).tolist()


def test_pairs_come_by_falling_score_however_many_are_asked_for() -> None:
    draw = np.random.default_rng(7)
    score = np.where(draw.random((30_000, 4)) < 0.3, draw.integers(-2, 900, (30_000, 4)) / 1000, -np.inf)
    scores = Scores(score.astype(np.float32), np.zeros_like(score, np.uint8), np.ones(30_000, np.int64))
    listed = [latent * 4 + label for some in _by_score(scores) for latent, label in some]
    flat = score.ravel()
    assert listed == [place for place in np.argsort(-flat, kind="stable").tolist() if flat[place] > 0]


# -- pairs that were planted ------------------------------------------------------------------------------------------


def planted(seed: int, n: int, prevalence: np.ndarray, missing: float) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies [N, 3 M] and tags bool [N, M]. The first M latents each tell a topic, which texts also touch without
    being tagged, and which some that are about it are not tagged with; the next fire where any of four topics is
    touched; the last nearly everywhere."""
    draw = np.random.default_rng(seed)
    m = len(prevalence)
    topics = draw.random((n, m)) < prevalence
    touched = topics | (draw.random((n, m)) < 0.03)
    strength = np.where(topics, 0.1, 0.02) * draw.lognormal(0, 0.6, (n, m))
    narrow = np.where(touched, strength, 0) * (draw.random((n, m)) < 0.95)
    broad = np.stack([touched[:, (np.arange(4) + i) % m].any(1) for i in range(m)], 1) * draw.beta(2, 20, (n, m))
    dense = draw.beta(2, 20, (n, m)) * (draw.random((n, m)) < 0.9)
    lengths = draw.integers(40, 120, n)[:, None]
    frequency = draw.binomial(lengths, np.minimum(np.hstack([narrow, broad, dense]), 1)) / lengths
    return frequency, topics & (draw.random((n, m)) > missing)


def recovered(frequency: np.ndarray, tags: np.ndarray, prior: float | None) -> float:
    """Among as many pairs as there are labels, the best first, the share that were planted: precision and recall."""
    m = tags.shape[1]
    score = best_scores(blocks_of(frequency), frequency.shape[1], csr(tags), (*QUANTILES, 0.95, 0.98), prior).score
    return float(np.mean([place // m == place % m for place in np.argsort(-score.ravel())[:m]]))


def test_planted_pairs_of_rare_labels_are_recovered_where_the_ordinary_f1_prefers_common_labels() -> None:
    texts = [planted(seed, 4000, np.geomspace(0.3, 0.003, 12), missing=0.1) for seed in range(3)]
    found = {prior: np.mean([recovered(*one, prior) for one in texts]) for prior in (0.01, 0.1, None)}
    assert min(found[0.01], found[0.1]) >= 0.95 and found[None] <= found[0.01] - 0.05, found
    negatives = [~tags.any(1) for _, tags in texts]
    many = [(np.vstack([f, *5 * [f[none]]]), np.vstack([tags, *5 * [tags[none]]]))
            for (f, tags), none in zip(texts, negatives, strict=True)]  # fmt: skip
    again = np.mean([recovered(*one, 0.01) for one in many])
    assert again >= 0.95, "negatives that are there six times change little"


def test_the_calibrated_f1_does_not_depend_on_prevalence_and_the_ordinary_one_does() -> None:
    """The paper's figure 3: one probe, two normal distributions, ever fewer positives."""
    draw = np.random.default_rng(5)
    n, means = 20_000, {}
    for prevalence in (0.3, 0.1, 0.03, 0.01):
        labels = draw.random(n) < prevalence
        fires = draw.normal(np.where(labels, 2.0, 0.0)) > 1.0
        counts = (labels & fires).sum(), (~labels & fires).sum(), labels.sum(), n
        means[prevalence] = [float(calibrated_f1(*counts, prior)) for prior in (0.1, None)]
    calibrated, ordinary = np.array(list(means.values())).T
    assert np.ptp(calibrated) < 0.08 and ordinary[0] > 3 * ordinary[-1]
    assert (np.diff(ordinary) < 0).all()


def test_a_lower_prior_chooses_a_higher_threshold_and_asks_for_more_separation() -> None:
    """The paper's figure 4: the best threshold by prior, and the best score by how far the classes are apart."""
    draw = np.random.default_rng(6)
    labels = (draw.random(20_000) < 0.5)[:, None]
    fine = tuple(np.linspace(0.05, 0.99, 40))
    thresholds, scores = [], []
    for apart in (1.0, 2.0, 3.0):
        frequency = 1 / (1 + np.exp(4 - draw.normal(np.where(labels, apart, 0.0))))
        found = [best_scores(blocks_of(frequency), 1, csr(labels), fine, prior) for prior in (0.5, 0.1, 0.01, 0.001)]
        thresholds.append([threshold_of(int(one.level[0, 0])) for one in found])
        scores.append([float(one.score[0, 0]) for one in found])
    assert (np.diff(thresholds) >= 0).all() and all(row[-1] > row[0] for row in thresholds)
    ratio = np.array(scores[0]) / np.array(scores[2])  # what little separation costs, by prior
    assert (np.diff(ratio) < 0).all()
