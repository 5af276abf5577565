"""Integrated gradients at many sites at once: passes that begin in the middle, and that sites and points share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.attribution import F, close, difference, make_pair, make_sae
from helpers.models import FAMILIES
from unweave.attribute import attribution
from unweave.attribute.attribution import Interventions, fractions, node_effects
from unweave.attribute.options import AttributionOptions
from unweave.attribute.runner import AtSite, Runner, Shifted
from unweave.attribute.states import change_of, states
from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.lm.model import LM, Tokens
from unweave.lm.unembed import knows, unembed
from unweave.tasks.agreement import AnswerDifference

POINTS = ("resid_pre", "attn_in", "attn_heads", "attn_out", "attn_add", "resid_mid", "mlp_in", "mlp_act", "mlp_out",
          "mlp_add", "resid_post")  # fmt: skip


def every_site(lm: LM, layer: int = 1) -> list[str]:
    """Every point of a block, and what lies at both ends."""
    points = lm.layout.points()
    return sorted(
        {"embed", "resid_pre.0", *(f"{p}.{layer}" for p in POINTS if p in points), "resid_post.2", "final_norm"}
    )


def loop(lm: LM, site: Site, start: Tensor, shift: Tensor, tokens: Tokens, alphas: Sequence[float]) -> Tensor:
    """Whole forward passes from the tokens, one point and one site at a time."""
    mean = torch.zeros_like(start)
    for alpha in alphas:
        leaf = (start + alpha * shift).requires_grad_()
        with lm.taps(edit={site: lambda _x, _at, leaf=leaf: leaf}, grad=True):
            logits = lm(tokens)
        assert logits is not None
        last = logits[torch.arange(len(tokens)), tokens.mask.int().cumsum(1).argmax(1)]
        mean += torch.autograd.grad(difference(last, torch.arange(len(tokens))).sum(), leaf)[0]
    return mean / len(alphas)


def padded_pair(side: Any) -> tuple[Tokens, Tokens]:
    clean, patch = make_pair()
    lengths = (6, 4, 5)
    one, two = (
        Tokens.pad([(row[:n].tolist(), [4] * n) for row, n in zip(t.ids, lengths, strict=True)], 2, side)
        for t in (clean, patch)
    )
    return one, two


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("rule", "side", "layer"), [("left", "left", 1), ("midpoint", "right", 2)])
def test_every_site_at_once_equals_whole_passes_one_by_one(
    tiny: Any, name: str, rule: Any, side: Any, layer: int
) -> None:
    """In every family, with padding, in batches that hold several sites and batches that split one."""
    lm = LM(tiny(name).double(), None)
    saes = [make_sae(lm, site, seed) for seed, site in enumerate(every_site(lm, layer))]
    # Its eager attention takes the softmax in float32, where a mask of float64's least number is minus infinity: rows
    # that see nothing but padding become NaN.
    clean, patch = padded_pair("right" if name == "gemma2" else side)
    found = node_effects(
        lm, saes, clean, patch, difference, AttributionOptions(method="ig", steps=2, rule=rule, max_tokens=47)
    )
    assert list(found) == sorted(sae.write for sae in saes)
    for sae in saes:
        site = sae.write
        start = states(lm, sae, clean)[site]
        change = change_of(sae, start, states(lm, sae, patch)[site], clean.mask)
        expected = loop(lm, site, start.x, change.x, clean, fractions(2, rule))
        tolerance = 1e-9 if name in ("gpt2", "gpt_neox", "gpt_neox_sequential") else 1e-4  # RMS norms go through fp32
        close(found[site].gradient[clean.mask], expected[clean.mask], tolerance)
        close(found[site].latents, (expected @ sae.W_dec.T) * change.latents, tolerance)
        close(found[site].error, (expected * change.error).sum(-1), tolerance)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_passes_that_begin_in_the_middle_keep_a_sliding_window(tiny: Any, name: str) -> None:
    """Twelve tokens, of which a window holds eight; the last block computes the last token alone."""
    lm = LM(tiny(name).double(), None)
    saes = [make_sae(lm, site, seed) for seed, site in enumerate(every_site(lm, 2))]
    clean, patch = make_pair(width=12)
    found = node_effects(
        lm, saes, clean, patch, difference, AttributionOptions(method="ig", steps=2, rule="midpoint", max_tokens=50)
    )
    for sae in saes:
        site = sae.write
        start = states(lm, sae, clean)[site]
        change = change_of(sae, start, states(lm, sae, patch)[site], clean.mask)
        expected = loop(lm, site, start.x, change.x, clean, fractions(2, "midpoint"))
        close(found[site].gradient, expected, 1e-4)
        close(found[site].latents, (expected @ sae.W_dec.T) * change.latents, 1e-4)
    # The last block of gemma2's three has a window too, and so has each of gemma3's.
    before = found[Site("resid_pre", 2)].gradient
    assert not bool(before[:, :4].any()) and bool(before[:, 4].any())


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "gpt_neox_sequential"])
@pytest.mark.parametrize("ablate", [False, True])
def test_sites_together_are_complete_each_on_its_own(tiny: Any, name: str, ablate: bool) -> None:
    """Parallel and sequential blocks: latents and error of each site make up the change when that site is patched."""
    lm = LM(tiny(name).double(), None)
    saes = [make_sae(lm, site, seed) for seed, site in enumerate(every_site(lm))]
    clean, patch = make_pair()
    other = None if ablate else patch
    found = node_effects(
        lm, saes, clean, other, difference, AttributionOptions(method="ig", steps=60, rule="midpoint", max_tokens=4096)
    )
    for sae in saes:
        latents, error = found[sae.write].over_positions()
        end = states(lm, sae, patch)[sae.write].x
        values = []
        for value in (None, sae.b_dec.expand_as(end) if ablate else end):
            with lm.taps(edit={sae.write: lambda x, _at, value=value: value}):
                values.append(difference(lm(clean)[:, -1], torch.arange(3)))  # type: ignore[index]
        total = values[1] - values[0]
        assert total.abs().max() > 1e-3
        close(latents.sum(1) + error, total, 2e-2 if ablate else 2e-3)
        for a, b in zip(Interventions(lm, sae, clean, other, difference).endpoints(), values, strict=True):
            close(a, b)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt_neox_sequential"])
def test_methods_agree_at_many_sites_of_a_linear_model(tiny: Any, name: str) -> None:
    """Blocks whose attention and MLP add a constant: the metric at the last residual is linear in every site."""
    lm = LM(tiny(name).double(), None)
    for block in lm.layout.blocks:
        for path in (lm.layout.family.heads, lm.layout.family.act):
            block.get_submodule(path).weight.data.zero_()
    places = ["embed", "attn_add.0", "mlp_add.0", "resid_post.0", "attn_add.1", "mlp_add.1", "resid_pre.2"]
    saes = [make_sae(lm, site, seed) for seed, site in enumerate(places)]
    clean, patch = make_pair()
    top = Site("resid_post", 2)
    direction = torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def metric(out: Tensor, rows: Tensor) -> Tensor:
        return (out * direction[rows]).sum((1, 2))

    by_method = {
        m: node_effects(lm, saes, clean, patch, AtSite(metric, top), AttributionOptions(method=m, steps=3))  # type: ignore[arg-type]
        for m in ("attribution", "ig", "exact")
    }
    for sae in saes:
        attribution, ig, exact = (by_method[m][sae.write] for m in ("attribution", "ig", "exact"))
        close(ig.latents, attribution.latents)
        close(ig.error, attribution.error)
        close(exact.latents, attribution.latents)
        close(exact.error, attribution.error)
        with_whole = states(lm, sae, patch)[sae.write].x - states(lm, sae, clean)[sae.write].x
        latents, error = ig.over_positions()
        close(latents.sum(1) + error, (with_whole * direction).sum((1, 2)))


class Counted:
    """How many tokens go through each block, forward."""

    def __init__(self, lm: LM) -> None:
        self.tokens = [0] * lm.n_layers
        for i, block in enumerate(lm.layout.blocks):
            mlp = block.get_submodule(lm.layout.family.mlp)
            mlp.register_forward_pre_hook(lambda _m, args, i=i: self.add(i, args[0]))

    def add(self, block: int, x: Tensor) -> None:
        self.tokens[block] += x.shape[0] * x.shape[1]

    def take(self) -> list[int]:
        found, self.tokens = self.tokens, [0] * len(self.tokens)
        return found


def test_blocks_below_a_site_run_once_and_points_share_passes(tiny: Any) -> None:
    lm = LM(tiny("gpt_neox_sequential").double(), None)
    sites = ["embed", *(f"{p}.{layer}" for layer in range(3) for p in ("attn_add", "mlp_add", "resid_post"))]
    saes = {site: make_sae(lm, site) for site in sites}
    clean, patch = make_pair(n=2)  # 12 tokens
    counted = Counted(lm)
    passes: list[int] = []

    def metric(out: Tensor, rows: Tensor) -> Tensor:
        passes.append(len(rows))
        return difference(out, rows)

    def tokens(steps: int, rule: str, chosen: Sequence[str]) -> list[int]:
        some = [saes[site] for site in chosen]
        node_effects(
            lm, some, clean, patch, metric, AttributionOptions(method="ig", steps=steps, rule=rule, max_tokens=4096)
        )  # type: ignore[arg-type]
        return counted.take()

    # Beside the two passes that find states: each point runs the blocks above its site, and no other.
    tokens(1, "midpoint", sites)  # each SAE is verified against the model once
    above = {"embed": 3, "attn_add.0": 3, "mlp_add.0": 2, "resid_post.0": 2, "attn_add.1": 2, "resid_post.2": 0}
    for site, blocks in above.items():
        once, more = tokens(1, "midpoint", [site]), tokens(5, "midpoint", [site])
        assert [b - a for a, b in zip(once, more, strict=True)] == [4 * 12 * (i >= 3 - blocks) for i in range(3)]
    passes.clear()
    tokens(5, "midpoint", sites)
    # One pass for each place where passes begin: embed, before blocks 0, 1 and 2, and after the last.
    assert sorted(passes) == sorted([10, 10, 30, 30, 20])
    passes.clear()
    tokens(5, "left", sites)  # the clean run is each path's first point
    assert sorted(passes) == sorted([2, 8, 8, 24, 24, 16])


def test_effects_are_found_while_other_taps_are_open(tiny: Any) -> None:
    """What someone else reads or edits below a site still happens: passes are then whole."""
    lm = LM(tiny("gpt2").double(), None)
    saes = [make_sae(lm, site) for site in ("resid_post.1", "mlp_add.1", "attn_add.2")]
    for sae in saes:
        sae.verify(lm)
    clean, patch = make_pair()
    plain = node_effects(lm, saes, clean, patch, difference, AttributionOptions(method="ig", steps=2))
    with lm.taps(read=["resid_post.0"]):
        watched = node_effects(lm, saes, clean, patch, difference, AttributionOptions(method="ig", steps=2))
    with lm.taps(edit={"resid_post.0": lambda x, _at: 0.5 * x}):
        edited = node_effects(lm, saes, clean, patch, difference, AttributionOptions(method="ig", steps=2))
    for site, found in plain.items():
        close(watched[site].latents, found.latents)
        assert (edited[site].latents - found.latents).abs().max() > 1e-3


@pytest.mark.parametrize("read", ["mlp_add.1", "resid_post.1", "attn_in.2", "final_norm", "path.transformer.h.2"])
def test_a_metric_inside_the_model_begins_no_higher_than_it_reads(tiny: Any, read: str) -> None:
    lm = LM(tiny("gpt2").double(), None)
    at = Site.parse(read)
    saes = [make_sae(lm, site, seed) for seed, site in enumerate(("resid_post.0", "attn_add.1", "mlp_add.1"))]
    clean, patch = make_pair()
    probe = torch.randn(6, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def metric(out: Tensor, rows: Tensor) -> Tensor:
        return (out.square() * probe).sum((1, 2))

    found = node_effects(
        lm, saes, clean, patch, AtSite(metric, at), AttributionOptions(method="ig", steps=3, rule="midpoint")
    )
    for sae in saes:
        start, end = (states(lm, sae, t)[sae.write] for t in (clean, patch))
        mean = torch.zeros_like(start.x)
        for alpha in fractions(3, "midpoint"):
            leaf = (start.x + alpha * (end.x - start.x)).requires_grad_()
            with lm.taps([read], {sae.write: lambda _x, _at, leaf=leaf: leaf}, grad=True) as seen:
                lm(clean)
            mean += torch.autograd.grad(metric(seen[read], torch.arange(3)).sum(), leaf)[0] / 3
        close(found[sae.write].latents, (mean @ sae.W_dec.T) * (end.latents - start.latents))


def test_few_and_many_changes_are_multiplied_alike(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product per changed latent and the dense one."""
    lm = LM(tiny("gpt2").double(), None)
    sae = make_sae(lm, "resid_post.0")
    clean, patch = make_pair(n=4, width=8)
    found = []
    for share in (2.0, 0.0):
        monkeypatch.setattr(attribution, "_FEW", share)
        found.append(node_effects(lm, sae, clean, patch, difference)[sae.write])
    sparse, dense = found
    assert 0 < (dense.latents != 0).sum() < dense.latents.numel()
    close(sparse.latents, dense.latents)
    nothing = torch.zeros(4, 8, dtype=torch.bool)
    monkeypatch.setattr(attribution, "_FEW", 2.0)
    assert not node_effects(lm, sae, clean, patch, difference, positions=nothing)[sae.write].latents.any()


