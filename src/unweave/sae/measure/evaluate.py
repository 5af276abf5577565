"""How well an SAE describes an activation, and how well the model works with the SAE in its place.

1. Every token is either counted or left out: padding, the special ids and the norm outliers that the SAE was not
   trained on (``sae.policy``) are left out of every mean below and left unedited in every forward pass (traps 1, 2, 7).
2. A first pass over the tokens stops at the SAE's site: it says which tokens count, and gives mu, the mean activation
   over all of them.
3. A second round adds up, in float64, what the reconstruction metrics need: unexplained variance =
   sum ||x - xhat||^2 / sum ||x - mu||^2, so that predicting the mean scores exactly 1 and a perfect reconstruction 0
   (trap 32). And it computes the model's next-token loss four times: as it is, with xhat in place of x, with mu in
   place of x, and with zeros in place of x; and the divergence KL(clean || edited) of the last three. What is equal in
   these passes is computed once (``passes.py``).
4. recovered = (ce_ablated - ce_sae) / (ce_ablated - ce_clean): 1 when nothing is lost, 0 when the SAE is no better
   than the ablation; undefined, with the reason, where the model does not predict the text or ablation costs nothing.

Sums run over tokens, never over batch means, so how the tokens are split, ordered or padded changes nothing beyond
rounding (trap 33). What is left out is marked by boolean masks, never by zeros (trap 34).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.progress import task
from unweave.core.site import Site
from unweave.lm.model import LM, Tokens
from unweave.sae.measure.metrics import METRIC_SET, CoreMetrics, density_histogram, drift, recovered_share
from unweave.sae.measure.passes import Passes, Row

if TYPE_CHECKING:
    from unweave.core.codes import Codes
    from unweave.sae.module import SAE

_LOGIT_BYTES = 1 << 29
_CHUNK_ELEMENTS = 1 << 22
_HELD_BYTES = 1 << 30

__all__ = ["CoreMetrics", "drift", "evaluate", "evaluate_all"]


def evaluate(lm: LM, sae: SAE, batches: Iterable[Tokens]) -> CoreMetrics:
    """Measures an SAE on batches of tokens; see the head of this file for what is measured and how.

    The tokens go through the model once, and the blocks above the SAE's site three times more. Batches whose logits
    would take more than 512 MB are split by rows, although they are never held whole (``passes.py``). The residual
    stream at the site is held for all tokens, up to 1 GB of it; beyond, the blocks below run twice.

    Raises UnweaveError when the SAE names no site, reads after it writes or was made for another model, when there are
    no tokens to count, when activations do not vary, and when activations, reconstructions or logits are not finite
    (naming the row).
    """
    return evaluate_all(lm, [sae], batches)[0]


def evaluate_all(lm: LM, saes: Sequence[SAE], batches: Iterable[Tokens]) -> list[CoreMetrics]:
    """``evaluate`` for several SAEs of one site and policy: what does not depend on the SAE is computed once."""
    read, write = _sites(lm, saes[0])
    for sae in saes:
        if _sites(lm, sae) != (read, write) or sae.policy != saes[0].policy:
            what = "SAEs that are measured together read and write the same sites, and count the same tokens"
            remedy = "measure them one by one, or give them one policy (TokenPolicy.common)"
            raise UnweaveError(what, where=str(read), remedy=remedy)
        sae.verify(lm)
    with torch.no_grad():
        passes = Passes.of(lm, read, write)
        at_once = 1 if passes.end is not None else 3 + len(saes)  # how many passes' logits are held
        pieces = [piece for batch in batches for piece in _split(batch, at_once * lm.vocab_size)]
        if not pieces:
            raise UnweaveError("there are no tokens to evaluate on", remedy="give at least one batch of tokens")
        counted = _count(passes, saes[0], pieces)
        if counted.n == 0:
            what = f"none of the tokens counts: {', '.join(f'{n} {reason}' for reason, n in counted.excluded.items())}"
            remedy = "give text with ordinary tokens, or an SAE with another token policy"
            raise UnweaveError(what, where=str(read), remedy=remedy)
        measured = _measure(passes, saes, pieces, counted)
    return [_metrics(write, measured, i, counted.excluded, lm.vocab_size) for i in range(len(saes))]


# -- what is evaluated ------------------------------------------------------------------------------------------------


def _sites(lm: LM, sae: SAE) -> tuple[Site, Site]:
    read, write = sae.read or sae.write, sae.write or sae.read
    if read is None or write is None:
        raise UnweaveError("this SAE does not say which site it belongs to", remedy='name it: sae.at("resid_post.9")')
    if "path" not in (read.point, write.point) and lm.site(read) > lm.site(write):
        what = f"this SAE reads at {read}, which the model reaches after {write}, where it writes"
        raise UnweaveError(what, remedy="name its sites in the order of the model: sae.at(read, write)")
    return lm.site(read), lm.site(write)


def _split(batch: Tokens, vocab_size: int) -> Iterator[Tokens]:
    rows = max(1, _LOGIT_BYTES // (4 * vocab_size * max(1, batch.ids.shape[1])))
    for start in range(0, len(batch), rows):
        yield batch.rows(slice(start, start + rows))


def _require_finite(finite: Tensor, first_row: int, what: str) -> None:
    """``finite`` [B, P] must be True everywhere; names the first row where it is not."""
    bad = (~finite).any(-1).nonzero()
    if len(bad):
        raise UnweaveError(
            f"{what} are not finite (NaN or infinity)",
            where=f"row {first_row + int(bad[0])} of the tokens evaluated",
            remedy="use a wider dtype (float32), and check the weights and this row's tokens",
        )


# -- first round: which tokens count ----------------------------------------------------------------------------------


@dataclass
class _Sums:
    """Sums over tokens in float64, from which the reconstruction metrics follow.

    Mean and spread of x are kept as (n, mean, sum of squared deviations) and merged by Chan's rule, which does not
    lose digits when the mean is large beside the spread.
    """

    n: int
    mean: Tensor  # [d_out]
    deviations: float
    counts: Tensor  # int64 [F]
    errors: float = 0.0
    l0: float = 0.0
    l1: float = 0.0
    cosine: float = 0.0
    ratio: float = 0.0
    nonzero: int = 0

    def spread_with(self, n: int, mean: Tensor, deviations: float) -> None:
        """Merges the count, mean and squared deviations of further tokens."""
        total = self.n + n
        step = mean - self.mean
        self.deviations += deviations + float(step.square().sum()) * self.n * n / total
        self.mean = self.mean + step * (n / total)
        self.n = total

    def add(self, x: Tensor, codes: Codes, xhat: Tensor) -> None:
        """Tokens' activations [n, d_out], latents [n, F] and reconstructions [n, d_out]."""
        x, xhat = x.double(), xhat.double()
        mean = x.mean(0)
        self.spread_with(len(x), mean, float((x - mean).square().sum()))
        self.errors += float((x - xhat).square().sum())
        fired = codes.counts()
        self.counts += fired
        self.l0 += float(fired.sum())
        self.l1 += float(codes.values.abs().sum(dtype=torch.float64))
        length, length_hat = x.norm(dim=-1), xhat.norm(dim=-1)
        some = length > 0
        both = some & (length_hat > 0)
        self.cosine += float(((x * xhat).sum(-1)[both] / (length * length_hat)[both]).sum())
        self.ratio += float((length_hat[some] / length[some]).sum())
        self.nonzero += int(some.sum())


