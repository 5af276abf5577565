"""eai-sparsify's sparse coder, step by step as its trainer does it, with its default optimiser and learning rate."""

from __future__ import annotations

import torch
import worker
from schedulefree import ScheduleFreeWrapper
from sparsify import SparseCoderConfig
from sparsify.sign_sgd import SignSGD
from sparsify.sparse_coder import SparseCoder


def prepare(setting: worker.Setting):
    config = SparseCoderConfig(num_latents=setting.latents, k=setting.k)
    coder = SparseCoder(setting.train.shape[1], config, device=setting.device)
    coder.b_dec.data = setting.rows(0).mean(0)
    rate = 5e-3 / (setting.latents / 2**14) ** 0.5
    optimiser = ScheduleFreeWrapper(SignSGD([{"params": list(coder.parameters()), "lr": rate}]), momentum=0.95)
    optimiser.train()

    def train(step: int) -> None:
        coder.set_decoder_norm_to_unit_norm()
        coder(setting.rows(step)).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()

    def reconstruct(x: torch.Tensor) -> tuple[torch.Tensor, float]:
        optimiser.eval()
        out = coder(x)
        optimiser.train()
        return out.sae_out, float((out.latent_acts > 0).sum())

    return train, reconstruct


worker.serve(prepare)
