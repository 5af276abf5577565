"""Batches of tokens from a store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from unweave.lm.model import LM, Tokens

if TYPE_CHECKING:
    from unweave.data.tokens import TokenStore


def store_batches(lm: LM, store: TokenStore, rows: Sequence[int], batch_tokens: int = 2048) -> list[Tokens]:
    """Rows of a token store as batches of about ``batch_tokens`` positions, rows of like length together."""
    lengths = store.starts[1:] - store.starts[:-1]
    order = sorted((int(row) for row in rows), key=lambda row: (int(lengths[row]), row))
    batches: list[list[int]] = []
    for row in order:
        if not batches or (len(batches[-1]) + 1) * int(lengths[row]) > batch_tokens:
            batches.append([])
        batches[-1].append(row)
    return [store.batch(batch, lm.pad_id)[0] for batch in batches]
