"""SAEs in compressed models: correlations, labels, steering and damage against direct computations; the whole, tiny."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from helpers.jobs import WORDS, spec_of
from unweave import LM, SAE, Site
from unweave.core.codes import Codes
from unweave.core.errors import UnweaveError
from unweave.core.result import as_read, as_written
from unweave.latents.annotations import Annotation, ScoredLabel, write
from unweave.methods.compress import stage as compress
from unweave.methods.compress.spec import PruneSpec, QuantiseSpec
from unweave.methods.compress.transfer import damage, effects, stage
from unweave.methods.compress.transfer.result import ORIGINAL, RETRAINED, Transfer
from unweave.methods.compress.transfer.spec import TransferSpec
from unweave.methods.compress.transfer.survival import Fit, Sums, correlations, survival
from unweave.methods.compress.transfer.view import cells_table, rows, section
from unweave.methods.train import stage as train
from unweave.sae.activations import ReLU

Dense = torch.Tensor


def sparse(n: int = 300, f: int = 7, seed: int = 0) -> Dense:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, f, generator=g) * (torch.rand(n, f, generator=g) < 0.3)


def summed(before: Dense, after: Dense, parts: int = 3) -> Sums:
    sums = Sums(before.shape[1])
    for a, b in zip(before.chunk(parts), after.chunk(parts), strict=True):
        sums.add(Codes.from_dense(a), Codes.from_dense(b))
    return sums


# -- survival ---------------------------------------------------------------------------------------------------------


def test_correlations_are_numpys() -> None:
    before = sparse()
    after = torch.where(torch.rand(before.shape) < 0.5, before, sparse(seed=1))
    after[:, 5] = 0
    sums = summed(before, after)
    r = correlations(sums.table, sums.n)
    for j in (0, 1, 2, 3, 4, 6):
        assert r[j] == pytest.approx(np.corrcoef(before[:, j], after[:, j])[0, 1], abs=1e-9)
    assert r[5] == 0  # it never fires afterwards
    assert torch.equal(sums.table[7].float(), before.amax(0)) and torch.equal(
        sums.table[5], (before > 0).sum(0).double()
    )


def test_codes_in_any_order_of_latents() -> None:
    before, after = sparse(), sparse(seed=1)
    values, indices = after.topk(4)
    kept = torch.zeros_like(after).scatter(1, indices, values)
    sums = Sums(7)
    sums.add(Codes.from_dense(before), Codes.from_topk(values, indices, 7))
    torch.testing.assert_close(sums.table, summed(before, kept).table)
    empty = Sums(7)
    empty.add(Codes.from_dense(before), Codes.from_dense(torch.zeros_like(before)))
    assert np.nan_to_num(correlations(empty.table, empty.n)).tolist() == [0.0] * 7


def test_what_does_not_change_survives_and_what_is_silenced_is_counted() -> None:
    before = sparse(2000, 6)
    before[:, 0] = 0
    before[5:, 1] = 0
    same = summed(before, before)
    found = survival(same.table, same.n)
    assert found.every.mean is not None and found.every.mean.value == pytest.approx(1, abs=1e-12)
    assert (found.every.latents, found.rare, found.every.alike, found.every.silenced) == (4, 1, 1.0, 0)
    after = before.clone()
    after[:, 2] = 0
    less = summed(before, after)
    found = survival(less.table, less.n)
    assert found.every.mean is not None and found.every.mean.value == pytest.approx(0.75)
    assert found.every.silenced == 1 and found.by_rate[-1].latents == 4 == sum(one.latents for one in found.by_rate)


def orthogonal_sae(width: int = 6) -> SAE:
    """Latents are the positive coordinates, in units of their own."""
    scale = torch.arange(1.0, width + 1)
    return SAE(torch.diag(scale), torch.zeros(width), torch.diag(1 / scale), torch.zeros(width), ReLU(),
               read=Site("resid_post", 1))  # fmt: skip


def test_a_direction_pruned_away_costs_what_it_wrote() -> None:
    sae, x = orthogonal_sae(), torch.randn(500, 6).abs()
    W_dec = sae.W_dec.clone()
    W_dec[2] = 0
    fits = []
    for one in (sae, sae.with_weights(sae.W_enc, sae.b_enc, W_dec, "")):
        fit = Fit(6, torch.device("cpu"))
        for part in x.split(100):
            fit.add(one, part, one.codes(part))
        fits.append(fit.unexplained)
    lost = x[:, 2].square().sum() / (x - x.mean(0)).square().sum()
    assert fits[0] == pytest.approx(0, abs=1e-9) and fits[1] == pytest.approx(float(lost), rel=1e-5)


# -- labels and steering ----------------------------------------------------------------------------------------------


def test_aurocs_are_scikit_learns() -> None:
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    shares, labels = rng.integers(0, 5, (80, 3)) / 4, rng.random((80, 3)) < 0.4
    shares[7] = np.nan
    labels[:, 2] = False
    found = effects.aurocs(shares, labels)
    there = ~np.isnan(shares[:, 0])
    for j in (0, 1):
        assert found[j] == pytest.approx(roc_auc_score(labels[there, j], shares[there, j]))
    assert np.isnan(found[2])
    told = effects.told(shares, shares, labels, 0)
    assert told.pairs == 2 and told.change is not None and told.change.value == 0


@pytest.mark.parametrize("site", ["resid_post.1", "attn_heads.1", "mlp_add.0"])
def test_a_push_does_what_adding_it_by_hand_does(site: str, tiny_lm: Callable[..., LM]) -> None:
    lm = tiny_lm()
    shifts = torch.randn(3, lm.width(site), generator=torch.Generator().manual_seed(0))
    shifts[1] = 0
    moved, divergence = effects.changes(lm, Site.parse(site), shifts, ["the keys", "on the table"])
    expected = []
    for prompt in ("the keys", "on the table"):
        row = lm.tokenize(prompt)

        def logs(shift: Dense, row: Any = row) -> Dense:
            def edit(x: Dense, at: Any) -> Dense:
                x = x.clone()
                x[:, -1] += shift
                return x

            with lm.taps(edit={site: edit}):
                out = lm(row)
            assert out is not None
            return out[0, -1].log_softmax(-1)

        with torch.no_grad():
            expected.append(torch.stack([logs(shift) - logs(torch.zeros_like(shift)) for shift in shifts]))
    torch.testing.assert_close(moved, torch.cat(expected, 1), rtol=1e-3, atol=1e-4)
    assert divergence[1] == 0 and (divergence[[0, 2]] > 0).all()


def test_pushes_are_as_long_as_their_latents_and_random_ones_too() -> None:
    sae = orthogonal_sae()
    pushes = effects.pushes(sae, [0, 3], torch.tensor([2.0, 8.0]), 0)
    torch.testing.assert_close(pushes[:2], torch.eye(6)[[0, 3]] * 2)
    torch.testing.assert_close(pushes.norm(dim=1), torch.full((4,), 2.0))
    change = torch.randn(4, 50)
    same = effects.steered((change, torch.ones(4)), (change, torch.ones(4)))
    assert same.alike is not None and same.alike.value == pytest.approx(1) and same.latents == 2
    gone = effects.steered((change, torch.ones(4)), (torch.zeros(4, 50), torch.zeros(4)))
    assert gone.alike is not None and gone.alike.value == 0 and gone.size is not None and gone.size.value == 0


# -- damage -----------------------------------------------------------------------------------------------------------


def test_overlap_and_prediction_of_planted_damage() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 4))
    noise = rng.normal(size=600)
    planted = 10 ** (-2 + 0.5 * x[:, 0] - 0.3 * x[:, 2] + 0.05 * noise)
    planted[:20] = np.nan
    unrelated = 10 ** (-2 + rng.normal(size=600) / 2)
    site = Site("resid_post", 1)
    found = damage.predictor(site, x, {"a": planted, "b": 2 * planted, "c": unrelated}, 0)
    assert found is not None and found.latents == 580 and found.low > 0.95 and found.rank_correlation > 0.95
    weights = list(found.weights.values())
    assert weights[0] == pytest.approx(0.5, abs=0.05) and weights[2] == pytest.approx(-0.3, abs=0.05)
    assert found.elsewhere["b"] > 0.95 and abs(found.elsewhere["c"]) < 0.15
    nothing = damage.predictor(site, x, {"c": unrelated}, 0)
    assert nothing is not None and nothing.explained < 0.03
    assert damage.predictor(site, x[:30], {"a": planted[:30]}, 0) is None
    same, other, _ = damage.overlaps(site, {"a": planted, "b": 2 * planted, "c": unrelated})
    assert same.shared == 1 and same.rank_correlation == pytest.approx(1) and same.latents == 580
    assert other.shared < 0.3 and abs(other.rank_correlation) < 0.15


# -- the whole --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(home: Path, runs: Path) -> dict[str, str]:
    """The model untouched but compressed in name, pruned by half, and rounded."""
    data = spec_of(home).data.to_dict() | {"tokens": 1500, "heldout_tokens": 800}
    given = {"model": str(home / "model"), "data": data, "device": "cpu"}
    made = {
        "same": compress.prune(PruneSpec.from_dict(given | {"sparsity": 0.0}), runs),
        "half": compress.prune(PruneSpec.from_dict(given | {"sparsity": 0.5}), runs),
        "rounded": compress.quantise(QuantiseSpec.from_dict(given | {"bits": 4, "group": 0}), runs),
    }
    return {name: str(run.path / "model") for name, run in made.items()}


@pytest.fixture(scope="module")
def saes(home: Path, runs: Path) -> list[str]:
    run = train.run(spec_of(home, sites=("resid_post.1", "mlp_add.0")), runs)
    return sorted(str(path.parent) for path in run.path.rglob("cfg.json"))


def asked(saes: list[str], compressed: list[str], **more: Any) -> TransferSpec:
    given = {
        "saes": saes, "compressed": compressed, "tokens": 1500, "loss_tokens": 500, "steer": 3, "batch_tokens": 256,
        "device": "cpu", "pruning": {"shares": [0.25], "sweep": [0.9], "tokens": 1000},
    }  # fmt: skip
    return TransferSpec.from_dict(given | more)


def test_an_unchanged_model_damages_nothing(saes: list[str], models: dict[str, str], runs: Path) -> None:
    result = stage.run(asked(saes, [models["same"]], pruning={"shares": [], "sweep": []}), runs).result
    assert (
        len(result.cells) == 4
        and result.overlaps == ()
        and result.compressions[0].loss.after == pytest.approx(result.compressions[0].loss.before)
    )
    for site in result.sites:
        before, after = (result.of(site, ORIGINAL, on) for on in ("original", "compressed"))
        assert before is not None and after is not None and after.survival is not None and after.steered is not None
        assert after.metrics == before.metrics and before.survival is None
        assert after.survival.every.mean is not None and after.survival.every.mean.value == pytest.approx(1)
        assert after.survival.every.latents > 20 and after.survival.every.alike == 1
        assert after.steered.alike is not None and after.steered.alike.value == pytest.approx(1, abs=1e-5)
    (damaged, _) = result.compressions[0].sites
    assert damaged.unexplained_variance == damaged.unexplained_before


def test_the_whole_study(saes: list[str], models: dict[str, str], home: Path, runs: Path, tmp_path: Path) -> None:
    retrained = train.run(spec_of(home, model=models["half"]), runs)
    (again,) = (str(path.parent) for path in retrained.path.rglob("cfg.json"))
    tagged = [{"text": f"{a} {b} {a}", "tags": [a[0]]} for a in WORDS for b in WORDS]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, tagged)))
    sae = next(one for one in map(SAE.load, saes) if one.read == Site("resid_post", 1))
    said = ScoredLabel(label=WORDS[0][0], threshold=0.0, score=0.5, support=9, maximum=1.0)
    lines = [Annotation(f"resid_post.1/{j}", "first letter", sae=sae.digest(), labels=(said,)) for j in range(0, 40, 3)]
    write(tmp_path / "labels.jsonl", lines)
    told = {"labels": str(tmp_path / "labels.jsonl"), "texts": {"source": str(tmp_path / "texts.jsonl")}, "context": 16}
    spec = asked(saes, [models["half"], models["rounded"]], retrained=[again], told=told)
    run = stage.run(spec, runs)
    result = run.result
    site = Site("resid_post", 1)
    names = [(cell.form, cell.on) for cell in result.cells if cell.site == site]
    both = [ORIGINAL, "pruned 25 %", RETRAINED]
    assert names == [*((form, "original") for form in both), *((form, "compressed") for form in (*both, "pruned 90 %"))]
    for cell in result.cells:
        followed = cell.form not in (RETRAINED, "pruned 90 %") and (cell.form, cell.on) != (ORIGINAL, "original")
        assert (cell.survival is not None) == followed == (cell.steered is not None)
        assert (cell.told is not None) == (followed and cell.site == site)
        if cell.survival is not None:
            assert cell.survival.every.mean is not None and 0 < cell.survival.every.mean.value < 1
    half, rounded = result.compressions
    assert half.words == "pruned by wanda, 50 % sparse" and rounded.words.startswith("rounded to 4 bits")
    assert all(a.survival.every.mean.value < b.survival.every.mean.value  # type: ignore[union-attr]
               for a, b in zip(half.sites, rounded.sites, strict=True))  # fmt: skip
    pruned = result.of(site, "pruned 90 %", "compressed")
    kept = result.of(site, ORIGINAL, "compressed")
    assert pruned and kept and pruned.metrics.unexplained_variance > kept.metrics.unexplained_variance
    assert len(result.overlaps) == 2 and {one.site for one in result.predictors} <= set(result.sites)
    table = pq.read_table(run.path / result.latents)
    assert table.num_rows == 2 * 128 and table.column_names[3:] == [
        "original, compressed", "pruned 25 %, original", "pruned 25 %, compressed", rounded.words
    ]  # fmt: skip
    html = section(result).body
    assert html.count("<svg") == 4 and "random directions" in html and "worst tenth" in html
    assert len(list(cells_table(result))) == len(result.cells) and rows(result)
    assert as_read(Transfer, json.loads(json.dumps(as_written(result))), "") == result
    assert stage.run(replace(spec, batch_tokens=64), runs).reused and not (run.path / "parts").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"pruning": {"shares": [0.5], "sweep": [0.5]}}, "0.5 is among shares and in the sweep"),
        ({"pruning": {"shares": [0.5, 0.25]}}, "ascending shares"),
        ({"pruning": {"sweep": [1.0]}}, "ascending shares"),
        ({"compressed": []}, "compressed must be not empty"),
    ],
)
def test_wrong_questions_are_refused(more: dict[str, Any], says: str, saes: list[str], models: dict[str, str],
                                     runs: Path) -> None:  # fmt: skip
    with pytest.raises(UnweaveError, match=says):
        stage.run(asked(saes, **{"compressed": [models["same"]], **more}), runs)


def test_another_model_or_site_is_refused(saes: list[str], models: dict[str, str], home: Path, runs: Path) -> None:
    with pytest.raises(UnweaveError, match="no original SAE at"):
        stage.run(asked(saes[1:], [models["same"]], retrained=[saes[0]]), runs)
