"""SCR and TPP on planted features: scores known in advance, and ablations token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from unweave.core.errors import UnweaveError
from unweave.methods.saebench.ablation import Pooled, probe_of, removal
from unweave.methods.saebench.baselines import random_directions
from unweave.methods.saebench.labelled import Labelled, Split
from unweave.methods.saebench.planted import Planted
from unweave.methods.saebench.probes import Probe
from unweave.methods.saebench.scr import Trial, groups_of, scores, shifted, trial_of
from unweave.methods.saebench.spec import ScrSpec, pair_of
from unweave.methods.saebench.tpp import perturbed
from unweave.sae.module import SAE

PAIR = ("film", "shop", "good", "bad")
NS = (1, 2, 8)


def pooled(sae, x):
    return Pooled.of(csr_array(sae.encode(x).numpy()), x.numpy(), sae)


@pytest.fixture(scope="module")
def reviews():
    """Feature 0 is the class, 1 the cue, 2 and 3 children of the cue; 36 others fire at random."""
    world = Planted.drawn([-1, -1, 1, 1, *[-1] * 36], 64, zipf=0.0, rate=0.5)
    _, f = world.sample(1600, seed=3)
    f[:, :2] = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).repeat(400, 1)
    f[:, 2] = f[:, 1] * (torch.arange(1600) // 4 % 4 == 0)  # on a quarter of the texts with the cue
    f[:, 3] = 0
    has = np.stack([f[:, 0], 1 - f[:, 0], f[:, 1], 1 - f[:, 1]], 1) > 0
    x = f @ world.directions
    return world, x, Labelled("planted", PAIR, np.arange(1600), has)


def hand_made(world):
    """Probes that know the directions: of the class, of the cue, and one that says the class by the cue alone."""
    one, cue = world.directions[0].numpy(), world.directions[1].numpy()
    return [Probe(one, -0.5), Probe(cue, -0.5), Probe(one + 2 * cue, -1.5)]


def scr(world, x, labelled, sae, form="correct", ns=NS):
    trial = trial_of(labelled, PAIR, 0)
    return scores([shifted(pooled(sae, x), trial, hand_made(world), ns, form, 0)], ns, form)


def test_scr_of_a_disentangled_sae_is_one_and_of_an_absorbing_one_waits_for_its_children(reviews):
    world, x, labelled = reviews
    perfect = scr(world, x, labelled, world.sae())
    assert [perfect[f"scr_dir1_threshold_{n}"] for n in NS] == [1, 1, 1]
    assert [perfect[f"scr_metric_threshold_{n}"] for n in NS] == [1, 1, 1]
    assert "scr_dir2_threshold_1" not in perfect, "the biased probe tells the cue, so no bias is to be removed"
    # The cue's latent is silent on a quarter of the texts that have it: there the cue stays, and those of the other
    # class stay wrong. Only together with the child's latent, which writes the cue too, is it gone.
    absorbing = scr(world, x, labelled, world.sae([2], 1.0))
    rows, is_class = trial_of(labelled, PAIR, 0).classes.test
    wrong = float(((is_class == 0) & (x[rows] @ world.directions[2] > 0.5).numpy()).mean())
    assert 0.02 < wrong < 0.1
    expected = [1 - 2 * wrong, 1, 1]
    assert [absorbing[f"scr_dir1_threshold_{n}"] for n in NS] == pytest.approx(expected)


@pytest.mark.parametrize("form", ["correct", "compatible"])
def test_scr_of_directions_that_know_nothing_is_near_zero(reviews, form):
    world, x, labelled = reviews
    numbers = scr(world, x, labelled, random_directions(world.sae(), x, seed=5), form)
    assert abs(numbers["scr_dir1_threshold_1"]) < 0.15
    assert numbers["llm_scr_metric_threshold_1"] > 0.9, "erasing the difference of means takes the cue out"
    assert abs(scr(world, x, labelled, world.sae(), form)["random_scr_metric_threshold_1"]) < 0.3


def test_zeros_move_every_logit_and_means_do_not(reviews):
    """A cue on half of the texts carries half a probe's threshold: SAEBench's zeros leave all on one side."""
    world, x, labelled = reviews
    assert scr(world, x, labelled, world.sae())["scr_dir1_threshold_1"] == 1
    assert scr(world, x, labelled, world.sae(), "compatible")["scr_dir1_threshold_1"] == 0


@pytest.mark.parametrize("form", ["correct", "compatible"])
def test_a_trained_probe_takes_up_the_cue(reviews, form):
    world, x, labelled = reviews
    trial = trial_of(labelled, PAIR, 1)
    data = pooled(world.sae(), x)
    probes = [probe_of(data.own, split, (0.1, 1.0), form, 1) for split in (trial.classes, trial.cues, trial.biased)]
    numbers = shifted(data, trial, probes, NS, form, 1)
    assert numbers["d1_clean"] > 0.97 and numbers["d1_"] < 0.85
    if form == "correct":
        assert scores([numbers], NS, form)["scr_dir1_threshold_2"] > 0.9


def test_ablating_pooled_latents_is_ablating_them_token_by_token():
    """With the error kept, through encoder and decoder at every token, then pooled: SAEBench's own way."""
    world = Planted.drawn([-1] * 30, 20, zipf=0.0)  # superposition: there is an error
    x, _ = world.sample(120 * 5)
    sae = world.sae()
    f, texts = sae.encode(x), torch.arange(600) // 5
    mean = lambda values: torch.stack([values[texts == i].mean(0) for i in range(120)])  # noqa: E731
    data = Pooled.of(csr_array(mean(f).numpy()), mean(x).numpy(), sae)
    rng = np.random.default_rng(0)
    probe, y, rows = Probe(rng.normal(size=20), 0.3), rng.integers(0, 2, 80), np.arange(80)
    apart = mean(f)[:80][y == 1].mean(0) - mean(f)[:80][y == 0].mean(0)
    along = sae.W_dec @ torch.from_numpy(probe.weight).float()
    for form in ("correct", "compatible"):
        for both_signs in (True, False):
            by = (apart * along).abs() if both_signs else apart.clamp(min=0) * along
            away = removal(data, (rows, y), probe, 500, form, 0, both_signs=both_signs)
            logits = away.logits(data, np.arange(120), probe, (3, 5))
            assert len(away.latents[""]) == int((by > 0).sum() if form == "correct" else (by != 0).sum())
            for n in (3, 5):
                chosen = by.topk(n).indices
                assert set(away.latents[""][:n]) == set(chosen.tolist())
                ablated = f.clone()
                ablated[:, chosen] = mean(f)[:80].mean(0)[chosen] if form == "correct" else 0.0
                changed = sae.decode(ablated) + (x - sae.decode(f))
                np.testing.assert_allclose(logits[str(n)], probe.logits(mean(changed).numpy()), atol=1e-4)
    assert set(away.logits(data, rows, probe, (500,))) == {"", "llm_", "500", "random_500"}
    erased = data.own - (data.own - away.centre) @ away.dual[:, None] * away.delta
    np.testing.assert_allclose(erased[:80][y == 1].mean(0), erased[:80][y == 0].mean(0), atol=1e-6)
    np.testing.assert_allclose(away.logits(data, np.arange(120), probe, (3,))["llm_"], probe.logits(erased), atol=1e-6)