def test_metrics_that_are_constant_or_not_numbers_are_refused(tiny: Any) -> None:
    lm = LM(tiny("gpt2").double(), None)
    saes = [make_sae(lm, "mlp_add.0"), make_sae(lm, "resid_post.1")]
    clean, patch = make_pair()
    for method in ("attribution", "ig"):
        with pytest.raises(UnweaveError, match="is constant"):
            node_effects(
                lm, saes, clean, patch, lambda out, rows: out[:, 5] - out[:, 5], AttributionOptions(method=method)
            )  # type: ignore[arg-type]
        with pytest.raises(UnweaveError, match="does not depend on"):
            node_effects(
                lm, saes, clean, patch, lambda out, rows: torch.ones(len(out)), AttributionOptions(method=method)
            )  # type: ignore[arg-type]

    def second(out: Tensor, rows: Tensor) -> Tensor:
        return torch.where(rows == 1, torch.inf, out[:, 3])

    for call in (
        lambda: node_effects(lm, saes, clean, patch, second),
        lambda: node_effects(lm, saes, clean, patch, second, AttributionOptions(method="ig")),
        lambda: node_effects(lm, saes, clean, patch, second, AttributionOptions(method="exact")),
        lambda: Interventions(lm, saes[0], clean, patch, second).exact(range(F)),
        lambda: Interventions(lm, saes[0], clean, patch, second).alone(range(F)),
        lambda: Interventions(lm, saes[0], clean, patch, second).endpoints(),
    ):
        with pytest.raises(UnweaveError, match=r"NaN or infinite[^$]*example 1"):
            call()
    below = Site("attn_add", 0)
    for call in (
        lambda: node_effects(lm, saes, clean, patch, AtSite(lambda out, _: out.sum((1, 2)), below)),
        lambda: node_effects(
            lm, saes, clean, patch, AtSite(lambda out, _: out.sum((1, 2)), below), AttributionOptions(method="ig")
        ),
        lambda: Interventions(lm, saes[0], clean, patch, AtSite(lambda out, _: out.sum((1, 2)), below)).endpoints(),
    ):
        with pytest.raises(UnweaveError, match=r"does not depend on mlp_add\.0"):
            call()


