"""A few latents of an SAE on their own, at the cost of their rows alone; and what names latents and values."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.sae.activations import Identity, JumpReLU, TopK
from unweave.sae.sparse.kernels import topk_rows

if TYPE_CHECKING:
    from unweave.sae.module import SAE

_DENSE_BYTES = 32 << 20
"""how many bytes of dense pre-activations a TopK SAE holds at once"""
_COUNT_UP_TO = 4
"""with so few latents, counting the winners above each is cheaper than finding a row's k-th largest"""


class Subset:
    """A few latents of an SAE: ``latents`` [S], ``W_enc`` [d_in, S], ``b_enc`` [S], ``directions`` [S, d_out]."""

    latents: Tensor
    W_enc: Tensor
    b_enc: Tensor

    def __init__(self, sae: SAE, latents: Iterable[int]) -> None:
        """Raises UnweaveError for an invalid, unknown or repeated latent."""
        chosen = numbers(latents)
        for j in chosen:
            if not 0 <= j < sae.d_sae:
                raise UnweaveError(f"latent {j} does not exist", where=repr(sae), remedy=f"use 0 to {sae.d_sae - 1}")
        if len(set(chosen)) != len(chosen):
            raise UnweaveError("a latent is named twice", remedy="name each latent once")
        self.sae = sae
        self.latents = torch.tensor(chosen, dtype=torch.int64, device=sae.W_enc.device)
        self.W_enc = sae.W_enc[:, self.latents].contiguous()
        self.b_enc = sae.b_enc[self.latents]
        self._rows = sae.W_dec[self.latents]

    @property
    def directions(self) -> Tensor:
        """What value 1 of each latent adds to the activation, [S, d_out].

        Raises UnweaveError where that differs from token to token (``writes`` knows), and for an SAE that only encodes.
        """
        self.sae.require_decoder()
        if self.sae.input_norm is not None:
            raise UnweaveError(
                f"this SAE normalises every token's input ({self.sae.input_norm}), so its latents' directions have "
                "another length at every token",
                where=repr(self.sae),
                remedy="edit with clamp, add or ablate, which scale them; other uses need an SAE without it",
            )
        return self._rows

    def span(self) -> Tensor:
        """Orthonormal rows that span the latents' directions, whatever their length."""
        self.sae.require_decoder()
        return orthonormal_basis(self._rows)

    def writes(self, values: Tensor, source: Tensor) -> Tensor:
        """What ``values`` [..., S] of the latents add to the activation [..., d_out] of tokens that read ``source``."""
        self.sae.require_decoder()
        normal = self.sae.normalised(source)
        return (values if normal is None else values * normal.scale) @ self._rows

    def encode(self, x: Tensor) -> Tensor:
        """These latents' values [..., S]: equal to ``sae.encode(x)[..., latents]``, and so are their gradients.

        A TopK SAE encodes every token fully to find its winners, without gradients and in chunks.
        """
        activation = self.sae.activation
        if isinstance(activation, TopK):
            return self._topk(x, activation.k)
        pre = self._pre(x)
        if isinstance(activation, Identity):
            return pre
        if isinstance(activation, JumpReLU):
            return torch.relu(pre) * (pre > activation.threshold[self.latents])
        return torch.relu(pre)

    def _pre(self, x: Tensor) -> Tensor:
        normal = self.sae.normalised(x)
        x = x.to(self.W_enc.dtype) if normal is None else normal.x
        return x @ self.W_enc + self.b_enc

    def _topk(self, x: Tensor, k: int) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            pre, wins = self._winners(x, k)
            return torch.where(wins, torch.relu(pre), 0.0)
        pre = self._pre(x)
        may_fire = (pre > 0).any(-1)  # no other token needs its winners
        wins = torch.zeros_like(pre, dtype=torch.bool)
        wins[may_fire] = self._winners(x.detach()[may_fire], k)[1]
        return torch.where(wins, torch.relu(pre), 0.0)

    def _winners(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Pre-activations [..., S], and which of them are among their token's k largest, by ``kernels.topk_rows``."""
        rows = max(1, _DENSE_BYTES // (4 * self.sae.d_sae))
        shape, pre, wins = (*x.shape[:-1], len(self.latents)), [], []
        for chunk in x.reshape(-1, x.shape[-1]).split(rows):
            with torch.no_grad():
                everything = self.sae.pre(chunk)
                pre.append(everything[:, self.latents])
                if 0 < len(self.latents) <= _COUNT_UP_TO:
                    counts = [_before(everything, j) for j in self.latents.tolist()]
                    wins.append(torch.stack(counts, -1) < k)
                else:
                    winners = topk_rows(everything, k)[1].long()
                    fires = torch.zeros_like(everything, dtype=torch.bool).scatter_(1, winners, True)
                    wins.append(fires[:, self.latents])
        return torch.cat(pre).view(shape), torch.cat(wins).view(shape)


def _before(pre: Tensor, latent: int) -> Tensor:
    """How many pre-activations [..., F] go before a latent's: the larger ones, and equal ones that stand before it.

    NaN is the largest, as in ``kernels.topk_rows``, whose rule this is.
    """
    z, earlier, later = pre[..., latent : latent + 1], pre[..., :latent], pre[..., latent + 1 :]
    ahead = (earlier >= z) | earlier.isnan()
    behind = (later > z) | (later.isnan() & ~z.isnan())
    return ahead.sum(-1) + behind.sum(-1)


def _whole(latent: object) -> int:
    """A latent's number. UnweaveError unless it is a whole number."""
    try:
        if _is_truth(latent):
            raise TypeError
        return operator.index(latent)  # type: ignore[arg-type]
    except TypeError:
        raise UnweaveError(f"{latent!r} is not a latent", remedy="name latents by whole numbers") from None


def finite(value: object) -> float | None:
    """A finite number, be it NumPy's or a tensor; None for anything else, truth values and texts among them."""
    if _is_truth(value) or isinstance(value, (str, bytes)):
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _is_truth(value: object) -> bool:
    return isinstance(value, (bool, np.bool_)) or (isinstance(value, Tensor) and value.dtype == torch.bool)


def numbers(latents: Iterable[int]) -> list[int]:
    """The numbers of latents. UnweaveError for anything else."""
    if not isinstance(latents, Iterable) or isinstance(latents, (str, bytes)):
        raise UnweaveError(f"{latents!r} does not name latents", remedy="pass the numbers of latents, as a list")
    return [_whole(latent) for latent in latents]


def orthonormal_basis(directions: Tensor, tolerance: float = 1e-5) -> Tensor:
    """Orthonormal rows [r, D] that span directions [S, D]; r <= S, since parallel directions count once.

    From an SVD above a relative tolerance: a plain QR would turn the rounding error of dependent rows into directions.
    """
    _, sizes, rows = torch.linalg.svd(directions.double(), full_matrices=False)
    return rows[sizes > tolerance * sizes.max()].to(directions.dtype)
