"""Every mode of editing against its formula, with strengths by row, on parts of the text, and while a latent fires."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.data.policy import TokenPolicy
from unweave.lm.chat import Role
from unweave.lm.model import LM, Tokens
from unweave.sae import steered
from unweave.sae.activations import Activation, JumpReLU, ReLU, TopK
from unweave.sae.edits import MODES, Change, together
from unweave.sae.module import SAE
from unweave.sae.steered import generate_sweep, prompt_tokens, until_end

D, F = 32, 40
SITE = Site("resid_post", 1)
IDS = torch.randint(4, 97, (3, 9), generator=torch.Generator().manual_seed(1))
NAN = float("nan")


def draw_sae(activation: Activation | None = None, seed: int = 0, site: Site = SITE, **about: Any) -> SAE:
    g = torch.Generator().manual_seed(seed)
    shapes = ((D, F), (F,), (F, D), (D,))
    weights = [torch.randn(*shape, generator=g) * 0.3 for shape in shapes]
    return SAE(*weights, activation or ReLU(), read=site, **about)


def values_at(lm: LM, tokens: Tokens | Tensor, edit: Any = None, site: Site = SITE) -> Tensor:
    with lm.taps(read=[site], edit=edit, stop=site) as seen:
        lm(tokens)
    return seen[site]


def by_hand(sae: SAE, mode: str, x: Tensor, values: dict[int, float]) -> Tensor:
    """One token's new activation [D], with the whole SAE encoded and decoded and its error added back."""
    if mode == "project":
        rows = sae.W_dec[list(values)].double()
        share = next(iter(values.values()))
        return (x.double() - share * (torch.linalg.pinv(rows) @ rows @ x.double())).float()
    f = sae.encode(x)
    new = f.clone()
    for j, c in values.items():
        now = float(f[j])
        new[j] = {
            "clamp": c, "add": now + c, "multiply": now * c, "cap": min(now, c), "min-clamp": max(now, c),
        }[mode]  # fmt: skip
    return sae.decode(new) + (x - sae.decode(f))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", [ReLU(), JumpReLU(torch.full((F,), 0.4)), TopK(6)])
