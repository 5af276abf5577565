"""Edits inside transformers' Trainer, beside a loop whose hook is written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer, TrainerState, TrainingArguments

from helpers.models import VOCAB, build_tiny
from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.lm.at import At
from unweave.lm.chat import Role
from unweave.lm.model import LM
from unweave.methods.finetune.trainer import EditCallback, ablating
from unweave.sae.activations import ReLU
from unweave.sae.module import SAE
from unweave.sae.provenance import describe_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
N, STEPS, LR = 8, 4, 0.05
IDS = torch.randint(8, VOCAB, (N, 9), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in IDS]


def an_sae() -> SAE:
    g = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(48, 32, generator=g, dtype=torch.float64), dim=1)
    zero = torch.zeros(32, dtype=torch.float64)
    return SAE(rows.T.clone(), torch.full((48,), -0.2).double(), rows, zero, ReLU(), read=Site("resid_post", 1))


SAE_ = an_sae()


def by_hand(model: Any, share: Callable[[int], float]) -> dict[str, Tensor]:
    """SGD on the whole set, latents 0 to 9 zeroed by a hook that encodes and decodes all of them."""
    step = 0

    def hook(_module: Any, _args: Any, out: Any) -> Any:
        x = out[0] if isinstance(out, tuple) else out
        f = SAE_.encode(x)
        lost = f.clone()
        lost[..., :10] = 0
        x = x + share(step) * (SAE_.decode(lost) - SAE_.decode(f))
        return (x, *out[1:]) if isinstance(out, tuple) else x

    handle = model.get_submodule("model.layers.1").register_forward_hook(hook)
    optimiser = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=LR)
    for step in range(STEPS):  # noqa: B007 - the hook reads it
        optimiser.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimiser.step()
    handle.remove()
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def by_trainer(model: Any, callback: EditCallback, folder: Path, **changes: Any) -> Trainer:
    options: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": N, "learning_rate": LR,
        "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "use_cpu": True, "report_to": [],
        "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    arguments = TrainingArguments(**options | changes)
    data: Any = ROWS
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data, callbacks=[callback])
    trainer.train()
    return trainer


def close(a: dict[str, Tensor], model: Any) -> None:
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(weight.detach(), a[name], rtol=0, atol=1e-6)


CASES = {
    "whole": {},
    "accumulated": {"per_device_train_batch_size": N // 2, "gradient_accumulation_steps": 2},
    "checkpointed": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("case", CASES)
def test_a_trainer_learns_under_the_edit_and_evaluates_without(case: str, tmp_path: Path) -> None:
    expected = by_hand(build_tiny("llama").double(), lambda step: 1.0)
    model = build_tiny("llama").double().train()
    callback = EditCallback(model, SAE_.ablate(range(10)))
    assert model.training and all(weight.requires_grad for weight in model.parameters())
    trainer = by_trainer(model, callback, tmp_path, eval_strategy="steps", eval_steps=STEPS, **CASES[case])
    close(expected, model)
    (measured,) = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    model.eval()
    with torch.no_grad():
        assert measured == pytest.approx(float(model(input_ids=IDS, labels=IDS).loss), rel=1e-4)
    assert not callback.lm.sessions and not model._forward_pre_hooks
    hooked = [name for name, module in model.named_modules() if module._forward_hooks]
    assert hooked == (["model.embed_tokens"] if case == "checkpointed" else [])  # the trainer's own


def test_edits_fade_with_the_trainers_progress(tmp_path: Path) -> None:
    expected = by_hand(build_tiny("llama").double(), lambda step: 1 - step / (STEPS - 1))
    model = build_tiny("llama").double()
    zero = SAE_.ablate(range(10))
    by_trainer(model, EditCallback(model, lambda p: [replace(zero, share=1 - p)] if p < 1 else []), tmp_path)
    close(expected, model)


def test_adapters_of_peft_learn_under_the_edit(tmp_path: Path) -> None:
    def adapted() -> Any:
        torch.manual_seed(0)
        model: Any = build_tiny("llama").double()
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM"))

    model = adapted()
    expected = by_hand(model.get_base_model(), lambda step: 1.0)
    model = adapted()
    by_trainer(model, EditCallback(model, SAE_.ablate(range(10))), tmp_path)
    close(expected, model.get_base_model())


def test_every_pass_is_one_of_whole_rows() -> None:
    seen: list[tuple[int, int]] = []

    def look(x: Tensor, at: At) -> None:
        del x
        seen.append((at.step, int(at.roles.max())))

    model = build_tiny("gpt2")
    with ablating(model, {Site("resid_post", 1): look}):
        for _ in range(2):
            model(input_ids=IDS).logits.sum().backward()
    assert seen == [(0, Role.TEXT), (0, Role.TEXT)] and model.transformer.wte.weight.grad is not None
    assert not model._forward_pre_hooks


def test_an_sae_of_another_model_is_refused_before_training() -> None:
    sae = an_sae()
    sae.provenance = {"model": describe_model(LM(build_tiny("llama", 1), None), sae)}
    with pytest.raises(UnweaveError):
        EditCallback(build_tiny("llama"), sae.ablate([1]))


def test_a_step_that_was_interrupted_leaves_no_hook() -> None:
    model = build_tiny("llama").double()
    callback = EditCallback(model, SAE_.ablate([1]))
    state = TrainerState(global_step=0, max_steps=3)
    callback.on_step_begin(None, state, None)
    callback.on_step_begin(None, state, None)  # the next training of the same trainer
    assert len(callback.lm.sessions) == 1
    callback.close()
    assert not callback.lm.sessions and not model._forward_pre_hooks
