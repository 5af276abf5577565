"""Sites, taps and generation on every family."""

from __future__ import annotations

import copy

import pytest
import torch

from helpers.models import FAMILIES
from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.lm.fingerprint import fingerprint_distance
from unweave.lm.model import LM, Tokens
from unweave.lm.shortcuts import last_tokens_only

IDS = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(1))


def logits(lm: LM, ids: torch.Tensor | Tokens = IDS) -> torch.Tensor:
    out = lm(ids)
    assert out is not None
    return out


@pytest.fixture(params=FAMILIES)
def lm(request: pytest.FixtureRequest, tiny) -> LM:  # type: ignore[no-untyped-def]
    return LM(tiny(request.param), None)


def test_lm_computes_what_the_model_computes(lm: LM) -> None:
    with torch.no_grad():
        assert torch.equal(logits(lm), lm.model(IDS).logits)


def test_residual_stream_adds_up_and_matches_hidden_states(lm: LM) -> None:
    points = lm.layout.points()
    with lm.taps(read=[Site(p, layer) for p in points for layer in range(3)]) as seen:
        lm(IDS)
    with torch.no_grad():
        hidden = lm.model(IDS, output_hidden_states=True).hidden_states
    for layer in range(3):
        pre, attention, mlp, post = (seen[f"{p}.{layer}"] for p in ("resid_pre", "attn_add", "mlp_add", "resid_post"))
        torch.testing.assert_close(pre + attention + mlp, post, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(hidden[layer], pre, rtol=0, atol=0)
        if "resid_mid" in points:
            torch.testing.assert_close(pre + attention, seen[f"resid_mid.{layer}"], rtol=1e-5, atol=1e-5)


def test_identity_edit_leaves_logits_bit_equal_at_every_site(lm: LM) -> None:
    before = logits(lm)
    for site in lm.sites():
        with lm.taps(edit={site: lambda x, at: x.clone()}):
            assert torch.equal(logits(lm), before), site
        with lm.taps(edit={site: lambda x, at: None}):
            assert torch.equal(logits(lm), before), site


def test_trap_12_editing_a_site_is_what_a_later_read_of_the_stream_sees(lm: LM) -> None:
    """A shift at resid_mid must reach both the norm and the stream around it, not just the norm's input."""
    shift = torch.randn(32, generator=torch.Generator().manual_seed(2))
    sites = [
        Site(p, 1) for p in ("resid_pre", "resid_mid", "attn_add", "mlp_add", "resid_post") if p in lm.layout.points()
    ]
    for site in sites:
        with lm.taps(
            read=[site, "resid_mid.1" if "resid_mid" in lm.layout.points() else site, "mlp_add.1", "resid_post.1"]
        ) as plain:
            lm(IDS)
        with lm.taps(read=[site, "mlp_add.1", "resid_post.1"], edit={site: lambda x, at: x + shift}) as moved:
            lm(IDS)
        torch.testing.assert_close(moved[site], plain[site] + shift, rtol=1e-5, atol=1e-5)
        if site.point in ("resid_mid", "attn_add") and "resid_mid" in lm.layout.points():
            expected = plain["resid_mid.1"] + shift + moved["mlp_add.1"]
            torch.testing.assert_close(moved["resid_post.1"], expected, rtol=1e-4, atol=1e-4)


def test_edit_changes_logits_at_every_site(lm: LM) -> None:
    before = logits(lm)
    for site in lm.sites():
        with lm.taps(
            edit={site: lambda x, at: x + torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(3))}
        ):
            assert not torch.allclose(logits(lm), before, atol=1e-4), site


def test_trap_18_stop_runs_no_later_block(lm: LM) -> None:
    ran: list[int] = []
    handles = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(lm.layout.blocks)]
    with lm.taps(read=["resid_post.1"], stop="resid_post.1") as seen:
        assert lm(IDS) is None
    assert seen["resid_post.1"].shape == (2, 12, 32)
    assert 2 not in ran
    for handle in handles:
        handle.remove()


def test_hooks_are_gone_afterwards_even_after_an_error(lm: LM) -> None:
    before = logits(lm)

    def fails(x: torch.Tensor, at: object) -> torch.Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), lm.taps(edit={"resid_post.1": fails}):
        lm(IDS)
    assert torch.equal(logits(lm), before)
    assert not lm.sessions


