"""Tokens as pieces of the text that they are tokens of.

A token alone says less than its place in a row: some tokenizers leave the space before a word out at a row's beginning
only, and a character may be spread over several tokens. Here a token's own text is a string in which a byte that is no
whole character stands as a lone surrogate (Python's ``surrogateescape``); the texts of a row, joined, give the
characters back.

    own_texts    each token's text inside a row, leading space included
    pieces       a row's tokens as pieces that joined are the decoded row: a character spread over several tokens is the
                 first one's, the others are empty; bytes that never become a character are written <0xE2>
    shown_alone  one token's own text on its own, e.g. in a list of promoted tokens
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import takewhile
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

_LOST = "\ufffd"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LOOSE = re.compile("[\udc80-\udcff]")


class Piece(NamedTuple):
    """A token's part of a text; ``goes_on`` where it holds only the rest of a character that began before it."""

    text: str
    goes_on: bool


class _Texts(NamedTuple):
    """Texts of one tokenizer's tokens that were worked out before: inside a row, and at its beginning."""

    inside: dict[int, str]
    first: dict[int, str]


_texts_of: WeakKeyDictionary[Any, _Texts] = WeakKeyDictionary()


def own_texts(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """Each token's text inside a row, special tokens included, loose bytes as lone surrogates."""
    return _texts(tokenizer, ids, first=False)


def first_texts(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """As ``own_texts``, of tokens that begin a row: some tokenizers leave out the space before its first word."""
    return _texts(tokenizer, ids, first=True)


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[Piece]:
    """A row's tokens as pieces: joined they are the decoded row, where every byte of it belongs to a character."""
    if not ids:
        return []
    row = joined([*first_texts(tokenizer, ids[:1]), *own_texts(tokenizer, ids[1:])])
    whole = _decode(tokenizer, ids)
    if _LOST in whole or "".join(piece.text for piece in row) == whole:
        return row
    return _by_beginnings(tokenizer, ids, whole)


def joined(texts: Sequence[str]) -> list[Piece]:
    """The pieces of a row from its tokens' own texts."""
    if not any(map(_LOOSE.search, texts)):
        return [Piece(text, False) for text in texts]
    sizes = [len(text.encode("utf-8", "surrogateescape")) for text in texts]
    characters = "".join(texts).encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    row: list[Piece] = []
    at = begun = end = 0  # the next character, the byte at which it begins, and the byte at which the token ends
    for size in sizes:
        end += size
        parts = []
        while at < len(characters) and begun < end:
            parts.append(characters[at])
            begun += len(characters[at].encode("utf-8", "surrogateescape"))
            at += 1
        row.append(Piece(_visible("".join(parts)), size > 0 and not parts))
    return row


def alone(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token's text on its own, space before it included."""
    return [shown_alone(text, i) for text, i in zip(own_texts(tokenizer, ids), ids, strict=True)]


def shown_alone(text: str, token_id: int) -> str:
    """A token's own text on its own: loose bytes as <0xE2>; its id in angle brackets where it has no text."""
    return "".join(piece.text for piece in joined([text])) or f"<{int(token_id)}>"


def is_letter(character: str) -> bool:
    """Whether a character is part of a word: a letter, or a mark that stands on one."""
    return character.isalpha() or unicodedata.category(character).startswith("M")


def _visible(text: str) -> str:
    return _LOOSE.sub(lambda match: f"<0x{ord(match[0]) - 0xDC00:02X}>", text)


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(map(int, ids)), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _texts(tokenizer: Any, ids: Iterable[int], first: bool) -> list[str]:
    numbers = [int(i) for i in ids]
    cached = _texts_of.get(tokenizer)
    if cached is None:
        cached = _texts_of[tokenizer] = _Texts({}, {})
    texts = cached.first if first else cached.inside
    missing = [i for i in dict.fromkeys(numbers) if i not in texts]
    if missing:
        before = [] if first else _anchor(tokenizer)
        texts.update({i: _text(tokenizer, i, before) for i in missing})
    return [texts[i] for i in numbers]


def _anchor(tokenizer: Any) -> list[int]:
    """Tokens that stand for ordinary letters, to put before another one; empty where the tokenizer has none."""
    try:
        ids = list(tokenizer("a", add_special_tokens=False)["input_ids"])[-1:]
        return ids if ids and "a" in _decode(tokenizer, ids) else []
    except (AttributeError, TypeError, KeyError):  # what knows the tokens' names alone
        return []


def _text(tokenizer: Any, token_id: int, before: list[int]) -> str:
    """A token's text after some others, from what decoding adds; from its name where its bytes are part characters."""
    if hasattr(tokenizer, "decode"):
        head, whole = _decode(tokenizer, before) if before else "", _decode(tokenizer, [*before, token_id])
        text = whole[len(head) :] if whole.startswith(head) else _decode(tokenizer, [token_id])
        if _LOST not in text:
            return text
    (name,) = tokenizer.convert_ids_to_tokens([token_id])
    return "" if name is None else _from_name(str(name))


def _from_name(name: str) -> str:
    """What a token's name in the vocabulary says: a byte as <0xE2>, bytes as the letters of byte-level BPE, or text."""
    if match := _BYTE.fullmatch(name):
        return bytes([int(match[1], 16)]).decode("utf-8", "surrogateescape")
    letters = _byte_of()
    if all(character in letters for character in name):
        return bytes(letters[character] for character in name).decode("utf-8", "surrogateescape")
    return name.replace("\u2581", " ")


@cache
def _byte_of() -> Mapping[str, int]:
    """The letter by which byte-level BPE writes each byte: itself where it can be printed, else one from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _by_beginnings(tokenizer: Any, ids: Sequence[int], whole: str) -> list[Piece]:
    """Pieces from the decoded beginnings of a row, for tokenizers in which a token's text depends on its neighbours."""
    row, shown = [], 0
    for n in range(1, len(ids) + 1):
        text = _decode(tokenizer, ids[:n]).rstrip(_LOST) if n < len(ids) else whole
        same = takewhile(lambda pair: pair[0] == pair[1], zip(text, whole, strict=False))
        agreed = max(shown, sum(1 for _ in same))
        row.append(Piece(whole[shown:agreed], False))
        shown = agreed
    return row
