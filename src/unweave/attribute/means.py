"""Means over a dataset of what every latent of every site does: its effect on a metric, and how strongly it fires.

The effect of a latent is what its part of the activation adds to the metric, to first order (Marks et al. 2024, eq. 2;
Casademunt et al. 2025, eq. 1): the sum over positions of f_j(x) (d_j . dm/dx). Setting the latent to zero takes that
away, so that a positive effect is one that helps. (The second paper's eq. 1 names m(z = 0) - m on its left side; its
right side, its code and this have the other sign.)

1. One forward and one backward pass of a batch give dm/dx [B, P, D] at all sites. No SAE is spliced in.
2. Only latents that fire have an effect: their codes are sparse, and each entry costs one dot product. Padding, the
   token that begins a text and those that the SAE's policy excludes (special ones, norm outliers) count for nothing.
3. Each example's metric is differentiated by itself, so a mean over examples depends neither on how they are batched
   nor on padding. (A batch's mean metric, as in the second paper's code, gives effects that shrink with the batch.)
4. Nothing is kept but sums over examples, in float64: memory does not grow with the dataset.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from unweave.attribute.runner import Batch, Runner, rows_of
from unweave.attribute.states import SAEs, by_site_of, chunks, counted, reads_of
from unweave.core.codes import Codes
from unweave.core.errors import UnweaveError
from unweave.core.progress import task
from unweave.core.site import Site
from unweave.lm.model import LM
from unweave.sae.module import SAE
from unweave.sae.sparse.pattern import Choice
from unweave.sae.sparse.products import dot_rows

Z = 1.96
"""standard errors on each side of a 95 % interval of a mean"""


class Mean:
    """A mean over examples of one number per latent, with its standard error; sums float64 [F]."""

    def __init__(self, n_latents: int, device: torch.device | str = "cpu") -> None:
        self.n = 0
        self._sums = torch.zeros(2, n_latents, dtype=torch.float64, device=device)

    def add(self, each: Tensor) -> None:
        """Counts examples in: each [B, F], float64."""
        self.n += len(each)
        self._sums += torch.stack([each.sum(0), each.square().sum(0)])

    @property
    def value(self) -> Tensor:
        """The mean, float64 [F]."""
        return self._sums[0] / max(self.n, 1)

    @property
    def deviation(self) -> Tensor:
        """The standard deviation over examples, float64 [F]; 0 below two examples."""
        spread = self._sums[1] - self.n * self.value.square()
        return (spread.clamp(min=0) / max(self.n - 1, 1)).sqrt() * (self.n > 1)

    @property
    def margin(self) -> Tensor:
        """Half of the mean's 95 % interval over examples, float64 [F]."""
        return Z * self.deviation / max(self.n, 1) ** 0.5


@dataclass(frozen=True)
class Firing:
    """What fires on a batch's tokens that count: row i of ``codes`` is token ``tokens[i]`` int64 (of B P positions) of
    example ``examples[i]`` int64."""

    codes: Codes
    tokens: Tensor
    examples: Tensor
    counted: Tensor
    """tokens that count in each example, int64 [B]"""
    source: Tensor
    """what the SAE reads there, [n, D]"""

    def sums(self, values: Tensor) -> Tensor:
        """Values [nnz] of the codes' entries, summed over each example's tokens: float64 [B, F]."""
        n, width = len(self.counted), self.codes.n_latents
        place = self.examples[self.codes.row_of_each()] * width + self.codes.indices
        return torch.zeros(n * width, dtype=torch.float64, device=values.device).index_add_(
            0, place, values.double()
        ).view(n, width)  # fmt: skip

    def per_token(self) -> tuple[Tensor, Tensor]:
        """How strongly each latent fires in each example, the mean over its tokens that count, and on what share of
        them: float64 [B, F] each; 0 in examples without any."""
        counted, values = self.counted.clamp(min=1).unsqueeze(1), self.codes.values
        return self.sums(values) / counted, self.sums((values > 0).to(values.dtype)) / counted


def firing(sae: SAE, x: Tensor, keep: Tensor) -> Firing:
    """What fires for x [B, P, D], the value of what the SAE reads, at the tokens that count: ``keep`` bool [B, P]."""
    numbers = keep.flatten().nonzero()[:, 0]
    source = x.flatten(0, 1)[numbers]
    return Firing(sae.codes(source), numbers, numbers // x.shape[1], keep.sum(1), source)


@dataclass(frozen=True)
class Activity:
    """How strongly and often one site's latents fire: means over examples."""

    activation: Mean
    """of f_j, itself a mean over the example's tokens that count"""
    frequency: Mean
    """of the share of these tokens on which the latent fires"""

    def add(self, fires: Firing) -> None:
        """Counts a batch's examples in."""
        for mean, each in zip((self.activation, self.frequency), fires.per_token(), strict=True):
            mean.add(each)


@dataclass(frozen=True)
class SiteMeans(Activity):
    """The same, and what the latents do."""

    effect: Mean
    """of the sum over positions of f_j (d_j . dm/dx), in units of the metric"""


def mean_effects(
    lm: LM, saes: SAEs, batches: Iterable[Batch], *, max_tokens: int = 1024, total: int | None = None
) -> dict[Site, SiteMeans]:
    """Every latent's effect on the metric and how strongly it fires, over all examples of ``batches`` (clean tokens,
    None, metric); patch tokens are not looked at. ``max_tokens`` bounds the tokens of a pass, ``total`` is the number
    of examples where it is known, for the progress shown.

    Raises UnweaveError for a metric that does not depend on a site, is constant, or not finite.
    """
    by_site = by_site_of(lm, saes)
    for sae in by_site.values():
        sae.require_decoder()
    means = {
        site: SiteMeans(*(Mean(sae.d_sae, lm.device) for _ in range(3))) for site, sae in by_site.items()
    }  # fmt: skip
    reads = {reads_of(sae, site) for site, sae in by_site.items()}
    with task("attribute", total=total or 0, unit="examples") as shown:
        for tokens, _, metric in _in_passes(batches, max_tokens):
            batch = tokens.to(lm.device)
            gradients, values = Runner(lm, batch, metric, max_tokens).gradients(list(by_site), reads)
            for site, sae in by_site.items():
                x = values[reads_of(sae, site)]
                _count(means[site], sae, gradients[site], firing(sae, x, counted(lm, sae, x, batch)))
            shown.advance(len(batch))
    if not any(bool(site.effect.value.any()) for site in means.values()):
        remedy = "check the answers that it compares, and that the SAEs are of this model"
        raise UnweaveError("no latent has an effect: the metric is constant, or nothing fires", remedy=remedy)
    return means


def _in_passes(batches: Iterable[Batch], max_tokens: int) -> Iterator[Batch]:
    for batch in batches:
        yield from (rows_of(batch, part) for part in chunks(len(batch[0]), batch[0].ids.shape[1], max_tokens))


def _count(means: SiteMeans, sae: SAE, gradient: Tensor, fires: Firing) -> None:
    codes, g = fires.codes, gradient.flatten(0, 1)[fires.tokens].to(sae.W_dec.dtype)
    normal = sae.normalised(fires.source)
    g = g if normal is None else g * normal.scale  # a latent's part has the token's own scale
    effects = dot_rows(g, Choice(codes.indices, codes.offsets, codes.n_latents), sae.W_dec) * codes.values
    if not bool(torch.isfinite(effects).all()):
        raise UnweaveError("effects are NaN or infinite", where=str(sae.write), remedy="check the SAE and the model")
    means.effect.add(fires.sums(effects))
    means.add(fires)
