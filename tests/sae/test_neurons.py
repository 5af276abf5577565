"""Neurons as latents: a site's coordinates, with nothing left over, on every family and at sites of any width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unweave.attribute.attribution import Interventions, node_effects
from unweave.attribute.states import states
from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.lm.model import LM, Tokens
from unweave.sae.neurons import neurons

SITES = ("embed", "attn_heads.1", "attn_add.1", "mlp_act.1", "mlp_add.1", "resid_post.1")


def make_pair() -> tuple[Tokens, Tokens]:
    clean = torch.randint(3, 97, (2, 5), generator=torch.Generator().manual_seed(3))
    patch = clean.clone()
    patch[:, 1] = (patch[:, 1] + 11) % 90 + 3
    return Tokens.of(clean), Tokens.of(patch)


def metric(out: Tensor, rows: Tensor) -> Tensor:
    return out[:, 5] - (1.0 + rows) * out[:, 7]


def test_neurons_are_the_coordinates_and_their_effects_gradient_times_difference(tiny: Any, family: str) -> None:
    lm = LM(tiny(family), None)
    clean, patch = make_pair()
    for name in SITES:
        site, sae = Site.parse(name), neurons(lm, name)
        width = lm.width(site)
        assert (sae.d_in, sae.d_sae, sae.d_out) == (width, width, width)
        x, end = states(lm, sae, clean)[site], states(lm, sae, patch)[site]
        assert torch.equal(x.latents, x.x) and not x.error.any()
        assert bool((x.x < 0).any())  # which a ReLU would have lost
        shift = torch.zeros_like(x.x, requires_grad=True)
        with lm.taps(edit={site: lambda v, _at, shift=shift: v + shift}, grad=True):
            logits = lm(clean)
        (gradient,) = torch.autograd.grad(metric(logits[:, -1], torch.arange(2)).sum(), shift)  # type: ignore[index]
        found = node_effects(lm, sae, clean, patch, metric)[site]
        torch.testing.assert_close(found.latents, gradient * (end.x - x.x), rtol=1e-4, atol=1e-6)
        assert found.latents.abs().max() > 0 and not found.error.any()


def test_edits_of_neurons_set_take_away_and_put_back_coordinates(tiny: Any, family: str) -> None:
    lm = LM(tiny(family), None)
    clean, _ = make_pair()
    before = lm(clean)
    for name in SITES:
        sae = neurons(lm, name)
        with lm.taps(read=[name]) as plain:
            lm(clean)
        x = plain[name]
        chosen = {2: 1.5, 0: -2.0}
        for edit, wanted in ((sae.clamp(chosen), chosen), (sae.ablate([2, 0]), {2: 0.0, 0: 0.0})):
            expected = x.clone()
            for j, value in wanted.items():
                expected[..., j] = value
            with lm.taps(read=[name], edit=edit) as seen:
                lm(clean)
            torch.testing.assert_close(seen[name], expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(sae.subset([3, 1]).encode(x), x[..., [3, 1]])
        with lm.taps(edit=sae.reconstruct()):
            torch.testing.assert_close(lm(clean), before, rtol=1e-5, atol=1e-5)


def test_exact_effects_of_neurons_are_those_of_overwriting_them(tiny: Any) -> None:
    lm = LM(tiny("llama"), None)
    clean, patch = make_pair()
    sae = neurons(lm, "mlp_act.1")
    found = Interventions(lm, sae, clean, patch, metric).exact([4, 9])
    with lm.taps(read=["mlp_act.1"]) as here, lm.taps(read=["mlp_act.1"]) as there:
        lm(clean)
        x = here["mlp_act.1"]
        lm(patch)
    for row, j in zip(found, (4, 9), strict=True):
        moved = x.clone()
        moved[..., j] = there["mlp_act.1"][..., j]
        with lm.taps(edit={"mlp_act.1": lambda _x, _at, moved=moved: moved}):
            logits = lm(clean)
        change = metric(logits[:, -1] - lm(clean)[:, -1], torch.arange(2))  # type: ignore[index]
        torch.testing.assert_close(row, change, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", ["unweave", "saelens", "dictionary_learning", "sparsify"])
def test_neurons_are_not_saved(tiny: Any, tmp_path: Path, format: str) -> None:
    sae = neurons(LM(tiny("llama"), None), "resid_post.1")
    with pytest.raises(UnweaveError, match="neurons are not a trained SAE"):
        sae.save(tmp_path / "x", format)
    assert not (tmp_path / "x").exists()
    with pytest.raises(UnweaveError, match=r"resid_post\.7"):
        neurons(LM(tiny("llama"), None), "resid_post.7")
