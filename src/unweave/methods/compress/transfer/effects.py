"""Whether latents still say and do what they did: labels on texts held out, directions added at the end of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from unweave.core.intervals import Array, interval
from unweave.core.site import Site
from unweave.data.stream import ActivationSource
from unweave.lm.model import LM
from unweave.methods.compress.transfer.result import Steered, Told
from unweave.methods.compress.transfer.survival import mean_of
from unweave.sae.module import SAE
from unweave.sae.output_score import NEUTRAL, raised

PROMPTS = (NEUTRAL, "The report says that", "It is a well known fact that")
_TOKENS_AT_ONCE = 1024


def firing_shares(
    source: ActivationSource, saes: Mapping[str, tuple[Site, SAE]], latents: Mapping[Site, Sequence[int]]
) -> dict[str, Array]:
    """On which share of each row's counted tokens the latents of a site fire, float64 [rows, S], for every form (by any
    name) of an SAE there; NaN for rows without a counted token."""
    store = source.store
    fired = {name: np.zeros((store.n_rows, len(latents[site]))) for name, (site, _) in saes.items()}
    counted = {name: np.zeros(store.n_rows) for name in saes}
    parts = {name: sae.subset(latents[site]) for name, (site, sae) in saes.items()}
    with torch.no_grad():
        for index in range(source.n_chunks):
            for chunk in source.passes(index):
                where = chunk.where.numpy()
                ids = torch.from_numpy(store.ids[where].astype(np.int64))
                row = np.searchsorted(store.starts, where, side="right") - 1
                for name, (site, sae) in saes.items():
                    keep = sae.policy.keep(chunk.x[site], ids)
                    f = parts[name].encode(chunk.x[site][keep].to(sae.W_enc)) > 0
                    np.add.at(fired[name], row[keep.numpy()], f.cpu().numpy())
                    counted[name] += np.bincount(row[keep.numpy()], minlength=store.n_rows)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {name: fired[name] / counted[name][:, None] for name in saes}


def aurocs(shares: Array, labelled: Array) -> Array:
    """Area under the ROC curve of each pair, float64 [n], ties counting half, of shares [rows, n] and labels bool
    [rows, n]. Rows with NaN are left out; NaN where no row, or every row, has the label."""
    from scipy.stats import rankdata

    there = ~np.isnan(shares[:, 0]) if shares.shape[1] else np.zeros(len(shares), dtype=bool)
    ranks, has = rankdata(shares[there], axis=0), labelled[there]
    positive = has.sum(0)
    negative = len(has) - positive
    with np.errstate(invalid="ignore", divide="ignore"):
        return ((ranks * has).sum(0) - positive * (positive + 1) / 2) / (positive * negative)


def told(shares: Array, before: Array, labelled: Array, seed: int) -> Told:
    """What ``shares`` [rows, n] of a form say of the labels [rows, n], beside those ``before``."""
    own, reference = aurocs(shares, labelled), aurocs(before, labelled)
    shuffled = aurocs(shares, labelled[np.random.default_rng(seed).permutation(len(labelled))])
    chance = float(np.nanmean(shuffled)) if np.isfinite(shuffled).any() else None
    return Told(int(np.isfinite(own).sum()), interval(own), interval(own - reference), chance)


def pushes(sae: SAE, latents: Sequence[int], strengths: Tensor, seed: int) -> Tensor:
    """What is added for each latent, its strength times its direction, and random directions as long: [2 S, D]."""
    rows = sae.subset(latents).directions * strengths[:, None].to(sae.W_dec)
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(rows.shape, generator=generator).to(rows)
    length = rows.norm(dim=1, keepdim=True)
    return torch.cat([rows, random / random.norm(dim=1, keepdim=True) * length])


def changes(lm: LM, site: Site, shifts: Tensor, prompts: Sequence[str] = PROMPTS) -> tuple[Tensor, Tensor]:
    """What adding each of ``shifts`` [N, D] at the last token of prompts does to the next token: the change in
    log-probability over all prompts, float32 [N, prompts * V], and KL(steered || plain), the mean over prompts, [N]."""
    moved, divergences = [], []
    with torch.no_grad():
        for prompt in prompts:
            row = lm.tokenize(prompt)
            last = torch.zeros(row.ids.shape[1], 1, dtype=shifts.dtype, device=lm.device)
            last[-1] = 1
            rows = torch.cat([torch.zeros_like(shifts[:1]), shifts]).unsqueeze(1)
            p = torch.cat([part for _, part in raised(lm, site, row, rows, last, _TOKENS_AT_ONCE)])
            logs = p.clamp_(min=1e-30).log()
            change = logs[1:] - logs[:1]
            moved.append(change)
            divergences.append((p[1:] * change).sum(1))
    return torch.cat(moved, 1), torch.stack(divergences).mean(0)


def steered(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> Steered:
    """``changes`` of latents and as many random directions in two settings."""
    n = len(before[1]) // 2
    a, b = (one[0] - one[0].mean(1, keepdim=True) for one in (before, after))
    alike = torch.nn.functional.cosine_similarity(a, b, dim=1).cpu().double().numpy()
    sizes = [one[1].cpu().double().numpy() for one in (before, after)]
    return Steered(
        latents=n,
        size=mean_of(sizes[1][:n]),
        size_before=float(sizes[0][:n].mean()),
        alike=mean_of(alike[:n]),
        random_alike=mean_of(alike[n:]),
    )
