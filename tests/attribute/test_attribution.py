"""Attribution against oracles that share nothing with it: linear models, finite differences, naive loops, autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.attribution import F, close, difference, make_pair, make_sae
from unweave.attribute.attribution import Interventions, fractions, node_effects
from unweave.attribute.options import AttributionOptions
from unweave.attribute.runner import AtSite
from unweave.attribute.states import site_of, states
from unweave.core.errors import UnweaveError
from unweave.core.result import to_plain
from unweave.core.site import Site
from unweave.data.policy import TokenPolicy
from unweave.lm.model import LM, Tokens
from unweave.methods.trace.comparison import compare, correlations
from unweave.methods.trace.spec import TraceOptions
from unweave.sae.activations import JumpReLU, ReLU, TopK
from unweave.sae.module import SAE


class Splice:
    """The edit that makes an SAE's latents and error leaves of the graph, and changes nothing else.

    After a forward pass in ``lm.taps(edit=splice, grad=True)`` ``latents`` and ``error`` can be given to autograd. The
    site keeps the model's own value bit for bit, and gradients pass to earlier sites as if nothing were there.
    """

    def __init__(self, sae: SAE) -> None:
        self.sae = sae
        self.latents: Tensor | None = None
        self.error: Tensor | None = None

    @property
    def site(self) -> Site:
        return site_of(self.sae)

    @property
    def needs(self) -> tuple[Site, ...]:
        return () if self.sae.read == self.sae.write or self.sae.read is None else (self.sae.read,)

    def verify(self, lm: LM) -> None:
        self.sae.verify(lm)

    def __call__(self, x: Tensor, at: Any) -> Tensor:
        sae, source = self.sae, at.read[self.needs[0]] if self.needs else x
        with torch.no_grad():
            latents = sae.encode(source) * sae.policy.keep(source, at.ids, at.mask).unsqueeze(-1)
            error = x - sae.decode(latents)
        self.latents, self.error = latents.requires_grad_(), error.requires_grad_()
        y = (sae.decode(self.latents) + self.error).to(x.dtype)
        return x + (y - y.detach())


@pytest.fixture
def lm(tiny: Any) -> LM:
    """GPT-2, since it is the family that computes in float64 throughout: RMS norms go through fp32."""
    return LM(tiny("gpt2").double(), None)


def naive_metric(lm: LM, tokens: Tokens, site: str, edit: Callable[[Tensor], Tensor]) -> Tensor:
    with lm.taps(edit={Site.parse(site): lambda x, at: edit(x)}):
        logits = lm(tokens)
    return difference(logits[:, -1], torch.arange(len(tokens)))


def values(lm: LM, site: str, tokens: Tokens) -> Tensor:
    with lm.taps(read=[site]) as seen:
        lm(tokens)
    return seen[site]


# -- linear models: everything agrees ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ablate", [False, True])
@pytest.mark.parametrize("activation", [TopK(6), ReLU(), JumpReLU(torch.full((F,), 0.4, dtype=torch.float64))])
def test_linear_downstream_all_methods_agree_and_sum_to_the_total(tiny: Any, activation: Any, ablate: bool) -> None:
    """With the last block adding nothing, the metric is linear in the site: an inner product at the last residual."""
    model = tiny("llama").double()
    block = model.model.layers[2]
    block.self_attn.o_proj.weight.data.zero_()
    block.mlp.down_proj.weight.data.zero_()
    lm = LM(model, None)
    sae = make_sae(lm, "resid_post.1", activation=activation)
    clean, patch = make_pair()
    other = None if ablate else patch
    direction = torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    top = Site("resid_post", 2)

    def metric(out: Tensor, rows: Tensor) -> Tensor:
        return (out * direction[rows]).sum((1, 2))

    found = {
        method: node_effects(lm, sae, clean, other, AtSite(metric, top), AttributionOptions(method=method, steps=3))[
            sae.write
        ]  # type: ignore[arg-type]
        for method in ("attribution", "ig", "exact")
    }
    for method in ("ig", "exact"):
        close(found[method].latents, found["attribution"].latents)
        close(found[method].error, found["attribution"].error)
    assert found["exact"].latents.abs().max() > 0.1
    assert found["exact"].gradient is None
    x = values(lm, "resid_post.1", clean)
    end = sae.b_dec.expand_as(x) if ablate else values(lm, "resid_post.1", patch)
    total = ((end - x) * direction).sum((1, 2))
    latents, error = found["ig"].over_positions()
    close(latents.sum(1) + error, total)
    close(Interventions(lm, sae, clean, other, AtSite(metric, top)).exact(range(F)), latents.T)


# -- integrated gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("site", ["embed", "attn_heads.1", "mlp_in.1", "mlp_add.2", "resid_post.0"])
def test_integrated_gradients_are_complete(tiny: Any, name: str, site: str) -> None:
    """Latents and error together make up the change when the whole site is patched, in every family."""
    lm = LM(tiny(name).double(), None)
    sae = make_sae(lm, site)
    clean, patch = make_pair()
    found = node_effects(lm, sae, clean, patch, difference, AttributionOptions(method="ig", steps=80, rule="midpoint"))[
        sae.write
    ]
    latents, error = found.over_positions()
    end = values(lm, site, patch)
    total = naive_metric(lm, clean, site, lambda x: end) - naive_metric(lm, clean, site, lambda x: x)
    assert total.abs().max() > 0.05
    close(latents.sum(1) + error, total, 2e-3)
    for a, b in zip(
        Interventions(lm, sae, clean, patch, difference).endpoints(), (lambda x: x, lambda x: end), strict=True
    ):
        close(a, naive_metric(lm, clean, site, b))


def test_rules_take_the_gradient_where_they_say(lm: LM) -> None:
    """One left step is attribution patching; one right step is its mirror image from the patch side."""
    sae = make_sae(lm, "resid_post.0")
    clean, patch = make_pair()
    one = {
        rule: node_effects(lm, sae, clean, patch, difference, AttributionOptions(method="ig", steps=1, rule=rule))[
            sae.write
        ]  # type: ignore[arg-type]
        for rule in ("left", "right")
    }
    forward = node_effects(lm, sae, clean, patch, difference)[sae.write]
    close(one["left"].latents, forward.latents)
    back = node_effects(lm, sae, patch, clean, difference)[sae.write]
    close(one["right"].latents, -back.latents)
    assert not torch.allclose(one["left"].latents, one["right"].latents)
    assert fractions(4, "left") == [0, 0.25, 0.5, 0.75]
    assert fractions(4, "right") == [0.25, 0.5, 0.75, 1]
    assert fractions(2, "midpoint") == [0.25, 0.75]


# -- attribution patching ---------------------------------------------------------------------------------------------


def test_attribution_against_finite_differences(lm: LM) -> None:
    """Central differences of the metric in single latents and along the error, decoded by hand."""
    sae = make_sae(lm, "resid_post.1", activation=ReLU())
    clean, patch = make_pair()
    found = node_effects(lm, sae, clean, patch, difference)[sae.write]
    x, end = values(lm, "resid_post.1", clean), values(lm, "resid_post.1", patch)
    f, f_end = torch.relu(x @ sae.W_enc + sae.b_enc), torch.relu(end @ sae.W_enc + sae.b_enc)
    e, e_end = x - f @ sae.W_dec - sae.b_dec, end - f_end @ sae.W_dec - sae.b_dec
    h = 1e-5
    nodes = (f_end - f).abs().flatten().topk(8).indices.tolist()
    for flat in nodes:
        b, p, j = flat // (6 * F), flat // F % 6, flat % F
        bump = torch.zeros_like(f)
        bump[b, p, j] = h
        up, down = (
            naive_metric(lm, clean, "resid_post.1", lambda _, moved=moved: moved @ sae.W_dec + sae.b_dec + e)
            for moved in (f + bump, f - bump)
        )
        slope = (up - down)[b] / (2 * h)
        close(found.latents[b, p, j], slope * (f_end - f)[b, p, j], 1e-6)
    for b, p in ((0, 2), (1, 4), (2, 5)):
        bump = torch.zeros_like(e)
        bump[b, p] = h * (e_end - e)[b, p]
        up, down = (naive_metric(lm, clean, "resid_post.1", lambda _, s=s, bump=bump: x + s * bump) for s in (1, -1))
        close(found.error[b, p], (up - down)[b] / (2 * h), 1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "olmo2", "gpt_neox"])
def test_attribution_at_many_sites_equals_autograd_through_splices(tiny: Any, name: str) -> None:
    """One pass for seven sites, some of which share a tensor (post-norm families), against leaves in the graph."""
    lm = LM(tiny(name).double(), None)
    places = [
        "embed",
        "attn_in.1",
        "attn_heads.1",
        "attn_add.1",
        "mlp_in.1",
        "mlp_add.1",
        "resid_post.1",
        "resid_pre.1",
    ]
    saes = [make_sae(lm, site, seed) for seed, site in enumerate(places)]
    clean, patch = make_pair()
    found = node_effects(lm, saes, clean, patch, difference)
    assert list(found) == sorted(Site.parse(site) for site in places)
    splices = [Splice(sae) for sae in saes]
    with lm.taps(edit=splices, grad=True):
        logits = lm(clean)
    value = difference(logits[:, -1], torch.arange(3)).sum()
    leaves = [leaf for splice in splices for leaf in (splice.latents, splice.error)]
    grads = torch.autograd.grad(value, leaves)
    for i, (sae, splice) in enumerate(zip(saes, splices, strict=True)):
        end = states(lm, sae, patch)[sae.write]
        close(found[sae.write].latents, grads[2 * i] * (end.latents - splice.latents))
        close(found[sae.write].error, (grads[2 * i + 1] * (end.error - splice.error)).sum(-1))


def test_a_transcoders_latents_come_from_the_site_it_reads(lm: LM) -> None:
    sae = make_sae(lm, "mlp_add.1", read="mlp_in.1", W_skip=torch.randn(32, 32, dtype=torch.float64) * 0.1)
    clean, patch = make_pair()
    state = states(lm, sae, clean)[sae.write]
    source, x = values(lm, "mlp_in.1", clean), values(lm, "mlp_add.1", clean)
    close(state.latents, sae.encode(source))
    close(state.latents @ sae.W_dec + sae.b_dec + source @ sae.W_skip + state.error, x)
    found = node_effects(lm, sae, clean, patch, difference)[sae.write]
    splice = Splice(sae)
    with lm.taps(edit=splice, grad=True):
        logits = lm(clean)
    assert torch.equal(logits, lm(clean))
    (grad,) = torch.autograd.grad(difference(logits[:, -1], torch.arange(3)).sum(), splice.latents)
    close(found.latents, grad * (sae.encode(values(lm, "mlp_in.1", patch)) - state.latents))


def test_what_a_skip_explains_is_no_error_and_no_node(lm: LM) -> None:
    """The effects share out what latents and error do: the change of the metric with the skip left as it is."""
    skip = 0.3 * torch.randn(32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sae = make_sae(lm, "mlp_add.1", read="mlp_in.1", W_skip=skip)
    clean, patch = make_pair()
    source = values(lm, "mlp_in.1", clean)
    for end in (patch, None):
        found = node_effects(
            lm, sae, clean, end, difference, AttributionOptions(method="ig", steps=400, rule="midpoint")
        )[sae.write]
        said = source @ sae.W_skip
        if end is None:
            moved = said + sae.b_dec
        else:
            source2, x2 = values(lm, "mlp_in.1", end), values(lm, "mlp_add.1", end)
            moved = said + x2 - source2 @ sae.W_skip
        change = naive_metric(lm, clean, "mlp_add.1", lambda _, m=moved: m) - naive_metric(
            lm, clean, "mlp_add.1", lambda v: v
        )
        close(found.latents.sum((1, 2)) + found.error.sum(1), change, 1e-4)
        assert change.abs().min() > 1e-3
    eye, zero = torch.eye(32, dtype=torch.float64), torch.zeros(32, dtype=torch.float64)
    whole = SAE(0 * eye, zero - 1, 0 * eye, zero, ReLU(), W_skip=eye, read=Site("resid_post", 1))
    assert float(states(lm, whole, clean)[Site("resid_post", 1)].error.abs().max()) == 0


def test_identity_splice_leaves_logits_bit_equal(tiny: Any, family: str) -> None:
    """On every family, in fp32, at every named point of a block at once."""
    lm = LM(tiny(family), None)
    points = [p for p in lm.layout.points() if p not in ("resid_mid", "resid_pre")]
    saes = [make_sae(lm, f"{point}.1").float() for point in points]
    clean, _ = make_pair()
    before = lm(clean)
    with lm.taps(edit=[Splice(sae) for sae in saes], grad=True):
        spliced = lm(clean)
    assert torch.equal(spliced, before)
    assert torch.equal(lm(clean), before)  # and nothing stays behind


# -- exact effects ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["clean", "patch"])
def test_exact_effects_against_a_naive_loop(lm: LM, origin: Any) -> None:
    sae = make_sae(lm, "resid_post.1")
    clean, patch = make_pair(n=5)
    latents = [3, 0, 17, 9]
    found = Interventions(lm, sae, clean, patch, difference, max_tokens=12).exact(latents, origin=origin)
    x, end = values(lm, "resid_post.1", clean), values(lm, "resid_post.1", patch)
    moves = sae.encode(end) - sae.encode(x)
    for row, j in zip(found, latents, strict=True):
        step = moves[..., j, None] * sae.W_dec[j]
        if origin == "clean":
            a, b = naive_metric(lm, clean, "resid_post.1", lambda _: x), lambda _, s=step: x + s
            close(row, naive_metric(lm, clean, "resid_post.1", b) - a)
        else:
            a, b = naive_metric(lm, clean, "resid_post.1", lambda _: end), lambda _, s=step: end - s
            close(row, a - naive_metric(lm, clean, "resid_post.1", b))
    assert found.abs().max() > 1e-3


def test_exact_effects_run_only_what_changes(lm: LM) -> None:
    """Examples in which a latent keeps its value cost no forward pass; the rest fill the batches."""
    sae = make_sae(lm, "resid_post.1")
    clean, patch = make_pair(n=8)
    patch = Tokens.of(torch.where(torch.arange(8)[:, None] < 3, patch.ids, clean.ids))  # five pairs do not differ
    moved = (states(lm, sae, patch)[sae.write].latents != states(lm, sae, clean)[sae.write].latents).any(1)
    assert 0 < moved.sum() < 8 * F
    runs: list[int] = []

    def counting(out: Tensor, rows: Tensor) -> Tensor:
        runs.append(len(rows))
        return difference(out, rows)

    found = Interventions(lm, sae, clean, patch, counting, max_tokens=60).exact(range(F))
    assert sum(runs) == 8 + int(moved.sum())
    assert max(runs) <= 10
    assert bool((found[~moved.T] == 0).all())
    assert len(runs) == 1 + math.ceil(int(moved.sum()) / 10)


def test_exact_nodes_against_a_naive_loop(lm: LM) -> None:
    sae = make_sae(lm, "mlp_add.1")
    clean, patch = make_pair(n=2, width=4)
    found = node_effects(lm, sae, clean, patch, difference, AttributionOptions(method="exact", max_tokens=16))[
        sae.write
    ]
    x, end = values(lm, "mlp_add.1", clean), values(lm, "mlp_add.1", patch)
    moves = sae.encode(end) - sae.encode(x)
    errors = (end - sae(end)) - (x - sae(x))
    reference = naive_metric(lm, clean, "mlp_add.1", lambda _: x)
    for p in range(4):
        for j in range(F):
            step = torch.zeros_like(x)
            step[:, p] = moves[:, p, j, None] * sae.W_dec[j]
            close(found.latents[:, p, j], naive_metric(lm, clean, "mlp_add.1", lambda _, s=step: x + s) - reference)
        step = torch.zeros_like(x)
        step[:, p] = errors[:, p]
        close(found.error[:, p], naive_metric(lm, clean, "mlp_add.1", lambda _, s=step: x + s) - reference)


def test_one_latents_own_path_gives_its_exact_effect(lm: LM) -> None:
    sae = make_sae(lm, "resid_post.0")
    clean, patch = make_pair(n=4)
    exact = Interventions(lm, sae, clean, patch, difference).exact(range(F))
    alone = Interventions(lm, sae, clean, patch, difference, max_tokens=500).alone(range(F), steps=100)
    close(alone, exact, 1e-3)
    together = node_effects(
        lm, sae, clean, patch, difference, AttributionOptions(method="ig", steps=100, rule="midpoint")
    )[sae.write]
    assert (together.over_positions()[0].T - exact).abs().max() > 0.05  # latents interact, and only this path sees it


@pytest.mark.parametrize("activation", [TopK(6), ReLU()])
def test_trap_37_ablation_takes_away_exactly_the_decoder_row(lm: LM, activation: Any) -> None:
    """An error that was recomputed with the latent gone would give back what was taken."""
    sae = make_sae(lm, "resid_post.1", activation=activation)
    clean, _ = make_pair()
    probe = torch.randn(32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = Interventions(
        lm, sae, clean, None, AtSite(lambda out, rows: (out @ probe).sum(1), Site("resid_post", 1))
    ).exact(range(F))
    f = sae.encode(values(lm, "resid_post.1", clean))
    close(found, -(f.sum(1) * (sae.W_dec @ probe)).T)
    assert found.abs().max() > 0.1


def test_trap_38_edits_leave_what_was_read_before_alone(lm: LM) -> None:
    sae = make_sae(lm, "resid_post.1")
    clean, patch = make_pair()
    before = states(lm, sae, clean)[sae.write]
    copies = [before.x.clone(), before.latents.clone(), before.error.clone()]
    ids = clean.ids.clone()
    with lm.taps(read=["resid_post.1", "resid_post.2"]) as seen:
        lm(clean)
    kept = {site: seen[site].clone() for site in seen}
    for method in ("attribution", "ig", "exact"):
        node_effects(lm, sae, clean, patch, difference, AttributionOptions(method=method, steps=2))  # type: ignore[arg-type]
    Interventions(lm, sae, clean, patch, difference).exact([1, 2])
    Interventions(lm, sae, clean, patch, difference).alone([1], steps=2)
    assert all(torch.equal(seen[site], value) for site, value in kept.items())
    assert all(map(torch.equal, copies, (before.x, before.latents, before.error)))
    assert torch.equal(clean.ids, ids)
    assert not lm.sessions
    assert not any(p.requires_grad or p.grad is not None for p in lm.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


# -- which tokens, which rows -----------------------------------------------------------------------------------------


def test_excluded_tokens_belong_wholly_to_the_error(lm: LM) -> None:
    """Special ids and norm outliers have no latents; nothing of the total effect is lost for that."""
    clean, patch = make_pair()
    x = values(lm, "resid_post.0", clean)
    norms = x.norm(dim=-1)
    limit = float(norms.flatten().sort().values[-3])
    sae = make_sae(lm, "resid_post.0", policy=TokenPolicy((int(clean.ids[0, 3]),), limit))
    state = states(lm, sae, clean)[sae.write]
    out = (norms > limit) | (clean.ids == clean.ids[0, 3])
    assert 2 < out.sum() < out.numel()
    assert bool((state.latents[out] == 0).all())
    assert bool((state.latents[~out] != 0).any(-1).all())
    close(state.error[out], (x - sae.b_dec)[out])
    found = node_effects(
        lm, sae, clean, patch, difference, AttributionOptions(method="ig", steps=100, rule="midpoint")
    )[sae.write]
    latents, error = found.over_positions()
    start, end = Interventions(lm, sae, clean, patch, difference).endpoints()
    close(latents.sum(1) + error, end - start, 2e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_and_has_no_effects(tiny: Any, side: Any) -> None:
    lm = LM(tiny("gpt2").double(), None)  # with learned positions: a wrong position id would show
    sae = make_sae(lm, "resid_post.0")
    lengths = (6, 4)
    pairs = [make_pair(n=1, width=width) for width in lengths]
    padded = [
        Tokens.pad(
            [(pair[k].ids[0].tolist(), [4] * width) for pair, width in zip(pairs, lengths, strict=True)], 2, side
        )
        for k in (0, 1)
    ]
    for method in ("attribution", "ig", "exact"):
        found = node_effects(lm, sae, *padded, difference, AttributionOptions(method=method, steps=4))[sae.write]  # type: ignore[arg-type]
        for row, (pair, width) in enumerate(zip(pairs, lengths, strict=True)):

            def metric(out: Tensor, rows: Tensor, row: int = row) -> Tensor:
                return difference(out, rows + row)

            alone = node_effects(lm, sae, *pair, metric, AttributionOptions(method=method, steps=4))[sae.write]  # type: ignore[arg-type]
            at = slice(0, width) if side == "right" else slice(6 - width, 6)
            close(found.latents[row, at], alone.latents[0])
            close(found.error[row, at], alone.error[0])
        assert bool((found.latents[~padded[0].mask] == 0).all())
        assert bool((found.error[~padded[0].mask] == 0).all())


def test_trap_33_the_memory_bound_changes_no_number(lm: LM) -> None:
    saes = [make_sae(lm, "resid_post.0"), make_sae(lm, "mlp_add.1", 1)]
    clean, patch = make_pair(n=5)
    for method in ("attribution", "ig", "exact"):
        whole, small = (
            node_effects(lm, saes, clean, patch, difference, AttributionOptions(method=method, steps=3, max_tokens=m))  # type: ignore[arg-type]
            for m in (4096, 13)
        )
        for site in whole:
            close(small[site].latents, whole[site].latents)
            close(small[site].error, whole[site].error)


def test_only_the_positions_asked_for_are_patched(lm: LM) -> None:
    sae = make_sae(lm, "resid_post.0")
    clean, patch = make_pair()
    asked = torch.zeros(3, 6, dtype=torch.bool)
    asked[:, 3:] = True
    found = node_effects(
        lm, sae, clean, patch, difference, AttributionOptions(method="ig", steps=100, rule="midpoint"), positions=asked
    )[sae.write]
    assert bool((found.latents[:, :3] == 0).all()) and bool((found.error[:, :3] == 0).all())
    x, end = values(lm, "resid_post.0", clean), values(lm, "resid_post.0", patch)
    mixed = torch.where(asked[..., None], end, x)
    total = naive_metric(lm, clean, "resid_post.0", lambda _: mixed) - naive_metric(
        lm, clean, "resid_post.0", lambda v: v
    )
    latents, error = found.over_positions()
    close(latents.sum(1) + error, total, 2e-3)


def test_models_in_bfloat16_are_measured_in_the_saes_precision(tiny: Any) -> None:
    exact_lm = LM(tiny("llama"), None)
    lm = LM(tiny("llama").bfloat16(), None)
    sae = make_sae(exact_lm, "resid_post.1").float()
    clean, patch = make_pair()
    for method in ("attribution", "ig"):
        half = node_effects(lm, sae, clean, patch, difference, AttributionOptions(method=method))[sae.write]  # type: ignore[arg-type]
        full = node_effects(exact_lm, sae, clean, patch, difference, AttributionOptions(method=method))[sae.write]  # type: ignore[arg-type]
        assert half.latents.dtype == torch.float32
        assert correlations(half.error.flatten(), full.error.flatten())["pearson"] > 0.99


# -- bad input --------------------------------------------------------------------------------------------------------


def test_inputs_that_do_not_line_up_are_refused(lm: LM) -> None:
    sae = make_sae(lm, "resid_post.1")
    clean, patch = make_pair()
    shorter = Tokens.of(patch.ids[:, 1:])
    hidden = Tokens(patch.ids, patch.mask.clone().index_fill_(1, torch.tensor(5), False), patch.roles)
    for other in (shorter, hidden):
        for call in (node_effects, lambda *a: Interventions(*a).exact([0])):
            with pytest.raises(UnweaveError, match="do not line up"):
                call(lm, sae, clean, other, difference)  # type: ignore[operator]
    with pytest.raises(UnweaveError, match="positions"):
        node_effects(lm, sae, clean, patch, difference, positions=torch.ones(3, 6))


def test_bad_sites_and_metrics_are_refused(lm: LM) -> None:
    sae = make_sae(lm, "resid_post.1")
    clean, patch = make_pair()
    with pytest.raises(UnweaveError, match="two SAEs have the same site"):
        node_effects(lm, [sae, make_sae(lm, "resid_post.1", 1)], clean, patch, difference)
    with pytest.raises(UnweaveError, match=r"writes to resid_post\.1, not to resid_post\.0"):
        node_effects(lm, {Site("resid_post", 0): sae}, clean, patch, difference)
    with pytest.raises(UnweaveError, match="there are no SAEs"):
        node_effects(lm, [], clean, patch, difference)
    with pytest.raises(UnweaveError, match="one number per row"):
        node_effects(lm, sae, clean, patch, lambda out, rows: out)
    with pytest.raises(UnweaveError, match=r"does not depend on resid_post\.1"):
        node_effects(lm, sae, clean, patch, AtSite(lambda out, rows: out[:, 0, 0], Site("resid_post", 0)))
    with pytest.raises(UnweaveError, match="NaN"):
        node_effects(lm, sae, clean, patch, lambda out, rows: out[:, 0] * float("nan"))
    with pytest.raises(UnweaveError, match="0 steps"):
        node_effects(lm, sae, clean, patch, difference, AttributionOptions(method="ig", steps=0))
    nowhere = SAE(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, TopK(3))
    with pytest.raises(UnweaveError, match="named no site"):
        node_effects(lm, nowhere, clean, patch, difference)


# -- the comparison ---------------------------------------------------------------------------------------------------


def test_correlations_by_hand() -> None:
    found = correlations([1.0, 2.0, 3.0, 4.0], [1.0, 8.0, 27.0, 64.0])
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] == pytest.approx(0.9513698)
    tied = correlations([1.0, 2.0, 2.0, 3.0], [4.0, 3.0, 1.0, 2.0])  # ranks 1, 2.5, 2.5, 4 and 4, 3, 1, 2
    assert tied["spearman"] == pytest.approx(-3 / math.sqrt(4.5 * 5))
    assert correlations([1.0, 2.0], [5.0, -5.0])["pearson"] == pytest.approx(-1.0)
    assert all(math.isnan(v) for v in correlations([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]).values())
    assert all(math.isnan(v) for v in correlations([1.0], [2.0]).values())
    with pytest.raises(UnweaveError):
        correlations([1.0, 2.0], [1.0])


def test_comparison_agrees_with_the_methods_it_calls(lm: LM) -> None:
    sae = make_sae(lm, "resid_post.1")
    first, second = make_pair(n=4), make_pair(n=2, width=8)
    batches = [(*first, difference), (*second, difference)]
    found = compare(lm, sae, batches, TraceOptions(top=5, random=6, steps=4, seed=1), max_tokens=40)
    assert found.examples == 6
    top, rest = found.effects[:5], found.effects[5:]
    assert [row.chosen for row in found.effects] == [True] * 5 + [False] * len(rest)
    assert len({row.latent for row in found.effects}) == 5 + len(rest)
    per_method = {
        method: torch.cat(
            [
                node_effects(lm, sae, *pair, difference, AttributionOptions(method=method, steps=4, rule="midpoint"))[
                    sae.write
                ].latents.sum(1)  # type: ignore[arg-type]
                for pair in (first, second)
            ]
        ).mean(0)
        for method in ("attribution", "ig")
    }
    assert [row.latent for row in top] == per_method["ig"].abs().topk(5).indices.tolist()
    exact, exact_patch = (
        torch.cat(
            [Interventions(lm, sae, *pair, difference).exact(range(F), origin=origin) for pair in (first, second)], 1
        ).mean(1)
        for origin in ("clean", "patch")  # type: ignore[arg-type]
    )
    for row in found.effects:
        assert row.exact_patch == pytest.approx(float(exact_patch[row.latent]))
        assert row.measured == pytest.approx(float(exact[row.latent] + exact_patch[row.latent]) / 2)
        assert row.ig == pytest.approx(float(per_method["ig"][row.latent]))
        assert row.attribution == pytest.approx(float(per_method["attribution"][row.latent]))
        assert row.exact == pytest.approx(float(exact[row.latent]))

    def agreement(estimate: Any, among: Any) -> dict[str, Any]:
        return {"pearson": found.pearson(estimate, among), "spearman": found.spearman(estimate, among)}

    assert agreement("ig", "chosen") == pytest.approx(correlations([r.ig for r in top], [r.measured for r in top]))
    assert agreement("exact", "chosen") == pytest.approx(
        correlations([r.exact for r in top], [r.measured for r in top])
    )
    assert agreement("attribution", "random") == pytest.approx(
        correlations([r.attribution for r in rest], [r.measured for r in rest])
    )
    together = []
    for clean, patch in (first, second):
        x, y = values(lm, "resid_post.1", clean), values(lm, "resid_post.1", patch)
        moves = (sae.encode(y) - sae.encode(x))[..., [row.latent for row in top]]
        move = moves @ sae.W_dec[[row.latent for row in top]]
        at = [
            naive_metric(lm, clean, "resid_post.1", lambda _, v=v: v).mean(0, keepdim=True) * len(clean)
            for v in (x, x + move, y - move, y)
        ]
        together.append((at[1] - at[0] + at[3] - at[2]) / 2)
    assert found.totals.top_together == pytest.approx(float(sum(together)) / 6)
    assert found.share == pytest.approx(found.totals.top_together / found.totals.change)
    again = compare(lm, sae, batches, TraceOptions(top=5, random=6, steps=4, seed=1), max_tokens=40)
    assert again.effects == found.effects
    with pytest.raises(UnweaveError, match=r"the 25 strongest latents.*only \d+ change"):
        compare(lm, sae, batches, TraceOptions(top=25))


def coordinates(lm: LM) -> SAE:
    """Latents that are the site's coordinates plus 100: everything is explained, the error is zero."""
    eye = torch.eye(32, dtype=torch.float64)
    hundred = torch.full((32,), 100.0, dtype=torch.float64)
    return SAE(eye, hundred, eye, -hundred, ReLU(), read=Site("resid_post", 1))


