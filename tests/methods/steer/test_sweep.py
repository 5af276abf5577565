"""Steering: what a sweep promises, its numbers against counts by hand, and which latents it chooses."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.data.policy import TokenPolicy
from unweave.lm.model import LM, Tokens
from unweave.methods.steer.choice import PROMPTS, TRIAL, choose_latents, expressions, trials
from unweave.methods.steer.themes import Theme, themes
from unweave.sae.activations import JumpReLU, ReLU, TopK
from unweave.sae.module import SAE
from unweave.sae.output_score import NEUTRAL, output_scores
from unweave.sae.steered import Generated, distinct, lens_tokens, measures, sweep, until_end

F = 24
PROMPTS_HERE = ["Tell me about the sea.", "Hi"]


@pytest.fixture
def lm(tiny_lm: Any) -> LM:
    return tiny_lm("llama")


def make_sae(lm: LM, activation: Any = None, **options: Any) -> SAE:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    weights = (draw(32, F) / 6, draw(F) * 0.3, draw(F, 32) * 0.5, draw(32) * 0.2)
    return SAE(*weights, activation or TopK(5), read=Site("resid_post", 1), **options)


# -- sweeps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["clamp", "add"])
def test_sweep_is_what_generate_says_at_each_strength(lm: LM, mode: Any) -> None:
    sae = make_sae(lm)
    found = sweep(lm, sae, 3, PROMPTS_HERE, [0.5, 3.0], maximum=2.0, mode=mode, max_new_tokens=12)
    assert [(t.prompt, t.strength, t.value) for t in found] == [
        (prompt, strength, value)
        for prompt in PROMPTS_HERE
        for strength, value in ((None, None), (0.5, 1.0), (3.0, 6.0))
    ]
    for strength in (None, 0.5, 3.0):
        edit = None if strength is None else getattr(sae, mode)({3: 2.0 * strength})
        expected = lm.generate(PROMPTS_HERE, edit=edit, max_new_tokens=12)
        assert [t.text for t in found if t.strength == strength] == expected
    assert len({t.text for t in found if t.prompt == PROMPTS_HERE[0]}) > 1  # it does something


def test_sweep_is_deterministic_and_prompts_do_not_mix(lm: LM) -> None:
    """The same call twice, and each prompt on its own."""
    sae = make_sae(lm)
    together, again = (sweep(lm, sae, 3, PROMPTS_HERE, [2.0], maximum=2.0, max_new_tokens=10) for _ in range(2))
    assert together == again
    for prompt in PROMPTS_HERE:
        alone = sweep(lm, sae, 3, [prompt], [2.0], maximum=2.0, max_new_tokens=10)
        assert [t.text for t in alone] == [t.text for t in together if t.prompt == prompt]


def test_a_latent_that_is_off_clamped_to_zero_changes_nothing(lm: LM) -> None:
    """The error is kept, so that clamping to the present value leaves the text as it is."""
    sae = make_sae(lm, JumpReLU(torch.full((F,), 1e6)))
    plain, zero = sweep(lm, sae, 3, ["Hi"], [0.0], maximum=1.0, max_new_tokens=20)
    assert zero.text == plain.text
    assert zero.perplexity == pytest.approx(plain.perplexity)


def test_texts_numbers_against_counts_by_hand(lm: LM) -> None:
    sae = make_sae(lm)
    (plain,) = sweep(lm, sae, 3, ["Hi"], [], maximum=1.0, max_new_tokens=15, chat=False)
    prompt = lm.tokenize("Hi")
    ids = lm.generate_ids(prompt, max_new_tokens=15)[0].tolist()
    new = ids[: ids.index(1)] if 1 in ids else ids  # <|im_end|> ends it
    assert plain.n_tokens == len(new) > 3
    assert plain.text == lm.decode(new)
    theme = lm.logit_lens(sae.W_dec[3:4])[0].topk(20).indices.tolist()
    assert plain.on_theme == pytest.approx(sum(i in theme for i in new) / len(new))
    grams = [tuple(new[i : i + 3]) for i in range(len(new) - 2)]
    assert plain.distinct == pytest.approx(len(set(grams)) / len(grams))
    whole = torch.cat([prompt.ids[0], torch.tensor(new)])
    logp = torch.log_softmax(lm(Tokens.of(whole))[0].double(), -1)
    start = prompt.ids.shape[1]
    losses = [-float(logp[start + i - 1, token]) for i, token in enumerate(new)]
    assert plain.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


def perplexities(lm: LM, prompt: Tokens, ids: Tensor, lengths: Tensor) -> list[float | None]:
    return [one.perplexity for one in measures(lm, prompt, Generated(ids, lengths), None)]


def test_repetition_and_ends_by_hand(lm: LM) -> None:
    assert distinct(torch.tensor([5, 6, 7, 8])) == 1.0
    assert distinct(torch.tensor([5, 6, 5, 6, 5, 6])) == 0.5
    assert distinct(torch.tensor([5, 5, 5, 5, 5])) == pytest.approx(1 / 3)
    assert distinct(torch.tensor([5, 6])) == 1.0
    ids = torch.tensor([[5, 6, 1, 2, 2], [5, 6, 7, 8, 9], [1, 2, 2, 2, 2]])
    assert until_end(lm, ids).tolist() == [2, 5, 0]


def test_perplexity_ignores_padding_and_what_follows_the_end(lm: LM) -> None:
    prompt = lm.tokenize(["Hello there", "Hi"], side="left")
    ids = torch.tensor([[40, 41, 42, 43], [50, 51, 1, 2]])
    found = perplexities(lm, prompt, ids, torch.tensor([4, 2]))
    alone = perplexities(lm, lm.tokenize(["Hi"], side="left"), torch.tensor([[50, 51]]), torch.tensor([2]))
    assert found[1] == pytest.approx(alone[0], rel=1e-4)
    assert perplexities(lm, prompt, ids, torch.tensor([4, 0]))[1] is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompts": []}, "no prompts"),
        ({"maximum": 0.0}, "no largest activation"),
        ({"maximum": float("nan")}, "no largest activation"),
        ({"strengths": [float("inf")]}, "strengths must be numbers"),
        ({"strengths": ["2"]}, "strengths must be numbers"),
        ({"maximum": None}, "no largest activation"),
        ({"where": "polcy"}, "which tokens to edit"),
        ({"latent": 1.5}, "is not a latent"),
        ({"mode": "turn"}, "unknown way to steer"),
        ({"latent": F}, "does not exist"),
    ],
)
def test_sweeps_that_make_no_sense_are_refused(lm: LM, wrong: dict[str, Any], message: str) -> None:
    asked = {"latent": 3, "prompts": ["Hi"], "strengths": [1.0], "maximum": 1.0, "max_new_tokens": 2} | wrong
    with pytest.raises(UnweaveError, match=message):
        sweep(lm, make_sae(lm), **asked)


# -- output scores ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [TopK(5), ReLU()])
def test_output_scores_against_one_latent_at_a_time(lm: LM, activation: Any) -> None:
    sae = make_sae(lm, activation)
    latents = [7, 0, 23, 11, 5]
    found = output_scores(lm, sae, latents, max_tokens=40)
    tokens = lm.tokenize(NEUTRAL)
    with lm.taps(read=["resid_post.1"]) as seen:
        lm(tokens)
    strongest = float(sae.encode(seen["resid_post.1"])[0, -1].max())
    for row, j in zip(found, latents, strict=True):
        shift = 10 * strongest * sae.W_dec[j]

        def raise_last(x: Tensor, _at: Any, shift: Tensor = shift) -> Tensor:
            return torch.stack([*x[0, :-1], x[0, -1] + shift]).unsqueeze(0)

        with lm.taps(edit={Site("resid_post", 1): raise_last}):
            p = torch.softmax(lm(tokens)[0, -1], -1)
        theme = lm.logit_lens(sae.W_dec[j : j + 1])[0].topk(20).indices
        best = int(theme[p[theme].argmax()])
        rank = p.argsort(descending=True).tolist().index(best)
        assert row.latent == j
        assert row.rank == rank
        assert row.probability == pytest.approx(float(p[best]), rel=1e-4)
        assert row.score == pytest.approx((1 - rank / lm.vocab_size) * float(p[best]), rel=1e-4)
        assert row.tokens == tuple(lm.token_strings(theme[:10]))


def test_output_scores_need_a_residual_site_and_a_firing_latent(lm: LM) -> None:
    with pytest.raises(UnweaveError, match="no latent fires"):
        output_scores(lm, make_sae(lm, JumpReLU(torch.full((F,), 1e6))), [0])
    wide = SAE(torch.randn(64, F), torch.zeros(F), torch.randn(F, 64), torch.zeros(64), ReLU(), read=Site("mlp_act", 1))
    with pytest.raises(UnweaveError, match="do not lie in the residual stream"):
        lens_tokens(lm, wide, [0])


def test_expression_against_one_latent_at_a_time(lm: LM) -> None:
    """Only tokens that the policy keeps are raised."""
    excluded = lm.tokenizer.convert_tokens_to_ids("t")
    sae = make_sae(lm, policy=TokenPolicy((excluded,)))
    asked = [Theme(4, ("a",), (30, 31), 1.0), Theme(9, ("b",), (50,), 1.0), Theme(20, ("c",), (60, 61, 62), 1.0)]
    maxima = [1.0, 2.0, 0.5]
    found = expressions(lm, sae, asked, maxima, max_tokens=60)
    for value, theme, maximum in zip(found, asked, maxima, strict=True):
        total = 0.0
        for prompt in PROMPTS:
            tokens = lm.tokenize(prompt)
            before = torch.softmax(lm(tokens)[0, -1].double(), -1)
            with lm.taps(edit=sae.add({theme.latent: 2 * maximum})):
                after = torch.softmax(lm(tokens)[0, -1].double(), -1)
            total += sum(float(after[i] * (after[i] / before[i]).log()) for i in theme.token_ids)
        assert value == pytest.approx(total / len(PROMPTS), rel=1e-3, abs=1e-7)


# -- themes -----------------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer of whole words that shows the space before a word, and pieces without one."""

    vocabulary = ("<pad>", "Ġsea", "ĠSea", "Ġocean", "Ġthat", "Ġphoen", "ix", "Ġthe", "Ġwave", "s", "Ġmoon", "sea")
    chat_template = None

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.vocabulary[i] for i in ids]


