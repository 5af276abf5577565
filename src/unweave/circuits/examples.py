"""Batches of examples: parts of them, which positions of them are looked at, and the metric of them as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from unweave.attribute.runner import Batch, Metric, Runner, Shifted
from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.lm.model import LM, Tokens


def metric_values(
    lm: LM, tokens: Tokens, metric: Metric, *, metric_at: Site | None = None, max_tokens: int = 1024
) -> Tensor:
    """The metric [B] of inputs as they are."""
    run = Runner(lm, tokens.to(lm.device), metric, metric_at, max_tokens)
    return torch.cat([run.metric_of(run.all_rows[part], {}, False) for part in run.chunks(len(tokens))])


def moved(tokens: Tokens, skip_first: int) -> Tensor | None:
    """Where effects are asked for, bool [B, P]: not at padding, nor at each row's first tokens. None: everywhere."""
    if skip_first == 0:
        return None
    free = tokens.mask & (tokens.mask.cumsum(1) > skip_first)
    if not bool(free.any(1).all()):
        raise UnweaveError(
            f"a text has no tokens beside the first {skip_first}", where="skip_first", remedy="leave fewer alone"
        )
    return free


def rows_of(batch: Batch, rows: slice) -> Batch:
    """Some of a batch's examples; their metric still gets the numbers they have in the whole batch."""
    clean, patch, metric = batch
    first = rows.start
    return clean.rows(rows), None if patch is None else patch.rows(rows), Shifted(metric, first)


def of_one_length(batches: Sequence[Batch]) -> tuple[list[Batch], int]:
    """The batches of the commonest length, and how many examples the others hold. Padding is refused."""
    lengths: Counter[int] = Counter()
    for clean, _, _ in batches:
        if not bool(clean.mask.all()):
            raise UnweaveError(
                "positions cannot be kept where rows are padded", remedy="batch texts by length, or sum over positions"
            )
        lengths[clean.ids.shape[1]] += len(clean)
    # The shorter of equally common ones, so that the order of batches does not matter.
    width = min(lengths, key=lambda length: (-lengths[length], length))
    kept = [batch for batch in batches if batch[0].ids.shape[1] == width]
    return kept, lengths.total() - lengths[width]


def spans(batch: Batch, max_tokens: int) -> list[tuple[int, int]]:
    """First and last rows of pieces of at most ``max_tokens`` tokens, as equal as can be."""
    n, width = batch[0].ids.shape
    pieces = -(-n // max(1, max_tokens // width))
    return [(n * i // pieces, n * (i + 1) // pieces) for i in range(pieces)]
