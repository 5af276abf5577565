"""unweave compare: pairs seed by seed, no ranking over unequal L0, and curves where there are some."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from unweave.core.errors import UnweaveError
from unweave.core.run import Run
from unweave.core.site import Site
from unweave.inputs.subject import SAEInfo, Subject
from unweave.methods.saebench.compare import view
from unweave.methods.saebench.compare.spec import CompareSpec
from unweave.methods.saebench.compare.stage import run
from unweave.methods.saebench.result import SaebenchResult, Scores
from unweave.methods.saebench.spec import SaebenchSpec
from unweave.methods.saebench.spread import Scored, measure

SITE = Site("resid_post", 1)


def scores_of(name, l0, values, key="explained_variance", better=1, data="d"):
    number = measure(Scored.of([{key: v} for v in values], 0.0), key, better, {})
    return Scores("core", 1, SITE, name, name * 20, l0, data, "text", (), 0.0, (number,), Path("x.json"))


def written(runs, rows, kinds, model="m"):
    infos = tuple(SAEInfo(SITE, kinds[one.sae], 8, 16, None, one.digest[:12]) for one in rows)
    result = SaebenchResult(Subject(model, "", infos, {}), "correct", 4, tuple(rows), ())
    asked = SaebenchSpec(saes=("x",), seed=int(sum(one.l0 for one in rows)))  # a run of its own
    with Run.open(runs, "saebench", asked, kind=SaebenchResult) as one:
        one.finish(result)
    return one.path


NOISE = np.array([0.0, 0.2, -0.1, 0.1])  # of the data, which all SAEs share


def test_equal_l0_is_compared_seed_by_seed(tmp_path):
    rows = [scores_of("a", 30, 0.5 + NOISE), scores_of("b", 32, 0.52 + NOISE + [0, 0.001, 0, 0.002])]
    folder = written(tmp_path, rows, {"a": "topk", "b": "topk"})
    result = run(CompareSpec(of=(folder,)), tmp_path).result
    (table,) = result.tables
    (pair,) = table.pairs
    assert (pair.better, pair.worse) == ("b", "a") and pair.told and table.why_not == ""
    assert table.entries[0].high - table.entries[0].low > 0.2, "though each alone is uncertain"
    lines = view.rows(result)
    assert any("ahead of a" in str(line[2]) for line in lines) and "svg" in view.section(result).body
    noisy = [scores_of("a", 30, 0.5 + NOISE), scores_of("b", 32, 0.52 - NOISE)]
    (other,) = run(CompareSpec(of=(written(tmp_path / "n", noisy, {"a": "t", "b": "t"}),)), tmp_path).result.tables
    assert not other.pairs[0].told


def test_lower_is_better_where_it_is(tmp_path):
    rows = [scores_of("a", 30, 0.1 + 0.01 * NOISE, better=-1), scores_of("b", 30, 0.3 + 0.01 * NOISE, better=-1)]
    (table,) = run(CompareSpec(of=(written(tmp_path, rows, {"a": "t", "b": "t"}),)), tmp_path).result.tables
    (pair,) = table.pairs
    assert pair.better == "a" and pair.told and pair.difference == pytest.approx(0.2)


def test_unequal_l0_is_not_ranked_without_curves(tmp_path):
    rows = [scores_of("a", 30, 0.5 + NOISE), scores_of("b", 90, 0.9 + NOISE)]
    folder = written(tmp_path, rows, {"a": "topk", "b": "relu"})
    (table,) = run(CompareSpec(of=(folder,)), tmp_path).result.tables
    assert table.pairs == () and "needs a curve" in table.why_not
    (table,) = run(CompareSpec(of=(folder,), l0_ratio=3.0), tmp_path).result.tables
    assert len(table.pairs) == 1 and table.why_not == ""


def test_curves_are_compared_at_one_l0(tmp_path):
    points = {"a": (10, 0.4), "b": (40, 0.8), "c": (20, 0.4), "d": (80, 0.8)}
    rows = [scores_of(name, l0, value + NOISE) for name, (l0, value) in points.items()]
    kinds = {"a": "topk", "b": "topk", "c": "relu", "d": "relu"}
    folders = [written(tmp_path, rows[:2], kinds), written(tmp_path, rows[2:], kinds)]
    (table,) = run(CompareSpec(of=tuple(folders)), tmp_path).result.tables
    (pair,) = table.pairs
    mean = NOISE.mean()
    assert (pair.better, pair.worse, pair.low) == ("topk", "relu", None) and "not ranked" in table.why_not
    assert pair.l0 == pytest.approx(np.sqrt(20 * 40))
    at = np.log(pair.l0 / 10) / np.log(4) * 0.4 - np.log(pair.l0 / 20) / np.log(4) * 0.4
    assert pair.difference == pytest.approx(at) and mean == pytest.approx(0.05)


def test_what_was_not_measured_alike_is_refused(tmp_path):
    rows = [scores_of("a", 30, 0.5 + NOISE), scores_of("b", 30, 0.5 + NOISE, data="other")]
    with pytest.raises(UnweaveError, match="no two SAEs were measured alike"):
        run(CompareSpec(of=(written(tmp_path, rows, {"a": "t", "b": "t"}),)), tmp_path)
    one = written(tmp_path / "1", rows[:1], {"a": "t"})
    two = written(tmp_path / "2", [replace(rows[0], sae="c", digest="c" * 20)], {"c": "t"}, model="other")
    with pytest.raises(UnweaveError, match="several models"):
        run(CompareSpec(of=(one, two)), tmp_path)
    with pytest.raises(UnweaveError, match="not a finished run"):
        run(CompareSpec(of=(tmp_path,)), tmp_path)
