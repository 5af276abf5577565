"""This package's trainer with its defaults, without AuxK: no other contestant has dead latents to revive either."""

from __future__ import annotations

import torch
import worker

from unweave import SAE
from unweave.core.site import Site
from unweave.methods.train.kinds import SAESpec
from unweave.methods.train.trainer import SAETrainer
from unweave.sae.activations import JumpReLU, ReLU


def given(setting: worker.Setting) -> SAE:
    """The contest's starting weights as an SAE."""
    t = setting.start
    activation = JumpReLU(t["threshold"]) if "threshold" in t else ReLU()
    W_enc = t["W_enc"].T.contiguous()
    return SAE(W_enc, t["b_enc"], t["W_dec"], t["b_dec"], activation, read=Site("resid_post", 9))


def prepare(setting: worker.Setting):
    width = setting.train.shape[1]
    common = {
        "kind": setting.kind, "expansion": setting.latents // width, "batch": setting.batch, "aux_weight": 0.0,
        "tokens": setting.steps * setting.batch,
    }  # fmt: skip
    if setting.start:
        more = {"penalty": "step", "bandwidth": setting.bandwidth} if setting.kind == "jumprelu" else {}
        fixed = {"sparsity": setting.sparsity, "lr": setting.lr, "schedule": "constant", "warmup": 0.0}
        scaling = {"centre": "none", "normalise": False}
        spec = SAESpec.from_dict(common | more | fixed | scaling)
        trainer = SAETrainer(spec, width, init_x=setting.rows(0), start=given(setting))
    else:
        trainer = SAETrainer(SAESpec.from_dict(common | {"k": setting.k}), width, init_x=setting.rows(0))

    def reconstruct(x: torch.Tensor) -> tuple[torch.Tensor, float]:
        sae = trainer.to_sae()
        codes = sae.codes(x)
        return sae.decode(codes), float((codes.values > 0).sum())

    return lambda step: trainer.step(setting.rows(step)), reconstruct


worker.serve(prepare)
