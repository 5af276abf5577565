"""The commands end to end: models and SAEs in, folders that load and losses out; and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.jobs import spec_of
from unweave import LM, SAE
from unweave.core.errors import UnweaveError
from unweave.core.spec import Spec
from unweave.lm.projections import projections
from unweave.methods.compress import stage
from unweave.methods.compress.result import Compressed
from unweave.methods.compress.spec import LowRankSpec, PruneSpec, QuantiseSpec
from unweave.methods.compress.view import rows, section


def fields(home: Path, **changes: Any) -> dict[str, Any]:
    base = spec_of(home).data.to_dict() | {"tokens": 1500, "heldout_tokens": 800}
    return {"model": str(home / "model"), "data": base, "device": "cpu", "batch_tokens": 256, **changes}


def shown(result: Compressed) -> str:
    """Everything that the terminal and a page show."""
    return "\n".join(str(row) for row in rows(result)) + section(result).body


def test_a_pruned_model_is_an_ordinary_folder(home: Path, runs: Path) -> None:
    run = stage.prune(PruneSpec.from_dict(fields(home, sparsity=0.5)), runs)
    result, folder = run.result, run.path / "model"
    assert result.calibration >= 1500 and result.loss is not None and result.loss.tokens > 500
    assert {change.zeros for change in result.tensors} == {0.5} and len(result.tensors) == 21
    lm, dense = LM.load(str(folder)), LM.load(str(home / "model"))
    assert lm.note == "pruned by wanda, 50 % sparse" and dense.note == ""
    assert lm.tokenizer_fingerprint() == dense.tokenizer_fingerprint()
    assert all(float((p.weight == 0).double().mean()) == 0.5 for p in projections(lm))
    assert all(float((p.weight == 0).double().mean()) < 0.1 for p in projections(dense))  # the given one is untouched
    again = stage.prune(PruneSpec.from_dict(fields(home, sparsity=0.5, batch_tokens=64)), runs)
    assert again.path == run.path and "50 % sparse" in shown(result) and "21 tensors" in shown(result)
    twice = stage.quantise(QuantiseSpec.from_dict(fields(home, model=str(folder), bits=8, group=16)), runs)
    assert LM.load(str(twice.path / "model")).note == "pruned by wanda, 50 % sparse; rounded to 8 bits, groups of 16"
    assert twice.result.tensors[0].zeros >= 0.5 and "10" in shown(twice.result)  # 8 bits and a scale for 16


@pytest.mark.parametrize(
    ("run", "spec"),
    [
        (stage.prune, PruneSpec(method="sparsegpt", pattern="2:4")),
        (stage.prune, PruneSpec(method="magnitude", sparsity=0.3)),
        (stage.quantise, QuantiseSpec(bits=3, group=0)),
        (stage.low_rank, LowRankSpec(share=0.5)),
        (stage.low_rank, LowRankSpec(share=0.5, method="weights")),
    ],
)
def test_every_method_runs(run: Any, spec: Spec, home: Path, runs: Path) -> None:
    asked = type(spec).from_dict(fields(home), base=spec)
    result = run(asked, runs).result
    assert all(change.change > 0 for change in result.tensors) and result.loss.after != result.loss.before
    assert (result.calibration > 0) == (spec in (PruneSpec(method="sparsegpt", pattern="2:4"), LowRankSpec(share=0.5)))
    assert result.method in shown(result) and "<svg" in section(result).body


def test_saes_are_pruned_and_rounded(home: Path, runs: Path, trained: Any) -> None:
    (folder,) = (path.parent for path in trained.path.rglob("cfg.json"))
    before = SAE.load(folder)
    given = fields(home, saes=[str(folder)])
    pruned = stage.prune(PruneSpec.from_dict(given | {"sparsity": 0.25}), runs)
    rounded = stage.quantise(QuantiseSpec.from_dict(given | {"bits": 4, "group": 16}), runs)
    for run, says in ((pruned, "25"), (rounded, "6 bits a weight")):
        (change,) = run.result.saes
        sae = SAE.load(run.path / change.folder)
        assert sae.read == before.read and sae.digest() != before.digest() and change.folder == Path("sae/resid_post.1")
        assert change.before.unexplained_variance < change.after.unexplained_variance and change.loss.tokens > 500
        assert says in shown(run.result)
    assert pruned.result.calibration > 0 and rounded.result.calibration == 0
    sae = SAE.load(pruned.path / pruned.result.saes[0].folder)
    assert ((sae.W_enc == 0).sum(0) == 8).all() and ((sae.W_dec == 0).sum(0) == sae.d_sae // 4).all()


def test_an_sae_in_the_pruned_model_needs_a_reason(home: Path, runs: Path, trained: Any) -> None:
    model = stage.prune(PruneSpec.from_dict(fields(home, sparsity=0.5)), runs).path / "model"
    (folder,) = (str(path.parent) for path in trained.path.rglob("cfg.json"))
    given = fields(home, model=str(model), saes=[folder], method="magnitude")
    with pytest.raises(UnweaveError, match="was trained on"):
        stage.prune(PruneSpec.from_dict(given), runs)
    result = stage.prune(PruneSpec.from_dict(given | {"accept_mismatch": "a pruned model"}), runs).result
    assert result.subject.accepted and result.subject.note == "pruned by wanda, 50 % sparse"


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        (PruneSpec, {"sparsity": 1.0}, "sparsity must be at least 0 and below 1"),
        (PruneSpec, {"sparsity": -0.1}, "sparsity must be at least 0"),
        (PruneSpec, {"pattern": "2:4", "sparsity": 0.3}, "sparsity = 0.3 would have no effect"),
        (PruneSpec, {"pattern": "half"}, "pattern must be n:m"),
        (PruneSpec, {"saes": ["x"], "method": "sparsegpt"}, "SparseGPT is for models"),
        (PruneSpec, {"saes": ["x"], "order": "one-pass"}, "order = 'one-pass' would have no effect"),
        (PruneSpec, {"saes": ["x"], "projections": ["mlp.*"]}, "projections = .* would have no effect"),
        (PruneSpec, {"method": "magnitude", "order": "one-pass"}, "order would have no effect"),
        (PruneSpec, {"accept_mismatch": "so"}, "accept_mismatch = 'so' would have no effect"),
        (QuantiseSpec, {"bits": 2}, "bits must be at least 3"),
        (QuantiseSpec, {"saes": ["x"], "bits": 5}, "stored in 8 or 4 bits"),
        (LowRankSpec, {"share": 0}, "share must be above 0"),
        (LowRankSpec, {"method": "weights", "order": "one-pass"}, "order = 'one-pass' would have no effect"),
        (LowRankSpec, {"saes": ["x"]}, "low rank is for models"),
    ],
)
def test_wrong_questions_are_refused(kind: type[Spec], changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UnweaveError, match=says):
        kind.from_dict(changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pattern": "3:5"}, "3:5 does not divide rows of 32"),
        ({"pattern": "4:2"}, "is not a pattern"),
        ({"projections": ["mpl.*"]}, "no projection fits"),
        ({"data": {"tokens": 10**7}}, "the text has only"),
        ({"method": "sparsegpt", "data": {"tokens": 20}}, "20 tokens do not say how the 64 inputs"),
    ],
)
def test_what_cannot_work_is_refused_before_work(changes: dict[str, Any], says: str, home: Path, runs: Path) -> None:
    given = fields(home)
    data = given["data"] | changes.get("data", {})
    with pytest.raises(UnweaveError, match=says):
        stage.prune(PruneSpec.from_dict(given | changes | {"data": data}), runs)


def test_losses_grow_with_what_is_taken(home: Path, runs: Path) -> None:
    torch.manual_seed(0)
    losses = []
    for sparsity in (0.0, 0.3, 0.9):
        loss = stage.prune(PruneSpec.from_dict(fields(home, sparsity=sparsity)), runs).result.loss
        assert loss is not None
        losses.append(abs(loss.after - loss.before))
    assert losses[0] == 0 and losses[0] < losses[1] < losses[2]
