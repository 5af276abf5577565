"""Planted features: SAEs whose absorption and probing scores are known in advance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from unweave.core.codes import Codes
from unweave.core.errors import UnweaveError
from unweave.methods.saebench import absorption
from unweave.methods.saebench.baselines import active, random_directions
from unweave.methods.saebench.planted import Planted
from unweave.methods.saebench.sparse_probing import Split, probed
from unweave.methods.saebench.spec import SaebenchSpec
from unweave.methods.train import init

LETTERS, WORDS = 26, 12
SPEC = {form: SaebenchSpec(saes=("x",), form=form, seeds=2) for form in ("correct", "compatible")}


@pytest.fixture(scope="module")
def spelling():
    """A feature for each letter, one for each of twelve words of it; every activation is a word and its letter."""
    parents = [-1] * LETTERS + [i // WORDS for i in range(LETTERS * WORDS)]
    world = Planted.drawn(parents, 384)
    word = torch.arange(LETTERS, len(parents)).repeat(5)  # each word five times, so that every part has it
    letters = (word - LETTERS) // WORDS
    return world, word, letters, world.directions[word] + world.directions[letters]


def parts_of(n):
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    return absorption.Parts(order[: n // 2], order[n // 2 : 3 * n // 4], order[3 * n // 4 :])


@pytest.mark.parametrize("share", [0.0, 1.0, 0.7])
def test_absorption_is_what_was_planted(spelling, share):
    world, word, letters, x = spelling
    absorbing = [LETTERS + i for i in range(LETTERS * WORDS) if i % WORDS < 4]  # a third of each letter's words
    sae = world.sae(absorbing, share) if share else world.sae()
    parts = parts_of(len(x))
    # the probe that knows the letters' directions, and says every letter that is there
    probe = absorption.Probe(world.directions[:LETTERS], torch.full((LETTERS,), -0.5))
    rows = absorption.letters_of(sae, x, letters, parts, probe, range(LETTERS), SPEC["correct"])
    assert len(rows) == LETTERS
    for row in rows:
        letter = absorption.LETTERS.index(row["first_letter"])
        test = word[parts.test][letters[parts.test] == letter]
        planted = sum(int(w) in absorbing for w in test) / len(test)
        assert row["num_probe_true_positives"] == len(test)
        if row["num_split_features"] == 1:  # the letter's own latent alone is main
            assert row["mean_absorption_fraction"] == pytest.approx(planted * share, abs=1e-4)
            assert row["full_absorption_rate"] == pytest.approx(planted if share == 1 else 0, abs=1e-6)
    if not share:
        assert all(row["num_split_features"] == 1 for row in rows)
    assert sum(row["num_split_features"] == 1 for row in rows) >= 5


@pytest.mark.parametrize("form", ["correct", "compatible"])
def test_random_directions_absorb_nothing(spelling, form):
    world, _, letters, x = spelling
    sae = random_directions(world.sae(), x, seed=9)
    assert active(sae, x) == pytest.approx(2, abs=0.1), "as many active latents as the perfect SAE has"
    probe = absorption.Probe(world.directions[:LETTERS], torch.full((LETTERS,), -0.5))
    rows = absorption.letters_of(sae, x, letters, parts_of(len(x)), probe, range(LETTERS), SPEC[form])
    assert np.mean([row["mean_absorption_fraction"] for row in rows]) < 0.1


def test_the_parts_of_absorption_are_a_loop_over_words(spelling):
    """``absorbed`` against the definition, word by word and latent by latent."""
    g = torch.Generator().manual_seed(4)
    f = torch.rand(60, 30, generator=g) * (torch.rand(60, 30, generator=g) < 0.2)
    cos = torch.rand(30, generator=g) * 1.4 - 0.7
    cos[[3, 7]] = torch.tensor([0.3, 0.5])
    written = cos * (0.5 + torch.rand(30, generator=g))
    projection = (f @ written) * (0.4 + 1.4 * torch.rand(60, generator=g)) + 0.05 * torch.randn(60, generator=g)
    main = torch.tensor([3, 7])
    f[::2, main] = 0
    fractions, full = absorption.absorbed(f, written, cos, projection, main)
    seen = set()
    for i in range(60):
        p, proj = f[i] * written, float(projection[i])
        ours = float(p[3] + p[7])
        theirs = sum(sorted(float(p[j]) for j in range(30) if j not in (3, 7) and cos[j] >= 0.1 and p[j] > 0)[-3:])
        if ours >= proj or theirs / proj < 0.4:
            expected = 0.0
        elif ours <= 0:
            expected = 1.0
        else:
            a = min(theirs, proj - ours)
            expected = min(max(a / (a + ours), 0.0), 1.0)
        top = int(p.argmax())
        whole = f[i, 3] < 1e-8 and f[i, 7] < 1e-8 and cos[top] >= 0.025 and proj >= 0 and float(p[top]) / proj >= 0.4
        assert float(fractions[i]) == pytest.approx(expected, abs=1e-5)
        assert bool(full[i]) == bool(whole)
        seen |= {bool(whole), 2 if expected == 0 else 3 if expected == 1 else 4}
    assert seen == {False, True, 2, 3, 4}, "every case of the definition occurs"


def test_latents_are_ordered_by_their_differences_of_means(spelling):
    world, _, letters, x = spelling
    f = world.sae([LETTERS, LETTERS + 20]).encode(x)
    order = absorption.differences(Codes.from_dense(f), letters)
    for letter in (0, 1, 25):
        has = letters == letter
        expected = (f[has].mean(0) - f[~has].mean(0)) / f.std(0, correction=0)
        torch.testing.assert_close(order[letter], expected, atol=1e-4, rtol=1e-4)


def test_probes_on_latents_and_on_dense_activations_are_one(spelling):
    world, _, letters, x = spelling
    codes = world.sae().codes(x)
    weight = torch.randn(len(world.parents), 26, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([5, 0, 77, 5])
    torch.testing.assert_close(absorption._rows(codes, rows, weight), codes.dense()[rows] @ weight)
    assert torch.equal(codes.take(rows).dense(), codes.dense()[rows])
    probe = absorption.fit(x, letters, l1=0.0, l2=1e-4, batch=256, seed=0)
    assert absorption._told(probe, x, letters, 0.9) == tuple(range(26))
    assert absorption.f1(torch.tensor([1, 1, 0, 0]) > 0, torch.tensor([1, 0, 1, 0]) > 0) == 0.5


@pytest.mark.parametrize("form", ["correct", "compatible"])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_probe_on_one_latent_reaches_what_was_planted(form, noise):
    """Feature 7 is the label, but for a share of texts on which it is not; nothing else knows it."""
    world = Planted.drawn([-1] * 40, 64, zipf=0.0)
    x, f = world.sample(1200)
    rng = np.random.default_rng(0)
    y = (f[:, 7].numpy() > 0).astype(np.int64)
    y ^= (rng.random(1200) < noise).astype(np.int64)
    split = Split(*((rows, y[rows]) for rows in np.split(np.arange(1200), [600, 800])))
    latents = csr_array(world.sae().encode(x).numpy())
    planted = float(((f[800:, 7].numpy() > 0) == y[800:]).mean())
    scores = probed(latents, split, (1, 2), (0.1, 1.0, 10.0), form, 0)
    assert scores["top_1_test_accuracy"] == pytest.approx(planted), "the one latent is what was planted"
    assert scores["test_accuracy"] == pytest.approx(planted, abs=0.05)
    other = csr_array(random_directions(world.sae(), x, seed=9).encode(x).numpy())
    assert probed(other, split, (1,), (1.0,), form, 0)["top_1_test_accuracy"] < planted - 0.1
    rolled = Split(*((rows, rng.permutation(targets)) for rows, targets in (split.train, split.validation, split.test)))
    assert abs(probed(latents, rolled, (1,), (1.0,), form, 0)["top_1_test_accuracy"] - 0.5) < 0.08, "chance"


def test_the_correct_probe_does_not_depend_on_the_scale_of_a_latent():
    world = Planted.drawn([-1] * 30, 48, zipf=0.0)
    x, f = world.sample(800)
    y = (f[:, 3].numpy() > 0).astype(np.int64)
    split = Split(*((rows, y[rows]) for rows in np.split(np.arange(800), [480, 640])))
    latents = world.sae().encode(x).numpy()
    scaled = latents * np.where(np.arange(30) == 9, 1e4, np.where(np.arange(30) == 3, 1e-4, 1.0))
    first, other = (probed(csr_array(one), split, (1,), (1.0,), "correct", 0) for one in (latents, scaled))
    assert first["top_1_test_accuracy"] == other["top_1_test_accuracy"] == 1
    compatible = probed(csr_array(scaled), split, (1,), (1.0,), "compatible", 0)
    assert compatible["top_1_test_accuracy"] < 0.7, "SAEBench's choice of latents goes by raw differences"


def test_planted_features_are_what_they_say():
    world = Planted.drawn([-1, -1, 0, 0, 2], 16, zipf=1.0, rate=0.8)
    x, f = world.sample(20_000)
    assert not bool((f[:, [2, 3]] > f[:, [0, 0]]).any()) and not bool((f[:, 4] > f[:, 2]).any())
    assert f[:, 1].mean() == pytest.approx(0.4, abs=0.02), "Zipf"
    torch.testing.assert_close(world.sae().encode(x), f, atol=5e-5, rtol=0)
    torch.testing.assert_close(world.sae([2], 1.0)(x), x, atol=5e-5, rtol=0)
    crowded = Planted.drawn([-1] * 40, 16)
    assert crowded.directions.norm(dim=1).allclose(torch.ones(40)), "superposition"
    for wrong in (lambda: Planted.drawn([1, -1], 8), lambda: world.sae([0])):
        with pytest.raises(UnweaveError):
            wrong()


def test_random_directions_are_not_those_that_training_begins_with():
    """With one seed both draw as many rows of the same width: an SAE would be compared with its own beginning."""
    world = Planted.drawn([-1] * 48, 24)
    x = world.sample(200)[0]
    begun = init.drawn_rows("random", 48, 24, x, torch.Generator().manual_seed(0))
    drawn = random_directions(world.sae(), x, seed=0).W_dec
    for known in (begun, world.directions):
        assert float((drawn @ known.T).abs().diagonal().mean()) < 0.4
