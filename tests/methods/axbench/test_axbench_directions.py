"""Directions from labelled texts, against sums written out, optimality conditions and finite differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from unweave.core.errors import UnweaveError
from unweave.core.progress import task
from unweave.core.site import Site
from unweave.data.policy import TokenPolicy
from unweave.lm.chat import Role
from unweave.methods.axbench.directions import (
    Direction,
    counted,
    difference_of_means,
    linear_probe,
    passage_values,
    reft_loss,
    reft_r1,
    sae_of,
    text_tokens,
    token_activations,
)
from unweave.methods.axbench.spec import ReftSpec

SITE = Site("resid_post", 1)
TEXTS = ["one two three", "a", "the sea and the shore", "go"]


def planted(n: int = 400) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    w = torch.nn.functional.normalize(torch.randn(12, generator=g), dim=0)
    label = torch.rand(n, generator=g) < 0.3
    return torch.randn(n, 12, generator=g) + 5.0 + 2.0 * label.unsqueeze(1) * w, label, w


def test_the_difference_of_means_is_that_and_is_zero_at_the_mean_without_the_concept() -> None:
    x, label, w = planted()
    got = difference_of_means(x, label)
    expected = x[label].mean(0) - x[~label].mean(0)
    torch.testing.assert_close(got.w, expected / expected.norm())
    assert float(x[~label].mean(0) @ got.w + got.b) == pytest.approx(0, abs=1e-4) and float(got.w @ w) > 0.9
    for labels in (torch.ones_like(label), torch.zeros_like(label)):
        with pytest.raises(UnweaveError, match="with the concept and without"):
            difference_of_means(x, labels)
    with pytest.raises(UnweaveError, match="do not differ"):
        difference_of_means(torch.ones(4, 3), torch.tensor([True, False, True, False]))


def test_the_probe_is_where_the_penalised_loss_is_flat() -> None:
    x, label, w = planted()
    got = linear_probe(x, label, l2=2.0)
    mean, scale = x.double().mean(0), x.double().std(0, correction=0)
    z, y = (x.double() - mean) / scale, label.double()
    weight = torch.where(label, len(y) / (2 * y.sum()), len(y) / (2 * (len(y) - y.sum())))

    def loss(v: torch.Tensor) -> torch.Tensor:
        terms = torch.nn.functional.binary_cross_entropy_with_logits(z @ v[:-1] + v[-1], y, reduction="none")
        return (weight * terms).sum() + v[:-1].square().sum()  # l2 / 2 times the squares

    v = torch.zeros(13, dtype=torch.double, requires_grad=True)
    optimiser = torch.optim.LBFGS([v], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        value = loss(v)
        value.backward()
        return value

    optimiser.step(closure)
    raw = v.detach()[:-1] / scale
    torch.testing.assert_close(got.w.double(), raw / raw.norm(), atol=2e-3, rtol=0)
    assert got.b == pytest.approx(float((v.detach()[-1] - mean @ raw) / raw.norm()), abs=1e-2)
    assert float(got.w @ w) > 0.9


def test_a_direction_is_an_sae_of_one_latent(tiny_lm: Any) -> None:
    lm = tiny_lm("llama")
    g = torch.Generator().manual_seed(1)
    some = [Direction(torch.nn.functional.normalize(torch.randn(32, generator=g), dim=0), 0.5, r) for r in (True, True)]
    sae = sae_of(some, SITE, TokenPolicy())
    x = torch.randn(3, 32, generator=g)
    torch.testing.assert_close(sae.encode(x)[:, 1], torch.relu(x @ some[1].w + 0.5))
    tokens = lm.tokenize(["abc"])
    with lm.taps(read=[SITE]) as before:
        lm(tokens)
    with lm.taps(read=[SITE], edit=sae.add({1: 3.0})) as after:
        lm(tokens)
    torch.testing.assert_close(after[SITE] - before[SITE], 3.0 * some[1].w.expand(1, 3, -1), atol=1e-5, rtol=0)
    assert bool((sae_of([Direction(some[0].w, -100.0)], SITE, TokenPolicy()).encode(x) < 0).all())


def test_only_the_texts_own_tokens_count(tiny_lm: Any) -> None:
    lm = tiny_lm("qwen2")
    tokens = text_tokens(lm, TEXTS, most=6)
    assert counted(tokens).sum(1).tolist() == [6, 1, 6, 2]
    assert bool((tokens.roles[counted(tokens)] == Role.ASSISTANT).all())
    x, owner = token_activations(lm, SITE, TokenPolicy(), TEXTS, most=6)
    assert owner.tolist() == [0] * 6 + [1] + [2] * 6 + [3] * 2
    with lm.taps(read=[SITE]) as seen:
        lm(text_tokens(lm, TEXTS[2:3], most=6))
    torch.testing.assert_close(x[owner == 2], seen[SITE][0][-6:], atol=1e-4, rtol=1e-4)
    sae = sae_of([Direction(torch.eye(32)[3]), Direction(torch.eye(32)[5])], SITE, TokenPolicy())
    early = sae_of([Direction(torch.eye(32)[4])], Site("resid_post", 0), TokenPolicy())
    with task("texts", total=4) as shown:
        mean, largest = passage_values(lm, [(sae, 0), (early, 0), (sae, 1), (sae, 0)], TEXTS, 6, shown)
    at_early, _ = token_activations(lm, Site("resid_post", 0), TokenPolicy(), TEXTS, most=6)
    for text in range(4):
        mine = [x[owner == text][:, 3], at_early[owner == text][:, 4], x[owner == text][:, 5], x[owner == text][:, 3]]
        np.testing.assert_allclose(mean[text], [v.mean() for v in mine], atol=1e-5)
        np.testing.assert_allclose(largest[text], [v.max() for v in mine], atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_loss_of_reft_is_the_equation_and_its_gradient_the_slope(tiny_lm: Any, name: str) -> None:
    lm = tiny_lm(name)
    tokens, label = text_tokens(lm, TEXTS, most=12), torch.tensor([True, False, True, False])
    options = ReftSpec(k=3, l1=0.1)
    g = torch.Generator().manual_seed(2)
    w, b = torch.randn(32, generator=g) / 5, torch.tensor(0.2)
    keep = counted(tokens)
    with lm.taps(read=[SITE], stop=SITE) as seen:
        lm(tokens)
    x, outside, edited = seen[SITE], 0.0, seen[SITE].clone()
    for row in range(4):
        f = torch.relu(x[row] @ w + b) * keep[row]
        top = sorted(f.tolist(), reverse=True)[:3]
        outside += float(f.sum()) - (sum(top) if label[row] else 0.0)
        edited[row][keep[row]] += sum(top) / 3 * w
    with lm.taps(edit={SITE: lambda _x, _at: edited}):
        logits = lm(tokens)
    losses = [
        -float(torch.log_softmax(logits[row, p - 1].float(), -1)[tokens.ids[row, p]])
        for row in (0, 2) for p in range(1, tokens.ids.shape[1]) if keep[row, p]
    ]  # fmt: skip
    expected = sum(losses) / len(losses) + 0.1 * outside / int(keep.sum())
    weights = (w.clone().requires_grad_(True), b.clone().requires_grad_(True))
    loss = reft_loss(lm, SITE, TokenPolicy(), tokens, label, weights, options)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    with torch.enable_grad():
        loss.backward()
    assert weights[0].grad is not None and weights[1].grad is not None
    step = weights[0].grad / weights[0].grad.norm() * 0.02

    def at(shift: torch.Tensor) -> float:
        return float(reft_loss(lm, SITE, TokenPolicy(), tokens, label, (w + shift, b), options).detach())

    assert (at(step) - at(-step)) / 0.04 == pytest.approx(float(weights[0].grad.norm()), rel=0.1)


def test_reft_starts_with_the_sign_that_most_tokens_have(tiny_lm: Any) -> None:
    lm, label, still = tiny_lm("llama"), [True, False, True, False], ReftSpec(lr=1e-9, epochs=1)
    x, _ = token_activations(lm, SITE, TokenPolicy(), TEXTS, 12)
    shares, plain = [], []
    for seed in range(8):
        got = reft_r1(lm, SITE, TokenPolicy(), TEXTS, label, most=12, options=still, seed=seed)
        shares.append(float((x @ got.w > 0).float().mean()))
        drawn = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(seed)), dim=0)
        plain.append(float((x @ drawn > 0).float().mean()))
        assert abs(float(got.w @ drawn)) == pytest.approx(1, abs=1e-4)
    assert min(shares) >= 0.5 > min(plain)


def test_training_reft_lowers_its_loss_and_leaves_the_model_alone(tiny_lm: Any) -> None:
    lm = tiny_lm("llama")
    texts, label = ["xyzzy xyzzy", "a b c d", "xyzzy", "the sea"] * 3, [True, False, True, False] * 3
    before = [p.clone() for p in lm.model.parameters()]
    options = ReftSpec(k=2, lr=0.05, epochs=12, batch=4)
    got = reft_r1(lm, SITE, TokenPolicy(), texts, label, most=12, options=options)
    assert float(got.w.norm()) == pytest.approx(1, abs=1e-5) and got.relu
    tokens, rows = text_tokens(lm, texts, 12), torch.tensor(label)

    def loss(direction: torch.Tensor, b: float) -> float:
        return float(reft_loss(lm, SITE, TokenPolicy(), tokens, rows, (direction, torch.tensor(b)), options).detach())

    random = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(0)), dim=0)
    assert loss(got.w, got.b) < min(loss(random, 0.0), loss(0 * random, 0.0)) - 0.05
    assert all(torch.equal(a, b) for a, b in zip(before, lm.model.parameters(), strict=True))