@dataclass
class _Counted:
    """Which tokens count, where the SAE writes on average, and what the passes of the second round begin with."""

    n: int
    mean: Tensor
    """the mean activation over the counted tokens, float64 [d_out]"""
    keeps: list[Tensor]
    """of each piece, the tokens that count, bool [B, P]; on the CPU"""
    excluded: dict[str, int]
    """how many tokens do not count, by reason"""
    low: list[Tensor | None]
    """of each piece, the residual stream [B, P, D] where ``passes.low`` says; None beyond 1 GB of them"""


def _count(passes: Passes, sae: SAE, pieces: Sequence[Tokens]) -> _Counted:
    lm, read, write = passes.lm, passes.read, passes.write
    total, n, held = torch.zeros(sae.d_out, dtype=torch.float64, device=lm.device), 0, 0
    keeps, low = [], []
    excluded = {"padding": 0, "special tokens": 0, "norm outliers": 0}
    special_ids = torch.tensor(sae.policy.exclude_ids, dtype=torch.int64, device=lm.device)
    with task("mean activation", total=sum(piece.n_tokens for piece in pieces), unit="tokens") as progress:
        for first_row, piece in zip(accumulate(map(len, pieces), initial=0), pieces, strict=False):
            batch = piece.to(lm.device)
            seen = passes.first(batch)
            x, y = seen[read], seen[write]
            finite = torch.isfinite(x).all(-1) & torch.isfinite(y).all(-1)
            _require_finite(finite | ~batch.mask, first_row, f"activations at {read}")
            keep = sae.policy.keep(x, batch.ids, batch.mask)
            special = torch.isin(batch.ids, special_ids) & batch.mask
            excluded["padding"] += int((~batch.mask).sum())
            excluded["special tokens"] += int((special & ~keep).sum())
            excluded["norm outliers"] += int((batch.mask & ~special & ~keep).sum())
            total += y[keep].sum(0, dtype=torch.float64)
            n += int(keep.sum())
            keeps.append(keep.cpu())
            begin = None if passes.low is None else seen[passes.low]
            held += 0 if begin is None else begin.numel() * begin.element_size()
            low.append(None if begin is None or held > _HELD_BYTES else begin.cpu())
            progress.advance(batch.n_tokens)
    return _Counted(n, total / max(1, n), keeps, excluded, low)