def test_trap_01_padding_side_does_not_matter(lm: LM) -> None:
    rows = [([5, 6, 7, 8, 9], [4] * 5), ([11, 12, 13], [4] * 3)]
    values = {}
    for side in ("left", "right"):
        tokens = Tokens.pad(rows, 0, side)  # type: ignore[arg-type]
        with lm.taps(read=["resid_post.2"]) as seen:
            out = logits(lm, tokens)
        values[side] = seen["resid_post.2"][tokens.mask], out[tokens.mask]
    alone = logits(lm, torch.tensor([[11, 12, 13]]))
    for left, right in zip(values["left"], values["right"], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values["right"][1][5:], alone[0], rtol=1e-4, atol=1e-5)


def test_gradients_reach_an_edit_and_only_when_asked(lm: LM) -> None:
    push = torch.zeros(32, requires_grad=True)
    with lm.taps(edit={"resid_post.0": lambda x, at: x + push}):
        assert not logits(lm).requires_grad
    with lm.taps(read=["resid_post.1"], edit={"resid_post.0": lambda x, at: x + push}, grad=True) as seen:
        out = logits(lm)[0, -1, 3]
    assert seen["resid_post.1"].requires_grad
    (gradient,) = torch.autograd.grad(out, push)
    assert gradient.abs().sum() > 0


def test_edits_see_every_step_of_cached_generation(lm: LM) -> None:
    """Greedy continuation under an edit, with the cache, equals the loop that runs everything anew each time."""
    shift = torch.randn(32, generator=torch.Generator().manual_seed(4))
    steps = []

    def edit(x: torch.Tensor, at) -> torch.Tensor:  # type: ignore[no-untyped-def]
        steps.append((at.step, tuple(at.ids.shape), bool(at.mask.all())))
        return x + shift

    got = lm.generate_ids(Tokens.of(IDS), {"resid_post.1": edit}, max_new_tokens=5)
    assert [step for step, _, _ in steps] == list(range(len(steps)))
    assert steps[0][1] == (2, 12) and steps[1][1] == (2, 1)
    for row in range(2):
        ids = IDS[row : row + 1]
        for token in got[row].tolist():
            with lm.taps(edit={"resid_post.1": lambda x, at: x + shift}):
                scores = logits(lm, ids)[0, -1]
            assert scores[token] >= scores.max() - 1e-4
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
            if token == lm.model.generation_config.eos_token_id:
                break


def test_greedy_is_greedy_whatever_the_model_ships(lm: LM) -> None:
    plain = lm.generate_ids(Tokens.of(IDS), max_new_tokens=8)
    own = lm.model.generation_config
    own.do_sample, own.top_p, own.repetition_penalty, own.no_repeat_ngram_size = True, 0.9, 1.9, 2
    for seed in (0, 1):
        assert torch.equal(lm.generate_ids(Tokens.of(IDS), max_new_tokens=8, seed=seed), plain)
    assert lm.model.generation_config is own
    with pytest.raises(UnweaveError, match="0 tokens"):
        lm.generate_ids(Tokens.of(IDS), max_new_tokens=0)


def test_taps_nest(lm: LM) -> None:
    with lm.taps(read=["resid_post.1"]) as outer:
        with lm.taps(read=["resid_post.1"]) as inner:
            lm(IDS)
        assert torch.equal(outer["resid_post.1"], inner["resid_post.1"])
        lm.generate_ids(Tokens.of(IDS), max_new_tokens=2)
    assert not lm.sessions


def test_a_device_that_is_not_there_is_refused() -> None:
    for device in ("gpu", "cuda:77"):
        with pytest.raises(UnweaveError, match="device"):
            LM.load("smollm2-135m-instruct", device=device)


def test_trap_38_in_place_edit_is_refused(lm: LM) -> None:
    with pytest.raises(UnweaveError, match="in place"), lm.taps(edit={"resid_post.1": lambda x, at: x.add_(1)}):
        lm(IDS)


