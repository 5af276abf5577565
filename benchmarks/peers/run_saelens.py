"""sae-lens's TopK trainer with its defaults, its inputs scaled as its documentation advises."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import worker
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer


def prepare(setting: worker.Setting):
    config = TopKTrainingSAEConfig(
        d_in=setting.train.shape[1],
        d_sae=setting.latents,
        k=setting.k,
        normalize_activations="expected_average_only_in",
    )
    sae = TopKTrainingSAE(config)

    def batches() -> Iterator[torch.Tensor]:
        yield setting.rows(0)

    options = SAETrainerConfig(
        total_training_samples=setting.steps * setting.batch,
        train_batch_size_samples=setting.batch,
        lr_end=3e-5,  # what its runner derives from its default rate of 3e-4
    )
    trainer = SAETrainer(cfg=options, sae=sae, data_provider=batches())
    trainer.activation_scaler.estimate_scaling_factor(
        d_in=config.d_in, data_provider=batches(), n_batches_for_norm_estimate=1
    )

    def train(step: int) -> None:
        trainer.step(setting.rows(step))
        trainer.n_training_steps += 1

    def reconstruct(x: torch.Tensor) -> torch.Tensor:
        scale = trainer.activation_scaler.scaling_factor
        assert scale is not None
        return sae(x * scale) / scale

    return train, reconstruct


worker.serve(prepare)
