"""Linear probes of two classes on pooled activations or latents x [R, D], dense or CSR."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from unweave.methods.saebench.labelled import Array, Split


@dataclass(frozen=True)
class Probe:
    """Logits x . weight + bias, in the units of x."""

    weight: Array
    bias: float

    def logits(self, x: Any) -> Array:
        return x @ self.weight + self.bias


@dataclass(frozen=True)
class Adam:
    """How SAEBench trains a probe with AdamW, which stops so many epochs after the best one on the *test* texts."""

    lr: float
    batch: int
    epochs: int
    patience: int
    l1: float = 0.0


def columns(x: Any, y: Array, k: int) -> Array:
    """The k columns whose means over the two classes differ most, the largest difference first."""
    return np.argsort(-np.abs(difference(x, y)), kind="stable")[:k]


def difference(x: Any, y: Array) -> Array:
    """Each column's mean over the first class less that over the other."""
    return np.asarray(x[y == 1].mean(0)).ravel() - np.asarray(x[y == 0].mean(0)).ravel()


def fitted(x: Any, y: Array, chosen: Array | None, strength: float) -> Any:
    """A logistic regression on some columns, or on all."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=strength, max_iter=1000).fit(dense(x, chosen), y)


def dense(x: Any, chosen: Array | None) -> Any:
    """Some columns as a dense matrix; all of them as they are."""
    if chosen is None:
        return x
    part = x[:, chosen]
    return part if isinstance(part, np.ndarray) else part.toarray()


def deviations(x: Any) -> Array:
    """The standard deviation of each column, 1 where it does not vary."""
    square = np.asarray((x * x).mean(0)).ravel()
    variance = square - np.asarray(x.mean(0)).ravel() ** 2
    return np.sqrt(np.where(variance > 1e-9 * np.maximum(square, 1e-30), variance, 1.0))


def scaled(x: Any, scale: Array) -> Any:
    from scipy.sparse import csr_array, diags_array

    return x / scale if isinstance(x, np.ndarray) else csr_array(x @ diags_array(1 / scale))


def validated(x: Array, split: Split, strengths: Sequence[float]) -> Probe:
    """A logistic regression on all columns in their standard deviations; its penalty is chosen on validation texts."""
    (train, y), (validation, wanted) = split.train, split.validation
    scale = deviations(x[train])
    probe, _ = best_of(x[train] / scale, y, x[validation] / scale, wanted, None, strengths)
    return Probe(probe.coef_[0] / scale, float(probe.intercept_[0]))


def best_of(
    x: Any, y: Array, x_validation: Any, wanted: Array, chosen: Array | None, strengths: Sequence[float]
) -> tuple[Any, float]:
    """The logistic regression on some columns, or all, whose penalty does best on validation texts; its accuracy."""
    probes = [fitted(x, y, chosen, strength) for strength in strengths]
    right = [float(probe.score(dense(x_validation, chosen), wanted)) for probe in probes]
    best = int(np.argmax(right))
    return probes[best], right[best]


def by_test(x: Any, y: Array, x_test: Any, y_test: Array, how: Adam, seed: int) -> tuple[Probe, float]:
    """SAEBench's probe on all columns at its best epoch, and the accuracy there on the *test* texts."""
    inputs, inputs_test = (torch.as_tensor(part if isinstance(part, np.ndarray) else part.toarray()).float()
                           for part in (x, x_test))  # fmt: skip
    wanted, best, since, found = torch.as_tensor(y).float(), 0.0, 0, Probe(np.zeros(x.shape[1]), 0.0)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        probe = torch.nn.Linear(inputs.shape[1], 1)
        optimiser = torch.optim.AdamW(probe.parameters(), lr=how.lr)
        for _ in range(how.epochs):
            order = torch.randperm(len(inputs))
            for rows in order.split(how.batch):
                optimiser.zero_grad()
                loss = F.binary_cross_entropy_with_logits(probe(inputs[rows]).squeeze(-1), wanted[rows])
                (loss + how.l1 * probe.weight.abs().sum() if how.l1 else loss).backward()
                optimiser.step()
            right = float(((probe(inputs_test).squeeze(-1) > 0).long().numpy() == y_test).mean())
            since += 1
            if right > best:
                best, since = right, 0
                found = Probe(probe.weight.detach()[0].double().numpy().copy(), float(probe.bias.detach()))
            if since >= how.patience:
                break
    return found, best
