"""SHIFT's parts: probe, pooling, effects on a logit, ablation, controls, judgements; and a case where it must work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.models import N_LAYERS, build_tiny, build_tiny_tokenizer
from unweave.circuits.graph import strongest
from unweave.core.errors import UnweaveError
from unweave.core.shares import Share
from unweave.core.site import Site
from unweave.inputs.subject import Subject
from unweave.judge.scripted import Scripted
from unweave.latents.annotations import Annotation
from unweave.latents.records import Context, LatentRecord
from unweave.lm.chat import Role
from unweave.lm.model import LM, Tokens
from unweave.methods.shift import relevance, supporting
from unweave.methods.shift.probe import (
    Pooled,
    Probe,
    Recipe,
    accuracies,
    beyond_first,
    concept_vectors,
    describe,
    fit,
    pool,
)
from unweave.methods.shift.result import Accuracies, Judgement, Method, Seed, ShiftResult, TableRow, Verdict
from unweave.methods.shift.spec import RuleOptions, SupportOptions
from unweave.sae.activations import JumpReLU
from unweave.sae.module import SAE, ReLU

TEXTS = [
    "The keys are here.",
    "A cat",
    "Some people never saw the sea",
    "Who?",
    "Two old doors near a wall",
    "No, not so",
]


def random_sae(lm: LM, site: str, n: int = 24, seed: int = 0) -> SAE:
    """An SAE with weights that reconstruct nothing well and no zeros anywhere."""
    g = torch.Generator().manual_seed(seed)
    width = lm.width(site)
    enc, dec = (torch.randn(*shape, generator=g) * 0.3 for shape in ((width, n), (n, width)))
    b_enc, b_dec = torch.randn(n, generator=g) * 0.1, torch.randn(width, generator=g) * 0.1
    threshold = torch.rand(n, generator=g) * 0.2
    return SAE(enc, b_enc, dec, b_dec, JumpReLU(threshold), read=lm.site(site))


# -- the probe ----------------------------------------------------------------------------------------------------


def overlapping(n: int = 400, width: int = 6) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    labels = torch.arange(n) % 2
    means = torch.randn(width, generator=g).double()
    x = torch.randn(n, width, generator=g).double() + torch.outer(labels - 0.5, means)
    return x * torch.tensor([1, 5, 0.2, 1, 3, 1]).double() + 7, labels


@pytest.mark.parametrize("standardise", [True, False])
def test_a_probe_trained_to_the_end_is_logistic_regression(standardise: bool) -> None:
    from sklearn.linear_model import LogisticRegression

    x, labels = overlapping()
    recipe = Recipe(lr=0.05, epochs=700, batch=400, weight_decay=0.0, standardise=standardise)
    if not standardise:
        x = (x - x.mean(0)) / x.std(0)
    probe = fit(x, labels, recipe)
    theirs = LogisticRegression(C=np.inf, tol=1e-10, max_iter=5000).fit(x.numpy(), labels.numpy())
    torch.testing.assert_close(probe.weight, torch.from_numpy(theirs.coef_[0]), rtol=1e-3, atol=1e-3)
    assert float(probe.bias) == pytest.approx(float(theirs.intercept_[0]), rel=1e-3, abs=1e-3)


def test_standardising_forgets_units_and_origin() -> None:
    x, labels = overlapping()
    one, other = fit(x, labels), fit(x * 1000 - 3e4, labels)
    torch.testing.assert_close(one(x), other(x * 1000 - 3e4), rtol=1e-6, atol=1e-6)
    plain = Recipe(standardise=False)
    assert not torch.allclose(fit(x, labels, plain)(x), fit(x + 1, labels, plain)(x + 1))


def test_the_first_step_is_adams() -> None:
    """Adam's first step is the learning rate times the gradient's sign; batches and epochs make more of them."""
    x, labels = overlapping(64)

    def after(lr: float, batch: int = 64, epochs: int = 1, weight_decay: float = 0.0) -> Tensor:
        return fit(
            x, labels, Recipe(lr=lr, epochs=epochs, batch=batch, weight_decay=weight_decay, standardise=False)
        ).weight

    step = after(1e-4) - after(2e-4)
    torch.testing.assert_close(step.abs(), torch.full_like(step, 1e-4), rtol=1e-2, atol=1e-7)
    first = after(1e-4) + (after(1e-4) - after(2e-4))
    for more in ({"batch": 32}, {"epochs": 2}):
        assert float((after(1e-4, **more) - first).abs().max()) > 1.5e-4
    torch.testing.assert_close(after(1e-4) - after(1e-4, weight_decay=0.5), 0.5e-4 * first, rtol=1e-2, atol=1e-9)


def test_first_weights_come_from_the_seed() -> None:
    x, labels = overlapping(64)
    assert torch.equal(fit(x, labels, seed=3).weight, fit(x, labels, seed=3).weight)
    assert not torch.equal(fit(x, labels, seed=3).weight, fit(x, labels, seed=4).weight)


def test_a_probe_refuses_what_it_cannot_learn_from() -> None:
    x, labels = overlapping(8)
    with pytest.raises(UnweaveError, match="both labels"):
        fit(x, torch.ones(8, dtype=torch.int64))
    with pytest.raises(UnweaveError, match="go together"):
        fit(x, labels[:4])
    x[2, 1] = torch.nan
    with pytest.raises(UnweaveError, match="NaN"):
        fit(x, labels)
    with pytest.raises(UnweaveError, match="cannot be trained"):
        Recipe(epochs=0)


def test_a_dimension_that_never_changes_does_no_harm() -> None:
    x, labels = overlapping(64)
    x[:, 3] = 5.0
    assert bool(torch.isfinite(fit(x, labels)(x)).all())


def test_accuracies_by_hand() -> None:
    logits = torch.tensor([1.0, -1.0, 2.0, -0.5, 0.1, 3.0, -2.0, -4.0])
    wanted = [1, 1, 1, 0, 0, 0, 0, 0]
    unwanted = [1, 1, 0, 0, 1, 1, 0, 0]
    found = accuracies(logits, wanted, unwanted)
    assert [group.value for group in found.groups] == [1.0, 0.0, 1.0, 0.5]
    assert (found.profession, found.gender, found.worst.value) == (Share(5, 8), Share(6, 8), 0.0)
    with pytest.raises(UnweaveError, match=r"\(1, 0\)"):
        accuracies(torch.tensor([1.0, 1.0, 1.0]), [0, 0, 1], [0, 1, 1])


# -- pooling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_trap_01_means_are_over_tokens_whatever_the_padding(side: Any) -> None:
    rows = [([5, 6, 7], [0, 0, 0]), ([8, 9], [0, 0])]
    tokens = Tokens.pad(rows, 2, side)
    x = tokens.ids.float().unsqueeze(-1) * torch.tensor([1.0, 100.0])
    assert pool(x, tokens, 0)[:, 0].tolist() == [6.0, 8.5]
    assert pool(x, tokens, 1)[:, 1].tolist() == [650.0, 900.0]
    assert beyond_first(tokens.mask, 1).sum(1).tolist() == [2, 1]


@pytest.mark.parametrize("family", ["olmo2", "gpt2"])
def test_pooled_texts_are_each_texts_own_mean(tiny_lm: Any, family: str) -> None:
    lm = tiny_lm(family)
    texts = Pooled(lm, TEXTS, Site.parse("resid_post.1"), begin=1, batch_tokens=40)
    for row, text in enumerate(TEXTS):
        with lm.taps(read=["resid_post.1"]) as seen:
            lm(lm.tokenize(text))
        torch.testing.assert_close(texts.clean[row], seen["resid_post.1"][0, 1:].mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "gpt_neox_sequential"])
def test_edits_begin_at_their_block_and_equal_whole_passes(tiny_lm: Any, family: str) -> None:
    lm = tiny_lm(family)
    sites = ("mlp_add.1", "resid_post.1", "attn_add.2")
    saes = {lm.site(s): random_sae(lm, s, seed=i) for i, s in enumerate(sites)}
    edits = supporting.ablation(saes, [(lm.site(s), j) for s in sites for j in (3, 1, 7)])
    texts = Pooled(lm, TEXTS, Site.parse("resid_post.2"), begin=1, batch_tokens=48)
    texts.edited(edits, [0])  # the first time, every autoencoder is verified by passes of its own
    ran: list[int] = []
    hooks = [attention_of(lm, i).register_forward_hook(lambda *_, i=i: ran.append(i)) for i in range(N_LAYERS)]
    found = texts.edited(edits, [4, 0, 5, 2])
    assert set(ran) == {1, 2}, "blocks below the edits are not run"
    for hook in hooks:
        hook.remove()
    for place, row in enumerate([4, 0, 5, 2]):
        with lm.taps(read=["resid_post.2"], edit=edits) as seen:
            lm(lm.tokenize(TEXTS[row]))
        torch.testing.assert_close(found[place], seen["resid_post.2"][0, 1:].mean(0), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, texts.clean[[4, 0, 5, 2]])


def attention_of(lm: LM, layer: int) -> Any:
    return lm.layout.tap(Site("attn_in", layer)).module


def test_edits_of_the_embedding_run_everything(tiny_lm: Any) -> None:
    lm = tiny_lm("llama")
    saes = {Site("embed"): random_sae(lm, "embed"), Site("resid_post", 1): random_sae(lm, "resid_post.1")}
    edits = supporting.ablation(saes, [(Site("embed"), 2), (Site("embed"), 5), (Site("resid_post", 1), 0)])
    texts = Pooled(lm, TEXTS, Site("resid_post", 1), begin=1)
    found = texts.edited(edits)
    whole = Pooled(lm, TEXTS, Site("resid_post", 1)).edited(edits)
    torch.testing.assert_close(found, whole)
    assert not torch.allclose(found, texts.edited(edits[1:]), atol=1e-3)
    assert torch.equal(texts.edited([], [1, 0]), texts.clean[[1, 0]])


def test_texts_are_cut_and_too_short_ones_refused(tiny_lm: Any) -> None:
    lm = tiny_lm("gpt2")
    site = Site("resid_post", 0)
    cut = Pooled(lm, [TEXTS[2]], site, max_length=9).clean
    torch.testing.assert_close(cut, Pooled(lm, [TEXTS[2][:9]], site).clean)
    with pytest.raises(UnweaveError, match="no token is left"):
        Pooled(lm, ["fine", "x"], site, skip_first=1)
    Pooled(lm, ["fine", "x"], site, skip_first=0)
    with pytest.raises(UnweaveError, match="tokenizer"):
        Pooled(LM(build_tiny("gpt2"), None), ["fine"], site)


# -- effects ------------------------------------------------------------------------------------------------------


def setting(lm: LM, names: tuple[str, ...], probed: str) -> tuple[dict[Site, SAE], Pooled, Probe]:
    saes = {lm.site(s): random_sae(lm, s, seed=i) for i, s in enumerate(names)}
    texts = Pooled(lm, TEXTS, lm.site(probed), begin=1)
    g = torch.Generator().manual_seed(5)
    return saes, texts, Probe(torch.randn(lm.d_model, generator=g), torch.tensor(0.3))


def test_effects_at_the_probes_site_are_what_each_latent_writes_into_the_logit(tiny_lm: Any) -> None:
    """The logit is linear there: -mean_p f_j(p) (d_j . w), and for the error likewise."""
    lm = tiny_lm("llama")
    site = Site("resid_post", 1)
    saes, texts, probe = setting(lm, ("resid_post.1",), "resid_post.1")
    found = supporting.logit_effects(lm, saes, texts, [3, 0], probe, options=SupportOptions(steps=1))[site]
    sae = saes[site]
    for place, row in enumerate([3, 0]):
        with lm.taps(read=[site]) as seen:
            lm(lm.tokenize(TEXTS[row]))
        x = seen[site][0, 1:]
        f = sae.encode(x)
        expected = -f.mean(0) * (sae.W_dec @ probe.weight)
        torch.testing.assert_close(found[place, :-1], expected, rtol=1e-4, atol=1e-4)
        error = -((x - sae.decode(f)).mean(0) @ probe.weight)
        assert float(found[place, -1]) == pytest.approx(float(error), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("family", ["gemma2", "gpt_neox"])
def test_effects_of_a_site_add_up_to_ablating_it(tiny_lm: Any, family: str) -> None:
    """Integrated gradients are complete: all latents and the error share out the logit's change, and nothing else."""
    lm = tiny_lm(family)
    saes, texts, probe = setting(lm, ("embed", "mlp_add.1", "resid_post.1", "resid_post.2"), "resid_post.1")
    found = supporting.logit_effects(lm, saes, texts, range(len(TEXTS)), probe, options=SupportOptions(steps=60))
    assert set(found) == {Site("embed"), Site("mlp_add", 1), Site("resid_post", 1)}, "none behind the probe"
    for site, effects in found.items():
        for row, text in enumerate(TEXTS):
            gone = saes[site].b_dec

            def empty(x: Tensor, at: Any, gone: Tensor = gone) -> Tensor:
                return torch.cat([x[:, :1], gone.expand_as(x[:, 1:])], 1)

            logits = []
            for edit in ({}, {site: empty}):
                with lm.taps(read=["resid_post.1"], edit=edit) as seen:
                    lm(lm.tokenize(text))
                logits.append(float(probe(seen["resid_post.1"][0, 1:].mean(0))))
            assert float(effects[row].sum()) == pytest.approx(logits[1] - logits[0], rel=0.03, abs=0.03)


