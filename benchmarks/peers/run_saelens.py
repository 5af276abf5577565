"""sae-lens's trainer with its defaults, its inputs scaled as its documentation advises.

Where the contest gives the weights it also gives the scale of activations, the rate and the penalty, the same to all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import worker
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer


def build(setting: worker.Setting) -> Any:
    sizes = {"d_in": setting.train.shape[1], "d_sae": setting.latents, "device": setting.device}
    scaled = "expected_average_only_in"
    if setting.kind == "topk":
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**sizes, k=setting.k, normalize_activations=scaled))
    elif setting.kind == "batchtopk":
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**sizes, k=setting.k, normalize_activations=scaled))
    elif setting.kind == "relu":
        config = StandardTrainingSAEConfig(**sizes, l1_coefficient=setting.sparsity, apply_b_dec_to_input=False)
        sae = StandardTrainingSAE(config)
    else:
        sae = JumpReLUTrainingSAE(
            JumpReLUTrainingSAEConfig(
                **sizes,
                l0_coefficient=setting.sparsity,
                jumprelu_bandwidth=setting.bandwidth,
                apply_b_dec_to_input=False,
            )
        )
    if setting.start:
        weights = {**setting.start, "W_enc": setting.start["W_enc"].T.contiguous()}
        sae.load_state_dict(weights)
    return sae.to(setting.device)


def as_saved(sae: Any, device: str) -> SAE:
    """The SAE that its user would load: BatchTopK is a JumpReLU there, with the threshold that training averaged.

    In its training form it would take the held-out batch's own winners.
    """
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        return SAE.load_from_disk(folder, device=device)


def prepare(setting: worker.Setting):
    sae = build(setting)

    def batches() -> Iterator[torch.Tensor]:
        yield setting.rows(0)

    rate = setting.lr if setting.start else 3e-4
    options = SAETrainerConfig(
        total_training_samples=setting.steps * setting.batch,
        train_batch_size_samples=setting.batch,
        device=setting.device,
        lr=rate,
        lr_end=rate / 10,  # as its runner derives it
    )
    trainer = SAETrainer(cfg=options, sae=sae, data_provider=batches())
    if not setting.start:
        trainer.activation_scaler.estimate_scaling_factor(
            d_in=sae.cfg.d_in, data_provider=batches(), n_batches_for_norm_estimate=1
        )

    def train(step: int) -> None:
        trainer.step(setting.rows(step))
        trainer.n_training_steps += 1

    saved: dict[int, SAE] = {}

    def reconstruct(x: torch.Tensor) -> tuple[torch.Tensor, float]:
        scale = trainer.activation_scaler.scaling_factor or 1.0
        if trainer.n_training_steps not in saved:
            saved.clear()
            saved[trainer.n_training_steps] = as_saved(sae, setting.device)
        inference = saved[trainer.n_training_steps]
        latents = inference.encode(x * scale)
        return inference.decode(latents) / scale, float((latents > 0).sum())

    return train, reconstruct


worker.serve(prepare)
