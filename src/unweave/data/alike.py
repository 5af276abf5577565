"""Near duplicates among texts by MinHash, and draws that depend on a text's hash alone."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from unweave.data.words import gram_hashes, word_hashes

_KEYS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], dtype=np.uint64)
Array = np.ndarray[Any, Any]


def min_hashes(texts: Sequence[str], n: int = 8) -> Array:
    """The smallest hash of ``n`` words in a row of each text under each of four permutations, uint64 [N, 4]; texts that
    are shorter have keys of their own."""
    words, lengths = word_hashes([text.lower() for text in texts]) if texts else (np.zeros(0, np.uint64), np.zeros(0))
    grams = gram_hashes(words, n)
    ends = np.cumsum(lengths).astype(np.int64)
    keys = np.empty((len(texts), len(_KEYS)), dtype=np.uint64)
    for i, (end, length) in enumerate(zip(ends.tolist(), lengths.tolist(), strict=True)):
        short = length < n
        own = word_hashes(["_".join(texts[i].split())])[0] if short else grams[end - length : end - n + 1]
        keys[i] = ((own[:, None] ^ _KEYS) * _KEYS[::-1]).min(0)
    return keys


def first_alike(keys: Array) -> Array:
    """The first text of each text's group, int64 [N]: texts that share a column's key are alike, and so on."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    left, right = [], []
    for column in keys.T:
        order = np.argsort(column, kind="stable")
        same = column[order][1:] == column[order][:-1]
        left.append(order[:-1][same])
        right.append(order[1:][same])
    rows, columns = np.concatenate(left), np.concatenate(right)
    graph = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(len(keys), len(keys)))
    _, group = connected_components(graph, directed=False)
    _, first = np.unique(group, return_index=True)
    return first[group]


def salted(hashes: Array, salt: str) -> Array:
    """Hashes uint64 that depend on the given ones and a text alone."""
    x = hashes.astype(np.uint64) ^ np.uint64(int.from_bytes(blake2b(salt.encode(), digest_size=8).digest(), "little"))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
