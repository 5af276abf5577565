"""Measures of an SAE on known features, each with the truth that the features say.

    explained_variance   1 - E|x - x_hat|^2 / E|x - mu|^2; 1 is all there is
    l0                   active latents per token; features per token
    probing              accuracy of a probe on one latent for whether a feature fires, balanced; of the feature's own
    absorption           as in ``absorption``, over tokens on which a parent fires, with its direction as the probe; the
                         part missing there of the value that the parent's own latent has where no child fires
    features             share of features of which some decoder row has a cosine of at least 0.9; all of them

A feature's own latent is the one whose decoder row is nearest to its direction, where it is so near.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unweave.methods.saebench.absorption import absorbed
from unweave.methods.saebench.core import token_sums
from unweave.methods.saebench.labelled import Split
from unweave.methods.saebench.planted import Planted
from unweave.methods.saebench.sparse_probing import probed
from unweave.sae.module import SAE

FOUND = 0.9
_LEAST = 40
"""tokens on which a feature must fire, and not fire"""
Row = tuple[str, float | None, float | None]


def measures(sae: SAE, world: Planted, x: Tensor, features: Tensor, seed: int = 0) -> list[Row]:
    """(name, measured, truth) on activations x [n, D] with ``features`` [n, G] in them."""
    sums = token_sums(sae, x, torch.zeros(len(x), dtype=torch.int64))
    spread = float((x.double() - x.double().mean(0)).square().sum())
    cos = F.normalize(world.directions, dim=1) @ F.normalize(sae.W_dec.float(), dim=1).T
    nearest = cos.max(1)
    own = torch.where(nearest.values >= FOUND, nearest.indices, -1)
    f = sae.encode(x)
    return [
        ("explained_variance", 1 - float(sums["rest"]) / spread, 1.0),
        ("l0", float(sums["fired"].sum()) / len(x), float((features > 0).sum()) / len(x)),
        ("probing", *_probing(f, features, own, seed)),
        ("absorption", *_absorption(sae, f, world, x, features, own)),
        ("features", float((own >= 0).float().mean()), 1.0),
    ]


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _probing(f: Tensor, features: Tensor, own: Tensor, seed: int) -> tuple[float | None, float | None]:
    rng, latents = np.random.default_rng(seed), f.numpy()
    measured, truth = [], []
    for g in range(features.shape[1]):
        fires = features[:, g].numpy() > 0
        sides = [rng.permutation(np.flatnonzero(fires == side)) for side in (True, False)]
        n = min(map(len, sides))
        if n < _LEAST:
            continue
        rows = rng.permutation(np.concatenate([side[:n] for side in sides]))
        parts = np.split(rows, [int(1.2 * n), int(1.6 * n)])
        split = Split(*((part, fires[part].astype(np.int64)) for part in parts))
        measured.append(probed(latents, split, (1,), (1.0,), "correct", seed)["top_1_test_accuracy"])
        if own[g] >= 0:
            says = latents[parts[2], int(own[g])] > 0
            truth.append(float((says == fires[parts[2]]).mean()))
    return _mean(measured), _mean(truth)


def _absorption(
    sae: SAE, f: Tensor, world: Planted, x: Tensor, features: Tensor, own: Tensor
) -> tuple[float | None, float | None]:
    measured, truth = [], []
    for parent in sorted({*world.parents.tolist()} - {-1}):
        here = features[:, parent] > 0
        alone = here & ~(features[:, world.parents == parent] > 0).any(1)
        if min(int(here.sum()), int(alone.sum())) < _LEAST:
            continue
        u = world.directions[parent]
        apart = f[here].mean(0) - f[~here].mean(0)
        cos = F.normalize(sae.W_dec.float(), dim=1) @ u
        main = (apart / f.std(0).clamp(min=1e-6)).argmax()[None]
        projection = (x[here] - sae.b_dec.float()) @ u
        measured.append(float(absorbed(f[here], sae.W_dec.float() @ u, cos, projection, main)[0].mean()))
        if own[parent] >= 0:
            value = f[:, int(own[parent])]
            truth.append(float((1 - value[here] / value[alone].median().clamp(min=1e-9)).clamp(0, 1).mean()))
    return _mean(measured), _mean(truth)
