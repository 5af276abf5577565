"""unweave saebench end to end on a tiny model, and what its intervals, files and refusals say."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import t

from helpers.jobs import spec_of
from unweave.core.errors import UnweaveError
from unweave.core.pieces import Pieces
from unweave.core.site import Site
from unweave.data.pack import Row
from unweave.data.policy import TokenPolicy
from unweave.methods.saebench import absorption, sparse_probing, view
from unweave.methods.saebench.labelled import Labelled, pooled_latents, problems_of, sparse
from unweave.methods.saebench.spec import (
    AbsorptionSpec,
    CoreSpec,
    ProbingSpec,
    RavelSpec,
    SaebenchSpec,
    ScrSpec,
    TppSpec,
)
from unweave.methods.saebench.spread import OWN, Scored, half_width, measure
from unweave.methods.saebench.stage import run
from unweave.methods.saebench.task import Bench
from unweave.methods.train import stage as train
from unweave.sae.activations import TopK
from unweave.sae.module import SAE

SITE = Site("resid_post", 1)


@pytest.fixture(scope="module")
def tagged(tmp_path_factory):
    """Texts about two things, told by their words; beside it texts about one of three, each of them calm or rough."""
    rng, folder = random.Random(0), tmp_path_factory.mktemp("tagged")
    words = {"sea": ["ship", "wave", "salt", "fish"], "land": ["tree", "road", "hill", "cart"],
             "sky": ["star", "bird", "wind"], "calm": ["still", "soft"], "rough": ["loud", "hard"]}  # fmt: skip
    rows = [
        {"text": " ".join(rng.choices([*words[label], "the", "and"], k=9)), "tags": [label]}
        for label in ("sea", "land") for _ in range(140)
    ]  # fmt: skip
    crossed = [
        {"text": " ".join(rng.choices(words[about] + words[how], k=8)), "tags": [about, how]}
        for about in ("sea", "land", "sky") for how in ("calm", "rough") for _ in range(70)
    ]  # fmt: skip
    fact = {"entity_class": "city", "attribute": "Country", "entity": "Oslo", "value": "Norway", "sentence": "In {} of"}
    for name, some in (("crossed", crossed), ("facts", [fact]), ("texts", rows)):
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, some)))
    return path


def spec(trained, tagged, **changes):
    base = SaebenchSpec(
        saes=(str(trained.path / "sae"),), seeds=3, device="cpu", batch_tokens=256,
        core=CoreSpec(tokens=1500, context=24, batch_rows=4),
        sparse_probing=ProbingSpec(sources=(str(tagged),), per_label=100, context=40, ks=(1, 3), strengths=(0.1, 1.0)),
        scr=ScrSpec(sources=(str(tagged.with_name("crossed.jsonl")),), pairs=("sea/land by calm/rough",), per_group=70,
                    ns=(2, 20), strengths=(0.1,)),
        tpp=TppSpec(sources=(str(tagged.with_name("crossed.jsonl")),), per_label=60, ns=(2, 20), strengths=(0.1,)),
        ravel=RavelSpec(facts=tagged.with_name("facts.jsonl"), classes=("city",)),
    )  # fmt: skip
    return replace(base, **changes)


@pytest.fixture(scope="module", params=["correct", "compatible"])
def done(request, trained, tagged, runs, home):
    other = train.run(replace(spec_of(home), seed=1), runs)
    return run(spec(trained, tagged, form=request.param, controls=(str(other.path / "sae"),)), runs)


def test_every_task_is_run_or_says_why(done):
    result = done.result
    assert [one.task for one in result.scores] == ["core", "sparse_probing", "scr", "tpp"]
    missing = {one.task: one.reason for one in result.not_run}
    assert missing.keys() == {"absorption", "ravel", "unlearning"}
    assert "of 1 sentences rightly, too few" in missing["ravel"]
    assert "single tokens of this tokenizer" in missing["absorption"]
    for one in result.scores:
        headlines = [m for m in one.measures if m.better]
        assert headlines and all(len(m.draws) == 3 and m.low <= m.value <= m.high for m in headlines[1:])
        assert all({gap.baseline for gap in m.gaps} >= {"random directions"} for m in headlines)
        assert any(gap.baseline.startswith("control ") for m in headlines for gap in m.gaps)
    probing = {m.key: m for m in result.scores[1].measures}
    assert any(gap.baseline == OWN for gap in probing["sae_test_accuracy"].gaps)
    assert ("sae_chosen_k_test_accuracy" in probing) == (result.form == "correct")
    assert probing["llm_test_accuracy"].value > 0.8, "the words tell the label"
    for one, key in zip(result.scores[2:], ("scr_metric_threshold_20", "tpp_threshold_20_total_metric"), strict=True):
        (headline,) = [m for m in one.measures if m.better]
        assert headline.key == key and "trained longer" in " ".join(one.notes)
        names = {gap.baseline.split(" ")[0] for gap in headline.gaps}
        assert names == {"random", "neurons", "control", "latents", OWN.split(" ")[0]} and len(headline.gaps) == 5


def test_files_have_saebenchs_keys(done):
    for one in done.result.scores:
        file = json.loads((done.path / one.file).read_text())
        assert set(file) == {
            "eval_type_id", "eval_config", "eval_id", "datetime_epoch_millis", "eval_result_metrics",
            "eval_result_details", "sae_bench_commit_hash", "sae_lens_id", "sae_lens_release_id", "sae_lens_version",
            "sae_cfg_dict", "eval_result_unstructured",
        }  # fmt: skip
        numbers = {m.key: m.value for m in one.measures}
        for category in file["eval_result_metrics"].values():
            for key, value in category.items():
                assert value == pytest.approx(numbers.get(key, -1), abs=0.5 if "tokens" in key else 1e-12)
        about = file["eval_result_unstructured"]
        assert about["form"] == done.result.form and about["data"] == one.data and about["sae"]["digest"] == one.digest
        assert file["sae_cfg_dict"]["hook_name"] == "blocks.1.hook_resid_post"
    core, probing, scr, tpp = (json.loads((done.path / one.file).read_text()) for one in done.result.scores)
    assert set(core["eval_result_metrics"]) == {
        "model_behavior_preservation", "model_performance_preservation", "reconstruction_quality", "shrinkage",
        "sparsity", "token_stats", "misc_metrics",
    }  # fmt: skip
    assert len(core["eval_result_details"]) == done.result.subject.saes[0].latents
    assert core["eval_result_metrics"]["misc_metrics"].keys() == {
        "freq_over_1_percent", "freq_over_10_percent", "normalized_freq_over_1_percent",
        "normalized_freq_over_10_percent", "average_max_encoder_cosine_sim", "average_max_decoder_cosine_sim",
        "frac_alive",
    }  # fmt: skip
    assert scr["eval_result_metrics"]["scr_metrics"].keys() == {
        f"scr_{key}_threshold_{n}" for n in (2, 20) for key in ("dir1", "metric", "dir2")
    }  # fmt: skip
    assert tpp["eval_result_metrics"]["tpp_metrics"].keys() == {
        f"tpp_threshold_{n}_{part}" for n in (2, 20)
        for part in ("total_metric", "intended_diff_only", "unintended_diff_only")
    }  # fmt: skip
    assert scr["eval_config"]["perform_scr"] and not tpp["eval_config"]["perform_scr"]
    assert len(scr["eval_result_details"]) == len(tpp["eval_result_details"]) == 1
    assert probing["eval_result_metrics"]["sae"].keys() == {
        "sae_test_accuracy", "sae_top_1_test_accuracy", "sae_top_3_test_accuracy",
    }  # fmt: skip


def test_what_is_shown_says_what_a_number_cannot_carry(done):
    lines = view.rows(done.result)
    assert any("random directions" in str(line[2]) for line in lines)
    page = view.section(done.result).body
    assert "Resolution" in page and "absorption did not run" in page
    first = done.result.scores[0].measures[0]
    behind = replace(first, better=1, gaps=(SimpleNamespace(baseline="b", value=1.0, low=-0.1, high=0.3),))
    assert "cannot tell the SAE from b" in view.verdict(behind)


def test_asking_again_returns_at_once_and_a_second_sae_reads_the_same_activations(done, trained, tagged, runs, home):
    again = run(spec(trained, tagged, form=done.result.form, controls=tuple(
        gap.baseline.removeprefix("control ") for gap in done.result.scores[0].measures[0].gaps
        if gap.baseline.startswith("control "))), runs)  # fmt: skip
    there = {path.name for path in runs.glob("activations-*")}
    assert again.path == done.path or there
    other = train.run(replace(spec_of(home), seed=2), runs)
    run(spec(trained, tagged, form=done.result.form, saes=(str(other.path / "sae"),)), runs)
    assert {path.name for path in runs.glob("activations-*")} == there


def test_the_interval_is_that_of_nadeau_and_bengio():
    draws = [0.7, 0.8, 0.75, 0.85]
    s = np.std(draws, ddof=1)
    assert half_width(draws, 0.0) == pytest.approx(t.ppf(0.975, 3) * s / 2)
    assert half_width(draws, 1 / 3) == pytest.approx(t.ppf(0.975, 3) * s * np.sqrt(1 / 4 + 1 / 3))
    rng = np.random.default_rng(0)  # the difference that is detected four times in five
    n, sd = 6, 1.0
    least = (t.ppf(0.975, n - 1) + t.ppf(0.8, n - 1)) * np.sqrt(2 / n) * sd
    assert half_width(rng.normal(0, sd, 100_000)[:n].tolist(), 0.0, power=0.8) > 0
    found = 0
    for _ in range(2000):
        a, b = rng.normal(0, sd, n), rng.normal(least, sd, n)
        found += abs(b.mean() - a.mean()) > t.ppf(0.975, 2 * n - 2) * np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / n)
    assert 0.75 < found / 2000 < 0.97


def test_gaps_are_paired_by_seed_and_tell_ahead_from_behind():
    common = np.array([0.0, 0.5, -0.5, 1.0])
    ours = Scored.of([{"a": 1.0 + c, "sae_x": 0.9, "llm_x": 0.95} for c in common], 0.0)
    base = Scored.of([{"a": 0.9 + c} for c in common], 0.0)
    ahead = measure(ours, "a", 1, {"b": base})
    assert ahead.gaps[0].difference == pytest.approx(0.1) and ahead.untold == ()
    assert measure(ours, "a", -1, {"b": base}).untold == ("b",) and measure(ours, "a", 0, {"b": base}).gaps == ()
    assert measure(ours, "sae_x", 1, {}).untold == (OWN,)


def test_pooled_latents_are_means_over_the_tokens_that_count(tiny_lm, tmp_path):
    lm, draw = tiny_lm("llama"), torch.Generator().manual_seed(0)
    sae = SAE(*(torch.randn(s, generator=draw) for s in ((32, 48), (48,), (48, 32), (32,))), TopK(4), read=SITE)
    rows = [Row(torch.randint(3, 97, (n,), generator=draw).tolist(), [4] * n, i) for i, n in enumerate((5, 9, 3, 9, 7))]
    rows[1].ids[2] = rows[4].ids[0] = 5
    asked = SaebenchSpec(saes=("x",), batch_tokens=20)
    bench = Bench(lm, lm.name, SITE, (sae,), TokenPolicy((5,)), asked, Pieces(None), tmp_path)
    held = pooled_latents(sae, bench, bench.source(bench.stored(rows), 16))
    pooled = sparse(held, 48).toarray()
    at = bench.at(rows, [0, 2, 1, 8, 6])
    for i, row in enumerate(rows):
        with lm.taps(read=[SITE], stop=SITE) as seen:
            lm(torch.tensor([row.ids]))
        x = seen[SITE][0]
        expected = sae.encode(x[torch.tensor(row.ids) != 5]).mean(0)
        np.testing.assert_allclose(pooled[i], expected.numpy(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(at[i], x[[0, 2, 1, 8, 6][i]], atol=1e-4, rtol=1e-4)


def test_problems_are_balanced_and_near_duplicates_stay_together():
    rng = np.random.default_rng(0)
    has = np.eye(3, dtype=bool)[rng.integers(0, 3, 600)]
    groups = np.arange(600) // 3
    texts = Labelled("set", ("a", "b", "c"), groups, has)
    for seed in (0, 1):
        problems = problems_of(texts, seed)
        assert list(problems) == ["a", "b", "c"]
        for label, split in enumerate(problems.values()):
            sides = [set(groups[rows]) for rows, _ in (split.train, split.validation, split.test)]
            assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
            for rows, targets in (split.train, split.validation, split.test):
                assert targets.mean() == 0.5 and len(set(rows.tolist())) == len(rows)
                assert (has[rows, label] == (targets == 1)).all()
    first, other = (problems_of(texts, seed)["a"].test[0] for seed in (0, 1))
    assert set(first) != set(other)


def test_prompts_end_with_the_word_and_what_is_asked_of_it(default_lm):
    words = absorption.words_of(default_lm, 6, 0)
    assert 100 < len(words) <= 26 * 6 and all(word.strip().isalpha() for word in words)
    rows, places, kept = absorption.prompts(default_lm, words, 2, 0)
    assert len(rows) == len(places) == len(kept) > 0.9 * len(words)
    for row, place, word in zip(rows, places, kept, strict=True):
        text = default_lm.tokenizer.decode(row.ids)
        assert text.endswith(f"{word} has the first letter:") and text.count("first letter") == 3
        assert default_lm.tokenizer.decode([row.ids[place]]).strip() == word.strip() and place == len(row.ids) - 6


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seeds": 1}, "seeds must be at least 2"),
        ({"tasks": ("core",)}, "the options of sparse_probing would have no effect"),
        ({"tasks": ("core", "core")}, "named once each"),
        ({"sparse_probing": {"ks": (2, 1)}}, "ascending"),
    ],
)
def test_questions_that_make_no_sense_are_refused(changes, says):
    fields = {"saes": ("a",), "sparse_probing": {"per_label": 50}} | changes
    with pytest.raises(UnweaveError, match=says):
        SaebenchSpec.from_dict(fields)


def test_what_cannot_be_measured_is_refused_or_not_run(trained, tagged, runs, tmp_path):
    sae = str(trained.path / "sae")
    with pytest.raises(UnweaveError, match="named twice"):
        run(spec(trained, tagged, saes=(sae, sae)), runs)
    one = tmp_path / "one.jsonl"
    one.write_text("\n".join(json.dumps({"text": f"words {i}", "tags": ["same"]}) for i in range(60)))
    asked = spec(trained, tagged, tasks=("core", "sparse_probing"), sparse_probing=ProbingSpec(sources=(str(one),)),
                 scr=ScrSpec(), tpp=TppSpec(), ravel=RavelSpec(),
                 core=CoreSpec(tokens=700, context=24, batch_rows=100), form="compatible")  # fmt: skip
    with pytest.raises(UnweaveError, match="no task could run; core: the text makes 1 batches, fewer than 3 seeds"):
        run(asked, runs)


def test_absorption_refuses_a_model_that_does_not_spell(default_lm, tmp_path):
    asked = SaebenchSpec(
        saes=("x",), tasks=("absorption",), seeds=2, absorption=AbsorptionSpec(words_per_letter=20, examples=0)
    )
    site = Site("resid_post", 1)
    bench = Bench(default_lm, default_lm.name, site, (), TokenPolicy(), asked, Pieces(None), tmp_path)
    noise = torch.randn(520, 16, generator=torch.Generator().manual_seed(0))
    bench_at = replace(bench)
    object.__setattr__(bench_at, "at", lambda rows, places: noise[: len(rows)])
    with pytest.raises(UnweaveError, match="first letters, fewer than 20"):
        absorption.TASK.prepare(bench_at)
    assert sparse_probing.TASK.baselines == ("random directions",)
