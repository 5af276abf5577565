"""LoRA learns its texts, does what its matrices say, and leaves no trace."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch

from unweave.core.errors import UnweaveError
from unweave.methods.axbench.directions import adapted, peft_for_lora
from unweave.methods.axbench.spec import LoraSpec


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_lora_learns_and_leaves_no_trace(tiny_lm: Any, name: str) -> None:
    lm = tiny_lm(name)
    tokens = lm.tokenize(["abc abc"])
    before, weights = lm(tokens), {n: p.clone() for n, p in lm.model.named_parameters()}
    module = lm.layout.blocks[0]
    with adapted(lm, ["abcabc", "bcabca"], most=6, options=LoraSpec(epochs=20, lr=0.02, batch=2)) as losses:
        assert losses[-1] < 0.6 * losses[0]
        assert not torch.allclose(lm(tokens), before)
        assert lm.layout.blocks[0] is module
        one = next(m for m in lm.model.modules() if hasattr(m, "lora_A"))
        x = torch.randn(2, one.lora_A["default"].in_features)
        low = x @ one.lora_A["default"].weight.T @ one.lora_B["default"].weight.T
        torch.testing.assert_close(one(x) - one.get_base_layer()(x), 32.0 / 4 * low, atol=1e-4, rtol=1e-3)
        assert lm.generate_ids(lm.tokenize(["ab"], side="left"), max_new_tokens=2).shape[0] == 1
    assert torch.equal(lm(tokens), before)
    assert {n: p.requires_grad for n, p in lm.model.named_parameters()} == dict.fromkeys(weights, False)
    assert all(torch.equal(p, weights[n]) for n, p in lm.model.named_parameters())


def test_without_peft_one_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "peft":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UnweaveError, match=r"unweave\[finetune\]"):
        peft_for_lora()
