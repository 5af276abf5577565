"""The weights that are trained, what they were before, and how they are saved."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unweave.core.errors import UnweaveError
from unweave.lm.adapters import require_peft
from unweave.lm.model import LM
from unweave.lm.sources import quiet
from unweave.methods.finetune.spec import WeightsSpec


@dataclass(frozen=True)
class Trainable:
    """A model whose weights ``named`` are trained, and what they are in the base model (on the CPU until it is run)."""

    lm: LM
    named: dict[str, nn.Parameter]
    base: dict[str, Tensor]
    first_block: int
    """blocks below it, and the embeddings, stay as they are; 0 where these are trained, too"""
    adapter: Any = None
    """the PeftModel around the model, for LoRA"""

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """Within, the model is the base model. Graphs that were recorded before are not touched."""
        own = {name: weight.data for name, weight in self.named.items()}
        try:
            for name, weight in self.named.items():
                self.base[name] = weight.data = self.base[name].to(weight.device)
            yield
        finally:
            for name, weight in self.named.items():
                weight.data = own[name]

    def save(self, folder: Path) -> None:
        """Writes a Hugging Face folder, or a PEFT adapter, with the tokenizer. No hook is part of either."""
        with quiet():
            if self.adapter is None:
                self.lm.model.save_pretrained(folder)
            else:
                self.adapter.save_pretrained(folder, save_embedding_layers=False)
            if self.lm.tokenizer is not None:
                self.lm.tokenizer.save_pretrained(folder)


@contextmanager
def trainable(lm: LM, spec: WeightsSpec, *, seed: int = 0, name: str | None = None) -> Iterator[Trainable]:
    """Within, the weights that ``spec`` names are trainable; afterwards the model is as it was, to the last bit.

    ``name`` is what an adapter says its base model is. Raises UnweaveError for blocks that do not exist.
    """
    if spec.first_block >= lm.n_layers:
        raise UnweaveError(
            f"block {spec.first_block} does not exist", where="weights.first_block",
            remedy=f"the model's blocks are 0 to {lm.n_layers - 1}",
        )  # fmt: skip
    adapter = _adapter(lm, spec, seed, name) if spec.train == "lora" else None
    try:
        named = _named(lm, spec)
        for weight in named.values():
            weight.requires_grad_(True)
        base = {name: weight.detach().to("cpu", copy=True) for name, weight in named.items()}
        yield Trainable(lm, named, base, 0 if spec.train == "all" else spec.first_block, adapter)
    finally:
        if adapter is not None:
            adapter.unload()
            vars(lm.model).pop("peft_config", None)
        else:
            with torch.no_grad():
                for name, weight in named.items():
                    weight.copy_(base[name])
                    weight.grad = None
        lm.model.requires_grad_(False)


def _named(lm: LM, spec: WeightsSpec) -> dict[str, nn.Parameter]:
    weights = dict(lm.model.named_parameters())
    if spec.train == "lora":
        return {name: weight for name, weight in weights.items() if weight.requires_grad}
    if spec.train == "blocks":
        parts = (*lm.layout.blocks[spec.first_block :], lm.model.get_submodule(lm.layout.family.final_norm))
        inside = {id(weight) for part in parts for weight in part.parameters()}
        return {name: weight for name, weight in weights.items() if id(weight) in inside}
    return weights


def _adapter(lm: LM, spec: WeightsSpec, seed: int, name: str | None) -> Any:
    """Adapters on the linear layers of the blocks, named one by one."""
    from transformers.pytorch_utils import Conv1D

    peft = require_peft("LoRA", where="weights.train", otherwise="train all or blocks")
    inside = {id(part) for block in lm.layout.blocks[spec.first_block :] for part in block.modules()}
    linear = [
        (path, part)
        for path, part in lm.model.named_modules()
        if id(part) in inside and isinstance(part, (nn.Linear, Conv1D))
    ]
    alpha: Any = spec.alpha  # peft only divides by the rank; whole numbers are not required
    config = peft.LoraConfig(
        r=spec.rank, lora_alpha=alpha, use_rslora=spec.rslora, target_modules=[path for path, _ in linear],
        fan_in_fan_out=any(isinstance(part, Conv1D) for _, part in linear), task_type="CAUSAL_LM",
        base_model_name_or_path=name,
    )  # fmt: skip
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers for what has another name now
        torch.manual_seed(seed)
        adapter = peft.get_peft_model(lm.model, config)
    config.base_model_name_or_path = name
    lm.model.eval()
    return adapter