def test_trap_13_wrong_shape_is_refused(lm: LM) -> None:
    with pytest.raises(UnweaveError, match="returned"), lm.taps(edit={"resid_post.1": lambda x, at: x[:1]}):
        lm(IDS)
    lm.model.register_forward_pre_hook(lambda *_: None)
    lm.layout.blocks[1].register_forward_hook(lambda m, a, out: (out[0] if isinstance(out, tuple) else out).mean(0))
    with pytest.raises(UnweaveError, match="not \\[batch"), lm.taps(read=["resid_post.1"], stop="resid_post.1"):
        lm(IDS)


def test_sites_that_do_not_exist(lm: LM) -> None:
    for bad in ("resid_post.3", "resid_past.1", "resid_post", "embed.1", "path.no.such.module"):
        with pytest.raises(UnweaveError):
            lm.site(bad)
    if lm.layout.parallel:
        with pytest.raises(UnweaveError, match="parallel"):
            lm.site("resid_mid.1")
    with pytest.raises(UnweaveError, match="not asked for"), lm.taps(read=["embed"]) as seen:
        lm(IDS)
        seen["resid_post.1"]
    with (
        pytest.raises(UnweaveError, match="no forward pass"),
        lm.taps(read=["resid_post.2"], stop="resid_post.0") as seen,
    ):
        lm(IDS)
        seen["resid_post.2"]


def test_logits_of_the_last_position_can_be_read_and_edited(lm: LM) -> None:
    last = logits(lm)[:, -1]
    with lm.taps(read=["logits"], edit={"logits": lambda x, at: x * 2}) as seen:
        out = lm(IDS, keep_logits=1)
    assert seen["logits"].shape[:2] == (2, 1)
    if lm.model.config.model_type != "gemma2":  # which caps its logits after the unembedding
        torch.testing.assert_close(out[:, -1], 2 * last, rtol=1e-4, atol=1e-5)  # type: ignore[index]


def test_module_paths_are_an_escape_hatch(lm: LM) -> None:
    blocks = lm.layout.family.blocks
    with lm.taps(read=[f"path.{blocks}.1", f"path.{blocks}.1@in", "resid_post.1", "resid_pre.1"]) as seen:
        lm(IDS)
    assert torch.equal(seen[f"path.{blocks}.1"], seen["resid_post.1"])
    assert torch.equal(seen[f"path.{blocks}.1@in"], seen["resid_pre.1"])


def test_trap_12_fingerprint_tells_models_and_layers_apart(lm: LM) -> None:
    own = lm.fingerprint("resid_post.1")
    assert fingerprint_distance(own, LM(copy.deepcopy(lm.model), None).fingerprint("resid_post.1")) < 1e-5
    assert fingerprint_distance(own, lm.fingerprint("resid_post.0")) > 0.1
    other = copy.deepcopy(lm.model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.02)
    assert fingerprint_distance(own, LM(other, None).fingerprint("resid_post.1")) > 1e-3
    half = LM(copy.deepcopy(lm.model).to(torch.bfloat16), None)
    assert fingerprint_distance(own, half.fingerprint("resid_post.1")) < 5e-2


def test_trap_15_attention_kernels_agree_in_float32(tiny) -> None:  # type: ignore[no-untyped-def]
    model = tiny("llama")
    fast = logits(LM(model, None))
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(LM(model, None)), fast, rtol=0, atol=5e-4)


