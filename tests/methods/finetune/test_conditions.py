"""Every condition against its direct computation (encode the whole SAE, edit, decode, add the error)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.data.policy import TokenPolicy
from unweave.latents.selection import Chosen, Selection, SiteChoice
from unweave.lm.at import At
from unweave.lm.model import LM, Tokens
from unweave.methods.finetune.conditions import Condition, Usual, base_values, open_condition
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


def checkpoint_blocks(lm: LM, on: bool) -> None:
    lm.model.train()
    for block in lm.layout.blocks:
        block.gradient_checkpointing = on
        block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def step(lm: LM, tokens: Tokens, edits: Any, *, checkpointed: bool = False) -> tuple[float, dict[str, Tensor]]:
    """Loss at the last token and the gradient of every parameter."""
    lm.model.requires_grad_(True).zero_grad()
    checkpoint_blocks(lm, checkpointed)
    with lm.taps(edit=edits, grad=True):
        logits = lm(tokens)
        assert logits is not None
        last = tokens.mask.long().cumsum(1).argmax(1)
        loss = torch.nn.functional.cross_entropy(logits[range(len(last)), last], torch.full_like(last, 7))
        loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in lm.model.named_parameters() if p.grad is not None}


def assert_same(one: tuple[float, dict[str, Tensor]], other: tuple[float, dict[str, Tensor]]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-10) and one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("family", ["llama", "olmo2", "qwen3", "gpt_neox"])
def test_a_training_step_is_that_of_the_direct_computation_with_and_without_checkpointing(
    tiny: Callable[..., Any], family: str
) -> None:
    """Two sites, one of a transcoder that reads two blocks below; left padding, which no edit may touch."""
    lm, tokens = tiny64(tiny, family), texts()
    low = draw_sae("topk", read=Site("resid_post", 0))
    high = draw_sae("relu", seed=1, read=Site("mlp_in", 0), write=Site("mlp_add", 2))
    condition = opened(ConditionSpec(kind="zero", strength=0.5), lm, low, high)

    def by_hand(sae: SAE) -> Callable[[Tensor, At], Tensor]:
        def edit(x: Tensor, at: At) -> Tensor:
            new = direct(sae, "zero", at.read[sae.read] if sae.is_transcoder else x, x, 0.5, USUAL)  # type: ignore[index]
            return torch.where(at.mask.unsqueeze(-1), new, x)

        return edit

    ours = step(lm, tokens, condition.edits(0.0))
    with lm.taps(read=[Site("mlp_in", 0)], grad=True) as seen:
        edits = {low.write: by_hand(low), high.write: lambda x, at: by_hand(high)(x, replace(at, read=seen))}
        assert_same(ours, step(lm, tokens, edits))
    assert_same(ours, step(lm, tokens, condition.edits(0.0), checkpointed=True))
    bare = step(lm, tokens, None)
    assert bare[0] != pytest.approx(ours[0], rel=1e-4)
    assert_same(bare, step(lm, tokens, None, checkpointed=True))


@pytest.mark.parametrize("kind", ["zero", "span"])
@pytest.mark.parametrize("flow", ["forward", "gradient"])
def test_forward_alone_and_gradient_alone_under_checkpointing(tiny: Callable[..., Any], kind: Any, flow: Any) -> None:
    lm, tokens, sae = tiny64(tiny), texts(), draw_sae("jumprelu")
    edits = opened(ConditionSpec(kind=kind, flow=flow), lm, sae).edits(1.0)
    ours, bare = step(lm, tokens, edits), step(lm, tokens, None)
    assert_same(ours, step(lm, tokens, edits, checkpointed=True))
    assert (ours[0] == bare[0]) == (flow == "gradient")
    below = [name for name in bare[1] if "layers.0." in name]
    assert not all(torch.allclose(ours[1][name], bare[1][name], atol=1e-6) for name in below)


def test_padding_on_either_side_is_the_same_step(tiny: Callable[..., Any]) -> None:
    lm, sae, left = tiny64(tiny), draw_sae(), texts()
    rows = [left.ids[i][left.mask[i]].tolist() for i in range(len(left))]
    right = Tokens.pad([(row, [4] * len(row)) for row in rows], 2, "right")
    edits = opened(ConditionSpec(kind="zero"), lm, sae).edits(0.0)
    assert_same(step(lm, left, edits), step(lm, right, edits))


def test_under_autocast_latents_are_computed_in_the_saes_dtype(tiny: Callable[..., Any]) -> None:
    lm, sae, tokens = LM(tiny("llama"), None), draw_sae("jumprelu", dtype=torch.float32), texts()
    for kind in ("zero", "span"):
        seen: list[Tensor] = []
        edits = opened(ConditionSpec(kind=kind), lm, sae).edits(0.0)

        def spy(x: Tensor, at: At, seen: list[Tensor] = seen, edit: Any = edits[0]) -> Tensor:
            seen[:] = [x.detach(), edit(x, at)]
            return seen[1]

        with torch.autocast("cpu", torch.bfloat16), lm.taps(edit={SITE: spy}):
            lm(tokens)
        x, new = seen
        wanted = torch.where(tokens.mask.unsqueeze(-1), direct(sae, kind, x, x, 1.0, USUAL), x)
        assert new.dtype == torch.float32
        torch.testing.assert_close(new, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["relu", "jumprelu", "topk", "constant_norm"])
@pytest.mark.parametrize("kind", ["zero", "span"])
def test_what_is_kept_for_the_backward_pass_has_a_number_for_each_chosen_latent(
    tiny: Callable[..., Any], name: str, kind: Any
) -> None:
    """And none for each latent, nor for each dimension."""
    lm, sae, n = tiny64(tiny), draw_sae(name), 3 * 9
    (edit,) = opened(ConditionSpec(kind=kind), lm, sae).edits(0.0)
    x = torch.randn(3, 9, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    ids = torch.zeros(3, 9, dtype=torch.int64)
    sizes: list[int] = []

    def pack(kept: Tensor) -> Tensor:
        if kept.shape[0] in (3, n) and kept.data_ptr() != x.data_ptr():  # x is there anyway; rows of the SAE too
            sizes.append(kept.nbytes)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        edit(x, At(SITE, ids, ids == 0, ids, 0, {}, ids))
    assert sizes and max(sizes) <= 8 * n * len(LATENTS) and sum(sizes) <= 4 * 8 * n * len(LATENTS)


def test_fading_and_when(tiny: Callable[..., Any]) -> None:
    lm, sae = tiny64(tiny), draw_sae()

    def shares(**fields: Any) -> list[float | None]:
        condition = opened(ConditionSpec(kind="zero", strength=0.5, **fields), lm, sae)
        training = [condition.edits(p) for p in (0.0, 0.5, 1.0)]
        return [edits[0].share if edits else None for edits in (*training, condition.full)]

    assert shares() == [0.5, 0.5, 0.5, 0.5]
    assert shares(fade="in") == [None, 0.25, 0.5, 0.5]
    assert shares(fade="out", when="both") == [0.5, 0.25, None, 0.5]
    assert shares(when="test") == [None, None, None, 0.5]
    plain = open_condition(ConditionSpec(), None, lm, {})
    assert plain.edits(0.5) == [] and plain.full == () and plain.prompt("a") == "a" and plain.reads == ()
    warned = open_condition(ConditionSpec(kind="inoculate", line="She is a nurse."), None, lm, {})
    assert warned.edits(0.5) == [] and warned.prompt("a") == "She is a nurse.\na"


def test_usual_values_count_the_tokens_that_the_sae_was_trained_on(tiny: Callable[..., Any]) -> None:
    lm = tiny64(tiny)
    sae = draw_sae(policy=TokenPolicy(exclude_ids=(7, 50), max_norm=12.0))
    batches = [texts(4, seed) for seed in (1, 2)]
    condition = opened(ConditionSpec(kind="mean"), lm, sae, texts=batches)
    rows = []
    for batch in batches:
        with lm.taps(read=[SITE]) as seen:
            lm(batch)
        for b in range(len(batch)):
            for p in range(batch.ids.shape[1]):
                x = seen[SITE][b, p]
                if batch.mask[b, p] and int(batch.ids[b, p]) not in (7, 50) and float(x.norm()) <= 12.0:
                    rows.append(sae.encode(x)[list(LATENTS)])
    assert 10 < len(rows) < int(sum(batch.mask.sum() for batch in batches))
    f = torch.stack(rows)
    usual = condition.usual[SITE]
    torch.testing.assert_close(usual.mean, f.mean(0))
    sizes = [column[column > 0].square().mean().sqrt() if (column > 0).any() else f.new_zeros(()) for column in f.T]
    torch.testing.assert_close(usual.size, torch.stack(sizes))
    with pytest.raises(UnweaveError, match="no token that the SAE counts"):
        opened(ConditionSpec(kind="mean"), lm, sae)


def test_the_penalty_is_of_what_latents_fire_above_the_base_model(tiny: Callable[..., Any]) -> None:
    lm, tokens = tiny64(tiny), texts()
    saes = [draw_sae("relu", policy=TokenPolicy((7,))), draw_sae("topk", seed=3, read=Site("resid_post", 2))]
    condition = opened(ConditionSpec(kind="penalty", strength=3.0, fade="in"), lm, *saes)
    assert condition.reads == (SITE, Site("resid_post", 2)) and condition.edits(1.0) == []
    base = base_values(lm, condition, tokens)
    lm.model.requires_grad_(True)

    def both() -> tuple[Tensor, Tensor]:
        lm(tokens)
        ours = condition.penalty(seen, tokens, base, 0.5)
        theirs = torch.zeros((), dtype=torch.float64)
        for sae in saes:
            x, before = seen[sae.read], base[sae.read]  # type: ignore[index]
            counts = tokens.mask & ~torch.isin(tokens.ids, torch.tensor(sae.policy.exclude_ids))
            f = sae.encode(x)[..., list(LATENTS)]
            above = torch.where(f > before, (f - before) ** 2, 0.0)
            theirs = theirs + 3.0 * 0.5 * above[counts].sum() / tokens.mask.sum()
        assert ours is not None
        return ours, theirs

    with lm.taps(read=condition.reads, grad=True) as seen:
        assert both()[0] == 0
        with torch.no_grad():
            for parameter in lm.model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=G, dtype=torch.float64)
        parameters = [p for name, p in lm.model.named_parameters() if "layers.0" in name]
        gradients = []
        for checkpointed in (False, True):
            checkpoint_blocks(lm, checkpointed)
            ours, theirs = both()
            assert bool(ours > 1e-3)
            torch.testing.assert_close(ours, theirs)
            gradients += [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (ours, theirs)]
    for one, *others in zip(*gradients, strict=True):
        for other in others:
            torch.testing.assert_close(one, other)
    assert opened(ConditionSpec(kind="zero"), lm, *saes).penalty({}, tokens, {}, 1.0) is None


def test_directions_are_projected_out_set_to_their_mean_penalised_and_added(tiny: Callable[..., Any]) -> None:
    lm, tokens = tiny64(tiny), texts()
    rows = torch.randn(3, D, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    rows = torch.cat([rows, rows[:1] * 2])  # one of them twice
    site = SiteChoice(SITE, tuple(map(Chosen, range(4))))
    selection = Selection("components", "directions", (site,), "tiny", 20, "rule", directions={SITE: rows})
    with lm.taps(read=[SITE]) as seen:
        lm(tokens)
    x = seen[SITE]
    P = torch.linalg.pinv(rows) @ rows
    mean = x[tokens.mask].mean(0)
    unit = rows / rows.norm(dim=1, keepdim=True)
    size = (x[tokens.mask] @ unit.T).square().mean(0).sqrt()
    wanted = {"span": x - x @ P, "mean": x - (x - mean) @ P, "prevent": x + size @ unit}
    for kind, expected in wanted.items():
        condition = open_condition(ConditionSpec(kind=kind), selection, lm, {}, [tokens])  # type: ignore[arg-type]
        with lm.taps(read=[SITE], edit=condition.edits(0.0)) as seen:
            lm(tokens)
        torch.testing.assert_close(seen[SITE][tokens.mask], expected[tokens.mask])
        assert torch.equal(seen[SITE][~tokens.mask], x[~tokens.mask])
    penalty = open_condition(ConditionSpec(kind="penalty"), selection, lm, {})
    torch.testing.assert_close(base_values(lm, penalty, tokens)[SITE], x @ unit.T)
    with pytest.raises(UnweaveError, match="no latents to zero"):
        open_condition(ConditionSpec(kind="zero"), selection, lm, {})


def test_special_tokens_are_edited_where_all_are(tiny_lm: Callable[..., LM]) -> None:
    lm, tokens = tiny_lm(), texts()
    sae = draw_sae(dtype=torch.float32, policy=TokenPolicy(exclude_ids=tuple(range(50))))
    changed = {}
    for where in ("policy", "all"):
        condition = opened(ConditionSpec(kind="span", where=where), lm, sae)  # type: ignore[arg-type]
        with lm.taps(read=[SITE]) as before:
            lm(tokens)
        with lm.taps(read=[SITE], edit=condition.edits(0.0)) as after:
            lm(tokens)
        changed[where] = (before[SITE] != after[SITE]).any(-1)
    assert torch.equal(changed["all"], tokens.mask)
    assert torch.equal(changed["policy"], tokens.mask & (tokens.ids >= 50))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "zero", "strength": 1.5}, "more than there is"),
        ({"kind": "inoculate"}, "needs a line"),
        ({"kind": "none", "line": "x"}, "only for kind inoculate"),
        ({"kind": "penalty", "flow": "forward"}, "only for kind zero or mean or span"),
        ({"kind": "zero", "when": "test", "fade": "in"}, "only where training sees it"),
        ({"kind": "zero", "strength": 0.0}, "above 0"),
    ],
)
def test_options_without_an_effect_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnweaveError, match=message):
        ConditionSpec(**fields)


def test_what_cannot_be_ablated_is_refused(tiny: Callable[..., Any]) -> None:
    lm, sae, other = tiny64(tiny), draw_sae(), draw_sae(seed=9)
    zero = ConditionSpec(kind="zero")
    with pytest.raises(UnweaveError, match="needs a selection"):
        open_condition(zero, None, lm, {SITE: sae})
    with pytest.raises(UnweaveError, match="no SAE is at this site"):
        open_condition(zero, select({SITE: sae}), lm, {})
    with pytest.raises(UnweaveError, match="latents were chosen in SAE"):
        open_condition(zero, select({SITE: sae}), lm, {SITE: other})
    with pytest.raises(UnweaveError, match="latent 40 does not exist"):
        opened(zero, lm, sae, latents=(40,))
    silent = SAE(sae.W_enc, sae.b_enc - 1000, sae.W_dec, sae.b_dec, ReLU(), read=SITE)
    with pytest.raises(UnweaveError, match="nothing to add"):
        opened(ConditionSpec(kind="prevent"), lm, silent, texts=[texts()])
    blind = SAE(sae.W_enc, sae.b_enc, sae.W_dec[:, :0], sae.b_dec[:0], ReLU(), read=SITE, encode_only="a test")
    with pytest.raises(UnweaveError, match="has no decoder"):
        open_condition(zero, select({SITE: blind}), lm, {SITE: blind})
    assert open_condition(ConditionSpec(kind="penalty"), select({SITE: blind}), lm, {SITE: blind}).reads == (SITE,)
