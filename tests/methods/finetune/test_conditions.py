"""Every condition against its direct computation (encode the whole SAE, edit, decode, add the error)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from unweave.core.site import Site
from unweave.latents.selection import Chosen, Selection, SiteChoice
from unweave.lm.at import At
from unweave.lm.model import LM, Tokens
from unweave.methods.finetune.conditions import Condition, Usual, open_condition
from unweave.methods.finetune.spec import ConditionSpec
from unweave.sae.activations import Activation, JumpReLU, ReLU, TopK
from unweave.sae.module import SAE

D, F = 32, 40
SITE = Site("resid_post", 1)
LATENTS = (3, 7, 8, 20, 21, 39)
G = torch.Generator().manual_seed(0)
THRESHOLDS = torch.rand(F, generator=G, dtype=torch.float64)
SAES: dict[str, tuple[Activation, dict[str, Any]]] = {
    "relu": (ReLU(), {}),
    "jumprelu": (JumpReLU(THRESHOLDS), {}),  # a folded Gated SAE is one too
    "batchtopk": (JumpReLU(torch.full((F,), 0.8, dtype=torch.float64)), {}),
    "topk": (TopK(7), {}),
    "layer_norm": (ReLU(), {"input_norm": "layer_norm"}),
    "constant_norm": (TopK(7), {"input_norm": "constant_norm"}),
    "transcoder": (ReLU(), {"read": Site("mlp_in", 1), "write": Site("mlp_add", 1)}),
    "skip transcoder": (TopK(7), {"read": Site("mlp_in", 1), "write": Site("mlp_add", 1), "skip": True}),
}


def draw_sae(name: str = "relu", seed: int = 0, dtype: torch.dtype = torch.float64, **about: Any) -> SAE:
    activation, more = SAES[name]
    g = torch.Generator().manual_seed(seed)
    W_enc, b_enc, W_dec, b_dec, skip = (
        torch.randn(*shape, generator=g, dtype=torch.float64) * 0.3 for shape in ((D, F), (F,), (F, D), (D,), (D, D))
    )
    about = {"read": SITE, **more, **about}
    about["W_skip"] = skip if about.pop("skip", False) else None
    return SAE(W_enc, b_enc, W_dec, b_dec, activation, **about).to(dtype)


def select(saes: Mapping[Site, SAE], latents: tuple[int, ...] = LATENTS) -> Selection:
    sites = tuple(SiteChoice(site, tuple(map(Chosen, latents)), "sae", sae.digest()) for site, sae in saes.items())
    return Selection("chosen", "latents", sites, "tiny", F, "rule")


def opened(spec: ConditionSpec, lm: LM, *saes: SAE, latents: tuple[int, ...] = LATENTS, texts: Any = ()) -> Condition:
    by_site = {sae.write: sae for sae in saes if sae.write is not None}
    return open_condition(spec, select(by_site, latents), lm, by_site, texts)


def tiny64(tiny: Callable[..., Any], family: str = "llama") -> LM:
    return LM(tiny(family).double(), None)


def texts(n: int = 4, seed: int = 1) -> Tokens:
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randint(4, 97, (length,), generator=g).tolist() for length in range(5, 5 + n)]
    return Tokens.pad([(row, [4] * len(row)) for row in rows], 2, "left")


def direct(
    sae: SAE, kind: str, source: Tensor, x: Tensor, strength: float, usual: Usual, latents: tuple[int, ...] = LATENTS
) -> Tensor:
    """The whole SAE: encode, edit, decode, plus error."""
    chosen = list(latents)
    if kind == "span":
        rows = sae.W_dec[chosen]
        return x - strength * (x @ torch.linalg.pinv(rows) @ rows)
    f = sae.encode(source)
    new = f.clone()
    target = {"zero": torch.zeros(len(chosen)), "mean": usual.mean, "prevent": f[..., chosen] + usual.size}[kind]
    new[..., chosen] = f[..., chosen] + strength * (target - f[..., chosen])
    return sae.explained(new, source) + (x - sae.explained(f, source))


USUAL = Usual(torch.rand(len(LATENTS), generator=G).double(), torch.rand(len(LATENTS), generator=G).double())


@pytest.mark.parametrize("latents", [LATENTS[:2], LATENTS])
@pytest.mark.parametrize("name", SAES)
@pytest.mark.parametrize("kind", ["zero", "mean", "span", "prevent"])
def test_value_and_gradient_are_those_of_the_direct_computation(
    tiny: Callable[..., Any], kind: Any, name: str, latents: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, sae, n = tiny64(tiny), draw_sae(name), len(latents)
    usual = Usual(USUAL.mean[:n], USUAL.size[:n])
    monkeypatch.setattr("unweave.methods.finetune.conditions.usual_values", lambda *_: {sae.write: usual})
    g = torch.Generator().manual_seed(5)
    x, source, cotangent = (torch.randn(3, 9, D, generator=g, dtype=torch.float64) for _ in range(3))
    source = source if sae.is_transcoder else x
    x.requires_grad_(), source.requires_grad_()
    ids, mask = torch.zeros(3, 9, dtype=torch.int64), torch.ones(3, 9, dtype=torch.bool)
    mask[0, :3] = False
    assert sae.read is not None and sae.write is not None
    at = At(sae.write, ids, mask, ids, 0, {sae.read: source}, ids)
    wanted = torch.where(mask.unsqueeze(-1), direct(sae, kind, source, x, 0.75, usual, latents), x)
    inputs = [x, source] if source is not x else [x]
    slopes = torch.autograd.grad(wanted, inputs, cotangent, allow_unused=True, materialize_grads=True)
    assert not torch.allclose(wanted, x, atol=1e-2)
    for flow in ("both", "forward", "gradient") if kind != "prevent" else ("both",):
        condition = opened(ConditionSpec(kind=kind, strength=0.75, flow=flow), lm, sae, latents=latents)
        (edit,) = condition.edits(0.3)
        got = edit(x, at)
        assert got is not None
        value, gradient = flow != "gradient", flow != "forward"
        torch.testing.assert_close(got, wanted if value else x, rtol=0, atol=1e-10 if value else 0)
        found = torch.autograd.grad(got, inputs, cotangent, allow_unused=True, materialize_grads=True)
        plain = [cotangent, torch.zeros_like(source)]
        for ours, theirs in zip(found, slopes if gradient else plain, strict=False):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SAES)
def test_the_gradient_is_that_of_finite_differences(tiny: Callable[..., Any], name: str) -> None:
    lm, sae = tiny64(tiny), draw_sae(name)
    g = torch.Generator().manual_seed(6)
    x, source = (torch.randn(1, 2, D, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ids = torch.zeros(1, 2, dtype=torch.int64)
    for kind in ("zero", "span"):
        (edit,) = opened(ConditionSpec(kind=kind), lm, sae).edits(0.0)

        def value(x: Tensor, source: Tensor, edit: Any = edit) -> Tensor:
            reads = {sae.read: source} if sae.is_transcoder else {}
            return edit(x, At(SITE, ids, ids == 0, ids, 0, reads, ids))

        assert torch.autograd.gradcheck(value, (x, source))


def test_a_zeroed_latent_takes_its_own_signal_off_the_gradient(tiny: Callable[..., Any]) -> None:
    """g - sum_j 1[f_j > 0] (g . d_j) w_j, by hand; where nothing fires it is g."""
    lm, sae = tiny64(tiny), draw_sae("relu")
    g = torch.Generator().manual_seed(7)
    x, cotangent = (torch.randn(1, 50, D, generator=g, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    ids = torch.zeros(1, 50, dtype=torch.int64)
    (edit,) = opened(ConditionSpec(kind="zero"), lm, sae, latents=(3,)).edits(0.0)
    got = edit(x, At(SITE, ids, ids == 0, ids, 0, {}, ids))
    assert got is not None
    (slope,) = torch.autograd.grad(got, x, cotangent)
    fires = (x @ sae.W_enc[:, 3] + sae.b_enc[3] > 0).double().unsqueeze(-1)
    assert 5 < int(fires.sum()) < 45
    wanted = cotangent - fires * (cotangent @ sae.W_dec[3]).unsqueeze(-1) * sae.W_enc[:, 3]
    torch.testing.assert_close(slope, wanted, rtol=0, atol=1e-12)