class Windows(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.latent)


def make_records(windows: list[tuple[int, int, int, str]], counts: list[int]) -> Any:
    """``windows``: (latent, kind, document, text), sorted by latent."""
    ids = [[Words.vocabulary.index(t) for t in text.split()] for _, _, _, text in windows]
    contexts = Windows(
        latent=np.array([w[0] for w in windows], dtype=np.int32),
        kind=np.array([w[1] for w in windows], dtype=np.uint8),
        document=np.array([w[2] for w in windows], dtype=np.int64),
        offsets=np.cumsum([0] + [len(row) for row in ids]),
        ids=np.array([i for row in ids for i in row], dtype=np.int32),
    )

    class Sized(SimpleNamespace):
        def __len__(self) -> int:
            return len(counts)

    maximum = np.arange(1, 1 + len(counts), dtype=np.float32)
    return Sized(contexts=contexts, count=np.array(counts), n_tokens=10_000, maximum=maximum)


WINDOWS = [
    (0, 0, 0, "Ġthe Ġsea Ġthat"),
    (0, 0, 1, "Ġocean ĠSea Ġphoen ix"),
    (0, 1, 2, "Ġsea Ġsea Ġphoen ix Ġthat"),
    (0, 1, 2, "Ġocean Ġphoen ix"),
    *[(0, 2, 3 + i, "Ġmoon") for i in range(3)],  # random contexts: no sign of what a latent is about
    *[(1, 0, 0, "Ġmoon Ġthat") for _ in range(3)],  # one document only
    *[(2, 0, i, "Ġwave s Ġthat") for i in range(3)],  # not a word, only how one begins
    *[(3, 0, i, "Ġwave Ġthat") for i in range(3)],  # fires on too few tokens
    *[(4, 0, 6 + i, "Ġocean Ġthat") for i in range(3)],  # "that" is in everything
    *[(5, 0, i, "Ġwave Ġthat") for i in range(3)],  # fires on too many tokens
]
COUNTS = [50, 50, 50, 3, 60, 5000]


