"""A long text as token ids piece by piece: together they are what tokenising the whole gives.

Where a text is cut its last tokens may be others, and where a piece begins its first. So pieces overlap: the tokens of
the last ``_MARGIN`` characters of a piece are left to the next, which begins ``_LEAD`` tokens earlier than that and
must repeat the last ``_AGREE`` tokens before it continues them. Where it does not, or where places are not to be
trusted, the text is tokenised as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from unweave.lm.chat import Role, encode_text, special_ids

_MARGIN = 512
_LEAD, _AGREE = 96, 24
_MOST = 1 << 20
"""characters of the largest piece"""


class Piece(NamedTuple):
    """The next token ids and their roles; ``end``: how many characters of the text are behind them."""

    ids: list[int]
    roles: list[int]
    end: int


class _Window(NamedTuple):
    """Token ids of a part of a text, special tokens left out, and where each begins and ends in the whole."""

    ids: list[int]
    spans: list[tuple[int, int]]

    @classmethod
    def of(cls, tokenizer: Any, text: str, start: int, stop: int) -> _Window | None:
        """None where no token covers some character other than a space: the offsets may then be unreliable."""
        encoded = tokenizer(text[start:stop], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans = [(a + start, b + start) for a, b in encoded["offset_mapping"]]
        reached = start
        for first, end in [*spans, (stop, stop)]:
            if first > reached and text[reached:first].strip():
                return None
            reached = max(reached, end)
        return cls(list(encoded["input_ids"]), spans)

    def seam(self, before: int) -> int:
        """How many tokens end at or before a character, with nothing of a character left to the next; 0 where none."""
        for count in range(len(self.ids) - 1, 0, -1):
            end = self.spans[count - 1][1]
            if end <= before and self.spans[count][0] >= end > self.spans[0][0]:
                return count
        return 0


def encode_pieces(tokenizer: Any, text: str, size: int) -> Iterator[Piece]:
    """Pieces of ``chat.encode_text(tokenizer, text)``: the first of about ``size`` characters, the next ever larger.

    All in one where the text is not longer than that, the tokenizer tells no places, or the text holds its BOS.
    """
    bos, special = getattr(tokenizer, "bos_token", None), special_ids(tokenizer)
    able = getattr(tokenizer, "is_fast", False) and not (bos and bos in text)
    done = 0
    if able and len(text) > size:
        for ids, end in _continued(tokenizer, text, max(size, 4 * _MARGIN)):
            done += len(ids)
            yield Piece(ids, [Role.SPECIAL.value if i in special else Role.TEXT.value for i in ids], end)
            if end == len(text):
                return
    ids, roles = encode_text(tokenizer, text)
    yield Piece(ids[done:], roles[done:], len(text))


def _continued(tokenizer: Any, text: str, size: int) -> Iterator[tuple[list[int], int]]:
    """Token ids and how many characters are behind them; ends early where a window does not continue the last."""
    start, end, tail = 0, 0, list[int]()
    while end < len(text):
        stop = min(len(text), start + size)
        window = _Window.of(tokenizer, text, start, stop)
        first = None if window is None else _after(window, end, tail)
        if window is None or first is None:
            return
        last = len(window.ids) if stop == len(text) else window.seam(stop - _MARGIN)
        if last <= first and stop < len(text):  # one token, or one word, as long as the window
            size *= 2
            continue
        lead = [] if tail else _lead(tokenizer, text[start:stop], window.ids)
        if lead is None:
            return
        end = len(text) if stop == len(text) else window.spans[last - 1][1]
        yield [*lead, *window.ids[first:last]], end
        tail = [*tail, *window.ids[first:last]][-_AGREE:]
        start = window.spans[max(0, last - _LEAD)][0] if last else start
        size = max(size, min(2 * size, _MOST))


def _lead(tokenizer: Any, text: str, ids: list[int]) -> list[int] | None:
    """What tokenising a text puts in front of its own ids; None where that is not all it does."""
    whole = encode_text(tokenizer, text)[0]
    count = len(whole) - len(ids)
    return whole[:count] if count >= 0 and whole[count:] == ids else None


def _after(window: _Window, end: int, tail: list[int]) -> int | None:
    """How many tokens of a window come before the character ``end``; None where it is not plain that they repeat
    ``tail``, the last before it."""
    if not tail:
        return 0
    counts = [n for n, (_, stop) in enumerate(window.spans, 1) if stop == end and window.ids[:n][-len(tail) :] == tail]
    return counts[0] if len(counts) == 1 else None