def test_each_mode_by_its_formula_in_every_family(tiny: Callable[..., Any], mode: Any, activation: Activation) -> None:
    sae = draw_sae(activation)
    for family in ("llama", "gemma2", "gpt2", "gpt_neox"):
        lm = LM(tiny(family), None)
        x = values_at(lm, IDS)
        f = sae.encode(x)
        j, k = f.sum((0, 1)).topk(2).indices.tolist()  # latents that fire here
        level = float(f[..., j][f[..., j] > 0].median()) if mode in ("cap", "min-clamp") else 0.7
        values = {j: level, k: level}
        got = values_at(lm, IDS, sae.edit(mode, values))
        expected = torch.stack([torch.stack([by_hand(sae, mode, token, values) for token in row]) for row in x])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(got, x, atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_strengths_by_row_are_the_edits_of_rows_alone(tiny_lm: Callable[..., LM], mode: Any) -> None:
    """NaN leaves a row as it is, bit by bit."""
    lm, sae = tiny_lm("qwen3"), draw_sae()
    x = values_at(lm, IDS)
    j, k = sae.encode(x).sum((0, 1)).topk(2).indices.tolist()
    rows = [0.5, NAN, 2.0]
    values: dict[int, Any] = {j: torch.tensor(rows)}
    if mode != "project":
        values[k] = 0.25
    got = values_at(lm, IDS, sae.edit(mode, values))
    for b, value in enumerate(rows):
        alone = {**({} if value != value else {j: value}), **{n: c for n, c in values.items() if n == k}}
        expected = values_at(lm, IDS[b : b + 1], sae.edit(mode, alone) if alone else None)
        torch.testing.assert_close(got[b : b + 1], expected, rtol=1e-4, atol=1e-5)
    assert mode != "project" or torch.equal(got[1], x[1])


def test_rows_of_different_latents_saes_sites_and_modes_are_one_batch(tiny_lm: Callable[..., LM]) -> None:
    lm = tiny_lm("smollm3")
    low, high = draw_sae(seed=1, site=Site("resid_post", 0)), draw_sae(TopK(5), seed=2)
    rows = [
        [Change(low, 3, 4.0), Change(high, 7, -2.0, "add")],
        [],
        [Change(high, 7, 1.0, "add"), Change(high, 8, 3.0, "add"), Change(high, 1, 1.0, "project")],
    ]
    got = values_at(lm, IDS, together(rows), Site("resid_post", 2))
    alone = [
        [low.clamp({3: 4.0}), high.add({7: -2.0})],
        None,
        [high.add({7: 1.0, 8: 3.0}), high.ablate([1], mode="span")],
    ]
    for b, edits in enumerate(alone):
        expected = values_at(lm, IDS[b : b + 1], edits, Site("resid_post", 2))
        torch.testing.assert_close(got[b : b + 1], expected, rtol=1e-4, atol=1e-5)
    assert len(together(rows)) == 3  # changes that are alike share an edit
    assert together([[], []]) == []


def test_the_order_of_a_rows_changes_is_its_own(tiny_lm: Callable[..., LM]) -> None:
    """Clamp and add at one latent do not commute; a row alone and beside rows of another order is the same."""
    lm, sae = tiny_lm(), draw_sae()
    push, hold, more = Change(sae, 3, 4.0, "add"), Change(sae, 3, 1.0), Change(sae, 5, 2.0, "add")
    rows = [[push, hold], [hold, push], [push, hold, more], [hold], [more, hold, push]]
    ids = IDS[:1].expand(len(rows), -1)
    got = values_at(lm, ids, together(rows))
    for b, row in enumerate(rows):
        torch.testing.assert_close(got[b : b + 1], values_at(lm, ids[:1], together([row])), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got[0], got[1], atol=1e-2)
    assert len(together([*rows, *rows])) == 3


def test_directions_that_a_row_projects_out_are_one_span(tiny_lm: Callable[..., LM]) -> None:
    lm, sae = tiny_lm(), draw_sae()
    rows = [[Change(sae, 3, 1.0, "project"), Change(sae, 4, 1.0, "project")], [Change(sae, 3, 1.0, "project")], []]
    got = values_at(lm, IDS, together(rows))
    for b, latents in enumerate(([3, 4], [3])):
        expected = values_at(lm, IDS[b : b + 1], sae.ablate(latents, mode="span"))
        torch.testing.assert_close(got[b : b + 1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda sae: sae.edit("turn", {1: 1.0}), "unknown way to steer"),
        (lambda sae: sae.clamp({1: torch.tensor([1.0, float("inf")])}), "the value for latent 1"),
        (lambda sae: sae.clamp({1: torch.ones(2, dtype=torch.bool)}), "the value for latent 1"),
        (lambda sae: sae.clamp({1: torch.ones(2), 2: torch.ones(3)}), r"for \[2, 3\] rows"),
        (lambda sae: sae.edit("project", {1: 1.0, 2: 0.5}), "different strengths"),
        (lambda sae: sae.clamp({1: 1.0}, where="answer:0"), "which tokens to edit"),
        (lambda sae: sae.clamp({1: 1.0}, when=sae.fires(F)), "does not exist"),
        (lambda sae: sae.fires(1, NAN), "cannot be above"),
        (lambda sae: together([[Change(sae, 1, 1.0), Change(sae, 1, 2.0)]]), "set twice"),
        (lambda sae: together([[Change(sae, 1, NAN)]]), "latent 1 of row 0"),
        (lambda sae: together([[Change(sae, 1, 1e39)]]), r"the value for latent 1 is \[1e\+39\]"),
        (lambda sae: sae.clamp({1: torch.ones(0)}), r"the value for latent 1 is \[\]"),
    ],
)
def test_edits_that_make_no_sense_are_refused(wrong: Callable[[SAE], Any], message: str) -> None:
    with pytest.raises(UnweaveError, match=message):
        wrong(draw_sae())


