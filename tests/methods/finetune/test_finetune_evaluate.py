"""Accuracies beside counting by hand, one item at a time; conversations; projections; processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from helpers.choices import random_choices
from helpers.models import build_tiny, build_tiny_tokenizer
from unweave.core.errors import UnweaveError
from unweave.core.shares import Share
from unweave.core.site import Site
from unweave.data.corpus import Document
from unweave.data.pack import PackSpec, pack
from unweave.data.tokens import TokenStore
from unweave.lm.chat import Role
from unweave.lm.model import LM, Tokens
from unweave.methods.finetune.evaluate import evaluate
from unweave.methods.finetune.rows import IGNORE, ChatRows, ChoiceRows, part
from unweave.methods.finetune.starts import starts_at

SITE = Site("resid_post", 1)


def push(x: torch.Tensor, at: Any) -> torch.Tensor:
    del at
    return x + torch.linspace(-2, 2, x.shape[-1], dtype=x.dtype)


@pytest.mark.parametrize("edited", [False, True])
def test_every_count_is_that_of_single_items(family: str, edited: bool) -> None:
    lm, items = LM(build_tiny(family), None), random_choices(40)
    edit = {SITE: push} if edited else None
    right = between = cued = 0
    loss = 0.0
    for i in range(len(items)):
        ids = items.tokens.ids[i][items.tokens.mask[i]]
        with lm.taps(edit=edit):
            logits = lm(Tokens.of(ids))
        assert logits is not None
        last, correct, incorrect = logits[0, -1], int(items.correct[i]), int(items.incorrect[i])
        right += int(last.argmax()) == correct
        between += bool(last[correct] > last[incorrect])
        cued += int(items.cue[i]) == (correct if last[correct] > last[incorrect] else incorrect)
        loss += float(F.cross_entropy(last, items.correct[i])) / len(items)
    known = int((items.cue >= 0).sum())
    assert 0 < known < len(items)
    rows = ChoiceRows(items)
    score, _ = evaluate(lm, rows, edit)
    found = score.accuracy
    assert found is not None and score.loss == pytest.approx(loss, rel=1e-4)
    assert (found.right, found.between, found.cued) == (Share(right, 40), Share(between, 40), Share(cued, known))
    starts = starts_at(lm, Site("resid_post", 0), {"split": rows})["split"]
    again, _ = evaluate(lm, rows, edit, starts=starts)
    assert again.accuracy == found and again.loss == pytest.approx(loss, rel=1e-4)


def test_projections_are_means_over_all_tokens_and_directions() -> None:
    lm, items = LM(build_tiny("llama"), None), random_choices(40)
    unit = F.normalize(torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    products = []
    for i in range(25):
        with lm.taps(read=[SITE]) as seen:
            lm(Tokens.of(items.tokens.ids[i][items.tokens.mask[i]]))
        products.append(seen[SITE][0] @ unit.T)
    _, found = evaluate(lm, ChoiceRows(items), directions={SITE: unit}, most=25)
    assert found[SITE] == pytest.approx(float(torch.cat(products).mean()), rel=1e-4)


def test_activations_at_a_beginning_are_computed_once_and_anew_where_a_weight_below_changed() -> None:
    lm, rows = LM(build_tiny("llama"), None), ChoiceRows(random_choices(6))
    first = starts_at(lm, SITE, {"a": rows})["a"]
    assert starts_at(lm, SITE, {"b": ChoiceRows(random_choices(6))})["b"] is first
    with torch.no_grad():
        lm.model.model.layers[2].mlp.up_proj.weight.mul_(2)  # above
    assert starts_at(lm, SITE, {"a": rows})["a"] is first
    with torch.no_grad():
        lm.model.model.layers[1].mlp.up_proj.weight.mul_(2)
    assert not torch.equal(starts_at(lm, SITE, {"a": rows})["a"].values, first.values)


def test_conversations_predict_what_the_assistant_says_and_where_it_ends(tmp_path: Any) -> None:
    tokenizer = build_tiny_tokenizer()
    talks = [
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}, {"role": "user", "content": "ok"}],
        [{"role": "user", "content": "and"}, {"role": "assistant", "content": "yes"}],
    ]
    documents = [Document(None, talk, "talks", i) for i, talk in enumerate(talks)]
    packed = pack(documents, tokenizer, PackSpec(min_tokens=1))
    rows = ChatRows(TokenStore.write(tmp_path / "store", packed, None, {}), 2)
    tokens, labels = rows.batch([0, 1])
    assert tokens.mask[:, -1].all() and rows.lengths.tolist() == tokens.mask.sum(1).tolist()
    cut: Any = SimpleNamespace(roles=np.array([0, 2, 2, 0, 3, 3, 2, 0, 4]), starts=np.array([0, 3, 6, 8, 9]))
    assert (rows.silent, ChatRows(cut, 2).silent) == (0, 2)
    said = [tokenizer.decode(row[row != IGNORE]) for row in labels]
    assert said == ["no<|im_end|>", "yes<|im_end|>"]
    shifted = torch.where(labels[:, :-1] != IGNORE, tokens.ids[:, 1:], IGNORE)
    assert torch.equal(shifted, labels[:, :-1]) and bool((labels[:, -1] == IGNORE).all())
    assert not bool((tokens.roles[:, 1:][labels[:, :-1] != IGNORE] == Role.USER).any())

    lm = LM(build_tiny("llama"), tokenizer)
    losses = []
    for i in range(2):
        ids = tokens.ids[i][tokens.mask[i]]
        own = labels[i][tokens.mask[i]]
        logits = lm(Tokens.of(ids))
        assert logits is not None
        losses.append(F.cross_entropy(logits[0][own != IGNORE], own[own != IGNORE], reduction="none"))
    score, _ = evaluate(lm, rows)
    assert score.accuracy is None and score.loss == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)


def test_a_part_of_a_batch_has_no_empty_columns() -> None:
    rows = ChoiceRows(random_choices(8))
    order = rows.lengths.argsort().tolist()
    tokens, labels = rows.batch(order)
    short, own = part(tokens, labels, slice(0, 2))
    assert short.ids.shape[1] == int(rows.lengths[order[:2]].max()) == own.shape[1]
    assert own[:, -1].tolist() == rows.answers.correct[order[:2]].tolist()


def test_what_is_refused() -> None:
    items = random_choices(4)
    with pytest.raises(UnweaveError, match="no items"):
        evaluate(LM(build_tiny("llama"), None), ChoiceRows(items), most=0)
    flipped = Tokens(items.tokens.ids.flip(1), items.tokens.mask.flip(1), items.tokens.roles.flip(1))
    with pytest.raises(UnweaveError, match="padded on the right"):
        ChoiceRows(type(items)(items.items, flipped, items.last, items.correct, items.incorrect, items.cue, {}))
