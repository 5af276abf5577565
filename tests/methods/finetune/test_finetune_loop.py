"""The loop beside plain PyTorch: gradients, schedule, accumulation, recomputation, beginnings, KL, processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F

from helpers.choices import random_rows
from helpers.models import build_tiny
from unweave.core.dist import SOLO, Group
from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.data.policy import TokenPolicy
from unweave.lm.model import LM
from unweave.methods.finetune.checkpoint import Checkpoints
from unweave.methods.finetune.conditions import Condition
from unweave.methods.finetune.loop import Plan, finetune
from unweave.methods.finetune.rows import ChoiceRows
from unweave.methods.finetune.spec import ConditionSpec, LearningSpec, WeightsSpec
from unweave.methods.finetune.starts import lowest, starts_at
from unweave.methods.finetune.weights import trainable
from unweave.sae.activations import ReLU
from unweave.sae.module import SAE

N = 10
NONE = Condition(ConditionSpec())
FAST = LearningSpec(lr=1e-2, batch=4, epochs=2, warmup=0.25)


def wide(family: str) -> Any:
    """In float64, for Adam makes of rounding whatever it likes; but for the family whose softmax is in float32, where
    the mask's float64 minimum is infinite."""
    return build_tiny(family) if family == "gemma2" else build_tiny(family).double()


def tiny(family: str = "llama") -> LM:
    return LM(wide(family), None)


def sae_at(site: str, seed: int = 0, width: int = 32) -> SAE:
    g = torch.Generator().manual_seed(seed)
    W_dec = F.normalize(torch.randn(48, width, generator=g), dim=1)
    bias, zero = torch.full((48,), -0.2), torch.zeros(width)
    return SAE(W_dec.T.clone(), bias, W_dec, zero, ReLU(), read=Site.parse(site))


def zeroing(*sites: str, **fields: Any) -> Condition:
    """Latents 0 to 9 at each site are zeroed."""
    subsets = {Site.parse(site): sae_at(site).subset(range(10)) for site in sites}
    full = tuple(subset.sae.ablate(range(10)) for subset in subsets.values())
    return Condition(ConditionSpec(kind="zero", **fields), subsets, full)


def penalising() -> Condition:
    sae = sae_at("resid_post.1")
    sae.policy = TokenPolicy(tuple(range(8, 40)))  # rows differ in how many tokens count
    return Condition(ConditionSpec(kind="penalty", strength=5.0), {Site.parse("resid_post.1"): sae.subset(range(30))})


def train(
    lm: LM, rows: ChoiceRows, options: LearningSpec = FAST, *, weights: WeightsSpec | None = None,
    condition: Condition = NONE, begin: bool = False, group: Group = SOLO,
) -> dict[str, Tensor]:  # fmt: skip
    """The weights that training ends with."""
    with trainable(lm, weights or WeightsSpec()) as model:
        edited = [site for edit in condition.full for site in (edit.site, *edit.needs)]
        site = lowest(model.first_block, [*condition.reads, *edited]) if begin else None
        starts = starts_at(lm, site, {"train": rows})
        assert bool(starts) == begin
        plan = Plan(len(rows.lengths), options)
        finetune(model, rows, condition, plan, starts=starts.get("train"), checkpoints=Checkpoints(group=group))
        return {name: weight.detach().clone() for name, weight in model.named.items()}


def close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert a.keys() == b.keys()
    for name in a:
        limit = tolerance if a[name].dtype == torch.float64 else 200 * tolerance
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=limit, msg=lambda text: f"{name}: {text}")  # noqa: B023