def test_scr_is_a_ratio_of_sums_or_saebenchs_mean_of_ratios():
    def pair(start, clean, after, other=0.99):
        return {"d1_": start, "d1_clean": clean, "d1_5": after, "d1_chosen": start, "d1_random_5": start,
                "d1_llm_": clean, "d2_": other, "d2_clean": other, "d2_5": other, "d2_chosen": other,
                "d2_random_5": other, "d2_llm_": other}  # fmt: skip

    pairs = [pair(0.5, 0.9, 0.7), pair(0.78, 0.8, 0.76), pair(0.7, 0.7, 0.9)]
    correct, compatible = (scores(pairs, (5,), form) for form in ("correct", "compatible"))
    assert correct["scr_metric_threshold_5"] == pytest.approx((0.2 - 0.02 + 0.2) / (0.4 + 0.02 + 0))
    assert compatible["scr_metric_threshold_5"] == pytest.approx((0.5 - 1 + 0) / 3)
    assert compatible["scr_dir2_threshold_5"] == 0 and "scr_dir2_threshold_5" not in correct
    assert correct["llm_scr_metric_threshold_5"] == pytest.approx(1) and correct["random_scr_metric_threshold_5"] == 0
    tie = pair(0.5, 0.9, 0.7, other=0.5)
    assert "scr_metric_threshold_5" not in scores([tie], (5,), "compatible"), "SAEBench has none on a tie"