# -- second round: reconstruction, and what the model loses -----------------------------------------------------------


def _variants(n_saes: int) -> tuple[str, ...]:
    return ("clean", *("sae",) * n_saes, "mean", "zero")


@dataclass
class _Measured:
    """Sums over the counted and over the other real tokens, for every SAE; and over next tokens."""

    counted: list[_Sums]
    left_out: list[_Sums]
    losses: Tensor
    """cross-entropy and divergence of each of ``_variants``, float64 [2, 3 + SAEs]"""
    predictions: int = 0


def _measure(passes: Passes, saes: Sequence[SAE], pieces: Sequence[Tokens], counted: _Counted) -> _Measured:
    def empty(sae: SAE) -> _Sums:
        zeros = torch.zeros(sae.d_out, dtype=torch.float64, device=passes.lm.device)
        return _Sums(0, zeros, 0.0, torch.zeros(sae.d_sae, dtype=torch.int64, device=zeros.device))

    n = len(_variants(len(saes)))
    inside, left_out = ([empty(sae) for sae in saes] for _ in range(2))
    measured = _Measured(inside, left_out, torch.zeros(2, n, dtype=torch.float64))
    known: list[list[Row]] = [[] for _ in range(n - 1)]  # of each edited pass, the rows of the last batch
    total = n * sum(piece.n_tokens for piece in pieces)
    with task("evaluate", total=total, unit="tokens") as progress:
        first_rows = accumulate(map(len, pieces), initial=0)
        for first_row, piece, keep, low in zip(first_rows, pieces, counted.keeps, counted.low, strict=False):
            batch, keep = piece.to(passes.lm.device), keep.to(passes.lm.device)
            seen, end = passes.clean(batch, None if low is None else low.to(passes.lm.device))
            progress.advance(batch.n_tokens)
            x, y = seen[passes.read], seen[passes.write]
            ends, stream = [end], None if passes.stream is None else seen[passes.stream]
            zero = torch.zeros_like(counted.mean)
            variants = []
            for sae, *sums in zip(saes, measured.counted, measured.left_out, strict=True):
                parts = zip((keep, batch.mask & ~keep), sums, strict=True)
                variants.append((_reconstruct(sae, parts, x, y, first_row, passes.write), zero))
            variants += [(counted.mean, counted.mean), (zero, zero)]
            for (value, padding), rows in zip(variants, known, strict=True):
                edited = y.masked_scatter(keep[..., None], value.to(y.dtype).expand(int(keep.sum()), -1))
                # Nothing sees what padding holds; filled alike, rows of several lengths are alike.
                edited = edited.where(batch.mask[..., None], padding.to(y.dtype))
                ends.append(passes.edited(batch, edited, stream, rows))
                progress.advance(batch.n_tokens)
            _add_losses(measured, passes, ends, batch, first_row)
    if measured.predictions == 0:
        raise UnweaveError("no token has a real next token to predict", remedy="give rows of at least two tokens")
    return measured


