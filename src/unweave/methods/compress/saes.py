"""Compressing SAEs: their encoders and decoders pruned, or rounded.

An encoder is a map of x - b_dec (of x, for transcoders), one row to a latent; its inputs' norms are those of x - b_dec.
The bias is moved along, b_enc + b_dec (W - W'), so that a weight that goes takes only its share of the deviation from
b_dec with it. A decoder is a map of latents, one row to an output dimension; its inputs' norms are those of latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.progress import task
from unweave.core.rounding import bits_per_weight, check_group, round_to_nearest
from unweave.core.site import Site
from unweave.lm.model import LM, Tokens
from unweave.methods.compress.masks import Pattern, choose, in_words, wanda_scores
from unweave.methods.compress.models import counts, tensor_change
from unweave.methods.compress.result import TensorChange
from unweave.sae.module import SAE


@dataclass(frozen=True)
class Norms:
    """Norms of what goes into an SAE's maps, over the calibration tokens that its policy counts."""

    inputs: Tensor
    """float64 [d_in], of x - b_dec in the SAE's units"""
    latents: Tensor
    """float64 [F]"""


def centre(sae: SAE) -> Tensor:
    """What the encoder's inputs are counted from: b_dec [d_in]; 0 where the SAE writes elsewhere."""
    return torch.zeros_like(sae.W_enc[:, 0]) if sae.is_transcoder else sae.b_dec


def norms_of(lm: LM, saes: Mapping[Site, SAE], batches: Sequence[Tokens]) -> dict[Site, Norms]:
    """The norms for every SAE (by name of its site), from one pass of the model that ends at the last of their sites.

    Raises UnweaveError where the SAE's policy counts no token.
    """
    reads = {site: sae.read for site, sae in saes.items() if sae.read is not None}
    inputs = {site: torch.zeros(sae.d_in, dtype=torch.float64, device=lm.device) for site, sae in saes.items()}
    latents = {site: torch.zeros(sae.d_sae, dtype=torch.float64, device=lm.device) for site, sae in saes.items()}
    counted = dict.fromkeys(saes, 0)
    stop = None if any(site.point == "path" for site in reads.values()) else max(reads.values())
    with task("calibrate", total=sum(batch.n_tokens for batch in batches), unit="tokens") as progress, torch.no_grad():
        for batch in batches:
            tokens = lm.admitted(batch)
            with lm.taps(read=reads.values(), stop=stop) as seen:
                lm(tokens)
            for site, sae in saes.items():
                x = seen[reads[site]]
                x = x[sae.policy.keep(x, tokens.ids, tokens.mask)]
                counted[site] += len(x)
                normal, codes = sae.normalised(x), sae.codes(x)
                deviation = (x.to(sae.W_enc.dtype) if normal is None else normal.x) - centre(sae)
                inputs[site] += deviation.double().square().sum(0)
                latents[site].index_add_(0, codes.indices.long(), codes.values.double().square())
            progress.advance(batch.n_tokens)
    for site, n in counted.items():
        if not n:
            raise UnweaveError("none of the calibration tokens counts for this SAE", where=str(site),
                               remedy="use text with ordinary tokens")  # fmt: skip
    return {site: Norms(inputs[site].sqrt(), latents[site].sqrt()) for site in saes}


def check_saes(saes: Mapping[Site, SAE], share: float | Pattern = 0.5, group: int = 0) -> None:
    """Raises UnweaveError for SAEs without a decoder, and for patterns and groups that do not divide their rows."""
    for site, sae in saes.items():
        sae.require_decoder()
        if isinstance(share, Pattern):
            share.check(sae.d_in, f"encoder at {site}")
            share.check(sae.d_sae, f"decoder at {site}")
        for name, columns in (("encoder", sae.d_in), ("decoder", sae.d_out)):
            check_group(group, columns, f"{name} at {site}")


def prune_sae(sae: SAE, share: float | Pattern, norms: Norms | None) -> SAE:
    """The SAE with its smallest weights at 0: by WANDA's score per row; without ``norms`` by magnitude per matrix."""
    masks = []
    for rows, which in ((sae.W_enc.T, "inputs"), (sae.W_dec.T, "latents")):
        if norms is not None:
            masks.append(choose(wanda_scores(rows, getattr(norms, which)), share))
        else:
            masks.append(choose(rows.abs(), share, "matrix"))
    W_enc, W_dec = sae.W_enc.masked_fill(masks[0].T, 0.0), sae.W_dec.masked_fill(masks[1].T, 0.0)
    b_enc = sae.b_enc + centre(sae) @ (sae.W_enc - W_enc)
    note = f"pruned by {'magnitude' if norms is None else 'wanda'}, {in_words(share)}"
    return sae.with_weights(W_enc, b_enc, W_dec, note)


def round_sae(sae: SAE, bits: int, group: int) -> SAE:
    """The SAE that ``sae.formats.quantised`` stores in so many bits, with float32 weights and its own biases."""
    W_enc = round_to_nearest(sae.W_enc.T, bits, group).weights().T.contiguous()
    W_dec = round_to_nearest(sae.W_dec, bits, group).weights()
    return sae.with_weights(W_enc, sae.b_enc.float(), W_dec, f"rounded to {bits} bits")


def changes_of(before: SAE, after: SAE, grid: tuple[int, int] | None) -> tuple[TensorChange, ...]:
    """What became of encoder and decoder; rows are latents. ``grid``: bits and group, where they were rounded."""
    pairs = {"W_enc": (before.W_enc.T, after.W_enc.T), "W_dec": (before.W_dec, after.W_dec)}
    return tuple(
        tensor_change(
            *(None, name, [counts(old, new)], tuple(old.shape)),
            bits=None if grid is None else bits_per_weight(*grid, old.shape[1]),
        )
        for name, (old, new) in pairs.items()
    )


def silenced(before: SAE, after: SAE) -> int:
    """Latents that lost all weights of their encoder or decoder."""
    silent = [(sae.W_enc == 0).all(0) | (sae.W_dec == 0).all(1) for sae in (before, after)]
    return int((silent[1] & ~silent[0]).sum())
