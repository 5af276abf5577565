"""Which weights to take out: by magnitude, by WANDA's score, n of m, or with SparseGPT's mending of the rest.

Weights are [out, in], one row to an output; a mask is bool, True where a weight goes. All choices take an exact number
of the smallest scores; of equal ones the first go.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError

Per = Literal["row", "matrix"]


class Pattern(NamedTuple):
    """In every ``m`` consecutive inputs of a row ``n`` weights go."""

    n: int
    m: int

    @classmethod
    def parse(cls, written: str) -> Pattern:
        """ "2:4". Raises UnweaveError for what is none."""
        match = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", written)
        if match is None or not 0 < int(match[1]) < int(match[2]):
            raise UnweaveError(
                f"{written!r} is not a pattern",
                where="pattern",
                remedy="write n:m with n from 1 to below m: 2:4 takes 2 of every 4 consecutive weights of a row",
            )
        return cls(int(match[1]), int(match[2]))

    def check(self, columns: int, where: str) -> None:
        """Raises UnweaveError where groups of m do not divide a row."""
        if columns % self.m:
            raise UnweaveError(
                f"the pattern {self} does not divide rows of {columns} weights",
                where=where,
                remedy="choose an m that divides them, or leave such projections out",
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def in_words(share: float | Pattern) -> str:
    """ "2:4", "50 % sparse" """
    return str(share) if isinstance(share, Pattern) else f"{100 * share:g} % sparse"


def wanda_scores(weights: Tensor, norms: Tensor) -> Tensor:
    """|W_ij| ||X_j|| [out, in], with norms [in] of the inputs over the calibration tokens (Sun et al. 2023).

    A common factor of the norms changes nothing.
    """
    dtype = torch.promote_types(weights.dtype, torch.float32)
    return weights.abs().to(dtype) * norms.to(dtype)


def choose(scores: Tensor, share: float | Pattern, per: Per = "row") -> Tensor:
    """The mask of the smallest scores [out, in]: floor(in * share) of each row, floor(out * in * share) of the matrix,
    or n in every m of a row."""
    if isinstance(share, Pattern):
        share.check(scores.shape[1], "scores")
        return _smallest(scores.reshape(-1, share.m), share.n).view_as(scores)
    rows = scores if per == "row" else scores.reshape(1, -1)
    return _smallest(rows, int(rows.shape[1] * share)).view_as(scores)


def _smallest(rows: Tensor, n: int) -> Tensor:
    """The n smallest of each row as a mask; of equal ones the first, as a stable sort has them."""
    if n == 0:
        return torch.zeros_like(rows, dtype=torch.bool)
    last = rows.topk(n, dim=1, largest=False, sorted=False).values.amax(1, keepdim=True)
    mask = rows <= last
    ties = mask.sum(1) > n  # few rows: only these need to be told apart
    if bool(ties.any()):
        some, bound = rows[ties], last[ties]
        below, equal = some < bound, some == bound
        mask[ties] = below | (equal & (equal.cumsum(1) <= n - below.sum(1, keepdim=True)))
    return mask


def sparsegpt(
    weights: Tensor, gram: Tensor, share: float | Pattern, *, damp: float = 0.01, block: int = 128
) -> tuple[Tensor, Tensor]:
    """Weights [out, in] with a share of them taken out and the rest mended, and the mask (Frantar & Alistarh 2023).

    ``gram`` [in, in] is X^T X of the inputs; ``damp`` times its mean diagonal is added. Columns are done from left to
    right. With H the gram of the columns from j on, taking out w_j moves the weights from j on by
    -w_j / [H^-1]_00 H^-1_0: the least squares update. In every ``block`` of columns the smallest w_j^2 / [H^-1]_00
    over all rows go, a pattern's n in every m of a row.
    """
    out, columns = weights.shape
    block = block if not isinstance(share, Pattern) else max(share.m, block - block % share.m)
    new = weights.double().clone()
    new[:, gram.diagonal() == 0] = 0.0
    mask = torch.zeros(out, columns, dtype=torch.bool, device=weights.device)
    hessian = gram.double().clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += damp * diagonal.mean()
    # Row j of this factor, from j on, is H^-1_0 / sqrt([H^-1]_00) of the columns from j on, for all j at once.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.zeros(out, stop - start, dtype=torch.float64, device=weights.device)
        if not isinstance(share, Pattern):
            scores = new[:, start:stop] / factor.diagonal()[start:stop]
            mask[:, start:stop] = choose(scores.square(), share, "matrix")
        for j in range(start, stop):
            if isinstance(share, Pattern) and (j - start) % share.m == 0:
                group = slice(j, j + share.m)
                mask[:, group] = choose((new[:, group] / factor.diagonal()[group]).square(), share)
            error = torch.where(mask[:, j], new[:, j], 0.0) / factor[j, j]
            new[:, j:stop] -= error[:, None] * factor[j, j:stop]
            errors[:, j - start] = error
        new[:, stop:] -= errors @ factor[start:stop, stop:]
    new[mask] = 0.0
    return new.to(weights.dtype), mask
