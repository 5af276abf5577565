"""The recipe of compressed models: what it runs at each scale, its claims, and all of it on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.jobs import WORDS, spec_of
from unweave.core.errors import UnweaveError
from unweave.core.result import as_read, as_written
from unweave.lm.model import LM
from unweave.methods.compress.spec import LowRankSpec, PruneSpec, QuantiseSpec
from unweave.methods.compress.transfer.spec import TransferSpec
from unweave.methods.saebench.spec import SaebenchSpec
from unweave.papers.compressed_models import claims, plan, recipe, view
from unweave.papers.compressed_models.plan import StudyPlan, plan_of
from unweave.papers.compressed_models.result import CompressedModels
from unweave.papers.compressed_models.spec import CompressedModelsSpec


def test_the_smoke_scale_has_three_layers_three_sites_and_two_seeds() -> None:
    (study,) = plan_of(CompressedModelsSpec())
    assert study.training is not None and len(study.training.sites) == 3 and len(study.groups) == 2
    assert study.training.sites[0] == "attn_heads.{4,12,20}"
    first, *others = study.compressions
    assert isinstance(first, PruneSpec) and (first.method, first.sparsity) == ("wanda", 0.5)
    assert {type(one) for one in others} == {PruneSpec, QuantiseSpec, LowRankSpec}
    assert study.retraining == study.training  # but for its model
    SaebenchSpec.from_dict({"saes": ["x"], **study.bench})


def test_the_paper_scale_has_the_papers_models_and_saes(monkeypatch: pytest.MonkeyPatch) -> None:
    def listed(repository: str) -> list[str]:
        l0 = (41, 85, 130) if repository.endswith("att") else (60, 127) if repository.endswith("mlp") else (22, 82, 176)
        return [f"layer_{layer}/width_{width}/average_l0_{one}/params.npz"
                for layer in range(26) for width in ("16k", "65k") for one in l0]  # fmt: skip

    monkeypatch.setattr(plan, "listed", listed)
    gpt2, gemma = plan_of(CompressedModelsSpec(scale="paper"))
    assert len(gpt2.saes) == 12 and set(gpt2.saes["layer 3"]) == {"mlp_add.3", "resid_post.3"}
    assert gemma.saes == {"layer 12": {
        "attn_heads.12": "hub:google/gemma-scope-2b-pt-att/layer_12/width_16k/average_l0_85",
        "mlp_add.12": "hub:google/gemma-scope-2b-pt-mlp/layer_12/width_16k/average_l0_127",
        "resid_post.12": "hub:google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82",
    }}  # fmt: skip
    for study in (gpt2, gemma):
        assert study.training is None and study.retraining.sae.tokens > 10**8
        given = {"saes": ["resid_post.12=x"], "compressed": ["y"], **study.transfer}
        assert TransferSpec.from_dict(given).steer == (0 if study is gpt2 else 16)
        assert set(study.bench_sites) <= {site for group in study.saes.values() for site in group}


def test_a_hub_that_cannot_be_reached_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def unreachable(repository: str) -> list[str]:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", unreachable)
    with pytest.raises(UnweaveError, match="its files cannot be listed: no route to host"):
        recipe.run(CompressedModelsSpec(scale="paper"), tmp_path)
    assert not list(tmp_path.iterdir())


def tiny_plan(home: Path, folder: Path) -> StudyPlan:
    """The tiny model, two sites, two seeds, two compressions, core of SAEBench."""
    base = spec_of(home, sites=("resid_post.1", "mlp_add.0"), variants=({"seed": [0]}, {"seed": [1]}))
    training = replace(base, sae=replace(base.sae, tokens=3200))
    data = base.data.to_dict() | {"tokens": 1000, "heldout_tokens": 500}
    given = {"model": str(home / "model"), "data": data, "device": "cpu"}
    rows = [{"text": f"{a} {b} {c}", "tags": [a[0]]} for a in WORDS[:8] for b in WORDS for c in WORDS[:4]]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return StudyPlan(
        name="tiny",
        model=str(home / "model"),
        training=training,
        saes={},
        compressions=(PruneSpec.from_dict(given), QuantiseSpec.from_dict(given | {"bits": 4, "group": 0})),
        retraining=training,
        transfer={"pruning": {"sweep": [0.9, 0.99], "tokens": 1000}, "tokens": 1200, "loss_tokens": 400, "steer": 2},
        device="cpu",
        groups=("seed0", "seed1"),
        labels={
            "texts": {"source": str(folder / "texts.jsonl")}, "context": 16,
            "match": {"prior": 0.1, "support": 5, "top": 5, "output_score": None},
        },
        bench={"tasks": ["core"], "seeds": 2, "core": {"tokens": 600}},
        bench_sites=("resid_post.1",),
    )  # fmt: skip


def test_the_recipe_end_to_end_and_again(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tiny_plan(home, tmp_path)
    monkeypatch.setattr(recipe, "plan_of", lambda spec: (small,))
    spec = CompressedModelsSpec(device="cpu")
    done = recipe.run(spec, tmp_path / "runs")
    result = done.result
    (study,) = result.studies
    assert [group.name for group in study.groups] == ["seed0", "seed1"]
    assert [len(group.transfer.compressions) for group in study.groups] == [2, 1]
    assert {one.part for one in result.runs} == {
        "train", "compress", "retrain", "labels", "transfer", "prune SAE", "saebench"
    }  # fmt: skip
    assert all((tmp_path / "runs" / one.run / "DONE").exists() for one in result.runs)
    (bench,) = study.benches
    assert {bench.forms[one.sae] for one in bench.scores.scores} == set(claims.FORMS)
    site = study.groups[0].transfer.sites[1]
    for form in claims.FORMS[1:3]:  # SAEBench measures the very SAEs that the study follows
        cell = study.groups[0].transfer.of(site, form, "compressed")
        assert cell is not None and cell.survival is not None
    listed = claims.claims(result)
    html, told = (done.path / "report.html").read_text(), (done.path / "claims.md").read_text()
    for claim in listed:
        assert claim.verdict in html and claim.claim.replace("|", "\\|") in told
    assert {claim.verdict for claim in listed} > {"not measured"}
    assert sum("(not in the paper)" in claim.claim for claim in listed) == 4
    assert html.count("<svg") >= 7 and "default-src 'none'" in html
    assert (done.path / "table.md").read_text().count("| tiny | seed1 |") == 2 * 8 + 2 * 2
    assert result.rows() and view.section(result).tiles
    assert as_read(CompressedModels, json.loads(json.dumps(as_written(result))), "") == result

    def fail(*args: Any, **options: Any) -> Any:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(LM, "load", fail)
    assert recipe.run(spec, tmp_path / "runs").reused