def test_support_has_the_sign_of_the_label_and_strongest_leaves_errors_out() -> None:
    site, other = Site("resid_post", 0), Site("resid_post", 1)
    effects = {
        site: torch.tensor([[1.0, -2.0, 9.0], [3.0, 4.0, 9.0]]),
        other: torch.tensor([[0.0, 6.0, 0.0], [0, 0, 0]]),
    }
    mean = supporting.support(effects, [0, 1])  # the logit speaks for label 1: raising it by ablation supports label 0
    assert mean[site].tolist() == [-1.0, -3.0, 0.0] and mean[other].tolist() == [0.0, 3.0, 0.0]
    mean = supporting.support(effects, [1, 0])
    assert [(s.name, s.effect) for s in strongest(mean)] == [("resid_post.0/1", 3.0), ("resid_post.0/0", 1.0)]
    assert [s.latent for s in strongest(mean, threshold=1.0)] == [1]
    mean[site][-1] = 100.0
    assert [s.latent for s in strongest(mean, top=1)] == [1]


def test_random_latents_are_as_many_active_and_others() -> None:
    g = torch.Generator().manual_seed(0)
    sites = [Site("embed"), Site("resid_post", 3), Site("resid_post", 4)]
    mean = {site: torch.randn(101, generator=g) for site in sites}
    for values in mean.values():
        values[::2] = 0.0
    chosen = [Verdict(sites[0], 1, True, ""), *(Verdict(sites[1], j, True, "") for j in range(1, 41, 2))]
    drawn = supporting.random_latents(mean, chosen, seed=0)
    assert Counter(site for site, _ in drawn) == {sites[0]: 1, sites[1]: 20}
    assert all(latent % 2 == 1 and latent != 100 for _, latent in drawn), "active ones, no errors"
    assert not {(v.site, v.latent) for v in chosen} & set(drawn)
    assert len(set(drawn)) == len(drawn)
    assert drawn == supporting.random_latents(mean, chosen, seed=0) != supporting.random_latents(mean, chosen, seed=1)