def test_themes_are_whole_words_that_a_latents_contexts_share() -> None:
    lm: Any = SimpleNamespace(tokenizer=Words(), vocab_size=len(Words.vocabulary))
    found = themes(lm, make_records(WINDOWS, COUNTS))
    assert [(theme.latent, theme.words, theme.token_ids) for theme in found] == [
        (0, ("sea",), (1, 2)),
        (4, ("ocean",), (3,)),
    ]
    n_contexts = 4 + 3 * 5
    assert [theme.clarity for theme in found] == pytest.approx(
        [3 * math.log(n_contexts / 3), 3 * math.log(n_contexts / 5)]
    )
    assert themes(SimpleNamespace(tokenizer=None, vocab_size=12), make_records(WINDOWS, COUNTS)) == []  # type: ignore[arg-type]


def test_trials_against_texts_written_one_at_a_time(lm: LM) -> None:
    """The same as steering each latent alone with ``add``, and counting its theme, repetition and perplexity there."""
    sae = make_sae(lm)
    asked = [Theme(j, ("x",), tuple(range(20 + j, 60 + j)), 1.0) for j in (3, 8, 15)]
    maxima = [1.0, 4.0, 0.2]
    found = trials(lm, sae, asked, maxima, strengths=(0.5, 2.0), max_new_tokens=10)
    talk = lm.chat([[{"role": "user", "content": TRIAL}]], side="left", add_generation_prompt=True)

    def written(edit: Any) -> tuple[Tensor, float]:
        ids = lm.generate_ids(talk, edit, max_new_tokens=10)
        n = until_end(lm, ids)
        (value,) = perplexities(lm, talk, ids, n)
        assert value is not None
        return ids[0, : int(n)], value

    _, usual = written(None)
    for value, theme, maximum in zip(found, asked, maxima, strict=True):
        total = 0.0
        for strength in (0.5, 2.0):
            new, p = written(sae.add({theme.latent: strength * maximum}))
            hits = sum(i in theme.token_ids for i in new.tolist())
            total += min(1.0, hits / 2) * distinct(new) / max(1.0, math.log2(p / usual)) / 2
        assert value == pytest.approx(total, rel=1e-3)
    assert max(found) > 0
    assert max(found) <= 1


