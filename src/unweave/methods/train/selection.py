"""Which entries of the pre-activations are selected: by rank in a row, by rank in the batch, or above a bound.

Selected entries are sparse; those above a bound are dense while many.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unweave.core.dist import Group
from unweave.methods.train.entries import Entries
from unweave.methods.train.state import State
from unweave.methods.train.weights import Weights
from unweave.sae.sparse import kernels

SPARSE_BELOW = 0.1
"""share of entries up to which those above a bound are handled sparsely"""
_TRY_AGAIN = 16
"""steps to stay dense after sparse handling was tried in vain"""


def largest_of_rows(w: Weights, x: Tensor, k: int) -> Entries:
    """The k largest pre-activations of each row of x [N, D], with a graph to x, W_enc and b_enc."""
    return _attached(w, x, *kernels.choose_topk(x.detach(), w.W_enc.detach(), w.b_enc.detach(), k))


def largest_of_batch(w: Weights, x: Tensor, k: int, guess: float, group: Group) -> Entries:
    """The k N largest of the batch in all processes; ``guess`` is a value near the smallest of them, 0: none."""
    W, b = w.W_enc.detach(), w.b_enc.detach()
    return _attached(w, x, *kernels.choose_batch_topk(x.detach(), W, b, k, guess=guess, group=group))


def above_bound(w: Weights, x: Tensor, bound: Tensor, state: State, group: Group) -> Entries | None:
    """Those above their latent's ``bound`` [F]; None where too many are, in this process or in another of the group."""
    selected = None
    if state.density <= SPARSE_BELOW and state.wait == 0:
        W, b = w.W_enc.detach(), w.b_enc.detach()
        selected = kernels.choose_above(x.detach(), W, b, bound, limit=SPARSE_BELOW)
        if group.size > 1 and int(group.max(torch.tensor(int(selected is None), device=x.device))):
            selected = None  # all do the same, so that all remember the same
        state.wait = 0 if selected is not None else _TRY_AGAIN
    return None if selected is None else _attached(w, x, *selected)


def every(w: Weights, x: Tensor) -> Entries:
    """All pre-activations of x [N, D], dense."""
    return Entries(torch.addmm(w.b_enc, x, w.W_enc.T))


def _attached(w: Weights, x: Tensor, values: Tensor, choice: kernels.Choice) -> Entries:
    return Entries(kernels.attach(x, w.W_enc, w.b_enc, values, choice), choice)