def test_ablation_is_the_explicit_edit_at_all_positions_or_the_policys(tiny_lm: Any) -> None:
    from unweave.data.policy import TokenPolicy

    lm = tiny_lm("llama")
    site = Site("resid_post", 1)
    sae = random_sae(lm, "resid_post.1")
    tokens = lm.tokenize(TEXTS[:1])
    sae.policy = TokenPolicy(exclude_ids=(int(tokens.ids[0, 2]),))
    with lm.taps(read=[site]) as seen:
        lm(tokens)
    x = seen[site]
    f = sae.encode(x)
    for where in ("all", "policy"):
        kept = torch.ones_like(tokens.mask) if where == "all" else ~torch.isin(tokens.ids, tokens.ids[0, 2])
        expected = x - (f[..., [2, 9]] @ sae.W_dec[[2, 9]]) * kept.unsqueeze(-1)
        with lm.taps(read=[site], edit=supporting.ablation({site: sae}, [(site, 9), (site, 2)], where)) as seen:
            lm(tokens)
        torch.testing.assert_close(seen[site], expected, rtol=1e-4, atol=1e-4)


def test_mean_ablation_sets_coordinates_to_the_texts_mean(tiny_lm: Any) -> None:
    lm = tiny_lm("gpt2")
    site = Site("mlp_act", 1)
    texts = Pooled(lm, TEXTS, Site("resid_post", 1), begin=1)
    (edit,) = supporting.mean_ablation(lm, texts, [0, 2], [(site, 5), (site, 3)])
    means = []
    for row in (0, 2):
        with lm.taps(read=[site]) as seen:
            lm(lm.tokenize(TEXTS[row]))
        means.append(seen[site][0, 1:].mean(0))
    mean = torch.stack(means).mean(0)
    tokens = lm.tokenize([TEXTS[1], TEXTS[4]])
    with lm.taps(read=[site], edit=[edit]) as seen:
        lm(tokens)
    x = seen[site]
    with lm.taps(read=[site]) as seen:
        lm(tokens)
    expected = seen[site].clone()
    for row in range(2):
        expected[row, 1 : int(tokens.mask[row].sum()), [3, 5]] = mean[[3, 5]]
    torch.testing.assert_close(x, expected)
    assert supporting.mean_ablation(lm, texts, [0], []) == []


