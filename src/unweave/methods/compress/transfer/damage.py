"""Which latents a compression damages: the same ones as another does, and ones that can be told beforehand?

Damage of a latent is 1 - r. It is predicted as log10(1 - r) by least squares from four things that the original model
and SAE say: how often the latent fires, how far it fires above its threshold in units of the input (its mean value over
the length of its encoder row), how much its values vary, and the cosine of encoder and decoder row. R^2 is of latents
that were not fitted on, in five folds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unweave.core.intervals import Array, rank_correlation
from unweave.core.site import Site
from unweave.methods.compress.transfer.result import Overlap, Predictor
from unweave.methods.compress.transfer.survival import LEAST, correlations
from unweave.sae.module import SAE

FEATURES = ("log firing rate", "log margin", "log spread of values", "cosine of encoder and decoder")
FOLDS = 5
_FLOOR = 1e-6
_TOP = 0.1


def damages(table: Tensor, n: int) -> Array:
    """1 - r of each latent, float64 [F]; NaN for those that fire too seldom to say."""
    return np.where(table[5].cpu().numpy() >= LEAST, 1 - correlations(table, n), np.nan)


def features(sae: SAE, table: Tensor, n: int) -> Array:
    """What is known of each latent before compression, float64 [F, 4]; see ``FEATURES``."""
    fired, a, aa = (table[row].cpu().double().clamp(min=1e-30) for row in (5, 0, 2))
    mean = a / fired
    spread = (aa / fired - mean.square()).clamp(min=0).sqrt() / mean
    encoder = sae.W_enc.T.cpu().double()
    together = F.cosine_similarity(encoder, sae.W_dec.cpu().double(), dim=1)
    columns = (fired / n, mean / encoder.norm(dim=1).clamp(min=1e-30), spread.clamp(min=1e-3))
    return torch.stack([*(column.log10() for column in columns), together], 1).numpy()


def overlaps(site: Site, by_compression: Mapping[str, Array]) -> list[Overlap]:
    """Every pair of compressions, by their words, with the damage [F] of each."""
    found = []
    for (one, a), (other, b) in combinations(by_compression.items(), 2):
        there = ~np.isnan(a) & ~np.isnan(b)
        n = int(there.sum())
        most = max(1, int(_TOP * n))
        if n > most:
            worst = [set(np.argsort(-values[there], kind="stable")[:most].tolist()) for values in (a, b)]
            rank = rank_correlation(a[there], b[there]) or 0.0
            found.append(Overlap(site, one, other, n, rank, len(worst[0] & worst[1]) / most))
    return found


def predictor(site: Site, x: Array, by_compression: Mapping[str, Array], seed: int) -> Predictor | None:
    """The prediction of the first compression's damage from features x [F, k]; None with too few latents, and where
    damage does not vary."""
    from scipy.stats import t

    first, *others = by_compression.items()
    there = ~np.isnan(first[1])
    x, y = x[there], np.log10(np.maximum(first[1][there], _FLOOR))
    if len(y) < 10 * x.shape[1] or np.ptp(y) < 1e-9:
        return None
    x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-12)
    fold = np.random.default_rng(seed).permutation(len(y)) % FOLDS
    predicted, shares = np.empty(len(y)), []
    for each in range(FOLDS):
        out = fold == each
        predicted[out] = _with_ones(x[out]) @ _weights(x[~out], y[~out])
        variance = float(((y[out] - y[~out].mean()) ** 2).sum())
        shares.append(1 - float(((y[out] - predicted[out]) ** 2).sum()) / max(variance, 1e-30))
    half = float(t.ppf(0.975, FOLDS - 1)) * float(np.std(shares, ddof=1)) / math.sqrt(FOLDS)
    elsewhere = {}
    for name, damage in others:
        both = ~np.isnan(damage[there])
        elsewhere[name] = rank_correlation(predicted[both], damage[there][both]) or 0.0
    mean = float(np.mean(shares))
    return Predictor(
        site=site,
        latents=len(y),
        explained=mean,
        low=mean - half,
        high=mean + half,
        rank_correlation=rank_correlation(predicted, y) or 0.0,
        weights=dict(zip(FEATURES, _weights(x, y)[1:].tolist(), strict=True)),
        elsewhere=elsewhere,
    )


def _with_ones(x: Array) -> Array:
    return np.column_stack([np.ones(len(x)), x])


def _weights(x: Array, y: Array) -> Array:
    return np.linalg.lstsq(_with_ones(x), y, rcond=None)[0]
