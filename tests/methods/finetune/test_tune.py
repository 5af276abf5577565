"""What is computed once for all steps equals what every step would compute: training, and evaluation with the edit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from helpers.choices import random_rows
from helpers.models import build_tiny
from unweave.core.site import Site
from unweave.lm.model import LM
from unweave.methods.finetune import starts
from unweave.methods.finetune.conditions import Condition
from unweave.methods.finetune.loop import Plan, finetune
from unweave.methods.finetune.spec import ConditionSpec, FinetuneSpec, LearningSpec, WeightsSpec
from unweave.methods.finetune.splits import Data, Setting
from unweave.methods.finetune.starts import Passes, passes
from unweave.methods.finetune.tune import training_passes
from unweave.methods.finetune.weights import trainable
from unweave.sae.activations import ReLU
from unweave.sae.module import SAE

ROWS, SITES = random_rows(10), ("resid_post.0", "resid_post.1", "resid_post.2")


def conditioned(spec: ConditionSpec) -> Condition:
    """Latents 0 to 9 of an SAE at each site, zeroed or penalised."""
    subsets = {}
    for seed, name in enumerate(SITES):
        g = torch.Generator().manual_seed(seed)
        rows = F.normalize(torch.randn(48, 32, generator=g), dim=1)
        sae = SAE(rows.T.clone(), torch.full((48,), -0.2), rows, torch.zeros(32), ReLU(), read=Site.parse(name))
        subsets[Site.parse(name)] = sae.subset(range(10))
    edits = tuple(subset.sae.ablate(range(10)) for subset in subsets.values())
    return Condition(spec, subsets, () if spec.kind == "penalty" else edits)


def tuned(kl: float = 0.0, **fields: Any) -> tuple[Passes, dict[str, torch.Tensor], dict[str, Any], dict[str, Any]]:
    """The passes of training, the weights after it, and scores without and with the edit."""
    lm = LM(build_tiny("llama").double(), None)
    weights = WeightsSpec(train="blocks", first_block=2)
    learning = LearningSpec(lr=1e-2, batch=4, epochs=2, warmup=0.25, kl=kl)
    spec = FinetuneSpec(
        condition=ConditionSpec.from_dict({"kind": "zero", **fields}), weights=weights, learning=learning
    )
    data = Data("rows", ROWS, {"validation": ROWS}, {})
    with trainable(lm, spec.weights) as model:
        condition = conditioned(spec.condition)
        training = training_passes(spec, model, condition, data)
        live, start = replace(condition, full=training.edits), training.starts.get("train")
        finetune(model, ROWS, live, Plan(10, learning), starts=start)
        plain = Setting(lm, data, passes(lm, 2, data.others).starts, {}, 10).all()
        under = passes(lm, 2, data.others, condition.full)
        edited = Setting(lm, data, under.starts, {}, 10).all(under.edits)
        return training, {name: weight.detach().clone() for name, weight in model.named.items()}, plain, edited


@pytest.mark.parametrize(
    ("fields", "live", "begins"),
    [({}, 1, 1), ({"flow": "forward"}, 1, 1), ({"when": "test"}, 0, 1), ({"strength": 0.5, "when": "both"}, 1, 1),
     ({"fade": "out"}, 3, 0), ({"flow": "gradient"}, 1, 1), ({"kl": 3.0}, 3, 0)],
)  # fmt: skip
def test_edits_below_what_is_trained_are_made_once(
    fields: dict[str, Any], live: int, begins: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick, *fast = tuned(**fields)
    monkeypatch.setattr(starts, "_MOST_BYTES", 0)  # nothing is held: every pass is whole, with every edit
    whole, *slow = tuned(**fields)
    assert whole.begins is None and not whole.starts and len(whole.edits) == (3 if live else 0)
    assert quick.begins == Site("resid_post", begins) and len(quick.edits) == live
    for name, weight in fast[0].items():
        torch.testing.assert_close(weight, slow[0][name], rtol=0, atol=1e-9)
    for one, two in zip(fast[1:], slow[1:], strict=True):
        assert one["validation"].loss == pytest.approx(two["validation"].loss, rel=1e-6)
    assert fast[2]["validation"].loss != pytest.approx(fast[1]["validation"].loss, rel=1e-6)


def test_a_penalty_reads_where_passes_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    fields: dict[str, Any] = {"kind": "penalty", "strength": 5.0}
    quick, *fast = tuned(**fields)
    monkeypatch.setattr(starts, "_MOST_BYTES", 0)
    whole, *slow = tuned(**fields)
    assert quick.begins == Site("resid_post", 0) and whole.begins is None and not quick.edits
    plain = tuned(kind="none")[1]
    for name, weight in fast[0].items():
        torch.testing.assert_close(weight, slow[0][name], rtol=0, atol=1e-9)
    assert any(not torch.allclose(weight, plain[name], atol=1e-6) for name, weight in fast[0].items())
