"""Which latents stay what they were: sums over tokens of their values before and after, and what follows from them.

1. Both models read the same tokens; chunks of their activations are side by side (``data.stream``).
2. Every form of an SAE encodes them sparsely. Of each latent the sums of a, b, a^2, b^2 and ab are added up, and how
   often either fires; products need the entries that both have, which are found by sorting. Nothing is
   [tokens, latents].
3. r = (n Sab - Sa Sb) / sqrt((n Saa - Sa^2) (n Sbb - Sb^2)), Pearson's correlation over tokens, zeros included. A
   latent that fires before and is constant afterwards has none; it counts as 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unweave.core.codes import Codes
from unweave.core.errors import UnweaveError
from unweave.core.intervals import Array, Interval, interval
from unweave.core.progress import task
from unweave.core.site import Site
from unweave.data.stream import ActivationSource
from unweave.methods.compress.transfer.result import ALIKE, On, Survival, Surviving
from unweave.sae.module import SAE

LEAST = 10
"""firings in the original model below which a correlation says too little"""
RATES = (0.0, 1e-3, 1e-2, 1e-1, 1.0)
_FEW = 200
_SUMS = ("a", "b", "aa", "bb", "ab", "fired", "fires", "maximum")


class Sums:
    """Sums over tokens of a latent's value before (a) and after (b), float64 [8, F]; the last row is a's maximum."""

    def __init__(self, n_latents: int, device: torch.device | str = "cpu") -> None:
        self.n = 0
        self.table = torch.zeros(len(_SUMS), n_latents, dtype=torch.float64, device=device)

    def add(self, before: Codes, after: Codes) -> None:
        """The same tokens, encoded before and after."""
        self.n += before.n_rows
        a, b = before.values.double(), after.values.double()
        for row, codes, values in (
            (0, before, a), (1, after, b), (2, before, a * a), (3, after, b * b),
            (5, before, (a > 0).double()), (6, after, (b > 0).double()),
        ):  # fmt: skip
            self.table[row].index_add_(0, codes.indices, values)
        here, there = (codes.row_of_each() * codes.n_latents + codes.indices for codes in (before, after))
        there, order = there.sort()
        if len(there):
            place = torch.searchsorted(there, here).clamp_(max=len(there) - 1)
            both = there[place] == here
            self.table[4].index_add_(0, before.indices[both], a[both] * b[order[place[both]]])
        self.table[7].scatter_reduce_(0, before.indices, a, "amax")


def correlations(table: Tensor, n: int) -> Array:
    """r of each latent, float64 [F], from the sums over n tokens; NaN where it does not vary before."""
    a, b, aa, bb, ab = (n * row if i > 1 else row for i, row in enumerate(table[:5]))
    spread, spread_after = (aa - a * a).clamp_(min=0), (bb - b * b).clamp_(min=0)
    r = (ab - a * b) / (spread.sqrt() * spread_after.sqrt())
    r = torch.where(spread_after > 0, r.clamp(-1, 1), 0.0)
    return torch.where(spread > 0, r, torch.nan).cpu().numpy()


def mean_of(values: Array) -> Interval | None:
    """The mean with its 95 % interval over latents: by bootstrap, of many by the standard error; NaN are left out."""
    values = values[~np.isnan(values)]
    if len(values) <= _FEW:
        return interval(values)
    mean, half = float(values.mean()), 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def survival(table: Tensor, n: int) -> Survival:
    """What the sums over n tokens say, by firing rate before."""
    r, fired, fires = correlations(table, n), table[5].cpu().numpy(), table[6].cpu().numpy()
    enough = (fired >= LEAST) & ~np.isnan(r)

    def some(low: float, high: float) -> Surviving:
        rate = fired / max(1, n)
        here = enough & (rate >= low) & (rate < high if high < 1 else rate <= high)
        alike = float((r[here] >= ALIKE).mean()) if here.any() else None
        return Surviving(low, high, int(here.sum()), int((fires[here] == 0).sum()), mean_of(r[here]), alike)

    return Survival(
        every=some(0.0, 1.0),
        rare=int(((fired > 0) & ~enough).sum()),
        median=float(np.median(r[enough])) if enough.any() else None,
        by_rate=tuple(some(low, high) for low, high in pairwise(RATES)),
    )


class Fit:
    """What an SAE leaves unexplained, over tokens."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.n, self.errors, self.squares = 0, 0.0, 0.0
        self.sum = torch.zeros(width, dtype=torch.float64, device=device)

    def add(self, sae: SAE, x: Tensor, codes: Codes) -> None:
        """Activations [n, D] with the SAE's latents of them."""
        self.n += len(x)
        self.errors += float((x - sae.explained(codes, x)).double().square().sum())
        self.squares += float(x.double().square().sum())
        self.sum += x.double().sum(0)

    @property
    def unexplained(self) -> float:
        """Squared error over the squared deviation from the mean; NaN where nothing varies."""
        variance = self.squares - float(self.sum.square().sum()) / max(1, self.n)
        return self.errors / variance if variance > 0 else math.nan


class Setting(NamedTuple):
    """A form of a site's SAE in one of two models."""

    site: Site
    form: str
    on: On

    def __str__(self) -> str:
        return f"{self.site}/{self.form}/{self.on}"


def compare(
    before: ActivationSource, after: ActivationSource, saes: Mapping[Site, SAE], settings: Mapping[Setting, SAE]
) -> dict[str, Tensor]:
    """The tables of ``Sums`` of every setting against the original SAE in the original model, by the setting's name;
    and for each site the original SAE's unexplained variance before and after, and the number of tokens, float64 [3].

    All forms of a site have one policy; a token counts where it does in both models. Raises UnweaveError where none of
    a site does.
    """
    sums = {key: Sums(sae.d_sae, sae.W_enc.device) for key, sae in settings.items()}
    fits = {site: (Fit(sae.d_out, sae.W_enc.device), Fit(sae.d_out, sae.W_enc.device)) for site, sae in saes.items()}
    with task(f"latents in {after.lm.name}", total=before.n_chunks, unit="chunks") as shown, torch.no_grad():
        for chunk in range(before.n_chunks):
            here, there = before.chunk(chunk), after.chunk(chunk)
            ids = torch.from_numpy(before.store.ids[here.where.numpy()].astype(np.int64))
            for site, sae in saes.items():
                keep = sae.policy.keep(here.x[site], ids) & sae.policy.keep(there.x[site], ids)
                x, y = here.x[site][keep].to(sae.W_enc), there.x[site][keep].to(sae.W_enc)
                reference, own = sae.codes(x), sae.codes(y)
                fits[site][0].add(sae, x, reference)
                fits[site][1].add(sae, y, own)
                for key in (key for key in settings if key.site == site):
                    form = settings[key]
                    codes = own if form is sae else form.codes(x if key.on == "original" else y)
                    sums[key].add(reference, codes)
            shown.advance()
    for site, (fit, _) in fits.items():
        if not fit.n:
            raise UnweaveError("none of the tokens counts in both models", where=str(site),
                               remedy="use text with ordinary tokens")  # fmt: skip
    tables = {str(key): one.table for key, one in sums.items()}
    numbers = {str(site): (*(fit.unexplained for fit in both), both[0].n) for site, both in fits.items()}
    return tables | {site: torch.tensor(three, dtype=torch.float64) for site, three in numbers.items()}
