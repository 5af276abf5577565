"""Whether labelled latents tell the label on texts that they were not chosen on.

1. The texts go through the model; of each SAE only the chosen latents are encoded.
2. Each pair of latent and label keeps two histograms of texts by level of frequency, with the label and without it: all
   that AUROC, its bootstrap and shuffled labels need, however many texts there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unweave.core.codes import Codes
from unweave.core.pieces import Pieces
from unweave.core.progress import task
from unweave.core.site import Site
from unweave.core.spec import digest
from unweave.methods.labels.frequencies import Reading
from unweave.methods.labels.levels import LEVELS, Array, auroc, level_of
from unweave.methods.labels.matching import calibrated_f1
from unweave.sae.activations import TopK
from unweave.sae.module import SAE
from unweave.tasks.tagged.texts import TaggedTexts

RESAMPLES = 1_000
LEAST = 8
"""texts with the label, and without, below which a bootstrap's interval says too much"""
_PARTS = ("offsets", "indices", "values", "where")
_SHOWN_CHUNKS = 12
"""chunks that contexts are taken from: about 200,000 tokens"""


@dataclass(frozen=True)
class Told:
    """How well a pair's latent tells its label on held-out texts."""

    positive: int
    """texts with the label"""
    auroc: float | None
    low: float | None
    high: float | None
    """the 95 % interval of a bootstrap over texts with and without the label; None with fewer than ``LEAST`` of
    either, of which it is too narrow"""
    shuffled: float | None
    """AUROC with the labels of the texts shuffled"""
    score: float | None
    """calibrated F1 at the threshold chosen before"""


@dataclass(frozen=True)
class HeldOut:
    """What a pass over held-out texts leaves of the pairs (latent, label) of each site."""

    histograms: Mapping[Site, Array]
    """for each pair the texts without and with the label by level, int64 [n, 2, 1 + LEVELS]; column 0: not firing"""
    latents: Mapping[Site, Array]
    """the latents of the pairs, ascending"""
    codes: Mapping[Site, tuple[Codes, Array]]
    """of these latents on the first tokens, and the store's token of each row, int64 [n]"""


def look(
    reading: Reading, texts: TaggedTexts, pairs: Mapping[Site, Sequence[tuple[int, int]]], pieces: Pieces
) -> HeldOut:
    """One pass of the model over the texts of a reading."""
    latents = {site: np.unique([latent for latent, _ in some]).astype(np.int64) for site, some in pairs.items()}
    totals = {site: np.zeros((len(some), 2, 1 + LEVELS), np.int64) for site, some in pairs.items()}
    codes: dict[Site, list[tuple[Codes, Array]]] = {site: [] for site in pairs}
    name = f"heldout-{digest([[str(site), list(map(list, some))] for site, some in pairs.items()])}"
    with task("held-out texts", total=reading.store.n_tokens, unit="tokens") as shown:
        for chunk in range(reading.source.n_chunks):
            make = lambda chunk=chunk: _chunk(reading, texts, pairs, latents, chunk)  # noqa: E731
            held = pieces.tensors(f"{name}-{chunk:05d}", make, later="")
            for site in totals:
                totals[site] += held[f"{site}/histogram"].numpy()
                if f"{site}/offsets" in held:
                    offsets, indices, values, where = (held[f"{site}/{part}"] for part in _PARTS)
                    codes[site].append((Codes(offsets, indices, values, len(latents[site])), where.numpy()))
            rows = reading.source.rows_of(chunk)
            shown.advance(int(reading.store.starts[rows.stop] - reading.store.starts[rows.start]))
    joined = {
        site: (Codes.cat([one for one, _ in some]), np.concatenate([where for _, where in some]))
        for site, some in codes.items()
    }
    return HeldOut(totals, latents, joined)


