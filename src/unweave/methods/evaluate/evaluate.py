"""How well an SAE describes an activation, and how well the model works with the SAE in its place.

1. Every token is either counted or left out: padding, the special ids and the norm outliers that the SAE was not
   trained on (``sae.policy``) are left out of every mean below and left unedited in every forward pass (traps 1, 2, 7).
2. A first pass over the tokens stops at the SAE's site and adds up, in float64, what the reconstruction metrics need:
   unexplained variance = sum ||x - xhat||^2 / sum ||x - mu||^2 with mu the mean over all counted tokens, so that
   predicting the mean scores exactly 1 and a perfect reconstruction 0 (trap 32).
3. A second pass computes the model's next-token loss four times: as it is, with xhat in place of x, with mu in place
   of x, and with zeros in place of x; and the divergence KL(clean || edited) of the last three.
4. recovered = (ce_ablated - ce_sae) / (ce_ablated - ce_clean): 1 when nothing is lost, 0 when the SAE is no better
   than the ablation; undefined, with the reason, where the model does not predict the text or ablation costs nothing.

Sums run over tokens, never over batch means, so how the tokens are split, ordered or padded changes nothing beyond
rounding (trap 33). What is left out is marked by boolean masks, never by zeros (trap 34).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.progress import task
from unweave.core.site import Site
from unweave.lm.model import LM, Tokens
from unweave.methods.evaluate.metrics import METRIC_SET, CoreMetrics, density_histogram, drift, recovered_share

if TYPE_CHECKING:
    from unweave.core.codes import Codes
    from unweave.lm.taps import At, Edits
    from unweave.sae.module import SAE

_LOGIT_BYTES = 1 << 29
_CHUNK_ELEMENTS = 1 << 22

__all__ = ["CoreMetrics", "drift", "evaluate"]


def evaluate(lm: LM, sae: SAE, batches: Iterable[Tokens]) -> CoreMetrics:
    """Measures an SAE on batches of tokens; see the head of this file for what is measured and how.

    The tokens go through the model four times, and once more up to the SAE's site. Batches whose logits would take
    more than 512 MB are split by rows; at most twice that is held at a time (one row's logits at the least).

    Raises UnweaveError when the SAE names no site or was made for another model, when there are no tokens to count,
    when activations do not vary, and when activations, reconstructions or logits are not finite (naming the row).
    """
    read, write = _sites(lm, sae)
    sae.verify(lm)
    pieces = [piece for batch in batches for piece in _split(batch, lm.vocab_size)]
    if not pieces:
        raise UnweaveError("there are no tokens to evaluate on", remedy="give at least one batch of tokens")
    with torch.no_grad():
        counted, left_out, keeps, excluded = _reconstructions(lm, sae, pieces, read, write)
        if counted.n == 0:
            raise UnweaveError(
                f"none of the tokens counts: {', '.join(f'{n} {reason}' for reason, n in excluded.items())}",
                where=str(read),
                remedy="give text with ordinary tokens, or an SAE with another token policy",
            )
        losses = _losses(lm, sae, pieces, keeps, write, counted.mean)
    return _metrics(write, counted, left_out, excluded, losses, lm.vocab_size)


# -- what is evaluated ------------------------------------------------------------------------------------------------


def _sites(lm: LM, sae: SAE) -> tuple[Site, Site]:
    read, write = sae.read or sae.write, sae.write or sae.read
    if read is None or write is None:
        raise UnweaveError("this SAE does not say which site it belongs to", remedy='name it: sae.at("resid_post.9")')
    return lm.site(read), lm.site(write)


def _split(batch: Tokens, vocab_size: int) -> Iterator[Tokens]:
    rows = max(1, _LOGIT_BYTES // (4 * vocab_size * max(1, batch.ids.shape[1])))
    for start in range(0, len(batch), rows):
        yield batch.rows(slice(start, start + rows))


def _rows_before(pieces: Sequence[Tokens]) -> list[int]:
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + len(piece))
    return starts


def _require_finite(good: Tensor, first_row: int, what: str) -> None:
    """``good`` [B, P] must be True everywhere; names the first row where it is not."""
    bad = (~good).any(-1).nonzero()
    if len(bad):
        raise UnweaveError(
            f"{what} are not finite (NaN or infinity)",
            where=f"row {first_row + int(bad[0])} of the tokens evaluated",
            remedy="use a wider dtype (float32), and check the weights and this row's tokens",
        )


# -- first pass: reconstruction ---------------------------------------------------------------------------------------


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


def _reconstructions(
    lm: LM, sae: SAE, pieces: Sequence[Tokens], read: Site, write: Site
) -> tuple[_Sums, _Sums, list[Tensor], dict[str, int]]:
    """Sums over the counted and over the other real tokens; which tokens count [B, P] of each piece; and why not."""

    def empty() -> _Sums:
        zeros = torch.zeros(sae.d_out, dtype=torch.float64, device=lm.device)
        return _Sums(0, zeros, 0.0, torch.zeros(sae.d_sae, dtype=torch.int64, device=lm.device))

    counted, left_out, keeps = empty(), empty(), []
    excluded = {"padding": 0, "special tokens": 0, "norm outliers": 0}
    special_ids = torch.tensor(sae.policy.exclude_ids, dtype=torch.int64, device=lm.device)
    total = sum(piece.n_tokens for piece in pieces)
    # Where a module path lies in the order of execution is not known, so such an SAE's pass runs to its end.
    stop = read if read == write else None if "path" in (read.point, write.point) else max(read, write)
    with task("reconstruct", total=total, unit="tokens") as progress:
        for first_row, piece in zip(_rows_before(pieces), pieces, strict=False):
            batch = piece.to(lm.device)
            with lm.taps(read=[read, write], stop=stop) as seen:
                lm(batch)
            x, y = seen[read], seen[write]
            good = torch.isfinite(x).all(-1) & torch.isfinite(y).all(-1)
            _require_finite(good | ~batch.mask, first_row, f"activations at {read}")
            keep = sae.policy.keep(x, batch.ids, batch.mask)
            special = torch.isin(batch.ids, special_ids) & batch.mask
            excluded["padding"] += int((~batch.mask).sum())
            excluded["special tokens"] += int((special & ~keep).sum())
            excluded["norm outliers"] += int((batch.mask & ~special & ~keep).sum())
            for which, sums in ((keep, counted), (batch.mask & ~keep, left_out)):
                good = torch.ones_like(batch.mask)
                good[which] = _add_rows(sae, sums, x[which], y[which])
                _require_finite(good, first_row, f"reconstructions at {write}")
            keeps.append(keep.cpu())
            progress.advance(batch.n_tokens)
    return counted, left_out, keeps, excluded


def _add_rows(sae: SAE, sums: _Sums, x: Tensor, y: Tensor) -> Tensor:
    """Encodes tokens x [n, d_in] and compares with y [n, d_out], so many at a time that memory stays small.

    Returns which tokens have a finite reconstruction, bool [n].
    """
    good = torch.ones(len(x), dtype=torch.bool, device=x.device)
    step = max(1, 4 * _CHUNK_ELEMENTS // sae.d_sae)
    for start in range(0, len(x), step):
        rows = x[start : start + step].to(sae.W_enc.dtype)
        codes = sae.codes(rows)
        xhat = sae.explained(codes, rows)
        sums.add(y[start : start + step], codes, xhat)
        good[start : start + step] = torch.isfinite(xhat).all(-1)
    return good


# -- second pass: what the model loses --------------------------------------------------------------------------------


@dataclass
class _Loss:
    ce: float = 0.0
    kl: float = 0.0


def _losses(
    lm: LM, sae: SAE, pieces: Sequence[Tokens], keeps: Sequence[Tensor], write: Site, mean: Tensor
) -> tuple[int, dict[str, _Loss]]:
    """How many next tokens were predicted, and the summed loss and divergence of each variant."""
    losses = {name: _Loss() for name in ("clean", "sae", "mean", "zero")}
    predictions = 0
    total = len(losses) * sum(piece.n_tokens for piece in pieces)
    with task("evaluate", total=total, unit="tokens") as progress:
        for first_row, piece, keep in zip(_rows_before(pieces), pieces, keeps, strict=False):
            batch = piece.to(lm.device)
            predictions += int((batch.mask[:, :-1] & batch.mask[:, 1:]).sum())
            edits: dict[str, Edits | None] = {
                "clean": None,
                "sae": sae.reconstruct(),
                "mean": {write: _replace(keep.to(lm.device), mean)},
                "zero": {write: _replace(keep.to(lm.device), torch.zeros_like(mean))},
            }
            clean: Tensor | None = None
            for name, edit in edits.items():
                with lm.taps(edit=edit):
                    logits = lm(batch)
                assert logits is not None
                clean = logits if clean is None else clean
                ce, kl = _compare(clean, logits, batch, first_row, name)
                losses[name].ce += ce
                losses[name].kl += kl
                del logits
                progress.advance(batch.n_tokens)
    if predictions == 0:
        raise UnweaveError("no token has a real next token to predict", remedy="give rows of at least two tokens")
    return predictions, losses


def _replace(keep: Tensor, value: Tensor) -> Callable[[Tensor, At], Tensor]:
    """An edit that puts ``value`` [d] in place of the activation where ``keep`` [B, P], and leaves the rest alone."""
    return lambda x, at: torch.where(keep[..., None], value.to(x.dtype), x)


def _compare(clean: Tensor, edited: Tensor, batch: Tokens, first_row: int, name: str) -> tuple[float, float]:
    """Summed cross-entropy of ``edited`` [B, P, V] and summed KL(clean || edited), over real next tokens.

    The vocabulary's softmax is taken for a few positions at a time.
    """
    rows, positions = (batch.mask[:, :-1] & batch.mask[:, 1:]).nonzero(as_tuple=True)
    targets = batch.ids[rows, positions + 1]
    step = max(1, _CHUNK_ELEMENTS // clean.shape[-1])
    ce, kl = 0.0, 0.0
    for start in range(0, len(rows), step):
        r, p, target = rows[start : start + step], positions[start : start + step], targets[start : start + step]
        log_q = edited[r, p].float().log_softmax(-1)
        losses = -log_q.gather(-1, target[:, None]).squeeze(-1)
        divergences = torch.zeros_like(losses)
        if edited is not clean:
            log_p = clean[r, p].float().log_softmax(-1)
            divergences = (log_p.exp() * (log_p - log_q)).sum(-1)
        good = torch.isfinite(losses) & torch.isfinite(divergences)
        if not bool(good.all()):
            marks = torch.ones_like(batch.mask)
            marks[r, p] = good
            _require_finite(marks, first_row, f"logits ({name})")
        ce += float(losses.double().sum())
        kl += float(divergences.double().sum())
    return ce, kl


# -- from sums to metrics ---------------------------------------------------------------------------------------------


def _metrics(
    site: Site,
    counted: _Sums,
    left_out: _Sums,
    excluded: dict[str, int],
    losses: tuple[int, dict[str, _Loss]],
    vocabulary: int,
) -> CoreMetrics:
    n, width = counted.n, len(counted.mean)
    unexplained = _over_variance(counted, site)
    everything = replace(counted)
    if left_out.n:
        everything.spread_with(left_out.n, left_out.mean, left_out.deviations)
        everything.errors += left_out.errors
        everything.l0 += left_out.l0
    predictions, sums = losses
    ce = {name: loss.ce / predictions for name, loss in sums.items()}
    kl = {name: loss.kl / predictions for name, loss in sums.items()}
    recovered, notes = {}, []
    for name in ("mean", "zero"):
        recovered[name], note = recovered_share(ce, name, vocabulary)
        notes += [note] if note else []
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
        ce_sae=ce["sae"],
        ce_mean=ce["mean"],
        ce_zero=ce["zero"],
        kl_sae=kl["sae"],
        kl_mean=kl["mean"],
        kl_zero=kl["zero"],
        recovered_vs_mean=recovered["mean"],
        recovered_vs_zero=recovered["zero"],
        notes=tuple(notes),
        firing_counts=counted.counts.cpu(),
    )


def _over_variance(sums: _Sums, site: Site) -> float:
    if sums.deviations <= 1e-12 * sums.n * float(sums.mean.square().sum()):
        raise UnweaveError(
            "the activations do not vary, so there is no variance to explain",
            where=str(site),
            remedy="give more and more varied text",
        )
    return sums.errors / sums.deviations
