"""Unlearning: a latent of which it is known what clamping it does, and the choice of a setting by brute force."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from unweave.core.errors import UnweaveError
from unweave.core.pieces import Pieces
from unweave.core.site import Site
from unweave.data.policy import TokenPolicy
from unweave.methods.saebench import unlearning
from unweave.methods.saebench.spec import SaebenchSpec, UnlearningSpec
from unweave.methods.saebench.spread import measure
from unweave.methods.saebench.task import Bench
from unweave.sae.activations import ReLU
from unweave.sae.module import SAE

SITE = Site("resid_pre", 0)
LEVEL = 0.4
"""the planted latent, where it fires"""


@pytest.fixture
def planted(tiny_lm, tmp_path, monkeypatch):
    """Latent 0 fires on the letter z, which all questions to forget hold; 400 others fire on q, which none holds."""
    monkeypatch.setattr(unlearning, "_PROMPT", "{}\n{}\n:")
    monkeypatch.setattr(unlearning, "_ORDERS", (tuple(range(4)),))
    lm, draw = tiny_lm("llama"), torch.Generator().manual_seed(0)
    embedding = lm.model.get_input_embeddings().weight.detach()
    z, q = (embedding[lm.tokenizer(letter)["input_ids"][0]] for letter in "zq")
    W_enc = torch.stack([z / z.square().sum(), *[q / q.square().sum()] * 400], 1)
    W_dec = torch.cat([3 * torch.randn(1, 32, generator=draw), 1e-3 * torch.randn(400, 32, generator=draw)])
    sae = SAE(W_enc, torch.full((401,), LEVEL - 1), W_dec, torch.zeros(32), ReLU(), read=SITE)
    rng, questions = random.Random(0), []
    for side, begin in (("forget", "z"), ("retain", "")):
        for i in range(24):
            text = begin + "".join(rng.choices("abcdefgh", k=4))
            one = unlearning.Question(side, text, ("i", "j", "k", "l"), 0)
            said = answer(lm, one, 0.0, W_dec[0])
            questions.append(replace(one, answer=said if i < 20 else (said + 1) % 4))
    lines = [{"side": one.side, "question": one.text, "options": one.options, "answer": one.answer}
             for one in questions]  # fmt: skip
    lines += [{"side": "forget", "text": "az zb zq"} for _ in range(9)] + [{"side": "retain", "text": "a b c"}]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return lm, sae, path, questions


def answer(lm, question, to, direction):
    """What the model answers with the planted latent at a value wherever z stands, without an SAE."""
    ids = torch.tensor([lm.tokenizer(question.prompt(range(4)))["input_ids"]])
    letters = torch.tensor([lm.tokenizer(letter)["input_ids"][0] for letter in "ABCD"])
    z = lm.tokenizer("z")["input_ids"][0]
    added = (ids == z)[..., None] * (to - LEVEL if to else 0.0) * direction
    with lm.taps(edit={SITE: lambda x, at: x + added}):
        return int(lm(ids)[0, -1, letters].argmax())


def bench_of(lm, sae, path, tmp_path, form="correct"):
    spec = SaebenchSpec(saes=("x",), tasks=("unlearning",), seeds=3, form=form,
                        unlearning=UnlearningSpec(material=path))  # fmt: skip
    return Bench(lm, lm.name, SITE, (sae,), TokenPolicy(), spec, Pieces(None), tmp_path)


@pytest.mark.parametrize("form", ["correct", "compatible"])
def test_what_was_planted_is_forgotten_and_the_rest_retained(planted, tmp_path, form):
    lm, sae, path, questions = planted
    sae.policy = TokenPolicy()
    prepared = unlearning.TASK.prepare(bench_of(lm, sae, path, tmp_path, form))
    assert prepared.known == tuple(one for i, one in enumerate(questions) if i % 24 < 20)
    scored = prepared.score(sae, Pieces(None))
    values = [v * (LEVEL if form == "correct" else 1) for v in unlearning._VALUES[form]]
    forget = [one for one in prepared.known if one.side == "forget"]
    by_hand = [[answer(lm, one, -v, sae.W_dec[0]) == one.answer for one in forget] for v in values]
    accuracies = np.mean(by_hand, axis=1)
    assert accuracies.min() < 0.6, "the planted latent changes answers"
    if form == "compatible":
        assert scored.value["unlearning_score"] == pytest.approx(1 - accuracies.min())
    else:
        assert all(1 - score <= accuracies.max() + 0.3 for score in scored.draws["unlearning_score"])
        assert min(scored.draws["unlearning_score"]) > 0.2
    assert scored.draws["unlearning_retained"] == (1.0, 1.0, 1.0), "no other question holds a z"
    assert scored.value["random_unlearning_score"] == 0
    assert [gap.baseline for gap in measure(scored, "unlearning_score", 1, {}).gaps] == ["latents drawn at random"]


def test_a_setting_is_chosen_on_some_questions_and_measured_on_others():
    rng = np.random.default_rng(0)
    for _ in range(30):
        table = rng.random((5, 40)) < rng.random((5, 1))
        forget = np.arange(40) < 20
        table[:, ~forget] |= rng.random((5, 20)) < 0.95
        first, second = np.arange(0, 40, 2), np.arange(1, 40, 2)
        best, expected = 1.0, (0.0, 1.0)
        for row in table:
            if all(row[i] for i in first if not forget[i]) and np.mean([row[i] for i in first if forget[i]]) < best:
                best = np.mean([row[i] for i in first if forget[i]])
                expected = (1 - np.mean([row[i] for i in second if forget[i]]),
                            np.mean([row[i] for i in second if not forget[i]]))  # fmt: skip
        found = unlearning.scores({"ranked": torch.from_numpy(table)}, forget, first, second)
        assert (found["unlearning_score"], found["unlearning_retained"]) == pytest.approx(expected)


def test_a_clamp_changes_tokens_on_which_latents_fire_alone(tiny_lm):
    lm, draw = tiny_lm("gpt2"), torch.Generator().manual_seed(1)
    sae = SAE(*(torch.randn(s, generator=draw) for s in ((32, 48), (48,), (48, 32), (32,))), ReLU(), read=SITE)
    ids = torch.randint(3, 97, (3, 11), generator=draw)
    with lm.taps(read=[SITE], stop=SITE) as seen:
        lm(ids)
    x = seen[SITE]
    with lm.taps(read=[SITE], edit=unlearning.clamped(sae, [4, 7], torch.tensor([-2.0, -3.0])), stop=SITE) as seen:
        lm(ids)
    f, expected = sae.encode(x), x.clone()
    for j, c in ((4, -2.0), (7, -3.0)):
        expected += torch.where(f[..., j : j + 1] > 0, (c - f[..., j : j + 1]) * sae.W_dec[j], torch.zeros(32))
    torch.testing.assert_close(seen[SITE], expected, atol=1e-4, rtol=1e-4)


def test_firing_is_counted_over_tokens_of_each_side(planted, tmp_path):
    lm, sae, path, _ = planted
    bench = bench_of(lm, sae, path, tmp_path)
    prepared = unlearning.TASK.prepare(bench)
    fires, size = unlearning.firing(sae, bench, prepared.chunks, prepared.n_forget)
    assert fires[0, 0] == pytest.approx(3 / 8) and fires[0, 1] == pytest.approx(1 / 8)
    assert not fires[1].any() and size[0] == pytest.approx(LEVEL, abs=1e-5)


def test_a_model_that_knows_nothing_is_told_and_so_is_a_wrong_file(planted, tmp_path, monkeypatch):
    lm, sae, path, _ = planted
    monkeypatch.undo()
    monkeypatch.setattr(unlearning, "_PROMPT", "{}\n{}\n:")
    with pytest.raises(
        UnweaveError, match=r"of 24 questions to forget the model answers \d rightly in \d.*chance 25 %"
    ):
        unlearning.TASK.prepare(bench_of(lm, sae, path, tmp_path))
    for line in ({"side": "both", "text": "x"}, {"side": "forget", "question": "x", "options": ["a"], "answer": 0},
                 {"side": "forget"}):  # fmt: skip
        wrong = tmp_path / "wrong.jsonl"
        wrong.write_text(json.dumps(line))
        with pytest.raises(UnweaveError, match="neither a question nor a text"):
            unlearning.read(wrong)
    wrong.write_text(json.dumps({"side": "forget", "text": "x"}))
    with pytest.raises(UnweaveError, match="no texts, or no questions, to forget"):
        unlearning.read(wrong)


def test_our_questions_have_one_right_answer_among_four():
    questions = unlearning.ours(0).questions
    assert {one.side for one in questions} == {"forget", "retain"}
    assert all(len(set(one.options)) == 4 for one in questions)
    paris = next(one for one in questions if "capital of France" in one.text)
    assert paris.options[paris.answer] == "Paris" and paris.side == "retain"
    assert paris.prompt((1, 0, 2, 3)).endswith(f"\nA. {paris.options[1]}\nB. {paris.options[0]}\n"
                                               f"C. {paris.options[2]}\nD. {paris.options[3]}\nAnswer:")  # fmt: skip
    assert unlearning.ours(0).questions != unlearning.ours(1).questions
