"""What single-latent effects are, against Shapley values by enumeration: an SAE of so few latents that all sets of them
can be tried."""

from __future__ import annotations

from itertools import combinations
from math import factorial
from typing import Any

import pytest
import torch
from torch import Tensor

from unweave.attribute.attribution import Interventions, Metric, node_effects
from unweave.attribute.options import AttributionOptions
from unweave.attribute.runner import AtSite
from unweave.core.site import Site
from unweave.lm.model import LM, Tokens
from unweave.sae.activations import ReLU
from unweave.sae.module import SAE

F, N, P, D = 6, 3, 5, 32
SITE = Site("resid_post", 1)


def make_sae() -> SAE:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return SAE(draw(D, F) / D**0.5, draw(F) * 0.3, draw(F, D), draw(D) * 0.2, ReLU(), read=SITE)


def directions(lm: LM, clean: Tokens, patch: Tokens) -> SAE:
    """Latents that are coordinates along the strongest directions of change, plus 100 so that they are active."""
    change = (value_at(lm, patch) - value_at(lm, clean)).flatten(0, 1)
    rows = torch.linalg.svd(change, full_matrices=False).Vh[:F]
    hundred = torch.full((F,), 100.0, dtype=torch.float64)
    return SAE(rows.T, hundred, rows, -hundred @ rows, ReLU(), read=SITE)


def make_pair() -> tuple[Tokens, Tokens]:
    clean = torch.randint(3, 97, (N, P), generator=torch.Generator().manual_seed(7))
    patch = clean.clone()
    patch[:, 1:3] = (patch[:, 1:3] + 11) % 90 + 3
    return Tokens.of(clean), Tokens.of(patch)


def value_at(lm: LM, tokens: Tokens) -> Tensor:
    with lm.taps(read=[SITE]) as seen:
        lm(tokens)
    return seen[SITE]


def players(lm: LM, sae: SAE, clean: Tokens, patch: Tokens) -> tuple[Tensor, Tensor]:
    """The site's clean value, and how it moves with each latent, and with the error, [F + 1, N, P, D]."""
    x, y = value_at(lm, clean), value_at(lm, patch)
    moved = sae.encode(y) - sae.encode(x)
    latents = torch.stack([moved[..., j, None] * sae.W_dec[j] for j in range(F)])
    return x, torch.cat([latents, (y - x - moved @ sae.W_dec).unsqueeze(0)])


def shapley(worth: dict[frozenset[int], Tensor], n: int) -> Tensor:
    """The mean of what each player adds over all orders in which they can come, [n, N]."""
    found = []
    for i in range(n):
        others = [j for j in range(n) if j != i]
        total = torch.zeros(N, dtype=torch.float64)
        for size in range(n):
            weight = factorial(size) * factorial(n - size - 1) / factorial(n)
            for some in combinations(others, size):
                total += weight * (worth[frozenset((*some, i))] - worth[frozenset(some)])
        found.append(total)
    return torch.stack(found)


def all_sets(metric: Any, x: Tensor, moves: Tensor) -> dict[frozenset[int], Tensor]:
    n = len(moves)
    return {
        frozenset(some): metric(x + moves[list(some)].sum(0))
        for size in range(n + 1)
        for some in combinations(range(n), size)
    }


def estimates(
    lm: LM, sae: SAE, clean: Tokens, patch: Tokens, metric: Metric, at: Site | None, steps: int
) -> dict[str, Tensor]:
    """[F, N] each: IG, exact from the clean end, and the mean of both ends."""
    ig = node_effects(
        lm, sae, clean, patch, AtSite(metric, at), AttributionOptions(method="ig", steps=steps, rule="midpoint")
    )[SITE]
    ends = [
        Interventions(lm, sae, clean, patch, AtSite(metric, at)).exact(range(F), origin=origin)  # type: ignore[arg-type]
        for origin in ("clean", "patch")
    ]
    return {"ig": ig.latents.sum(1).T, "exact": ends[0], "both": (ends[0] + ends[1]) / 2, "error": ig.error.sum(1)}


def test_where_pairs_interact_both_ends_and_ig_are_the_shapley_value_and_one_end_is_not(tiny: Any) -> None:
    """A metric of first and second order: everything is known exactly, and steps play no part."""
    lm = LM(tiny("gpt2").double(), None)
    sae, (clean, patch) = make_sae(), make_pair()
    g = torch.Generator().manual_seed(5)
    linear = torch.randn(P, D, generator=g, dtype=torch.float64)
    square = torch.randn(P * D, P * D, generator=g, dtype=torch.float64) / 10

    def metric(out: Tensor, rows: Tensor) -> Tensor:
        flat = out.flatten(1)
        return (out * linear).sum((1, 2)) + torch.einsum("bi,ij,bj->b", flat, square, flat)

    x, moves = players(lm, sae, clean, patch)
    worth = all_sets(lambda value: metric(value, torch.arange(N)), x, moves)
    values = shapley(worth, F + 1)
    torch.testing.assert_close(values.sum(0), worth[frozenset(range(F + 1))] - worth[frozenset()])
    found = estimates(lm, sae, clean, patch, metric, SITE, steps=1)
    for name in ("ig", "both"):
        torch.testing.assert_close(found[name], values[:F], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found["error"], values[F], rtol=1e-9, atol=1e-9)
    assert float((found["exact"] - values[:F]).norm() / values[:F].norm()) > 0.1


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gpt_neox_sequential"])
def test_in_a_model_both_ends_and_ig_lie_nearer_to_the_shapley_value_than_one_end(tiny: Any, family: str) -> None:
    lm = LM(tiny(family).double(), None)
    clean, patch = make_pair()
    sae = directions(lm, clean, patch)

    def metric(out: Tensor, rows: Tensor) -> Tensor:
        return out[:, 5] - (1.0 + rows.to(out.device)) * out[:, 7]

    def run(value: Tensor) -> Tensor:
        with lm.taps(edit={SITE: lambda _x, _at: value}):
            logits = lm(clean)
        assert logits is not None
        return metric(logits[:, -1], torch.arange(N))

    x, moves = players(lm, sae, clean, patch)
    worth = all_sets(run, x, moves)
    values, change = shapley(worth, F + 1), worth[frozenset(range(F + 1))] - worth[frozenset()]
    torch.testing.assert_close(values.sum(0), change)
    found = estimates(lm, sae, clean, patch, metric, None, steps=200)
    torch.testing.assert_close(found["ig"].sum(0) + found["error"], change, rtol=1e-3, atol=1e-4)
    off = {name: float((found[name] - values[:F]).norm() / values[:F].norm()) for name in ("ig", "both", "exact")}
    assert off["exact"] > 0.05, off
    assert max(off["ig"], off["both"]) < 0.7 * off["exact"], off
