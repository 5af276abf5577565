"""How far steered text is from the unedited model: each number against a loop over its tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from unweave.core.site import Site
from unweave.lm.model import LM, Tokens
from unweave.sae.activations import ReLU
from unweave.sae.edits import Change
from unweave.sae.module import SAE
from unweave.sae.steered import confidence_changes, prompt_tokens, side_by_side

PROMPTS = ["Tell me about the sea.", "Hi"]


def _sae() -> SAE:
    g = torch.Generator().manual_seed(0)
    shapes = ((32, 24), (24,), (24, 32), (32,))
    return SAE(*(torch.randn(*shape, generator=g) * 0.3 for shape in shapes), ReLU(), read=Site("resid_post", 1))


def _next(lm: LM, ids: list[int], roles: list[int], edit: Any) -> Tensor:
    """Log-probabilities [P, V] after every token of one row."""
    tokens = Tokens.pad([(ids, roles)], 2)
    with lm.taps(edit=edit):
        logits = lm(tokens)
    assert logits is not None
    return torch.log_softmax(logits[0].double(), -1)


@pytest.mark.parametrize("where", ["policy", "answer:2", "prompt"])
def test_log_probabilities_and_kl_of_every_text(tiny_lm: Callable[..., LM], where: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("unweave.sae.steered._LOGITS", 97 * 9 * 2)  # two rows at a time
    lm, sae = tiny_lm("gemma2"), _sae()
    changes = [(0.5, [Change(sae, 3, 2.0, "clamp", where)]), (2.0, [Change(sae, 4, 9.0, "add", where)])]
    texts = side_by_side(lm, PROMPTS, changes, themes=[(sae, 3)], max_new_tokens=8)
    assert [(t.prompt, t.strength, t.value) for t in texts] == [
        (prompt, *cell) for prompt in PROMPTS for cell in ((None, None), (0.5, 2.0), (2.0, 9.0))
    ]
    edits = {None: [], 0.5: [sae.clamp({3: 2.0}, where=where)], 2.0: [sae.add({4: 9.0}, where=where)]}
    for text in texts:
        prompt = prompt_tokens(lm, [text.prompt], None)
        new = lm.generate_ids(prompt, edits[text.strength], max_new_tokens=8)[0, : text.n_tokens].tolist()
        assert text.text == lm.decode(new)
        ids, roles = [*prompt.ids[0].tolist(), *new], [*prompt.roles[0].tolist(), *([3] * len(new))]
        plain, own = _next(lm, ids, roles, None), _next(lm, ids, roles, edits[text.strength])
        places = [len(ids) - len(new) - 1 + i for i in range(len(new))]
        assert text.perplexity == pytest.approx(
            math.exp(-sum(float(plain[p, j]) for p, j in zip(places, new, strict=True)) / len(new)), rel=1e-3
        )
        assert text.log_prob == pytest.approx(
            sum(float(own[p, j]) for p, j in zip(places, new, strict=True)) / len(new), rel=1e-3
        )
        kl = sum(float((own[p].exp() * (own[p] - plain[p])).sum()) for p in places) / len(new)
        assert text.kl == pytest.approx(kl, rel=1e-3, abs=1e-6)
        assert (text.kl > 0.001) == (text.strength is not None)


def test_edits_that_do_not_persist_have_no_single_pass_to_be_measured_by(tiny_lm: Callable[..., LM]) -> None:
    lm, sae = tiny_lm(), _sae()
    texts = side_by_side(lm, ["Hi"], [(1.0, [Change(sae, 4, 9.0, "add")])], max_new_tokens=5, persist=False)
    assert [(t.log_prob, t.kl) for t in texts] == [(None, None)] * 2 and texts[1].perplexity
    ids = lm.generate_ids(prompt_tokens(lm, ["Hi"], None), sae.add({4: 9.0}), max_new_tokens=5, persist=False)
    assert texts[1].text == lm.decode(ids[0, : texts[1].n_tokens])


def test_changes_of_confidence_one_latent_and_prompt_at_a_time(tiny_lm: Callable[..., LM]) -> None:
    lm, sae = tiny_lm(), _sae()
    rows = [[Change(sae, j, 5.0, "add")] for j in (3, 7, 1)]
    got = confidence_changes(lm, rows, PROMPTS, max_rows=2)

    def confidence(prompt: str, edit: Any) -> float:
        tokens = lm.tokenize(prompt)
        likeliest = _next(lm, tokens.ids[0].tolist(), tokens.roles[0].tolist(), edit)[-1].sort(descending=True).values
        return -float(likeliest[:20].mean())

    for value, j in zip(got, (3, 7, 1), strict=True):
        change = [confidence(prompt, sae.add({j: 5.0})) - confidence(prompt, None) for prompt in PROMPTS]
        assert value == pytest.approx(sum(change) / 2, rel=1e-3, abs=1e-5)
