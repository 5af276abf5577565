"""Where integrated gradients take their points, on ways that end at the zero vector and on others."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from unweave.attribute.attribution import Rule, fractions, node_effects, step_lengths
from unweave.attribute.options import AttributionOptions
from unweave.core.site import Site
from unweave.lm.model import LM, Tokens
from unweave.sae.activations import ReLU
from unweave.sae.module import SAE
from unweave.sae.neurons import neurons

N, P, D = 3, 5, 32
SITE = Site("resid_post", 0)


def inputs() -> Tokens:
    return Tokens.of(torch.randint(3, 97, (N, P), generator=torch.Generator().manual_seed(3)))


def difference(out: Tensor, rows: Tensor) -> Tensor:
    return out[:, 5] - (1.0 + 0.3 * rows.to(out.device)) * out[:, 7]


def sae_without_bias() -> SAE:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    weights = (draw(D, 20) / D**0.5, draw(20) * 0.3, draw(20, D) * 0.3, torch.zeros(D, dtype=torch.float64))
    return SAE(*weights, ReLU(), read=SITE)


def metric_with(lm: LM, tokens: Tokens, x: Tensor | None) -> Tensor:
    with lm.taps(edit={} if x is None else {SITE: lambda _x, _at: x}):
        logits = lm(tokens)
    assert logits is not None
    return difference(logits[:, -1], torch.arange(N))


@pytest.mark.parametrize("rule", get_args(Rule))
@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_parts_fill_the_way_and_each_holds_its_point(rule: Any, steps: int) -> None:
    alphas, lengths = fractions(steps, rule), step_lengths(steps, rule)
    assert len(alphas) == len(lengths) == steps
    assert sum(lengths) == pytest.approx(1, abs=1e-12)
    begin = 0.0
    for alpha, length in zip(alphas, lengths, strict=True):
        assert begin - 1e-12 <= alpha <= begin + length + 1e-12
        begin += length
    if rule == "graded":
        assert all(a >= b for a, b in pairwise(lengths))


@pytest.mark.parametrize("scale", [0.1, 0.01, 0.001])
def test_graded_steps_find_a_change_that_happens_at_the_end(scale: float) -> None:
    """m = r / sqrt(r^2 + s^2), a coordinate that is normalised while it goes to 0 (r = 1 - alpha) beside one of size s:
    it is known in closed form, and almost all of it changes within s of the end."""

    def change(steps: int, rule: Any) -> float:
        points = zip(fractions(steps, rule), step_lengths(steps, rule), strict=True)
        return sum(-(scale**2) / ((1 - a) ** 2 + scale**2) ** 1.5 * w for a, w in points)

    exact = -1 / (1 + scale**2) ** 0.5
    assert change(40, "graded") == pytest.approx(exact, rel=0.02)
    if scale < 0.02:
        assert abs(change(40, "midpoint") - exact) > 0.2


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "olmo2"])
def test_graded_steps_make_effects_of_neurons_add_up(tiny: Any, family: str) -> None:
    """Against the change that setting the site to zero makes, but at first tokens. Equal steps miss it everywhere."""
    lm = LM(tiny(family).double(), None)
    tokens = inputs()
    units = neurons(lm, SITE)
    with lm.taps(read=[SITE]) as seen:
        lm(tokens)
    end = seen[SITE].clone()
    end[:, 1:] = 0
    change = metric_with(lm, tokens, end) - metric_with(lm, tokens, None)
    later = torch.ones(N, P, dtype=torch.bool)
    later[:, 0] = False
    off = {}
    for rule in ("midpoint", "graded"):
        found = node_effects(
            lm, units, tokens, None, difference, AttributionOptions(method="ig", steps=80, rule=rule), positions=later
        )[SITE]
        off[rule] = float((found.latents.sum((1, 2)) - change).abs().mean() / change.abs().mean())
    assert off["graded"] < 0.05 < off["midpoint"], off


def test_weighted_gradients_are_those_of_a_loop(tiny: Any) -> None:
    """One point after another with whole passes, times the length of its part; in batches that split a way."""
    lm = LM(tiny("gpt2").double(), None)
    tokens, sae = inputs(), sae_without_bias()
    with lm.taps(read=[SITE]) as seen:
        lm(tokens)
    x = seen[SITE]
    total = torch.zeros_like(x)
    for k in range(3):
        alpha, begin, end = (1 - (1 - u) ** 4 for u in ((k + 0.5) / 3, k / 3, (k + 1) / 3))
        leaf = (x * (1 - alpha)).requires_grad_()
        with torch.enable_grad(), lm.taps(edit={SITE: lambda _x, _at, leaf=leaf: leaf}, grad=True):
            logits = lm(tokens)
            assert logits is not None
            value = difference(logits[:, -1], torch.arange(N)).sum()
        total += (end - begin) * torch.autograd.grad(value, leaf)[0]
    found = node_effects(
        lm, sae, tokens, None, difference, AttributionOptions(method="ig", steps=3, rule="graded", max_tokens=2 * P)
    )[SITE]
    torch.testing.assert_close(found.gradient, total, rtol=1e-9, atol=1e-9)
