"""Damaged llama2.c files: each is refused in words, or gives the numbers that stand at their places."""

from __future__ import annotations

import struct
from pathlib import Path
from random import Random

import numpy as np
import pytest

from helpers import damage
from unweave.core.errors import UnweaveError
from unweave.lm.llama2c import read_pieces, read_weights

HEADER = (8, 12, 1, 2, 1, 6, 4)  # width, hidden, layers, heads, key-value heads, vocabulary, context
EMBEDDED = HEADER[0] * HEADER[5]


def whole() -> bytes:
    width, hidden, layers, heads, kv, vocab, context = HEADER
    head = width // heads
    count = vocab * width + layers * (2 * width + 2 * width * width + 2 * kv * head * width + 3 * width * hidden)
    count += width + context * head
    weights = np.random.default_rng(0).normal(size=count).astype("<f4").tobytes()
    pieces = b"".join(struct.pack("<fi", -1.0, 1) + bytes([97 + i]) for i in range(vocab))
    return struct.pack("<7i", *HEADER) + weights + struct.pack("<i", 1) + pieces


def test_damaged_llama2c_files(tmp_path: Path) -> None:
    good, path, rng = whole(), tmp_path / "model.bin", Random(0)
    variants = [("whole", good), *damage.contents(good, rng, 500), *damage.contents(good, rng, 300, (0, 28))]
    for field in range(7):
        for number in (0, 1, -1, 3, 7, 2**16, 2**31 - 1, -(2**31)):
            changed = good[: 4 * field] + struct.pack("<i", number) + good[4 * field + 4 :]
            variants.append((f"field {field} = {number}", changed))
    read = 0
    for what, data in variants:
        path.write_bytes(data)

        def attempt() -> object:
            shape, tensors, rest = read_weights(path)
            return shape, tensors, read_pieces(rest, shape.vocab, str(path))

        found = damage.attempt(attempt)
        if isinstance(found, UnweaveError):
            assert found.where and found.remedy, what
            continue
        read += 1
        shape, tensors, pieces = found  # type: ignore[misc]
        size = shape.vocab * shape.width
        stands = np.frombuffer(data[28 : 28 + 4 * size], "<f4").reshape(shape.vocab, shape.width)
        assert np.array_equal(tensors["model.embed_tokens.weight"].numpy(), stands), what
        assert len(pieces) == shape.vocab
    assert 1 < read < len(variants) // 2 + 300


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(bad: float, tmp_path: Path) -> None:
    data = whole()
    (tmp_path / "m.bin").write_bytes(data[:40] + struct.pack("<f", bad) + data[44:])
    with pytest.raises(UnweaveError, match="embed_tokens holds NaN or infinity"):
        read_weights(tmp_path / "m.bin")
