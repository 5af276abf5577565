"""64-bit hashes of words and of n words in a row, without a Python step per word.

Words are what white space separates, as in ``str.split``. Hashes are the same in every process and on every machine.
They are spread evenly, but no secret is in them: who wants two n-grams with one hash can make them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

_CHUNK = 8
_LONG_WORD = 512
_SPACES = [code for code in range(0x3001) if chr(code).isspace()]  # U+3000 is the last of them
_OTHER_SPACE = re.compile(f"[{''.join(map(chr, (code for code in _SPACES if code > 127)))}]")
_IS_SPACE = np.zeros(256, dtype=bool)
_IS_SPACE[[code for code in _SPACES if code < 128]] = True
_MASKS = np.array([(1 << 8 * size) - 1 for size in range(_CHUNK + 1)], dtype=np.uint64)


def word_hashes(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the words of all texts, uint64 [W], and how many words each text has, int64 [len(texts)]."""
    parts = [_as_bytes(text) for text in texts]
    sizes = np.array([len(part) + 1 for part in parts], dtype=np.int64)
    data = b"\n".join(parts) + b"\n"
    blank = _IS_SPACE[np.frombuffer(data, dtype=np.uint8)]
    edges = np.flatnonzero(np.diff(blank, prepend=True))
    starts, ends = edges[::2], edges[1::2]
    limits = np.searchsorted(starts, np.cumsum(sizes))
    return _hashed(data, starts, ends - starts), np.diff(limits, prepend=0)


def gram_hashes(words: np.ndarray, n: int) -> np.ndarray:
    """A hash for every n words in a row, uint64 [max(W - n + 1, 0)], of the words' hashes uint64 [W].

    Spans of 2, 4, 8... words are hashed from two halves; n words are put together from spans of the powers of two in n.
    """
    count = max(len(words) - n + 1, 0)
    whole: np.ndarray | None = None
    power, length, covered = words, 1, 0
    while True:
        if n & length:
            part = power[covered : covered + count]
            whole = part if whole is None else _joined(whole, part)
            covered += length
        if covered == n:
            return whole if whole is not None else words[:0]
        power = _joined(power[:-length], power[length:])
        length *= 2


def _as_bytes(text: str) -> bytes:
    if not text.isascii():
        text = _OTHER_SPACE.sub(" ", text)
    return text.encode("utf-8", "surrogatepass")


def _hashed(data: bytes, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Hashes of stretches of ``data``, eight bytes at a time; those of very long words by themselves."""
    padded = data + bytes(_CHUNK)
    eight = np.ndarray((len(data),), dtype="<u8", buffer=padded, strides=(1,))
    hashes = _mixed(lengths.astype(np.uint64))
    left = np.flatnonzero(lengths <= _LONG_WORD)
    at = 0
    while len(left):
        chunk = eight[starts[left] + at] & _MASKS[np.minimum(lengths[left] - at, _CHUNK)]
        hashes[left] = _joined(hashes[left], chunk)
        at += _CHUNK
        left = left[lengths[left] > at]
    for index in np.flatnonzero(lengths > _LONG_WORD).tolist():
        word = data[starts[index] : starts[index] + lengths[index]]
        hashes[index] = int.from_bytes(blake2b(word, digest_size=8).digest(), "little")
    return hashes


def _joined(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """A hash of two hashes that depends on which is left. It is mixed every time: or else words in like places of two
    halves could be exchanged unnoticed."""
    return _mixed(left * np.uint64(0x9E3779B97F4A7C17) + right)


def _mixed(x: np.ndarray) -> np.ndarray:
    """A fixed permutation of the 64-bit numbers that leaves no structure (SplitMix64's last step); changes ``x``."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x