def test_diagnosis_tells_steps_from_interactions(lm: LM) -> None:
    """A metric that adds up over coordinates has no interactions; products of coordinates are nothing else."""
    sae = coordinates(lm)
    clean, patch = make_pair(n=6)
    site = Site("resid_post", 1)

    def additive(out: Tensor, rows: Tensor) -> Tensor:
        return (3.0 * out).sin().sum((1, 2))

    bad_steps = compare(lm, sae, [(clean, patch, AtSite(additive, site))], TraceOptions(steps=1, rule="left")).diagnosis
    assert bad_steps is not None
    assert bad_steps.cause == "steps"
    assert bad_steps.fine > 0.99 > bad_steps.coarse
    assert bad_steps.alone_error < 0.05
    assert compare(lm, sae, [(clean, patch, AtSite(additive, site))], TraceOptions(steps=32)).diagnosis is None

    matrix = torch.randn(32, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    matrix.fill_diagonal_(0)

    start = 0.8 * values(lm, "resid_post.1", clean)  # so that what changes is not lost in what stays

    def products(out: Tensor, rows: Tensor) -> Tensor:
        moved = out - start[rows]
        return torch.einsum("bpi,ij,bpj->b", moved, matrix, moved)

    found = compare(lm, sae, [(clean, patch, AtSite(products, site))], TraceOptions(steps=4)).diagnosis
    assert found is not None
    assert found.cause == "interactions"
    assert found.fine == pytest.approx(found.coarse)  # the gradient of a square is linear: any midpoint rule is exact
    assert found.both_ends == pytest.approx(1.0)  # and IG is the mean of the two ends
    assert "interact" in found.text


def test_results_are_plain_values_for_json(lm: LM) -> None:
    import json

    sae = make_sae(lm, "resid_post.1")
    found = compare(lm, sae, [(*make_pair(), difference)], TraceOptions(top=3, random=1, steps=2))
    plain = to_plain(found)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert found.pearson("ig", "random") is None  # of one value
