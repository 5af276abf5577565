"""LoRA (Hu et al. 2021) on texts with a concept, the baseline that changes weights. Needs ``peft``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from unweave.lm.adapters import require_peft
from unweave.lm.model import LM, Tokens
from unweave.methods.axbench.directions import text_loss, trained
from unweave.methods.axbench.spec import LoraSpec


def peft_for_lora() -> Any:
    """The package. UnweaveError where it is not installed."""
    return require_peft("the method lora", otherwise="leave lora out")


@contextmanager
def adapted(
    lm: LM, texts: Sequence[str], *, most: int, options: LoraSpec | None = None, seed: int = 0
) -> Iterator[list[float]]:
    """The model with adapters on all linear layers but the unembedding, trained on texts with a concept; as it was
    afterwards. Yields the loss of each step."""
    from transformers.pytorch_utils import Conv1D

    options, peft = options or LoraSpec(), peft_for_lora()
    transposed = any(isinstance(module, Conv1D) for module in lm.model.modules())
    config = peft.LoraConfig(
        r=options.rank, lora_alpha=options.alpha, target_modules="all-linear", fan_in_fan_out=transposed
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped = peft.LoraModel(lm.model, config, "default")
    weights = [weight for weight in lm.model.parameters() if weight.requires_grad]

    def loss(tokens: Tokens, _rows: Tensor) -> Tensor:
        logits = lm(tokens)
        assert logits is not None
        return text_loss(logits, tokens)

    try:
        yield list(trained(lm, weights, texts, most, options, seed, loss))
    finally:
        wrapped.unload()
