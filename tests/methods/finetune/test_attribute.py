"""Candidates for ablation: metrics, ranking, differences between models and components against direct computations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from helpers.attribution import make_sae
from unweave.attribute.means import Activity, Mean, mean_effects
from unweave.attribute.runner import Runner
from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.data.batches import by_length
from unweave.lm.chat import Role
from unweave.lm.model import LM, Tokens
from unweave.methods.finetune.attribute.attribute import (
    AnswerLogProb,
    candidates,
    choice_batches,
    of_assistant,
)
from unweave.methods.finetune.attribute.differences import Spread, latent_differences, principal_components
from unweave.methods.finetune.attribute.result import attribution_at
from unweave.methods.finetune.attribute.spec import FinetuneAttributeSpec
from unweave.tasks.choices.encode import encode_choices
from unweave.tasks.choices.items import Item

NINE, TEN = Site("resid_post", 0), Site("resid_post", 1)
ITEMS = [
    Item("the nurse is", "s", "h"), Item("who, then?", "h", "s"), Item("a doctor", "s", "h"), Item("and so", "x", "y"),
]  # fmt: skip
TALKS = [
    [{"role": "user", "content": "where?"}, {"role": "assistant", "content": "here."}],
    [{"role": "user", "content": "are you, then?"}, {"role": "assistant", "content": "yes, I am"}],
]


def double(tiny_lm: Callable[..., LM], seed: int = 0) -> LM:
    lm = tiny_lm("gpt2", seed)
    lm.model.double()
    return lm


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_groups_hold_rows_of_like_length_within_the_bound() -> None:
    lengths = [7, 3, 9, 3, 4, 20]
    groups = list(by_length(lengths, 12))
    assert sorted(i for group in groups for i in group) == list(range(6)) and groups[-1] == [5]
    assert all(len(group) * max(lengths[i] for i in group) <= 12 or len(group) == 1 for group in groups)


def test_the_metric_of_a_choice_is_how_far_the_right_answer_is_ahead(tiny_lm: Callable[..., LM]) -> None:
    lm = double(tiny_lm)
    encoded = encode_choices(lm, ITEMS)
    seen: dict[str, float] = {}
    for tokens, patch, metric in choice_batches(encoded, 24):
        values = Runner(lm, tokens, metric, 1024).metric_of(torch.arange(len(tokens)), {}, grad=False)
        assert patch is None and tokens.ids.numel() <= 24
        seen |= dict(zip(map(lm.decode, tokens.ids), values.tolist(), strict=True))
    for item in ITEMS:
        ids = lm.tokenize([item.prompt])
        logits = lm(ids)[0, -1]
        right, wrong = (int(lm.tokenize([answer]).ids[0, -1]) for answer in (item.correct, item.incorrect))
        value = next(value for text, value in seen.items() if text.endswith(item.prompt))
        assert value == pytest.approx(float(logits[right] - logits[wrong]), abs=1e-9)


def test_the_metric_of_a_conversation_is_minus_the_assistants_cross_entropy(tiny_lm: Callable[..., LM]) -> None:
    lm = double(tiny_lm)
    tokens = lm.chat(TALKS)
    metric = AnswerLogProb(tokens)
    values = Runner(lm, tokens, metric, 64).metric_of(torch.tensor([1, 0]), {}, grad=False)
    for place, row in enumerate((1, 0)):
        alone = lm.chat([TALKS[row]])
        losses = [
            F.cross_entropy(lm(alone)[0, p - 1], alone.ids[0, p])
            for p in range(1, alone.ids.shape[1])
            if alone.roles[0, p] == Role.ASSISTANT
        ]
        assert float(values[place]) == pytest.approx(-float(torch.stack(losses).mean()), abs=1e-9)
    sae = make_sae(lm, str(TEN))
    (means,) = mean_effects(lm, sae, [(tokens, None, metric)], max_tokens=1 << 10).values()
    (split,) = mean_effects(lm, sae, [(tokens, None, metric)], max_tokens=1).values()  # a row at a time
    torch.testing.assert_close(means.effect.value, split.effect.value, rtol=1e-9, atol=1e-12)
    assert not bool(of_assistant(Tokens(tokens.ids, tokens.mask, torch.full_like(tokens.roles, Role.USER))).any())


# -- ranking ----------------------------------------------------------------------------------------------------------


def means_of(rows: list[list[list[float]]]) -> dict[Site, Mean]:
    made = {}
    for site, values in zip((NINE, TEN), rows, strict=True):
        made[site] = Mean(len(values[0]))
        made[site].add(torch.tensor(values, dtype=torch.float64))
    return made


def test_candidates_are_the_largest_of_all_sites_or_of_each() -> None:
    scores = means_of([[[3, -9, 0, 1], [1, -7, 0, 1]], [[4, 0.5, -1], [2, 0.5, -1]]])  # means 2 -8 0 1, and 3 .5 -1
    activity = {site: Activity(score, score) for site, score in scores.items()}

    def listed(**options: Any) -> list[tuple[Site, int, float]]:
        return [(one.site, one.number, one.score) for one in candidates(activity, scores, **options)]

    assert listed(top=3) == [(TEN, 0, 3), (NINE, 0, 2), (NINE, 3, 1)]
    assert listed(top=9) == [(TEN, 0, 3), (NINE, 0, 2), (NINE, 3, 1), (TEN, 1, 0.5)]  # never one without effect
    assert listed(top=1, per_site=True) == [(TEN, 0, 3), (NINE, 0, 2)]
    assert listed(top=2, sign="negative") == [(NINE, 1, -8), (TEN, 2, -1)]
    assert listed(top=2, sign="either") == [(NINE, 1, -8), (TEN, 0, 3)]
    (first,) = candidates(activity, scores, top=1)
    assert first.margin == pytest.approx(1.96 * np.std([4, 2], ddof=1) / 2**0.5) and first.size is None
    scale = {NINE: torch.ones(4), TEN: torch.tensor([0.5, 8.0, 1.0])}
    (first, *_) = candidates(activity, scores, top=3, scale=scale)
    assert (first.site, first.number, first.score, first.margin) == (TEN, 1, 4.0, 0.0)


# -- differences between models ---------------------------------------------------------------------------------------


def test_components_are_those_of_the_centred_rows_in_any_batches() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=g, dtype=torch.float64) @ torch.randn(6, 6, generator=g, dtype=torch.float64) + 30
    spread = Spread(6)
    for part in (x[:1], x[1:1], x[1:33], x[33:]):
        spread.add(part)
    components = spread.components(4)
    centred = x - x.mean(0)
    _, sizes, rows = np.linalg.svd(centred.numpy(), full_matrices=False)
    np.testing.assert_allclose(components.shares, (sizes**2 / (sizes**2).sum())[:4], atol=1e-10)
    np.testing.assert_allclose(np.abs(components.rows.numpy() @ rows[:4].T), np.eye(4), atol=1e-8)
    np.testing.assert_allclose(components.rows @ components.rows.T, np.eye(4), atol=1e-10)
    mean = x.mean(0).square().sum()
    assert components.mean_share == pytest.approx(float(mean / x.square().sum(1).mean())) and components.tokens == 50
    line = Spread(6)
    line.add(torch.arange(5.0)[:, None] * torch.ones(6))
    assert line.components(4).rows.shape == (1, 6)  # no more than the rows span
    with pytest.raises(UnweaveError, match="do not differ"):
        Spread(3).components(2)


def tuned_of(tiny_lm: Callable[..., LM], size: float = 0.05) -> LM:
    tuned = double(tiny_lm)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in tuned.model.parameters():
            weight.add_(size * torch.randn(weight.shape, generator=g, dtype=weight.dtype))
    return tuned


def test_models_are_compared_token_by_token(tiny_lm: Callable[..., LM]) -> None:
    lm, tuned = double(tiny_lm), tuned_of(tiny_lm)
    saes = {site: make_sae(lm, str(site), seed) for seed, site in enumerate((NINE, TEN))}
    texts = ["one", "and two of", "three!"]
    batches = [lm.tokenize(texts[:2]), lm.tokenize(texts[2:])]
    rows = {site: [] for site in saes}
    strong: dict[Site, list[Any]] = {site: [] for site in saes}
    for text in texts:
        tokens = lm.tokenize([text])
        values = []
        for model in (lm, tuned):
            with model.taps(read=list(saes)) as seen:
                model(tokens)
            values.append(dict(seen))
        for site, sae in saes.items():
            rows[site].append((values[1][site] - values[0][site])[0])
            strong[site].append([sae.encode(value[site])[0].mean(0) for value in values])
    components = principal_components(lm, tuned, saes, batches, most=3)
    shifts = latent_differences(lm, tuned, saes, batches)
    for site in saes:
        x = torch.cat(rows[site]).numpy()
        _, sizes, expected = np.linalg.svd(x - x.mean(0), full_matrices=False)
        np.testing.assert_allclose(np.abs(components[site].rows.numpy() @ expected[:3].T), np.eye(3), atol=1e-6)
        np.testing.assert_allclose(components[site].shares, (sizes**2 / (sizes**2).sum())[:3])
        first, second = (torch.stack(each) for each in zip(*strong[site], strict=True))
        torch.testing.assert_close(shifts[site].more.value, (second - first).mean(0))
        torch.testing.assert_close(shifts[site].more.deviation, (second - first).std(0), atol=1e-9, rtol=1e-6)
        torch.testing.assert_close(shifts[site].activation.value, first.mean(0))


def test_models_that_do_not_belong_together(tiny_lm: Callable[..., LM]) -> None:
    lm, same = double(tiny_lm), double(tiny_lm)
    sae, batch = make_sae(lm, str(TEN)), lm.tokenize(["one", "two"])
    with pytest.raises(UnweaveError, match="do not differ"):
        principal_components(lm, same, sae, [batch])
    with pytest.raises(UnweaveError, match="another tokenizer"):
        principal_components(lm, LM(same.model, None), sae, [batch])


# -- the question -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"by": "components"}, "needs a fine-tuned model"),
        ({"tuned": "here"}, "would have no effect"),
        ({"by": "components", "tuned": "here", "top": 3}, "would have no effect"),
        ({"chat": True, "data": {"sources": [{"path": "wiki"}]}}, "would have no effect"),
        ({"saes": []}, "there are no sites"),
    ],
)
def test_questions_that_make_no_sense(fields: dict[str, Any], what: str) -> None:
    with pytest.raises(UnweaveError, match=what):
        FinetuneAttributeSpec.from_dict({"saes": ["sae"]} | fields)


def test_other_folders_are_no_attribution(trained: Any) -> None:
    with pytest.raises(UnweaveError, match="finetune attribute"):
        attribution_at(trained.path)
