"""What ablation does to the untrained model, against token by token computations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from helpers.attribution import make_sae
from unweave.core.errors import UnweaveError
from unweave.core.result import from_plain, to_plain
from unweave.core.site import Site
from unweave.data.policy import TokenPolicy
from unweave.latents.selection import Chosen, Selection, SiteChoice
from unweave.lm.model import LM
from unweave.methods.finetune.conditions import open_condition
from unweave.methods.finetune.diagnose import diagnose
from unweave.methods.finetune.diagnosis import Diagnosis, DirectionCheck
from unweave.methods.finetune.spec import ConditionSpec
from unweave.sae.activations import ReLU
from unweave.tasks.choices.encode import encode_choices
from unweave.tasks.choices.items import Item

ZERO, ONE = Site("resid_post", 0), Site("resid_post", 1)
ITEMS = [
    Item("the nurse is", "s", "h"), Item("who, then?", "h", "s"), Item("a doctor", "s", "h"), Item("so", "x", "y"),
]  # fmt: skip


def double(tiny_lm: Callable[..., LM], family: str = "gpt2") -> LM:
    lm = tiny_lm(family)
    lm.model.double()
    return lm


def latents(saes: dict[Site, Any], numbers: dict[Site, list[int]]) -> Selection:
    sites = tuple(SiteChoice(s, tuple(map(Chosen, js)), "sae", saes[s].digest()) for s, js in numbers.items())
    return Selection("chosen", "latents", sites, "m", 24, "rule")


def ahead(lm: LM, item: Item, edit: Any = None) -> float:
    ids = [int(lm.tokenize([answer]).ids[0, -1]) for answer in (item.correct, item.incorrect)]
    with lm.taps(edit=edit):
        logits = lm(lm.tokenize([item.prompt]))
    assert logits is not None
    return float(logits[0, -1, ids[0]] - logits[0, -1, ids[1]])


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen3"])
def test_projections_and_edits_token_by_token(tiny_lm: Callable[..., LM], family: str) -> None:
    lm = double(tiny_lm, family)
    policy = TokenPolicy(exclude_ids=(int(lm.tokenize(["a"]).ids[0, -1]),))
    saes = {ZERO: make_sae(lm, str(ZERO), 0, policy=policy), ONE: make_sae(lm, str(ONE), 1, activation=ReLU())}
    numbers = {ZERO: [3, 17], ONE: [5]}
    diagnosis = diagnose(lm, saes, latents(saes, numbers), encode_choices(lm, ITEMS), max_tokens=20)
    checks = {(one.site, one.number): one for one in diagnosis.directions}
    assert list(checks) == [(ZERO, 3), (ZERO, 17), (ONE, 5)]

    for site, sae in saes.items():
        xs = []
        for item in ITEMS:
            tokens = lm.tokenize([item.prompt])
            with lm.taps(read=[site]) as seen:
                lm(tokens)
            xs.append(seen[site][sae.policy.keep(seen[site], tokens.ids, tokens.mask)])
        x = torch.cat(xs)
        total = float(x.var(0, correction=0).sum())
        for j in numbers[site]:
            one, f, p = checks[site, j], sae.encode(x)[:, j], x @ F.normalize(sae.W_dec[j], dim=0)
            spread = float(p.std(correction=0))
            expected = (
                float(f.mean()), float((f != 0).double().mean()), float(p.mean()), spread, spread**2 / total,
                float(-f.mean() * sae.W_dec[j].norm()) / spread,
            )  # fmt: skip
            got = (one.activation, one.frequency, one.projection, one.deviation, one.share, one.zero_shift)
            assert got == pytest.approx(expected, abs=1e-5)
            assert one.span_adds == (float(p.mean()) < -spread)
        q = torch.linalg.qr(sae.W_dec[numbers[site]].T)[0]
        in_span = float((x @ q).var(0, correction=0).sum()) / total
        assert diagnosis.span_share[str(site)] == pytest.approx(in_span, abs=1e-5)

    before = torch.tensor([ahead(lm, item) for item in ITEMS])
    for kind in ("zero", "span"):
        edits = [sae.ablate(numbers[site], mode=kind) for site, sae in saes.items()]  # type: ignore[arg-type]
        after = torch.tensor([ahead(lm, item, edits) for item in ITEMS])
        one = next(one for one in diagnosis.edits if one.edit == kind)
        assert one.before == pytest.approx(float(before.mean()), abs=1e-4)
        assert one.change == pytest.approx(float((after - before).mean()), abs=1e-4)
        assert one.margin == pytest.approx(1.96 * float((after - before).std()) / 2, abs=1e-4)
        assert (one.right_before, one.right_after) == tuple(float((v > 0).double().mean()) for v in (before, after))
    weights = sum(weight.numel() for block in lm.layout.blocks for weight in block.parameters())
    costs = {one.edit: one.cost * weights for one in diagnosis.edits}
    assert costs["zero"] == costs["mean"] == pytest.approx(32 * 24 + 2 * 32 + 32 + 32)  # TopK computes all 24
    assert costs["span"] == pytest.approx(2 * 3 * 32)
    assert from_plain(Diagnosis, to_plain(diagnosis), "") == diagnosis


def test_a_condition_that_is_open_is_tried_as_it_is_and_texts_have_no_answers(tiny_lm: Callable[..., LM]) -> None:
    lm = double(tiny_lm)
    saes = {ONE: make_sae(lm, str(ONE))}
    selection, encoded = latents(saes, {ONE: [3, 5]}), encode_choices(lm, ITEMS)
    half = open_condition(ConditionSpec(kind="zero", strength=0.5), selection, lm, saes)
    diagnosis, whole = (diagnose(lm, saes, selection, encoded, conditions=one) for one in ([half], None))
    (edit,) = diagnosis.edits
    after = [ahead(lm, item, half.full) - ahead(lm, item) for item in ITEMS]
    assert edit.change == pytest.approx(sum(after) / len(after), abs=1e-6) and edit.change != whole.edits[0].change
    texts = diagnose(lm, saes, selection, [group.tokens for group in encoded.groups(2048)])
    assert texts.edits == () and texts.directions == whole.directions and texts.items == len(ITEMS)


def test_directions_keep_their_numbers(tiny_lm: Callable[..., LM]) -> None:
    lm = double(tiny_lm)
    rows = F.normalize(torch.randn(2, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    selection = Selection("pca", "directions", (SiteChoice(ONE, (Chosen(7), Chosen(2))),), "m", 20, "rule",
                          directions={ONE: rows})  # fmt: skip
    diagnosis = diagnose(lm, {}, selection, encode_choices(lm, ITEMS))
    assert [one.number for one in diagnosis.directions] == [7, 2]
    assert [one.edit for one in diagnosis.edits] == ["span", "mean"]
    for one in diagnosis.directions:
        assert one.activation == pytest.approx(one.projection, abs=1e-5)


def test_warnings_say_what_to_do(tiny_lm: Callable[..., LM]) -> None:
    lm = double(tiny_lm)
    sae = make_sae(lm, str(ONE))
    diagnosis = diagnose(lm, {ONE: sae}, latents({ONE: sae}, {ONE: [3]}), encode_choices(lm, ITEMS))
    edit, check = diagnosis.edits[0], diagnosis.directions[0]
    quiet = replace(edit, right_before=0.9, right_after=0.8)
    sound = replace(check, span_adds=False, zero_shift=-0.1)
    assert replace(diagnosis, directions=(sound,), edits=(quiet,)).warnings == ()
    broken = replace(quiet, right_after=0.6)
    bad = replace(sound, span_adds=True, zero_shift=-1.5)
    edits = (broken, replace(quiet, edit="span"))
    words = " ".join(replace(diagnosis, directions=(bad,), edits=edits).warnings)
    assert (
        "adds the concept" in words
        and "Firing nearly everywhere: resid_post.1/3." in words
        and "breaks the task" in words
    )
    assert replace(diagnosis, directions=(bad,), edits=(replace(quiet, edit="mean"),)).warnings == ()  # neither is done
    assert isinstance(check, DirectionCheck) and not replace(broken, right_before=0.55).breaks  # it never could do it


def test_nothing_counts(tiny_lm: Callable[..., LM]) -> None:
    lm = double(tiny_lm)
    sae = make_sae(lm, str(ONE), policy=TokenPolicy(max_norm=1e-6))
    with pytest.raises(UnweaveError, match="no token"):
        diagnose(lm, {ONE: sae}, latents({ONE: sae}, {ONE: [3]}), encode_choices(lm, ITEMS))
    with pytest.raises(UnweaveError, match="no SAE is at this site"):
        diagnose(lm, {}, latents({ONE: sae}, {ONE: [3]}), encode_choices(lm, ITEMS))