def test_a_batch_of_one_row_has_strengths_by_row_too(tiny_lm: Callable[..., LM]) -> None:
    lm, sae = tiny_lm(), draw_sae()
    x = values_at(lm, IDS[:1])
    assert torch.equal(values_at(lm, IDS[:1], sae.add({1: torch.tensor([NAN])})), x)
    one = values_at(lm, IDS, sae.add({1: torch.tensor([2.0])}))
    torch.testing.assert_close(one, values_at(lm, IDS, sae.add({1: 2.0})))


def test_strengths_for_another_number_of_rows_are_refused(tiny_lm: Callable[..., LM]) -> None:
    sae = draw_sae()
    for mode in ("clamp", "project"):
        with pytest.raises(UnweaveError, match="for 2 rows, and the batch has 3"):
            values_at(tiny_lm(), IDS, sae.edit(mode, {1: torch.ones(2)}))


# -- where ------------------------------------------------------------------------------------------------------------

TURNS = [
    [Role.PAD, Role.SPECIAL, Role.USER, Role.ASSISTANT, Role.USER, Role.SPECIAL],
    [Role.SPECIAL, Role.USER, Role.SPECIAL, Role.ASSISTANT, Role.ASSISTANT, Role.ASSISTANT],
    [Role.TEXT, Role.TEXT, Role.ASSISTANT, Role.ASSISTANT, Role.ASSISTANT, Role.ASSISTANT],
]  # an earlier answer is part of the prompt; the last one was begun
ANSWER = [[0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 2, 3], [0, 0, 1, 2, 3, 4]]


def _tokens() -> Tokens:
    roles = torch.tensor([[int(role) for role in row] for row in TURNS], dtype=torch.uint8)
    return Tokens(torch.arange(10, 28).view(3, 6), roles != int(Role.PAD), roles)


def test_where_by_part_of_the_text(tiny_lm: Callable[..., LM]) -> None:
    lm, tokens, answer = tiny_lm(), _tokens(), torch.tensor(ANSWER)
    sae = draw_sae(policy=TokenPolicy((12, 25)))
    trained = tokens.mask & ~torch.isin(tokens.ids, torch.tensor([12, 25]))
    before = values_at(lm, tokens)
    cases = {"prompt": answer == 0, "answer": answer > 0, "answer:3": answer >= 3, "policy": answer >= 0}
    for where, part in cases.items():
        after = values_at(lm, tokens, sae.add({1: 4.0}, where=where))
        assert torch.equal((before != after).any(-1), part & trained), where


def test_parts_of_the_text_are_known_at_every_step(tiny_lm: Callable[..., LM]) -> None:
    """With and without kept keys, after prompts of different lengths."""
    lm = tiny_lm()
    lm.model.generation_config.eos_token_id = lm.model.config.eos_token_id = None
    lm.tokenizer = None
    prompt = Tokens.pad([([40, 41, 42], [2, 2, 0]), ([50], [4])], 2, "left")
    for kept in (True, False):
        lm.may_cache = lambda *_, kept=kept: kept  # type: ignore[method-assign]
        seen: list[list[list[int]]] = []
        lm.generate_ids(prompt, {"embed": lambda x, at: seen.append(at.answer.tolist())}, max_new_tokens=4)  # noqa: B023
        new = [list(range(1, n + 1)) for n in range(4)]
        whole = [[[0, 0, 0, *row]] * 2 for row in new]
        assert seen == ([whole[0], *([[[n]] * 2 for n in (1, 2, 3)])] if kept else whole)


