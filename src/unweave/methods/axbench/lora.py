"""LoRA (Hu et al. 2021) on texts with a concept, the baseline that changes weights. Needs ``peft``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from unweave.core.errors import UnweaveError
from unweave.lm.model import LM
from unweave.methods.axbench.directions import text_loss, text_tokens
from unweave.methods.axbench.options import LoraSpec


def require_peft() -> Any:
    """The package. UnweaveError where it is not installed."""
    try:
        import peft
    except ImportError:
        raise UnweaveError(
            "the method lora needs the package peft", remedy="pip install 'unweave[finetune]', or leave lora out"
        ) from None
    return peft


@contextmanager
def adapted(
    lm: LM, texts: Sequence[str], *, most: int, options: LoraSpec | None = None, seed: int = 0
) -> Iterator[list[float]]:
    """The model with adapters on all linear layers but the unembedding, trained on texts with a concept; as it was
    afterwards. Yields the loss of each step."""
    from transformers.pytorch_utils import Conv1D

    options, peft = options or LoraSpec(), require_peft()
    transposed = any(isinstance(module, Conv1D) for module in lm.model.modules())
    config = peft.LoraConfig(
        r=options.rank, lora_alpha=options.alpha, target_modules="all-linear", fan_in_fan_out=transposed
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped = peft.LoraModel(lm.model, config, "default")
    try:
        yield _trained(lm, texts, most, options, seed)
    finally:
        wrapped.unload()


def _trained(lm: LM, texts: Sequence[str], most: int, options: LoraSpec, seed: int) -> list[float]:
    """Trains whatever of the model has gradients; returns the losses."""
    generator = torch.Generator().manual_seed(seed)
    weights = [weight for weight in lm.model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=options.lr, weight_decay=0.0)
    losses = []
    for _ in range(options.epochs):
        for rows in torch.randperm(len(texts), generator=generator).split(options.batch):
            tokens = text_tokens(lm, [texts[int(i)] for i in rows], most).to(lm.device)
            optimiser.zero_grad()
            with lm.taps(grad=True), torch.enable_grad():
                logits = lm(tokens)
                assert logits is not None
                loss = text_loss(logits, tokens)
                loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
    return losses
