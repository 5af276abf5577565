"""A sample of the batches seen last, on which BatchTopK's one threshold is measured with the weights as they stand.

A running mean of past thresholds lags behind the weights, which move fast in the first steps. Up to ``PER_STEP`` rows,
evenly spread over a batch, are kept of each step, ``KEPT`` in all; every process of a group holds those of the whole
batch, so that the threshold does not depend on how a batch is divided.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unweave.core.dist import Group
from unweave.methods.train.kinds import SAESpec
from unweave.methods.train.parameters import Weights
from unweave.sae.sparse import kernels

PER_STEP = 512
KEPT = 4096


@torch.no_grad()
def extended(window: Tensor, parts: Sequence[Tensor], rows: int, group: Group) -> Tensor:
    """The window [n, D] with a sample of a batch of ``rows`` rows, of which ``parts`` [m, D] are this process's own."""
    own, stride = torch.cat(list(parts)), -(-rows // PER_STEP)
    counts = torch.cat(group.gather(torch.tensor([len(own)], device=own.device)))
    before = int(counts[: group.rank].sum())
    sample = torch.cat(group.gather(own[-before % stride :: stride]))
    return torch.cat([window, sample])[-KEPT:]


@torch.no_grad()
def threshold(spec: SAESpec, weights: Weights, window: Tensor) -> float:
    """What k pre-activations a row of the window exceed on average; 0 where fewer are positive."""
    values, _ = kernels.choose_batch_topk(window, weights.W_enc, weights.b_enc, spec.k)
    return float(values.min()) if len(values) == spec.k * len(window) else 0.0
