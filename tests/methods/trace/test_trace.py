"""`unweave trace` on a tiny model: what it measures against passes by hand, and what it and the report put first."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.models import build_tiny, build_tiny_tokenizer
from unweave.attribute.result import incomplete
from unweave.core.errors import UnweaveWarning
from unweave.core.run import Run
from unweave.core.site import Site
from unweave.lm.model import LM
from unweave.methods.report import stage as report
from unweave.methods.report.spec import ReportSpec
from unweave.methods.trace import stage as trace
from unweave.methods.trace.spec import TraceSpec
from unweave.methods.trace.view import finding
from unweave.sae.module import SAE, ReLU
from unweave.tasks import agreement
from unweave.tasks.agreement import Pair

SITE, TOP = Site("resid_post", 1), 4


def made_pairs(n: int) -> list[Pair]:
    rng = random.Random(0)
    found = []
    for _ in range(n):
        letters = rng.choices("abcdefghij", k=6)
        changed = [*letters[:2], rng.choice("xyz"), *letters[3:]]
        found.append(Pair("".join(letters), "".join(changed), rng.choice("klm"), rng.choice("nop"), ""))
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trace")
    build_tiny("llama").save_pretrained(folder / "model")
    build_tiny_tokenizer().save_pretrained(folder / "model")
    lm = LM.load(str(folder / "model"), device="cpu")
    g = torch.Generator().manual_seed(0)
    enc, dec = torch.randn(32, 16, generator=g) * 0.3, torch.randn(16, 32, generator=g) * 0.3
    biases = torch.randn(16, generator=g) * 0.1, torch.randn(32, generator=g) * 0.1
    SAE(enc, biases[0], dec, biases[1], ReLU(), read=lm.site(SITE)).save(folder / "sae")
    return folder


def traced(home: Path, runs: Path, monkeypatch: pytest.MonkeyPatch, *, knows: bool = True, **changed: Any) -> Run:
    monkeypatch.setattr(agreement, "pairs", lambda _lm, _task, n, *, seed: made_pairs(n))
    if knows:  # as if the random model did the task
        monkeypatch.setattr(agreement, "accuracy", lambda _lm, pairs: agreement.Accuracy(len(pairs), 1.0, 1.0, {}))
        monkeypatch.setattr(trace, "_LEAST_CHANGE", 0.0)
    options = {"pairs": 12, "top": TOP, "random": 3, "steps": 40, **changed}
    return trace.run(TraceSpec(sae=home / "sae", model=str(home / "model"), device="cpu", **options), runs)


@pytest.mark.filterwarnings("ignore:effects at .* add up to:unweave.core.errors.UnweaveWarning")
def test_where_the_model_does_not_do_the_task_no_number_is_shown(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = traced(home, tmp_path, monkeypatch, knows=False)
    found = run.result
    assert (found.right_clean + found.right_patch) / 2 < 0.6
    assert "fails this task" in found.problem and found.agreements == () and found.share is None
    shown = {row[0]: row[1:] for row in found.rows()}
    assert shown["order, Spearman"] == (None, found.problem)
    page = report.run(ReportSpec(sae=home / "sae"), tmp_path)
    text = (page.path / page.result.report).read_text()
    assert "he model fails this task" in text and "of the effect found" not in text


def test_a_site_without_effect_is_named(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "accuracy", lambda _lm, pairs: agreement.Accuracy(len(pairs), 1.0, 1.0, {}))
    monkeypatch.setattr(trace, "_LEAST_CHANGE", 1e9)
    found = traced(home, tmp_path, monkeypatch, knows=False).result
    assert "next to nothing" in found.problem and found.agreements == ()


def test_effects_from_both_ends_and_the_share_of_the_strongest(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = traced(home, tmp_path, monkeypatch).result
    lm, sae = LM.load(str(home / "model"), device="cpu"), SAE.load(home / "sae")
    ((clean, patch, metric),) = agreement.batches(lm, made_pairs(12))
    assert patch is not None

    def value(tokens: Any) -> Tensor:
        with lm.taps(read=[SITE]) as seen:
            lm(tokens)
        return seen[SITE]

    def mean_metric(x: Tensor) -> float:
        with lm.taps(edit={SITE: lambda _x, _at: x}):
            logits = lm(clean)
        assert logits is not None
        return float(metric(logits[:, -1], torch.arange(12)).mean())

    x, y = value(clean), value(patch)
    moved = sae.encode(y) - sae.encode(x)
    for row in found.effects:
        move = moved[..., row.latent, None] * sae.W_dec[row.latent]
        assert row.exact == pytest.approx(mean_metric(x + move) - mean_metric(x), abs=1e-5)
        assert row.exact_patch == pytest.approx(mean_metric(y) - mean_metric(y - move), abs=1e-5)
    top = [row.latent for row in found.effects if row.chosen]
    assert len(top) == TOP
    move = moved[..., top] @ sae.W_dec[top]
    change = mean_metric(y) - mean_metric(x)
    together = (mean_metric(x + move) - mean_metric(x) + mean_metric(y) - mean_metric(y - move)) / 2
    assert found.share == pytest.approx(together / change, rel=1e-3)
    # The page and the table begin with the share and the order, and no correlation of sizes heads either.
    head = {name: value for name, value, _ in found.rows()}
    assert head["strongest together"] == found.share and head["change"] == pytest.approx(change, rel=1e-3)
    assert not any("Pearson" in str(row) for row in found.rows())
    assert f"{found.share:.0%} of it" in finding(found)
    (row,) = found.sums
    assert row.site == SITE and row.complete and incomplete(found.sums) is None
    assert row.change == pytest.approx(change, rel=1e-3) and row.sum == pytest.approx(change, rel=0.1)
    made = report.run(ReportSpec(sae=home / "sae"), tmp_path)
    page = (made.path / made.result.report).read_text()
    assert f"<b>{found.share:.0%}</b><span>of the effect found" in page
    assert "From the clean end" in page and "From the other end" in page


def test_estimates_that_do_not_add_up_are_a_warning(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unweave.attribute.completeness.TOLERANCE", 2e-3)  # a tiny model is nearly linear
    with pytest.warns(
        UnweaveWarning, match=r"effects at resid_post\.1 add up to .* but moving everything there changes"
    ):
        found = traced(home, tmp_path, monkeypatch, steps=1, rule="right").result
    assert "add up" in str(incomplete(found.sums)) and not found.sums[0].complete
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traced(home, tmp_path, monkeypatch, steps=60)