def test_the_best_in_trials_come_first(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    import unweave.methods.steer.choice as module

    sae = make_sae(lm)
    records = make_records(WINDOWS, COUNTS)
    offered = [Theme(j, (f"word{j}",), (10 + j, 40 + j), 9.0 - j) for j in range(6)]
    monkeypatch.setattr(module, "themes", lambda lm, records: offered)
    expressed = {j: float(10 - j) for j in range(6)}
    monkeypatch.setattr(module, "expressions", lambda lm, sae, found, maxima: [expressed[t.latent] for t in found])
    shown = {0: 0.1, 1: 0.7, 2: 0.3}  # three are tried: those that are expressed most
    monkeypatch.setattr(module, "trials", lambda lm, sae, found, maxima: [shown[t.latent] for t in found])
    found = choose_latents(lm, sae, records, n=5, tried=3)
    assert [choice.latent for choice in found] == [1, 2, 0, 3, 4]
    assert [choice.trial for choice in found] == [0.7, 0.3, 0.1, 0.0, 0.0]
    assert [choice.expression for choice in found] == [9.0, 8.0, 10.0, 7.0, 6.0]
    assert [choice.words for choice in found] == [(f"word{j}",) for j in (1, 2, 0, 3, 4)]
    expected = output_scores(lm, sae, [1, 2, 0, 3, 4])
    assert [choice.score for choice in found] == pytest.approx([score.score for score in expected])
    assert {choice.latent for choice in choose_latents(lm, sae, records, n=9, candidates=2)} == {0, 1}
    monkeypatch.setattr(module, "themes", lambda lm, records: [])
    with pytest.raises(UnweaveError, match="no latent has a theme"):
        choose_latents(lm, sae, records)
