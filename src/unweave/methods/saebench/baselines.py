"""What an SAE must beat: directions drawn at random with its sparsity, and the model's own coordinates."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from unweave.data.policy import TokenPolicy
from unweave.lm.model import LM
from unweave.sae.activations import TopK
from unweave.sae.module import SAE
from unweave.sae.neurons import neurons

_APART = 1 << 30
"""added to the seed: with the same one, directions are those that an SAE of this size begins with (32 bits count)"""


def active(sae: SAE, x: Tensor) -> float:
    """How many latents are above zero on a token of x [n, D], on average."""
    return float(sae.codes(x.to(sae.W_enc)).counts().sum()) / len(x)


def random_directions(sae: SAE, x: Tensor, seed: int = 0) -> SAE:
    """An SAE of the same size and sparsity whose latents are directions uniform on the sphere.

    f = c TopK_k(W (x - mu)), x_hat = f W + mu with unit rows W, mu the mean of x [n, D], k the SAE's own or its mean
    number of active latents on x, and the scale c that reconstructs x best.
    """
    k = sae.activation.k if isinstance(sae.activation, TopK) else round(active(sae, x))
    x = x.to(sae.W_enc.device).float()
    generator = torch.Generator().manual_seed(_APART + seed)
    W = F.normalize(torch.randn(sae.d_sae, x.shape[1], generator=generator), dim=1).to(x.device)
    mean, k = x.mean(0), min(max(k, 1), sae.d_sae)
    plain = SAE(W.T, -(W @ mean), W, mean, TopK(k), read=sae.read, policy=sae.policy)
    y = plain.reconstruct_sparsely(x) - mean
    scale = float(((x - mean) * y).sum() / (y * y).sum())
    return SAE(scale * W.T, -scale * (W @ mean), W, mean, TopK(k), read=sae.read, policy=sae.policy)


def own_neurons(lm: LM, sae: SAE, policy: TokenPolicy) -> SAE:
    """The coordinates of the site as latents."""
    assert sae.read is not None
    own = neurons(lm, sae.read)
    own.policy = policy
    return own
