"""This package's trainer with its defaults."""

from __future__ import annotations

import worker

from unweave.sae.train import SAESpec, SAETrainer


def prepare(setting: worker.Setting):
    width = setting.train.shape[1]
    spec = SAESpec(
        k=setting.k, expansion=setting.latents // width, batch=setting.batch, tokens=setting.steps * setting.batch
    )
    trainer = SAETrainer(spec, width, init_x=setting.rows(0))
    return lambda step: trainer.step(setting.rows(step)), lambda x: trainer.to_sae().reconstruct_sparsely(x)


worker.serve(prepare)
