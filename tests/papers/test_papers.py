"""The papers' recipes: what they compare, by hand-computed numbers, and the FAST recipe end to end on a tiny model."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from helpers.jobs import spec_of
from unweave.core.errors import UnweaveError
from unweave.core.intervals import Interval
from unweave.core.result import as_read, as_written
from unweave.inputs.subject import SAEInfo, Subject
from unweave.lm.model import LM
from unweave.methods.explain.rubric.result import Difference, JudgeInfo, RubricResult, Scores
from unweave.methods.special_tokens.result import (
    GROUPS,
    AlphaSweep,
    ByGroup,
    GroupErrors,
    SpecialTokenResult,
    Steering,
    SweetSpot,
    TokenErrors,
)
from unweave.methods.train.kinds import ReLUSpec, SAESpec, TopKSpec
from unweave.methods.train.presets import PRESETS
from unweave.methods.train.spec import TrainSpec
from unweave.papers.claims import Claim, markdown
from unweave.papers.instruct_saes import claims, errors_stage, figures, recipe, view
from unweave.papers.instruct_saes import plan as plans
from unweave.papers.instruct_saes.compare import cells, contest, curve, slope_at
from unweave.papers.instruct_saes.plan import Plan, plan_of
from unweave.papers.instruct_saes.result import RECIPES, InstructSaes, Measure, Measured, Rated
from unweave.papers.instruct_saes.spec import COMMAND, LAYERS, InstructSaesSpec
from unweave.sae.module import SAE

MEASURE = Measure("all")
SUBJECT = Subject("a model", "", (SAEInfo(None, "relu", 4, 8, None, "0" * 12),), {})


def token_errors(log2_mse: float | None, l0: float) -> TokenErrors:
    """The same numbers for every group of tokens."""
    mse = None if log2_mse is None else 2**log2_mse
    groups = ByGroup(**{group: GroupErrors(9, 1, mse, log2_mse, mse, log2_mse, 0.5, l0) for group in GROUPS})
    return TokenErrors(
        "unweave.special/1", "resid_post.1", "resid_post.1", 1, (0,), "template", groups, groups, 0, 1.0, None, 1.0,
        1.0, 10.0, None, 0, 0, 0, 0, 1.0, (),
    )  # fmt: skip


def measured(recipe: plans.Recipe, k: int | None, seed: int, l0: float, mse: float, kind: str = "relu") -> Measured:
    return Measured(recipe, kind, 4, "resid_post.1", k, seed, token_errors(math.log2(mse), l0))


def test_errors_are_moved_along_the_curve_to_the_same_l0() -> None:
    """A recipe whose error is exactly 1 / L0 has slope -1: at L0 32 every one of its SAEs has log2 MSE -5."""
    rows = [measured("FAST", k, 0, l0, 1 / l0) for k, l0 in ((16, 14.0), (32, 40.0), (64, 90.0))]
    rows += [measured("FAST", 32, 1, 36.0, 1 / 36), measured("FAST", 32, 2, 25.0, 1.1 / 25)]
    (cell,) = cells(rows, MEASURE, 32)
    assert cell.comparable
    assert cell.values == pytest.approx((-5, -5, -5 + math.log2(1.1)))
    assert cell.raw[0] == pytest.approx(-math.log2(40))
    assert cell.spread == pytest.approx(math.log2(1.1) / math.sqrt(3))


def test_one_l0_alone_is_not_a_curve() -> None:
    (cell,) = cells([measured("FAST", 32, 0, 30.0, 0.5)], MEASURE, 32)
    other = measured("BT(F)", 32, 0, 32.0, 0.25)
    found = contest([cell, *cells([other], MEASURE, 32)], "FAST", "BT(F)")
    assert (found.cells, found.left_out, claims.words(found)) == (0, 1, "nothing to compare")
    (as_trained,) = cells([measured("FAST", None, 0, 30.0, 0.5)], MEASURE, None)
    assert as_trained.comparable and as_trained.values == (-1.0,)
    assert not cell.comparable and cell.values == (-1.0,)
    assert slope_at([(1.0, 2.0), (1.0, 3.0)], 1.0) is None


def test_the_slope_is_that_of_the_segment_around_the_point() -> None:
    points = [(0.0, 0.0), (1.0, -1.0), (2.0, -4.0)]
    assert [slope_at(points, at) for at in (-1.0, 0.5, 1.0, 1.5, 9.0)] == [-1.0, -1.0, -1.0, -3.0, -3.0]


def test_a_measure_without_tokens_is_left_out() -> None:
    row = Measured("FAST", "relu", 4, "resid_post.1", 32, 0, token_errors(None, 3.0))
    assert cells([row], MEASURE, 32) == [] and curve([row], MEASURE, 0) == []


def test_contests_count_cells_and_what_every_seed_says() -> None:
    rows = [measured("FAST", 32, seed, 32.0, mse) for seed, mse in enumerate((0.25, 0.26))]
    rows += [measured("BT(F)", 32, seed, 32.0, mse) for seed, mse in enumerate((0.5, 0.255))]
    rows += [measured("FAST", 32, 0, 32.0, 1.0, "jumprelu"), measured("BT(F)", 32, 0, 32.0, 0.5, "jumprelu")]
    found = contest(cells(rows, MEASURE, 32), "FAST", "BT(F)")
    assert (found.cells, found.lower, found.clearly, found.clearly_higher) == (2, 1, 0, 0)  # one seed decides nothing
    by_hand = ((math.log2(0.25) + math.log2(0.26)) - (math.log2(0.5) + math.log2(0.255))) / 2 + 1
    assert found.mean_difference == pytest.approx(by_hand / 2)
    assert "lower in 1 of 2 cells" in claims.words(found)


def test_claims_as_a_table() -> None:
    text = markdown([Claim("a | b", "", "not measured")])
    assert text.splitlines()[2] == "| a \\| b | - | not measured |"


@pytest.mark.parametrize("spec", [InstructSaesSpec(), *(InstructSaesSpec(scale="paper", model=m) for m in LAYERS)])
def test_recipes_differ_in_their_data_alone(spec: InstructSaesSpec) -> None:
    plan = plan_of(spec)
    trainings = plan.trainings
    assert list(trainings) == ["BT(P)", "BT(F)", "FAST"]
    common = trainings["FAST"].data
    assert {replace(t, data=common).digest() for t in trainings.values()} == {trainings["FAST"].digest()}
    assert trainings["BT(F)"].data.sources == common.sources and common.dedup == 20
    packs = [(t.data.pack.packing, t.data.pack.context) for t in trainings.values()]
    assert packs == [("blocks", 2048), ("blocks", 2048), ("documents", 8192)]
    assert trainings["FAST"].stream.special_tokens == "include"


def test_the_smoke_scale_is_as_large_as_it_says() -> None:
    plan = plan_of(InstructSaesSpec())
    for training in plan.trainings.values():
        assert training.sae.tokens >= 300_000 and training.sae.expansion == 4
        assert training.sites == ("resid_post.{4,9,14}",)
    seeds = {(v["kind"][i], s) for v in training.variants for i in (0, 1) for s in v["seed"]}
    assert {("relu", 0), ("relu", 1), ("relu", 2), ("jumprelu", 2)} <= seeds


def test_paper_scale_measures_rates_and_steers_on_dialogues_that_share_none() -> None:
    """Sections 4.2, 5 and 6: 5,000 dialogues, an additional 10,000, and 1,000; special ids wherever they stand."""
    plan = plan_of(InstructSaesSpec(scale="paper"))
    texts = (plan.measured, plan.read, plan.steered)
    assert [text.heldout_documents for text in texts] == [5000, 10_000, 1000]
    parts = sorted(text.heldout_part for text in texts)
    assert all(before[1] <= after[0] for before, after in pairwise(parts))
    assert all(
        replace(t, heldout_documents=None, heldout_part=(0.0, 1.0)) == plan.trainings["FAST"].data for t in texts
    )
    assert plan.special_ids == (872, 77091, 151644, 151645) and plan.where == "anywhere"
    assert plan_of(InstructSaesSpec()).where == "template" and plan.conversations == 1000


@pytest.mark.parametrize(
    "asked",
    [
        {"model": "Qwen/Qwen2.5-7B-Instruct"},
        {"scale": "paper", "model": "gpt2"},
        {"rubric": False, "judge": {"model": "x"}},
    ],
)
def test_options_without_effect_are_refused(asked: dict) -> None:
    with pytest.raises(UnweaveError):
        InstructSaesSpec.from_dict(asked)


def tiny_plan(home: Path) -> Plan:
    base = spec_of(home)
    chat = replace(base.data, tokens=3000, dedup=20)
    base = replace(
        base,
        data=chat,
        stream=replace(base.stream, special_tokens="include", max_norm_ratio=None),
        sae=replace(base.sae, k=4, tokens=2048),
        variants=(
            {"kind": ["relu", "jumprelu"], "k": [4], "seed": [0, 1]},
            {"kind": ["relu", "jumprelu"], "k": [8], "seed": [0]},
        ),
    )
    trainings: dict[plans.Recipe, TrainSpec] = plans._recipes(
        base, replace(chat, dedup=0), chat, replace(chat.pack, packing="blocks"), chat.pack
    )
    heldout = replace(chat, heldout_tokens=1000)
    return Plan(trainings, heldout, heldout, heldout, "resid_post.1/jumprelu-k4-seed0", 2, 5)


def test_the_fast_recipe_end_to_end_and_again(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recipe, "plan_of", lambda spec: tiny_plan(home))
    spec = InstructSaesSpec(rubric=False, device="cpu")
    run = recipe.run(spec, tmp_path)
    result = run.result
    assert not run.reused and (run.path / "errors.png").stat().st_size > 10_000
    page = (run.path / "report.html").read_text()
    assert "FAST" in page and "data:image/png" in page and "http://" not in page.replace("http://www.w3.org", "")
    rows = result.rows()
    assert {"SAEs", "FAST against BT(P)", "FAST against BT(F)"} <= {row[0] for row in rows}
    assert rows[0][1] == len(result.saes) == 18
    assert {(one.recipe, one.kind, one.k, one.seed) for one in result.saes} == {
        (name, kind, k, seed)
        for name in ("BT(P)", "BT(F)", "FAST")
        for kind in ("relu", "jumprelu")
        for k, seed in ((4, 0), (4, 1), (8, 0))
    }
    for claim in claims.claims(result):
        assert claim.verdict in page and claim.verdict in (run.path / "claims.md").read_text()
    assert "Special tokens" in page and view.section(result).body in page
    assert (run.path / "table.md").read_text().count("| relu | resid_post.1 |") >= 4
    assert {(part.part, part.recipe) for part in result.runs} >= {("errors", None), ("train", "BT(P)")}
    assert all((tmp_path / part.run / "DONE").exists() for part in result.runs)
    assert type(result) is COMMAND.result and "uw-embed" in result._repr_html_()
    assert as_read(InstructSaes, as_written(result), "here") == result

    def fail(*args: object, **options: object) -> object:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(LM, "load", fail)
    monkeypatch.setattr(SAE, "load", fail)
    assert recipe.run(spec, tmp_path).reused


def test_a_curve_is_not_drawn_on_far_beyond_its_ends() -> None:
    rows = [measured("FAST", k, 0, l0, 1 / l0) for k, l0 in ((16, 500.0), (32, 520.0))]
    (cell,) = cells(rows, MEASURE, 32)
    assert not cell.comparable and cell.values == cell.raw == (pytest.approx(-math.log2(520)),)


def test_paper_scale_rows_have_no_k_and_widths_are_kinds_of_their_own() -> None:
    """The published recipes fix a coefficient; the smoke scale aims at an L0."""
    for name in PRESETS:
        assert errors_stage.aimed_at(SAESpec.from_dict({"preset": name})) is None
    assert errors_stage.aimed_at(ReLUSpec(k=32)) == errors_stage.aimed_at(TopKSpec(k=32)) == 32
    wide = [Measured("FAST", "jumprelu", width, "resid_post.12", None, 0, token_errors(-1.0, 9.0)) for width in (8, 16)]
    assert [cell.expansion for cell in cells(wide, MEASURE, None)] == [8, 16]
    assert [figures.kind_name(one.kind, one.expansion, wide) for one in wide] == ["jumprelu 8x", "jumprelu 16x"]
    assert figures.kind_name("jumprelu", 8, wide[:1]) == "jumprelu"


def steered() -> SpecialTokenResult:
    spot = SweetSpot((), False, 0.1, 1.25, 0.5)
    swept = AlphaSweep(3, (), 1.0, (), (), (), ())
    return SpecialTokenResult(SUBJECT, token_errors(-1.0, 20.0), (), Steering(swept, None, "absolute", spot, None))


def test_the_page_of_paper_scale(tmp_path: Path) -> None:
    """No k, one seed: errors as trained, at whatever L0; and no verdict from seeds that do not exist."""
    rows = tuple(
        Measured(name, "jumprelu", 8, "resid_post.12", None, 0, token_errors(math.log2(mse), 20.0))
        for name, mse in zip(RECIPES, (0.5, 0.3, 0.2), strict=True)
    )
    result = InstructSaes("paper", ("resid_post.12",), 40_960_000, None, rows, (), steered(), ())
    view.write(result, tmp_path)
    found = {claim.claim[:30]: claim for claim in claims.claims(result)}
    first = found["FAST reconstructs all tokens b"]
    assert first.verdict == "as claimed"
    assert "at equal coefficients, whatever the L0" in first.ours
    assert "(0 by every seed; 0 higher by every seed)" in first.ours
    assert found["steering with latents of speci"].verdict == "not measured"
    assert "±" not in (tmp_path / "table.md").read_text().split("###")[1]


@pytest.mark.parametrize(
    ("scored", "p", "verdict", "says"),
    [
        (8, 0.01, "not measured", "8 latents are too few"),
        (128, 0.2, "not measured", "not shown to tell latents from shuffled"),
        (128, 0.01, "as claimed", "FAST 50 %"),
    ],
)
def test_ratings_get_a_verdict_only_from_a_judge_that_reads(scored: int, p: float, verdict: str, says: str) -> None:
    def scores(mean: float, high: float) -> Scores:
        known = Interval(mean, None, None), Interval(high, None, None)
        return Scores(scored, scored, 0, {}, (0, 0, scored, 0, 0), *known, None)

    def result(high: float) -> RubricResult:
        above = Difference(1.0, 0.5, 2.0, p)
        judge = JudgeInfo("j", "", True)
        return RubricResult(SUBJECT, "x", 200, judge, scores(3.0, high), scores(2.0, 0.0), above, (), 0, 0)

    claim = claims.rating_claim([Rated("BT(P)", result(0.1)), Rated("BT(F)", result(0.2)), Rated("FAST", result(0.5))])
    assert claim.verdict == verdict and says in claim.ours