def classes(f, n):
    rows = np.arange(len(f))
    problems = []
    for label in range(n):
        y = f[:, label].numpy().astype(np.int64)
        rng = np.random.default_rng(label)
        own, rest = rng.permutation(rows[y == 1]), rng.permutation(rows[y == 0])[: int(y.sum())]
        parts = [np.concatenate([a, b]) for a, b in zip(np.array_split(own, 3), np.array_split(rest, 3), strict=True)]
        problems.append(Split(*((part, y[part]) for part in parts)))
    return problems


@pytest.mark.parametrize("form", ["correct", "compatible"])
def test_tpp_of_a_disentangled_sae_is_one_half_and_of_a_shared_latent_what_the_others_lose(form):
    world = Planted.drawn([-1] * 40, 64, zipf=0.0)
    _, f = world.sample(1200)
    f[:, :4] = torch.eye(4)[torch.arange(1200) % 4]
    x, v = f @ world.directions, world.directions.numpy()
    problems, probes = (
        classes(f, 4),
        [Probe(v[i], -0.4) for i in range(4)],
    )  # off the middle, where rounding would decide
    perfect = perturbed(pooled(world.sae(), x), problems, probes, (1, 3), form, 0)
    assert perfect["llm_test_accuracy"] == 1
    assert perfect["tpp_threshold_1_intended_diff_only"] == pytest.approx(0.5)
    assert perfect["tpp_threshold_1_unintended_diff_only"] == pytest.approx(0, abs=1e-6)
    assert perfect["llm_tpp_threshold_1_total_metric"] > 0.4 and perfect["random_tpp_threshold_1_total_metric"] < 0.2

    shared = world.sae()  # classes 0 and 1, and 2 and 3, share a latent each
    for a, b in ((0, 1), (2, 3)):
        shared.W_enc[:, a] += shared.W_enc[:, b]
        shared.W_enc[:, b] = 0
        shared.W_dec[a] += shared.W_dec[b]
    numbers = perturbed(pooled(shared, x), problems, probes, (1,), form, 0)
    # Taken away as zeros, the latent leaves its pair's texts on the other side of both probes. As its mean, 2/3, it
    # puts all other texts on the pair's side: two thirds of either probe's negatives.
    expected = 1 / 2 if form == "compatible" else 1 / 3
    assert numbers["tpp_threshold_1_intended_diff_only"] == pytest.approx(expected, abs=0.04)
    assert numbers["tpp_threshold_1_unintended_diff_only"] == pytest.approx(expected / 3, abs=0.02)
    chance = perturbed(pooled(random_directions(world.sae(), x, seed=9), x), problems, probes, (1,), form, 0)
    assert abs(chance["tpp_threshold_1_total_metric"]) < 0.1


def test_a_pairs_groups_are_equal_and_the_biased_part_has_two_of_them(reviews):
    _, _, labelled = reviews
    twins = Labelled("twins", PAIR, np.arange(1600) // 8, labelled.has)
    trial = trial_of(twins, PAIR, 0)
    assert isinstance(trial, Trial)
    group = groups_of(PAIR, labelled.has, PAIR)
    sides = []
    for name in ("train", "validation", "test"):
        rows, is_class = getattr(trial.classes, name)
        same, has_cue = getattr(trial.cues, name)
        biased, target = getattr(trial.biased, name)
        assert (rows == same).all() and len(set(np.bincount(group[rows]).tolist())) == 1
        assert (2 * is_class + has_cue == group[rows]).all()
        assert set(group[biased]) == {0, 3} and (target == (group[biased] == 3)).all()
        sides.append({*(rows // 8), *(biased // 8)})
    assert len(trial.biased.train[0]) == len(trial.classes.train[0])
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    with pytest.raises(UnweaveError, match="a group of 'film/shop by good/bad' has fewer than 8"):
        trial_of(Labelled("few", PAIR, np.arange(60), labelled.has[:60]), PAIR, 0)


def test_what_scr_cannot_do_is_refused(reviews):
    world, *_ = reviews
    assert pair_of("a review/b by good /bad") == ("a review", "b", "good", "bad")
    with pytest.raises(UnweaveError, match="CLASS/CLASS by CUE/CUE"):
        ScrSpec(pairs=("film and shop",))
    sae = world.sae()
    normed = SAE(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.activation, input_norm="layer_norm")
    with pytest.raises(UnweaveError, match="normalises every token's input"):
        Pooled.of(csr_array((2, 40)), np.zeros((2, 64)), normed)