# -- while a latent fires ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("at", ["resid_post.0", "mlp_add.1", "resid_post.1"])
def test_an_edit_waits_for_a_latent_of_the_same_site_or_an_earlier_one(
    tiny_lm: Callable[..., LM], family: str, at: str
) -> None:
    lm, sae = tiny_lm(family), draw_sae()
    other = draw_sae(seed=5, site=Site.parse(at), policy=TokenPolicy((int(IDS[0, 3]),)))
    values = other.encode(values_at(lm, IDS, site=Site.parse(at)))
    j = int(values.sum((0, 1)).argmax())
    above = float(values[..., j].flatten().sort().values[12:14].mean())  # between two values
    firing = (values[..., j] > above) & (IDS[0, 3] != IDS)
    before = values_at(lm, IDS)
    after = values_at(lm, IDS, sae.add({1: 4.0}, where="all", when=other.fires(j, above)))
    assert torch.equal((before != after).any(-1), firing)
    assert bool(firing.any()) and not bool(firing.all())


def test_a_latent_that_is_read_too_late_or_in_no_known_place_is_refused(tiny_lm: Callable[..., LM]) -> None:
    lm, sae = tiny_lm(), draw_sae()
    late, nowhere = draw_sae(site=Site("attn_in", 2)), SAE(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, ReLU())
    for other, message in ((late, "read later, at attn_in.2"), (nowhere, "named no site")):
        with pytest.raises(UnweaveError, match=message):
            values_at(lm, IDS, sae.add({1: 4.0}, when=other.fires(3)))


# -- many prompts and strengths in full batches -----------------------------------------------------------------------


def test_a_sweep_in_batches_is_every_row_alone(tiny_lm: Callable[..., LM], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of all lengths, SAEs, modes and strengths; in one batch, and in batches of one or two."""
    lm = tiny_lm("gemma2")
    low, high = draw_sae(seed=1, site=Site("resid_post", 0)), draw_sae(TopK(5), seed=2)
    tokens = prompt_tokens(lm, ["Hi", "Tell me about it.", "Why?", "Hi", "Once upon a time there was"], None)
    changes = [
        [Change(low, 3, 4.0)],
        [Change(high, 7, 6.0, "add"), Change(low, 2, 0.0)],
        [],
        [Change(high, 7, 6.0, "min-clamp", "answer")],
        [Change(high, 5, 3.0, when=low.fires(2))],
    ]
    wide = generate_sweep(lm, tokens, changes, max_new_tokens=8)
    monkeypatch.setattr(steered, "_BATCH_TOKENS", 90)
    narrow = generate_sweep(lm, tokens, changes, max_new_tokens=8)
    assert torch.equal(wide.ids, narrow.ids)
    texts = wide.texts(lm)
    for row, edits in enumerate(changes):
        alone = lm.generate_ids(tokens.rows(slice(row, row + 1)), together([edits]), max_new_tokens=8)[0]
        n = int(until_end(lm, alone[None]))
        assert wide.ids[row, :n].tolist() == alone[:n].tolist() and int(wide.lengths[row]) == n
        assert texts[row] == lm.decode(alone[:n])
    assert len(set(texts)) == len(texts)


def test_a_sweep_is_refused_before_anything_is_generated(tiny_lm: Callable[..., LM]) -> None:
    lm, sae = tiny_lm(), draw_sae()
    tokens = prompt_tokens(lm, ["Hi", "Why?"], None)
    late = draw_sae(site=Site("resid_post", 2))
    lm.generate_ids = None  # type: ignore[method-assign,assignment]
    for changes, message in (
        ([[]], "for 1 rows, there are 2 prompts"),
        ([[], [Change(sae, F, 1.0)]], "does not exist"),
        ([[], [Change(sae, 1, 1.0, when=late.fires(2))]], "read later"),
    ):
        with pytest.raises(UnweaveError, match=message):
            generate_sweep(lm, tokens, changes)