def _reconstruct(
    sae: SAE, parts: Iterable[tuple[Tensor, _Sums]], x: Tensor, y: Tensor, first_row: int, write: Site
) -> Tensor:
    """Adds up what x [B, P, d_in] says of y [B, P, d_out] at the tokens (bool [B, P]) of each part; returns the first
    part's reconstructions [n, d_out]."""
    reconstructions = []
    for rows, sums in parts:
        reconstructions.append(_add_rows(sae, sums, x[rows], y[rows]))
        finite = torch.ones_like(rows)
        finite[rows] = torch.isfinite(reconstructions[-1]).all(-1)
        _require_finite(finite, first_row, f"reconstructions at {write}")
    return reconstructions[0]


def _add_rows(sae: SAE, sums: _Sums, x: Tensor, y: Tensor) -> Tensor:
    """Encodes tokens x [n, d_in] and compares with y [n, d_out], so many at a time that memory stays small.

    Returns the reconstructions [n, d_out].
    """
    reconstructions = [y[:0]]
    step = max(1, 4 * _CHUNK_ELEMENTS // sae.d_sae)
    for start in range(0, len(x), step):
        rows = x[start : start + step].to(sae.W_enc.dtype)
        codes = sae.codes(rows)
        xhat = sae.explained(codes, rows)
        sums.add(y[start : start + step], codes, xhat)
        reconstructions.append(xhat.to(y.dtype))
    return torch.cat(reconstructions)


def _add_losses(measured: _Measured, passes: Passes, ends: Sequence[Tensor], batch: Tokens, first_row: int) -> None:
    """Adds the losses of a batch's passes, which are in the order of ``_variants`` and ended with ``ends``."""
    places, ce, kl = passes.losses(ends, batch)
    finite_of = torch.isfinite(ce) & torch.isfinite(kl)
    for name, of_variant in zip(_variants(len(measured.counted)), finite_of, strict=True):
        finite = torch.ones_like(batch.mask)
        finite[places] = of_variant
        _require_finite(finite, first_row, f"logits ({name})")
    measured.predictions += len(places[0])
    measured.losses += torch.stack([ce.sum(1), kl.sum(1)]).cpu()


# -- from sums to metrics ---------------------------------------------------------------------------------------------


def _metrics(site: Site, measured: _Measured, which: int, excluded: dict[str, int], vocabulary: int) -> CoreMetrics:
    counted, left_out, predictions = measured.counted[which], measured.left_out[which], measured.predictions
    n, width = counted.n, len(counted.mean)
    unexplained = _over_variance(counted, site)
    everything = replace(counted)
    if left_out.n:
        everything.spread_with(left_out.n, left_out.mean, left_out.deviations)
        everything.errors += left_out.errors
        everything.l0 += left_out.l0
    of_this = measured.losses[:, [0, 1 + which, -2, -1]] / predictions
    ce, kl = (dict(zip(_variants(1), row, strict=True)) for row in of_this.tolist())
    recovered = {name: recovered_share(ce, name, vocabulary) for name in ("mean", "zero")}
    return CoreMetrics(
        metric_set=METRIC_SET,
        site=str(site),
        tokens=n,
        excluded=excluded,
        unexplained_variance=unexplained,
        explained_variance=1 - unexplained,
        mse=counted.errors / (n * width),
        cosine=counted.cosine / max(1, counted.nonzero),
        norm_ratio=counted.ratio / max(1, counted.nonzero),
        l0=counted.l0 / n,
        l1=counted.l1 / n,
        alive_fraction=float((counted.counts > 0).double().mean()),
        density=density_histogram(counted.counts, n),
        unexplained_variance_all_tokens=_over_variance(everything, site),
        l0_all_tokens=everything.l0 / everything.n,
        predictions=predictions,
        ce_clean=ce["clean"],
        **{f"{loss}_{name}": of[name] for loss, of in (("ce", ce), ("kl", kl)) for name in ("sae", "mean", "zero")},
        recovered_vs_mean=recovered["mean"][0],
        recovered_vs_zero=recovered["zero"][0],
        notes=tuple(note for _, note in recovered.values() if note),
        firing_counts=counted.counts.cpu(),
    )


def _over_variance(sums: _Sums, site: Site) -> float:
    if sums.deviations <= 1e-12 * sums.n * float(sums.mean.square().sum()):
        what = "the activations do not vary, so there is no variance to explain"
        raise UnweaveError(what, where=str(site), remedy="give more and more varied text")
    return sums.errors / sums.deviations
