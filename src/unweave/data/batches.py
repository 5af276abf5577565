"""Rows of like length together, and such batches of tokens from a store."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from unweave.lm.model import LM, Tokens

if TYPE_CHECKING:
    from unweave.data.tokens import TokenStore


def by_length(lengths: Sequence[int], max_tokens: int, spread: float = math.inf) -> Iterator[list[int]]:
    """Places of rows of like length, at most ``max_tokens`` tokens together with padding, and at least one row; none
    is more than ``spread`` times as long as the shortest."""
    group: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: (lengths[place], place)):
        size = lengths[place]
        if group and ((len(group) + 1) * size > max_tokens or size > spread * lengths[group[0]]):
            yield group
            group = []
        group.append(place)
    if group:
        yield group


def store_batches(
    lm: LM, store: TokenStore, rows: Sequence[int], batch_tokens: int = 2048, spread: float = math.inf
) -> list[Tokens]:
    """Rows of a token store as batches of about ``batch_tokens`` positions, rows of like length together; with
    ``spread`` 1 those of one length, so that there is no padding."""
    order = sorted(map(int, rows))
    lengths = (store.starts[1:] - store.starts[:-1])[order].tolist()
    groups = by_length(lengths, batch_tokens, spread)
    return [store.batch([order[i] for i in group], lm.pad_id)[0] for group in groups]