def test_training_is_that_of_transformers_and_pytorch(family: str) -> None:
    """Against a loop over the plain model with full logits, AdamW and transformers' schedule; the base comes back."""
    from transformers import get_linear_schedule_with_warmup

    rows, options = random_rows(N), replace(FAST, lr=3e-3, weight_decay=0.1, clip=0.5)
    plain, lm = wide(family), tiny(family)
    before = {name: weight.clone() for name, weight in lm.model.state_dict().items()}
    plan = Plan(N, options)
    optimiser = torch.optim.AdamW(plain.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_linear_schedule_with_warmup(optimiser, math.ceil(0.25 * plan.steps), plan.steps)
    assert plan.steps == 6
    for step in range(plan.steps):
        assert plan.learning_rate(step) == pytest.approx(optimiser.param_groups[0]["lr"])
        loss = torch.zeros(())
        for row in plan.rows(step):  # each item alone, without padding
            ids = rows.answers.tokens.ids[row][rows.answers.tokens.mask[row]]
            logits = plain(input_ids=ids.unsqueeze(0)).logits[0, -1]
            loss = loss + F.cross_entropy(logits, rows.answers.correct[row]) / len(plan.rows(step))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimiser.step()
        schedule.step()
    close(train(lm, rows, options), {name: w.detach() for name, w in plain.named_parameters()})
    after = lm.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(weight.requires_grad for weight in lm.model.parameters()) and not lm.sessions


def test_every_epoch_has_every_item_once() -> None:
    plan = Plan(10, LearningSpec(batch=4, epochs=1.5))
    assert plan.steps == 4 and [len(plan.rows(step)) for step in range(4)] == [4, 4, 2, 4]
    first = [row for step in range(3) for row in plan.rows(step)]
    assert sorted(first) == list(range(10)) and first[:4] != plan.rows(3)
    assert first[:4] != replace(plan, seed=1).rows(0)
    assert sorted(replace(plan, checks=2).checked) == [0, 2, 3, 4]


@pytest.mark.parametrize("change", [{"accumulation": 3}, {"recompute": True}])
@pytest.mark.parametrize("kind", ["none", "zero", "penalty"])
def test_neither_accumulation_nor_recomputation_changes_what_is_learnt(change: dict[str, Any], kind: str) -> None:
    rows = random_rows(N)
    condition = {"none": NONE, "zero": zeroing("resid_post.0", "mlp_out.1"), "penalty": penalising()}[kind]
    whole = train(tiny(), rows, condition=condition)
    close(train(tiny(), rows, replace(FAST, **change), condition=condition), whole)


def test_recomputed_passes_have_the_same_gradients_to_the_last_bit_in_every_family(family: str) -> None:
    rows, condition = random_rows(4), zeroing("resid_post.0", "mlp_out.1", "attn_heads.1")
    one = replace(FAST, epochs=1)
    whole = train(tiny(family), rows, one, condition=condition)
    again = train(tiny(family), rows, replace(one, recompute=True), condition=condition)
    close(again, whole, 0.0)


def test_passes_that_begin_in_the_middle_learn_the_same(family: str) -> None:
    rows, weights = random_rows(N), WeightsSpec(train="blocks", first_block=1)
    for condition, options in ((NONE, FAST), (zeroing("resid_post.1"), replace(FAST, kl=0.5))):
        lm = tiny(family)
        whole = train(lm, rows, options, weights=weights, condition=condition)
        close(train(lm, rows, options, weights=weights, condition=condition, begin=True), whole)


def test_where_passes_begin() -> None:
    places = {"resid_post.4": "resid_post.4", "resid_pre.4": "resid_post.3", "mlp_out.4": "resid_post.3"}
    places |= {"final_norm": "resid_post.8", "embed": "None", "resid_mid.0": "None"}
    assert {name: str(lowest(9, [Site.parse(name)])) for name in places} == places
    assert lowest(0, []) is None and str(lowest(3, [Site.parse("resid_post.7")])) == "resid_post.2"


def test_kl_is_to_the_base_model() -> None:
    """One step of a loss that is almost only KL leaves the weights, which are the base's, where they are."""
    rows, lm = random_rows(4), tiny()
    options = LearningSpec(lr=1e-2, batch=4, epochs=3, warmup=0.0, weight_decay=0.0)
    moved = train(lm, rows, options)
    held = train(lm, rows, replace(options, kl=1000.0))
    base = dict(lm.model.named_parameters())
    with trainable(lm, WeightsSpec()):
        pass
    far = [sum(float((weights[name] - base[name]).norm()) for name in base) for weights in (moved, held)]
    assert far[1] < 0.9 * far[0]


def test_edits_change_what_is_learnt_and_fade() -> None:
    rows = random_rows(N)
    learnt = [
        train(tiny(), rows, condition=condition)["model.layers.0.mlp.up_proj.weight"]
        for condition in (NONE, zeroing("resid_post.0"), zeroing("resid_post.0", fade="out"))
    ]
    assert len({tuple(one.flatten().tolist()) for one in learnt}) == 3


def test_lora_learns_and_leaves_the_model_as_it_was(family: str) -> None:
    rows, lm = random_rows(N), tiny(family)
    before = {name: weight.clone() for name, weight in lm.model.state_dict().items()}
    learnt = train(lm, rows, weights=WeightsSpec(train="lora", first_block=1, rank=2), begin=True)
    assert any(bool(weight.any()) for name, weight in learnt.items() if "lora_B" in name)
    assert all(".1." in name or ".2." in name for name in learnt)
    after = lm.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_bfloat16_learns(how: str) -> None:
    rows, lm = random_rows(4), LM(build_tiny("qwen2"), None)
    options = replace(FAST, epochs=8, autocast=how == "autocast")
    if how == "bfloat16":
        lm = LM(build_tiny("qwen2").bfloat16(), None)
    with trainable(lm, WeightsSpec()) as model:
        plan = Plan(4, options, checks=1)
        history = finetune(model, rows, zeroing("resid_post.0"), plan)
        assert next(iter(model.named.values())).dtype == (torch.bfloat16 if how == "bfloat16" else torch.float32)
    losses = [check.loss for check in history if check.loss is not None]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_loss_that_explodes_keeps_the_weights_before_it(broken: str, tmp_path: Path) -> None:
    rows, lm = random_rows(N), tiny()

    class Exploding(Condition):
        def penalty(self, read: Any, tokens: Any, base: Any, progress: float) -> Tensor | None:
            if progress < 0.5:
                return None
            weight = lm.model.model.norm.weight
            return weight.sum() * torch.inf if broken == "loss" else (weight - weight).abs().sqrt().sum()

    with trainable(lm, WeightsSpec()) as model:
        store = Checkpoints(tmp_path)
        with pytest.raises(UnweaveError, match="no longer finite") as caught:
            finetune(model, rows, Exploding(ConditionSpec()), Plan(N, FAST), checkpoints=store)
        assert "step 4 of 6" in caught.value.where and "learning.lr" in caught.value.remedy
        saved = store.load()
        assert saved is not None and saved["step"] == 3
        assert all(torch.equal(saved["weights"][name], weight) for name, weight in model.named.items())


def test_what_is_refused() -> None:
    rows, lm = random_rows(3), tiny()
    with (
        pytest.raises(UnweaveError, match="block 3 does not exist"),
        trainable(lm, WeightsSpec(train="blocks", first_block=3)),
    ):
        pass
    with trainable(lm, WeightsSpec()) as model:
        with pytest.raises(UnweaveError, match="batches of 2 cannot be divided among 3"):
            few = Checkpoints(group=Group(0, 3))
            finetune(model, rows, NONE, Plan(3, LearningSpec(batch=2)), checkpoints=few)
        with pytest.raises(UnweaveError, match="3 training items, not 4"):
            finetune(model, rows, NONE, Plan(4, LearningSpec()))


# -- several processes ------------------------------------------------------------------------------------------------


def _cases() -> dict[str, Callable[[Group], dict[str, Tensor]]]:
    rows = random_rows(N)  # batches of 4, 4 and 2: one of three processes is idle in the last
    blocks = WeightsSpec(train="blocks", first_block=1)
    return {
        "all": lambda group: train(tiny(), rows, replace(FAST, clip=0.1), group=group),
        "blocks": lambda group: train(
            tiny("gpt2"), rows, replace(FAST, accumulation=2), weights=blocks, begin=True, group=group,
            condition=zeroing("resid_post.1"),
        ),
    }  # fmt: skip


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=3)
    torch.save({name: case(Group(rank, 3)) for name, case in _cases().items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_three_processes_train_as_one_does(tmp_path: Path) -> None:
    spawn(_work, (str(tmp_path),), nprocs=3)
    several = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    for name, case in _cases().items():
        close(several[0][name], case(SOLO))
        close(several[1][name], several[0][name], 0.0)
        close(several[2][name], several[0][name], 0.0)