def test_where_passes_begin(tiny: Any) -> None:
    def begins(name: str, metric_at: str | None = None) -> dict[str, tuple[str, str]]:
        lm = LM(tiny(name), None)
        metric = difference if metric_at is None else AtSite(difference, Site.parse(metric_at))
        run = Runner(lm, make_pair()[0], metric, 64)
        sites = ("embed", "resid_pre.1", "attn_heads.1", "attn_add.1", "mlp_out.1", "mlp_add.1", "resid_post.1")
        found = {site: run.beginning(Site.parse(site)) for site in sites}
        return {site: (str(begin.stream), begin.how) for site, begin in found.items()}

    sequential = begins("gpt2")
    assert sequential == {
        "embed": ("embed", "is"),
        "resid_pre.1": ("resid_post.0", "is"),
        "attn_heads.1": ("resid_post.0", "edit"),
        "attn_add.1": ("resid_post.0", "edit"),
        "mlp_out.1": ("resid_post.1", "adds"),
        "mlp_add.1": ("resid_post.1", "adds"),
        "resid_post.1": ("resid_post.1", "is"),
    }
    assert begins("gpt_neox") == sequential | {"attn_add.1": ("resid_post.1", "adds")}
    assert begins("gemma2") == sequential | {"mlp_out.1": ("resid_post.0", "edit")}  # a norm stands between
    assert begins("gpt2", "path.transformer.h.2")["embed"] == ("None", "edit")


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_few_tokens_are_those_of_all(tiny: Any, name: str) -> None:
    """And so are gradients, whether few tokens have one or all, and whatever follows the unembedding."""
    lm = LM(tiny(name), None)
    if name == "gemma2":
        assert lm.model.config.final_logit_softcapping
    tokens = padded_pair("right")[0]
    assert knows(lm)
    with lm.taps(read=["final_norm"]) as seen:
        logits = lm(tokens)
    hidden = seen["final_norm"][0].clone().requires_grad_()
    torch.testing.assert_close(unembed(lm, hidden), logits[0], rtol=1e-5, atol=1e-5)  # type: ignore[index]
    chosen = torch.tensor([90, 3, 17])
    torch.testing.assert_close(unembed(lm, hidden, chosen), logits[0][:, chosen], rtol=1e-5, atol=1e-5)  # type: ignore[index]
    head = lm.model.get_output_embeddings()
    cap = getattr(lm.model.config, "final_logit_softcapping", None)
    plain = head(hidden) if cap is None else cap * torch.tanh(head(hidden) / cap)
    for some in (chosen, torch.arange(97)):
        (expected,) = torch.autograd.grad(plain[:, some].square().sum(), hidden, retain_graph=True)
        for mine in (unembed(lm, hidden)[:, some], unembed(lm, hidden, some)):
            (found,) = torch.autograd.grad(mine.square().sum(), hidden)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_metric_that_says_what_it_reads_gets_that_alone(tiny: Any) -> None:
    lm = LM(tiny("gpt_neox").double(), None)
    saes = [make_sae(lm, "mlp_add.0"), make_sae(lm, "resid_post.1")]
    clean, patch = padded_pair("right")
    metric = AnswerDifference(torch.tensor([5, 9, 5]), torch.tensor([7, 7, 11]))
    assert metric.logits_read.tolist() == [5, 7, 9, 11]
    for method in ("attribution", "ig", "exact"):
        found, plain = (
            node_effects(lm, saes, clean, patch, m, AttributionOptions(method=method, steps=2))  # type: ignore[arg-type]
            for m in (metric, lambda out, rows: metric(out, rows))
        )
        for site, one in found.items():
            close(one.latents, plain[site].latents)
            close(one.error, plain[site].error)
    later = Shifted(metric, 1)
    assert later.logits_read is not None and later.logits_read.tolist() == [5, 7, 9, 11]

    def reading(out: Tensor, rows: Tensor) -> Tensor:
        assert bool(torch.isfinite(out[:, [5, 7, 9, 11]]).all()) and int(torch.isfinite(out).sum()) == 4 * len(rows)
        return out[:, 5] - out[:, 6]

    reading.logits_read = metric.logits_read  # type: ignore[attr-defined]
    with pytest.raises(UnweaveError, match="NaN"):  # it reads another
        node_effects(lm, saes, clean, patch, reading)


def test_a_model_whose_logits_follow_another_rule_is_run_whole(tiny: Any) -> None:
    model = tiny("gpt2").double()
    plain = LM(tiny("gpt2").double(), None)
    inner = model.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        out.logits = 2 * out.logits
        return out

    model.forward = doubled
    lm = LM(model, None)
    assert not knows(lm) and knows(plain)
    clean, patch = make_pair()
    one, two = (
        node_effects(
            m, make_sae(m, "resid_post.0"), clean, patch, difference, AttributionOptions(method="ig", steps=2)
        )[Site("resid_post", 0)]
        for m in (plain, lm)
    )
    close(two.latents, 2 * one.latents)