def table_with(original: int, shifted: int, oracle: int) -> ShiftResult:
    """A result of one seed with these worst groups, in percent."""
    rows = []
    for method, percent in {"original": original, "shift": shifted, "oracle": oracle}.items():
        groups = (Share(percent, 100), *[Share(100, 100)] * 3)
        rows.append(TableRow(cast(Method, method), 0, Accuracies(Share(1, 2), Share(1, 2), groups)))
    seed = Seed((), tuple(rows), (), ())
    return ShiftResult(Subject("m", "", (), {}), SITE, "x", "", Judgement("rule", ()), (seed,))


def test_recovered_share() -> None:
    assert table_with(20, 60, 100).recovered("shift") == pytest.approx(0.5)
    assert table_with(90, 90, 90).recovered("shift") is None
    assert table_with(80, 95, 85).recovered("shift") is None  # three times a gap that is none


@pytest.mark.parametrize(("right", "of"), [(0, 6), (6, 6), (3, 6), (171, 300)])
def test_intervals_are_wilsons(right: int, of: int) -> None:
    from scipy.stats import binomtest

    expected = binomtest(right, of).proportion_ci(0.95, method="wilson")
    assert Share(right, of).interval == pytest.approx((expected.low, expected.high), abs=1e-6)


# -- a case where it must work ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted() -> Iterator[tuple[LM, SAE, list[str], list[tuple[int, int]]]]:
    """Texts with one letter for gender (m, f) and one for profession (p, n) among others. The embeddings of each two
    differ by one direction only, which is a latent of its own: ablated, the letters are the same to the model."""
    model = build_tiny("llama")
    tokenizer = build_tiny_tokenizer()
    lm = LM(model, tokenizer)
    g = torch.Generator().manual_seed(2)
    basis = torch.linalg.qr(torch.randn(32, 2, generator=g)).Q.T
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight -= weight @ basis.T @ basis
        m, f, p, n = (tokenizer.convert_tokens_to_ids(c) for c in "mfpn")
        weight[f] = weight[m] + 2.0 * basis[0]
        weight[n] = weight[p] + 1.0 * basis[1]
    others = torch.randn(32, 6, generator=g) * 0.3
    enc = torch.cat([basis.T, others - basis.T @ (basis @ others)], 1)
    sae = SAE(enc, torch.zeros(8), enc.T.contiguous(), torch.zeros(32), ReLU(), read=Site("embed"))
    rng = np.random.default_rng(0)
    texts, groups = [], []
    for i in range(320):
        profession, gender = (i // 2) % 2, i % 2
        noise = "".join(rng.choice(list("abc"), 4))
        texts.append(f"a{'mf'[gender]}{noise[:2]}{'pn'[profession]}{noise[2:]}{'mf'[gender]}")
        groups.append((profession, gender))
    yield lm, sae, texts, groups


def test_shift_removes_what_one_latent_carries(planted: Any) -> None:
    lm, sae, names, groups = planted
    texts = Pooled(lm, names, Site("resid_post", 1))
    saes = {Site("embed"): sae}
    train = [i for i in range(200) if groups[i] in ((0, 0), (1, 1))]
    test = list(range(200, 320))
    labels = torch.tensor([groups[i][0] for i in train])
    recipe = Recipe(epochs=20)
    probe = fit(texts.clean[train], labels, recipe)

    def measured(classifier: Probe, x: Tensor) -> Any:
        return accuracies(classifier(x), *zip(*(groups[i] for i in test), strict=True))

    original = measured(probe, texts.clean[test])
    assert original.gender.value > 0.9 and original.worst.value < 0.3
    effects = supporting.logit_effects(lm, saes, texts, train[:40], probe, options=SupportOptions(steps=6))
    strong = strongest(supporting.support(effects, [groups[i][0] for i in train[:40]]))
    assert strong[0].name == "embed/0", "gender's latent is found first"
    edits = supporting.ablation(saes, [(Site("embed"), 0)])
    x = texts.edited(edits)

    # For the ablated model m and f are one letter: a text says the same as its twin of the other gender.
    twins = [name.translate(str.maketrans("mf", "fm")) for name in names]
    mirrored = Pooled(lm, twins, Site("resid_post", 1)).edited(edits)
    torch.testing.assert_close(x, mirrored, rtol=1e-4, atol=1e-4)
    both = torch.cat([probe(x[test]), probe(mirrored[test])])
    wanted, unwanted = zip(*(groups[i] for i in test), strict=True)
    after = accuracies(both, wanted * 2, (*unwanted, *(1 - g for g in unwanted)))
    assert after.gender.value == pytest.approx(0.5)
    retrained = measured(fit(x[train], labels, recipe), x[test])
    assert retrained.worst.value > 0.9
    others = supporting.random_latents(
        supporting.support(effects, [0] * 40), [Verdict(Site("embed"), 0, True, "")], seed=0
    )
    assert others and others != [(Site("embed"), 0)]


def test_concepts_are_unit_vectors_around_their_mean(tiny_lm: Any) -> None:
    lm = tiny_lm("llama")
    site = Site("resid_post", 1)
    found = concept_vectors(lm, site, ("ward", "grant", "a"))
    raw = []
    for word in ("ward", "grant", "a"):
        with lm.taps(read=[site]) as seen:
            lm(lm.tokenize(f"The {word}"))
        raw.append(seen[site][0, -1])
    expected = torch.stack(raw) - torch.stack(raw).mean(0)
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    x = torch.randn(5, 32)
    torch.testing.assert_close(describe(x, found)[2, 1], x[2] @ found[1])


# -- judgements ---------------------------------------------------------------------------------------------------


def context(text: str, focus: int) -> Context:
    texts = tuple(text.split("|"))
    values = tuple(5.0 if i == focus else 0.0 for i in range(len(texts)))
    counted = (True,) * len(texts)
    return Context(tuple(range(len(texts))), texts, values, counted, focus, 0, 0, Role.TEXT, None)


def record(latent: int, contexts: list[Context], promoted: tuple[str, ...] = ()) -> LatentRecord:
    written = tuple((token, 1.0) for token in promoted)
    return LatentRecord(latent, 5, 0.1, 5.0, 2.0, 0.0, written, (), tuple(contexts), (), ())


SITE = Site("resid_post", 3)
RECORDS = {
    (SITE, 0): record(0, [context("that| night| she| went", 2), context(" her|,", 0), context(" a| sea", 1)]),
    (SITE, 1): record(1, [context(" the| sea", 1)] * 4 + [context(" she", 0)], (" x", " y", " z")),
    (SITE, 2): record(2, [context(" the| sea", 1)] * 5, (" his", " him", " x", " y", " z", " q", " r", " s")),
    (SITE, 3): record(3, [context(" El|iz|abeth| ran", 1)] * 2),
    (SITE, 4): record(4, [context(" the|rapy", 1)] * 2, ("here", "there", "other", " hers", "a", "b", "c", "d")),
    (SITE, 5): record(5, []),
}


def test_the_rule_reads_strongest_words_and_promoted_tokens() -> None:
    found = {v.latent: v for v in relevance.by_rule(RECORDS)}
    assert {latent for latent, v in found.items() if v.irrelevant} == {0, 2, 3}
    assert "'she'" in found[0].why and "promotes 'his', 'him'" in found[2].why and "elizabeth" in found[3].why
    assert found[5].irrelevant is False and "never fires" in found[5].why
    assert found[4].name == "resid_post.3/4"
    strict = {
        v.latent for v in relevance.by_rule(RECORDS, RuleOptions(context_share=1.0, promoted_share=0.3)) if v.irrelevant
    }
    assert strict == {3}
    assert {v.latent for v in relevance.by_rule(RECORDS, words={"sea"}) if v.irrelevant} == {1, 2}


def test_first_names_count_with_a_capital_only() -> None:
    def judged(*contexts: Context, promoted: tuple[str, ...] = ()) -> bool | None:
        (verdict,) = relevance.by_rule({(SITE, 0): record(0, list(contexts), promoted)})
        return verdict.irrelevant

    assert judged(context(" a| bill", 1), context(" grace", 0)) is False
    assert judged(context(" of| B|ill|'s", 2), context(" GRACE", 0)) is True
    assert judged(context(" x", 0), promoted=(" mark", " rose")) is False
    assert judged(context(" x", 0), promoted=(" Mark", "Rose")) is True
    assert judged(context(" She", 0), context(" mother", 0)) is True


def test_the_whole_word_around_a_token() -> None:
    assert relevance.word_at(context("a| El|iz|abeth|'s", 2)) == "elizabeth"
    assert relevance.word_at(context(" men|,| she", 1)) == ","
    assert relevance.word_at(context(" Mrs|.| Bell", 0)) == "mrs"


def test_annotations_decide_where_somebody_said_something() -> None:
    said = {
        "resid_post.3/0": Annotation("resid_post.3/0", "women", relevant=False),
        "resid_post.3/1": Annotation("resid_post.3/1", "the sea", relevant=True),
        "resid_post.3/2": Annotation("resid_post.3/2", "unclear"),
    }
    found = relevance.by_annotation([(SITE, 0), (SITE, 1), (SITE, 2), (SITE, 7)], said)
    assert [v.irrelevant for v in found] == [True, False, None, None]
    assert [v.why for v in found] == ["women", "the sea", "unclear", "not annotated"]
    with pytest.raises(UnweaveError, match="any of the 2 latents"):
        relevance.by_annotation([(SITE, 2), (SITE, 7)], said)


def test_a_chat_model_sees_contexts_and_promoted_tokens_and_failures_are_counted() -> None:
    judge = Scripted(["answer: [[yes]]", "I think answer: [[No]].", "yes", None, "answer: [[yes]] answer: [[no]]"])
    found = relevance.by_chat(RECORDS, judge)
    assert [v.irrelevant for v in found] == [True, False, None, None, None, None]
    assert Counter(v.why for v in found if v.irrelevant is None) == {
        relevance.SILENT: 1,
        "no answer of the form asked for": 1,
        "scripted failure": 1,
        "more than one answer": 1,
    }
    assert len(judge.asked) == 5, "a latent that never fires is not asked about"
    last = judge.asked[2][-1]["content"]
    assert last.startswith("Text 1:  the *sea*\n".replace(":  ", ": ")) and "It promotes: his, him, x" in last
    assert [turn["role"] for turn in judge.asked[0]] == ["user", "assistant"] * 3 + ["user"]
    with pytest.raises(UnweaveError, match="none of the judge's 5"):
        relevance.by_chat(RECORDS, Scripted(lambda _: "maybe"))
