"""Matrices of low rank: the truncated SVD, of the weights or of what they make of their inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def rank_for(share: float, out: int, columns: int) -> int:
    """The rank at which factors [out, r] and [r, in] hold at most this share of the matrix's numbers; at least 1."""
    return max(1, int(share * out * columns / (out + columns)))


def low_rank(weights: Tensor, rank: int, gram: Tensor | None = None) -> Tensor:
    """The matrix of this rank nearest to weights [out, in].

    Nearest in the Frobenius norm ||W - W'||; with ``gram`` X^T X [in, in] nearest in the outputs ||(W - W') X^T||, as
    SVD-LLM (Wang et al. 2024) has it. Both are U U^T W with U the first left singular vectors of W or W X^T, which are
    eigenvectors of W W^T or W X^T X W^T; so inputs that never vary do no harm.
    """
    wide = weights.double()
    products = wide @ wide.T if gram is None else wide @ gram.double() @ wide.T
    first = torch.linalg.eigh(products).eigenvectors[:, -rank:]
    return (first @ (first.T @ wide)).to(weights.dtype)
