"""How two lists of effects agree: in proportion, in order, and in size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from unweave.core.errors import UnweaveError

Values = Sequence[float] | Tensor


def correlations(a: Values, b: Values) -> dict[str, float]:
    """Pearson's and Spearman's correlation (ties share their mean rank).

    NaN where a correlation is not defined: fewer than two values, or all values of one side the same.
    """
    x, y = (np.asarray(torch.as_tensor(v, dtype=torch.float64).cpu()) for v in (a, b))
    if x.shape != y.shape or x.ndim != 1:
        raise UnweaveError(f"cannot correlate {list(x.shape)} with {list(y.shape)} values", remedy="pair them")
    return {"pearson": _pearson(x, y), "spearman": _pearson(_ranks(x), _ranks(y))}


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip((x @ y) / np.sqrt((x @ x) * (y @ y)), -1.0, 1.0))


def _ranks(x: np.ndarray) -> np.ndarray:
    _, group, sizes = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[group]


def scale(estimates: Values, measured: Values) -> float:
    """The factor c for which c times ``measured`` is nearest to ``estimates``; NaN where all measured are 0."""
    x, y = (np.asarray(torch.as_tensor(v, dtype=torch.float64).cpu()) for v in (measured, estimates))
    return float(x @ y / (x @ x)) if bool(x.any()) else math.nan
