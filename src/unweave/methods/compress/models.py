"""Compressing a model's projections in place, by one of the methods, and what became of every tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.rounding import bits_per_weight, check_group, round_to_nearest
from unweave.lm.model import LM, Tokens
from unweave.lm.projections import Projection
from unweave.methods.compress.calibrate import Inputs, Needs, Order, each_projection
from unweave.methods.compress.lowrank import low_rank, rank_for
from unweave.methods.compress.masks import Pattern, choose, in_words, sparsegpt, wanda_scores
from unweave.methods.compress.result import TensorChange

PruneMethod = Literal["wanda", "magnitude", "sparsegpt"]


class Changed(NamedTuple):
    """New weights [out, in], and the bits or the rank they have where the method bounds these."""

    weights: Tensor
    bits: float | None = None
    rank: int | None = None


def _any(columns: int, where: str) -> None:
    """Every matrix will do."""


@dataclass(frozen=True)
class Method:
    """A way to compress one matrix."""

    words: str
    """what weights are afterwards, as "pruned by wanda, 50 % sparse" """
    needs: Needs
    change: Callable[[Tensor, Inputs | None], Changed]
    check: Callable[[int, str], None] = _any
    """raises UnweaveError where rows of so many weights cannot be compressed so"""


def pruning(method: PruneMethod, share: float | Pattern) -> Method:
    """WANDA (a choice per row), magnitude (per matrix), both leaving other weights as they are, and SparseGPT."""

    def change(weights: Tensor, inputs: Inputs | None) -> Changed:
        if method == "magnitude":
            mask = choose(weights.abs(), share, "matrix")
        elif method == "wanda":
            assert inputs is not None
            mask = choose(wanda_scores(weights, inputs.norms), share)
        else:
            assert inputs is not None and inputs.gram is not None
            return Changed(sparsegpt(weights, inputs.gram, share)[0])
        return Changed(weights.masked_fill(mask, 0.0))

    needs: dict[PruneMethod, Needs] = {"magnitude": "nothing", "wanda": "norms", "sparsegpt": "gram"}
    check = share.check if isinstance(share, Pattern) else _any
    return Method(f"pruned by {method}, {in_words(share)}", needs[method], change, check)


def rounding(bits: int, group: int) -> Method:
    """Rounding to nearest; the weights are what the codes and scales stand for."""

    def change(weights: Tensor, inputs: Inputs | None) -> Changed:
        del inputs
        rounded = round_to_nearest(weights, bits, group).weights().to(weights.dtype)
        return Changed(rounded, bits=bits_per_weight(bits, group, weights.shape[1]))

    grouped = f"groups of {group}" if group else "one scale a row"
    return Method(f"rounded to {bits} bits, {grouped}", "nothing", change, lambda c, w: check_group(group, c, w))


def ranking(share: float, *, aware: bool) -> Method:
    """Low rank, nearest in outputs (``aware``) or in weights."""

    def change(weights: Tensor, inputs: Inputs | None) -> Changed:
        rank = rank_for(share, *weights.shape)
        return Changed(low_rank(weights, rank, None if inputs is None else inputs.gram), rank=rank)

    words = f"of low rank, {100 * share:g} % of the numbers, nearest in {'outputs' if aware else 'weights'}"
    return Method(words, "gram" if aware else "nothing", change)


def check_method(method: Method, chosen: Sequence[Projection], calibration: int) -> None:
    """Raises UnweaveError for matrices that the method cannot compress, and for too little text to calibrate on."""
    for projection in chosen:
        method.check(projection.weight.shape[1], str(projection))
    widest = max(chosen, key=lambda projection: projection.weight.shape[1])
    if method.needs == "gram" and calibration < widest.weight.shape[1]:
        raise UnweaveError(
            f"{calibration:,} tokens do not say how the {widest.weight.shape[1]:,} inputs of {widest} go together",
            where="data.tokens",
            remedy=f"calibrate on at least {widest.weight.shape[1]:,} tokens, better on many times as many",
        )


def compress_model(
    lm: LM, chosen: Sequence[Projection], method: Method, batches: Sequence[Tokens] = (), order: Order = "blocks"
) -> tuple[TensorChange, ...]:
    """Compresses projections of a model in place, and says what became of each tensor.

    ``batches`` are the calibration tokens, without padding. Raises UnweaveError before any weight is changed for
    matrices that the method cannot compress and for too few tokens, and later for experts that no token reached.
    """
    check_method(method, chosen, sum(batch.n_tokens for batch in batches))
    changes: dict[tuple[int, str], list[Tensor]] = {}
    about: dict[tuple[int, str], tuple[tuple[int, ...], float | None, int | None]] = {}

    def work(projection: Projection, inputs: Inputs | None) -> None:
        after = method.change(projection.weight, inputs)
        tensor = (projection.layer, projection.name)
        changes.setdefault(tensor, []).append(counts(projection.weight, after.weights))
        about[tensor] = (tuple(after.weights.shape), after.bits, after.rank)
        projection.weight.copy_(after.weights)

    with torch.no_grad():
        each_projection(lm, chosen, batches, method.needs, order, work)
    return tuple(tensor_change(*tensor, changes[tensor], *about[tensor]) for tensor in changes)


def counts(before: Tensor, after: Tensor) -> Tensor:
    """Zeros after and before, ||W' - W||^2 and ||W||^2: float64 [4]."""
    moved, wide = (after - before).double(), before.double()
    return torch.stack([(after == 0).sum(), (before == 0).sum(), moved.square().sum(), wide.square().sum()]).double()


def tensor_change(
    layer: int | None,
    name: str,
    counted: Sequence[Tensor],
    shape: tuple[int, ...],
    bits: float | None = None,
    rank: int | None = None,
) -> TensorChange:
    """What became of a tensor that holds matrices of this shape, from the ``counts`` of each."""
    zeros, zeros_before, moved, size = torch.stack(list(counted)).sum(0).tolist()
    n, total = len(counted), len(counted) * shape[0] * shape[1]
    return TensorChange(
        layer=layer,
        name=name,
        shape=shape if n == 1 else (n, *shape),
        zeros=zeros / total,
        zeros_before=zeros_before / total,
        change=(moved / size) ** 0.5 if size else 0.0,
        bits=bits,
        rank=rank,
    )