def _chunk(
    reading: Reading,
    texts: TaggedTexts,
    pairs: Mapping[Site, Sequence[tuple[int, int]]],
    latents: Mapping[Site, Array],
    chunk: int,
) -> dict[str, Tensor]:
    """The histograms of a chunk's texts; of the first chunks also the codes."""
    rows = reading.source.rows_of(chunk)
    offsets, labels = texts.label_rows(reading.texts[rows.start : rows.stop])
    wanted = np.unique([name for some in pairs.values() for _, name in some])
    has = np.zeros((len(rows), len(wanted)), dtype=np.int64)
    inside = np.isin(labels, wanted)
    row_of_each = np.repeat(np.arange(len(rows)), np.diff(offsets))
    has[row_of_each[inside], np.searchsorted(wanted, labels[inside])] = 1
    totals = {site: np.zeros(len(some) * 2 * (1 + LEVELS), np.int64) for site, some in pairs.items()}
    codes: dict[Site, list[tuple[Codes, Array]]] = {site: [] for site in pairs}
    for site, x, where in reading.passes(chunk):
        f = of_latents(reading.saes[site], x, latents[site]).float().cpu()
        codes[site].append((Codes.from_dense(f), where))
        here, row = np.unique(reading.row_of(where) - rows.start, return_inverse=True)
        fired = torch.zeros(len(here), f.shape[1]).index_add_(0, torch.from_numpy(row), (f > 0).float()).numpy()
        share = fired / np.bincount(row, minlength=len(here))[:, None]
        place = np.searchsorted(latents[site], [latent for latent, _ in pairs[site]])
        level = np.where(share > 0, 1 + level_of(share).astype(np.int64), 0)[:, place]
        labelled = has[here][:, np.searchsorted(wanted, [label for _, label in pairs[site]])]
        cell = (np.arange(len(place)) * 2 + labelled) * (1 + LEVELS) + level
        totals[site] += np.bincount(cell.ravel(), minlength=totals[site].size)
    tensors = {f"{site}/histogram": torch.from_numpy(t.reshape(-1, 2, 1 + LEVELS)) for site, t in totals.items()}
    for site, some in codes.items():
        if chunk < _SHOWN_CHUNKS:
            all_codes = Codes.cat([one for one, _ in some])
            where = torch.from_numpy(np.concatenate([where for _, where in some]))
            parts = (all_codes.offsets, all_codes.indices, all_codes.values, where)
            tensors |= {f"{site}/{name}": part for name, part in zip(_PARTS, parts, strict=True)}
    return tensors


def of_latents(sae: SAE, x: Tensor, latents: Array) -> Tensor:
    """Some latents (ascending) of activations [n, D], dense [n, len(latents)]."""
    with torch.no_grad():
        if isinstance(sae.activation, TopK):
            return sae.codes(x).of(torch.from_numpy(latents)).dense()
        return sae.subset(latents.tolist()).encode(x)


def told(histogram: Array, level: int, prior: float | None, seed: int) -> Told:
    """Of one pair's histograms int64 [2, 1 + LEVELS], without and with the label, and the level of its threshold."""
    negative, positive = histogram[:, histogram.any(0)]
    n, has = int(histogram.sum()), int(positive.sum())
    if not 0 < has < n:
        return Told(has, None, None, None, None, None)
    rng = np.random.default_rng([seed, has, n])
    low = high = None
    if LEAST <= has <= n - LEAST:
        drawn = [rng.multinomial(int(side.sum()), side / side.sum(), RESAMPLES) for side in (positive, negative)]
        low, high = (float(value) for value in np.percentile(auroc(*drawn), [2.5, 97.5]))
    # drawing which texts have the label is drawing how many of each level do
    chance = rng.multivariate_hypergeometric(positive + negative, has)
    fires = histogram[:, 1 + level :].sum(1)
    score = float(calibrated_f1(fires[1], fires[0], np.array(has), n, prior))
    shuffled = float(auroc(chance, positive + negative - chance))
    return Told(has, float(auroc(positive, negative)), low, high, shuffled, score)
