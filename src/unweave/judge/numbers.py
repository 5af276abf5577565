"""Log-probabilities of the numbers in a reply, from those of its tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

_LONGEST = 3


def as_number(token: str) -> str | None:
    """The whole number of at most three digits that a token says, white space around it aside; None for others."""
    word = token.strip()
    return word if word.isascii() and word.isdecimal() and len(word) <= _LONGEST else None


def merged(logprobs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Log-probabilities of numbers from those of tokens: " 2" and "2" are one number. ValueError for what is none."""
    total: dict[str, float] = {}
    for token, logprob in logprobs:
        number = as_number(token)
        if number is not None:
            if isinstance(logprob, bool) or not isinstance(logprob, int | float) or not logprob <= 1e-3:
                raise ValueError(f"no log-probability: {logprob!r}")
            high, low = max(logprob, before := total.get(number, -math.inf)), min(logprob, before)
            total[number] = high if low == -math.inf else high + math.log1p(math.exp(low - high))
    return total


def placed(logprobs: Any, text: str) -> dict[int, dict[str, float]]:
    """Where numbers stand in a reply, with the log-probabilities of the numbers that could; none where what the server
    says of its tokens does not add up to the text."""
    numbers, whole, at = {}, text.encode(), 0
    try:
        for token in logprobs["content"] if logprobs else ():
            piece = bytes(token["bytes"]) if token.get("bytes") is not None else token["token"].encode()
            if whole[at : at + len(piece)] != piece:
                return {}
            if as_number(token["token"]) is not None:
                place = at + len(piece) - len(piece.lstrip())
                others = {other["token"]: other["logprob"] for other in token.get("top_logprobs") or ()}
                others[token["token"]] = token["logprob"]
                numbers[len(whole[:place].decode())] = merged(others.items())
            at += len(piece)
    except (LookupError, TypeError, ValueError, AttributeError):
        return {}
    return numbers if at == len(whole) else {}
