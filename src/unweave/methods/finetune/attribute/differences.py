"""How a fine-tuned model differs from the one it came from, on the same texts: latent by latent, and by components.

1. Latents: how much more each writes in the fine-tuned model, (f'_j - f_j) |d_j| averaged over an example's tokens,
   paired by example: a mean, its 95 % interval, and the same in standard deviations over examples.
2. Principal components of x' - x at each site, over all tokens that count: eigenvectors of the covariance, which is
   summed up batch by batch in float64. They are orthonormal rows [C, D] in the units of the activation. (The paper's
   code scales each coordinate before it looks for components, and then uses them as if it had not.) Centring takes
   away what is the same at every token; ``mean_share`` says how much of the difference that is.

Tokens that count are those of each SAE's policy in both models, special tokens left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unweave.attribute.means import Activity, Mean, firing
from unweave.attribute.states import SAEs, by_site_of, reads_of, values_of
from unweave.core.errors import UnweaveError
from unweave.core.progress import task
from unweave.core.site import Site
from unweave.lm.model import LM, Tokens
from unweave.sae.module import SAE


class Spread:
    """Mean and covariance of rows that come in batches, float64 (Chan's update keeps large means apart)."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.n = 0
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(width, width, dtype=torch.float64, device=device)
        """the sum over rows of (x - mean)(x - mean)^T"""

    def add(self, x: Tensor) -> None:
        """Counts rows in: x [n, D]."""
        if len(x) == 0:
            return
        x, n = x.double(), self.n + len(x)
        mean = x.mean(0)
        centred, step = x - mean, mean - self.mean
        self.scatter += centred.T @ centred + torch.outer(step, step) * (self.n * len(x) / n)
        self.mean += step * (len(x) / n)
        self.n = n

    def components(self, most: int) -> Components:
        """The first ``most`` principal components, fewer where the rows span fewer dimensions. UnweaveError where rows
        do not differ."""
        values, vectors = torch.linalg.eigh(self.scatter)
        values, rows = values.flip(0).clamp(min=0), vectors.T.flip(0)
        total, shift = values.sum(), self.n * self.mean.square().sum()
        if self.n < 2 or float(total) <= 0:
            raise UnweaveError("the two models do not differ here", remedy="give a model that was fine-tuned")
        rank = int((values > 1e-12 * values[0]).sum())
        rows = rows[: min(most, rank)]
        largest = rows.abs().argmax(1, keepdim=True)
        rows = rows * rows.gather(1, largest).sign()  # of the two signs always the same one
        return Components(rows, values[: len(rows)] / total, float(shift / (shift + total)), self.n)


@dataclass(frozen=True)
class Components:
    """Orthonormal rows [C, D], and what share of the variance each explains [C]; float64."""

    rows: Tensor
    shares: Tensor
    mean_share: float
    """of the mean squared difference, the part that is the same at every token"""
    tokens: int


def principal_components(
    lm: LM, tuned: LM, saes: SAEs, batches: Sequence[Tokens], *, most: int = 20, max_tokens: int = 2048
) -> dict[Site, Components]:
    """Components of (tuned - lm) at every SAE's site. UnweaveError for models that do not differ or belong together."""
    by_site = by_site_of(lm, saes)
    spreads = {site: Spread(sae.d_out, lm.device) for site, sae in by_site.items()}
    for tokens, values in _both(lm, tuned, {*by_site}, batches, max_tokens):
        for site, sae in by_site.items():
            x, y = (value[site] for value in values)
            keep = _counted(lm, sae, tokens, (x, y))
            spreads[site].add(y[keep].double() - x[keep].double())
    components = {}
    for site, spread in spreads.items():
        try:
            components[site] = spread.components(most)
        except UnweaveError as error:
            raise UnweaveError(error.what, where=str(site), remedy=error.remedy) from None
    return components


@dataclass(frozen=True)
class Shift(Activity):
    """How strongly and often one site's latents fire in a model, and how much more strongly once it is fine-tuned."""

    more: Mean
    """of an example's f'_j - f_j, itself a mean over its tokens that count"""


def latent_differences(
    lm: LM, tuned: LM, saes: SAEs, batches: Sequence[Tokens], *, max_tokens: int = 2048
) -> dict[Site, Shift]:
    """How strongly and often every latent fires in ``lm``, and how much more strongly in ``tuned``, paired by
    example."""
    by_site = by_site_of(lm, saes)
    shifts = {s: Shift(*(Mean(sae.d_sae, lm.device) for _ in range(3))) for s, sae in by_site.items()}
    reads = {reads_of(sae, site) for site, sae in by_site.items()}
    for tokens, values in _both(lm, tuned, reads, batches, max_tokens):
        for site, sae in by_site.items():
            both = [value[reads_of(sae, site)] for value in values]
            keep = _counted(lm, sae, tokens, both)
            before, after = (firing(sae, x, keep) for x in both)
            shifts[site].add(before)
            shifts[site].more.add(after.per_token()[0] - before.per_token()[0])
    return shifts


def _counted(lm: LM, sae: SAE, tokens: Tokens, both: Sequence[Tensor]) -> Tensor:
    special = torch.tensor(lm.special_ids, dtype=torch.int64, device=tokens.ids.device)
    keep = ~torch.isin(tokens.ids, special)
    for x in both:
        keep = keep & sae.policy.keep(x, tokens.ids, tokens.mask)
    return keep


def _both(
    lm: LM, tuned: LM, sites: Iterable[Site], batches: Sequence[Tokens], max_tokens: int
) -> Iterator[tuple[Tokens, list[dict[Site, Tensor]]]]:
    """Every batch on the first model's device, with the values [B, P, D] of the sites in both models."""
    if tuned.tokenizer_fingerprint() != lm.tokenizer_fingerprint() or tuned.d_model != lm.d_model:
        what = f"{tuned.name} has another tokenizer or width than {lm.name}"
        raise UnweaveError(what, where="tuned", remedy="give the model that it was fine-tuned from, and this one")
    with task("compare models", total=sum(map(len, batches)), unit="examples") as shown:
        for tokens in batches:
            batch = tokens.to(lm.device)
            values = [values_of(model, sites, batch, max_tokens=max_tokens) for model in (lm, tuned)]
            yield batch, [{site: x.to(lm.device) for site, x in value.items()} for value in values]
            shown.advance(len(tokens))
