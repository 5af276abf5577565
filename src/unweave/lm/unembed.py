"""Logits from the final norm's output, with no work for tokens that nobody asks for or that have no gradient.

A vocabulary is large: in a model of few blocks the unembedding costs more than they do. A metric that compares answers
reads some of its rows and has a gradient at these alone.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unweave.core.site import Site
from unweave.lm.model import LM, Tokens

_FEW = 1 / 8
"""The share of the vocabulary with a gradient up to which picking these rows is faster than using all."""

_agreed: weakref.WeakKeyDictionary[LM, bool] = weakref.WeakKeyDictionary()


class _Unembed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(hidden, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        used = (g != 0).any(0).nonzero().squeeze(1)
        if len(used) < _FEW * g.shape[1]:
            return g[:, used] @ ctx.weight[used], None, None
        return g @ ctx.weight, None, None


def unembed(lm: LM, hidden: Tensor, tokens: Tensor | slice | None = None) -> Tensor:
    """Logits [R, V] of the final norm's output [R, D]; with ``tokens`` (int64 [k] or a slice) theirs alone, [R, k].

    Only where ``knows(lm)``. Gradients flow to ``hidden``.
    """
    head = lm.model.get_output_embeddings()
    weight, bias = head.weight, getattr(head, "bias", None)
    if tokens is not None:
        weight, bias = weight[tokens], None if bias is None else bias[tokens]
    logits = _Unembed.apply(hidden, weight, bias)
    cap = getattr(lm.model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)  # type: ignore[operator]


def top_tokens(lm: LM, logits: Tensor, k: int, *, largest: bool = True) -> tuple[Tensor, Tensor]:
    """The k largest (or smallest) logits [..., V] and their ids, both [..., k], of the ids that the tokenizer has.

    Rows of the unembedding beyond them only make its size round: they are not tokens, whatever their logits. Of fewer
    than k ids all are given.
    """
    ids = lm.known_ids.to(logits.device)
    top = (logits if len(ids) == logits.shape[-1] else logits[..., ids]).topk(min(k, len(ids)), dim=-1, largest=largest)
    return top.values, ids[top.indices]


def knows(lm: LM) -> bool:
    """Whether ``unembed`` gives this model's logits, tested once on a few tokens. No taps may be open."""
    if lm not in _agreed:
        site = Site("final_norm")
        ids = (torch.arange(8) * 7919 + 13) % lm.vocab_size
        with lm.taps(read=[site]) as seen:
            logits = lm(Tokens.of(ids))
        assert logits is not None
        with torch.no_grad():
            mine = unembed(lm, seen[site][0])
        error = float((mine - logits[0]).norm() / logits[0].norm().clamp(min=1e-30))
        _agreed[lm] = error < (1e-5 if lm.dtype in (torch.float32, torch.float64) else 1e-2)
    return _agreed[lm]