def test_unknown_family_and_broken_layout_are_refused(tiny) -> None:  # type: ignore[no-untyped-def]
    model = tiny("llama")
    model.config.model_type = "mystery"
    with pytest.raises(UnweaveError, match="mystery"):
        LM(model, None)
    model = tiny("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda m, a, out: out * 2)  # runs before our read sees the output
    model.model.layers[1].register_forward_hook(lambda m, a, out: out + 1)
    with pytest.raises(UnweaveError, match="block 1"):
        LM(model, None)


def test_bfloat16_model_passes_its_own_check(tiny) -> None:  # type: ignore[no-untyped-def]
    for family in ("llama", "gemma2", "gpt2", "gpt_neox"):
        assert LM(tiny(family).to(torch.bfloat16), None).dtype == torch.bfloat16


def test_logit_lens_is_the_final_norm_and_unembedding(tiny) -> None:  # type: ignore[no-untyped-def]
    lm = LM(tiny("gpt2"), None)
    d = torch.randn(3, 32)
    norm = lm.model.transformer.ln_f
    centred = d - d.mean(-1, keepdim=True)
    expected = centred / (centred.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt() * norm.weight
    torch.testing.assert_close(lm.logit_lens(d), expected @ lm.model.lm_head.weight.T, rtol=1e-4, atol=1e-4)


# -- beginning in the middle ------------------------------------------------------------------------------------------

# Every place where a pass may begin: (site, blocks that do not run)
BEGINNINGS = [("embed", 0), ("resid_pre.0", 0), ("resid_post.0", 1), ("resid_pre.2", 2), ("resid_post.2", 3)]


def padded() -> Tokens:
    return Tokens.pad([([5, 6, 7, 8, 9], [4] * 5), ([11, 12, 13], [4] * 3)], 0, "left")


def value_at(lm: LM, site: str, tokens: Tokens) -> torch.Tensor:
    with lm.taps(read=[site], stop=site) as seen:
        lm(tokens)
    return seen[site]


@pytest.mark.parametrize(("site", "skipped"), BEGINNINGS)
def test_a_pass_that_begins_in_the_middle_ends_alike(lm: LM, site: str, skipped: int) -> None:
    """Same logits bit for bit, padding on the left included; what lies below is not computed; all is put back."""
    blocks = lm.layout.blocks
    ran: list[int] = []
    parts = [block.get_submodule(lm.layout.family.mlp) for block in blocks]
    handles = [part.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, part in enumerate(parts)]
    for tokens in (padded(), Tokens.of(IDS)):
        before, value = logits(lm, tokens), value_at(lm, site, tokens)
        ran.clear()
        with lm.taps(start=(site, value), read=[site, "final_norm"]) as seen:
            other = Tokens(tokens.ids.flip(1), tokens.mask, tokens.roles)  # which tokens they are no longer matters
            assert torch.equal(logits(lm, other), before)
        assert ran == list(range(skipped, 3))
        assert torch.equal(seen[site], value)
        assert not any("forward" in vars(block) for block in blocks)
        assert torch.equal(logits(lm, tokens), before)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(("site", "skipped"), BEGINNINGS)
def test_gradients_at_a_beginning_are_those_of_the_whole_pass(lm: LM, site: str, skipped: int) -> None:
    tokens = padded()
    shift = torch.zeros(2, 5, 32, requires_grad=True)
    with lm.taps(edit={site: lambda x, at: x + shift}, grad=True):
        (expected,) = torch.autograd.grad(logits(lm, tokens)[:, -1, 3].sum(), shift)
    value = value_at(lm, site, tokens).requires_grad_()
    with lm.taps(start=(site, value), grad=True):
        (found,) = torch.autograd.grad(logits(lm, tokens)[:, -1, 3].sum(), value)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert found.abs().sum() > 0


def test_edits_reads_and_stops_above_a_beginning_work(lm: LM) -> None:
    shift = torch.randn(32, generator=torch.Generator().manual_seed(2))
    edit = {site: lambda x, at: x + shift for site in ("resid_post.0", "mlp_add.1", "resid_post.1")}
    with lm.taps(edit=edit, read=["attn_in.1", "resid_post.1"]) as whole:
        before = logits(lm)
    value = value_at(lm, "resid_post.0", Tokens.of(IDS))
    with lm.taps(read=["resid_pre.1"]) as outer, lm.taps(start=("resid_post.0", value), edit=edit, read=whole) as seen:
        assert torch.equal(logits(lm), before)
    assert all(torch.equal(seen[site], whole[site]) for site in whole)
    assert torch.equal(outer["resid_pre.1"], value)  # opened before, and still the value that the pass begins with
    with lm.taps(start=("resid_post.0", value), read=["resid_post.0"], stop="resid_post.0") as seen:
        assert lm(IDS) is None
    assert torch.equal(seen["resid_post.0"], value)


def test_what_lies_below_a_beginning_is_refused(lm: LM) -> None:
    blocks, value = lm.layout.family.blocks, torch.zeros(2, 12, 32)
    begin = ("resid_post.1", value)
    below = ["embed", "resid_pre.0", "resid_post.0", "mlp_add.1", "resid_pre.1", f"path.{blocks}.0"]
    for site in below:
        for taken in ({"read": [site]}, {"edit": {site: lambda x, at: None}}, {"stop": site}):
            with pytest.raises(UnweaveError, match=r"lies below resid_post\.1"), lm.taps(start=begin, **taken):
                pass
        with pytest.raises(UnweaveError, match="lies below"), lm.taps(read=[site]), lm.taps(start=begin):
            pass
        with pytest.raises(UnweaveError, match="lies below"), lm.taps(start=begin), lm.taps(read=[site]):
            pass
    with pytest.raises(UnweaveError, match="lies below"), lm.taps(["embed"], start=("resid_pre.0", value)):
        pass
    for site in ("mlp_add.1", "final_norm", "logits", f"path.{blocks}.1"):
        with pytest.raises(UnweaveError, match="cannot begin at"), lm.taps(start=(site, value)):
            pass
    with pytest.raises(UnweaveError, match="start= once"), lm.taps(start=begin), lm.taps(start=begin):
        pass
    for wrong in (value[:1], value[:, 1:], value[..., 1:]):
        with pytest.raises(UnweaveError, match="one row per row"), lm.taps(start=("resid_post.1", wrong)):
            lm(IDS)
    with pytest.raises(UnweaveError, match="with a cache"), lm.taps(start=begin):
        lm.generate_ids(Tokens.of(IDS), max_new_tokens=2)
    assert not lm.sessions


def test_a_model_is_whole_again_after_an_error(lm: LM) -> None:
    before = logits(lm)
    own = lm.layout.blocks[0].forward
    lm.layout.blocks[0].forward = lambda *a, **k: own(*a, **k)  # someone else's, which must stay
    theirs = lm.layout.blocks[0].forward

    def fails(x: torch.Tensor, at: object) -> torch.Tensor:
        raise RuntimeError("no")

    with (
        pytest.raises(RuntimeError, match="no"),
        lm.taps(start=("resid_post.1", torch.zeros(2, 12, 32)), edit={"mlp_add.2": fails}),
    ):
        lm(IDS)
    assert lm.layout.blocks[0].forward is theirs
    assert not any("forward" in vars(block) for block in lm.layout.blocks[1:])
    assert torch.equal(logits(lm), before)
    assert not lm.sessions


def test_a_beginning_takes_the_models_precision(tiny) -> None:  # type: ignore[no-untyped-def]
    lm = LM(tiny("llama").bfloat16(), None)
    before, value = logits(lm), value_at(lm, "resid_post.0", Tokens.of(IDS))
    with lm.taps(start=("resid_post.0", value.double())):
        found = logits(lm)
    assert found.dtype == torch.bfloat16 and torch.equal(found, before)


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_left_out_of_the_last_block_change_no_last_logits(lm: LM, side: str) -> None:
    """Nor their gradients, at any position of any earlier value; and the MLP really sees one token a row."""
    tokens = Tokens.pad([([5, 6, 7, 8, 9], [4] * 5), ([11, 12, 13], [4] * 3)], 0, side)  # type: ignore[arg-type]
    rows, last = torch.arange(2), torch.tensor([4, 4 if side == "left" else 2])
    value = value_at(lm, "resid_post.0", tokens).requires_grad_()
    seen: list[int] = []
    block = lm.layout.blocks[-1]
    down = block.get_submodule(lm.layout.family.act)
    handle = down.register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape[1]))
    with lm.taps(start=("resid_post.0", value), grad=True):
        whole = logits(lm, tokens)[rows, last]
        with last_tokens_only(lm, last):
            less = logits(lm, tokens)[rows, last]
    handle.remove()
    assert seen == [5, 1]
    torch.testing.assert_close(less, whole, rtol=1e-5, atol=1e-5)
    probe = torch.randn(97, generator=torch.Generator().manual_seed(5))
    (expected,), (found,) = (torch.autograd.grad((out @ probe).sum(), value) for out in (whole, less))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not any("forward" in vars(module) for module in lm.model.modules())
    with pytest.raises(IndexError), last_tokens_only(lm, last + 9):
        lm(tokens)
    assert not any("forward" in vars(module) for module in lm.model.modules())
