"""Text and conversations as token ids with a role for every token.

A conversation is rendered to one string by the tokenizer's own chat template and tokenised once, without adding
special tokens again (the template has written its own). Which stretch of the string is which message's content follows
from where the template put it (``lm/places.py``). A token wholly inside a content gets that message's role, be it a
special token that somebody typed; everything else is SPECIAL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from enum import IntEnum
from itertools import repeat
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from unweave.core.errors import UnweaveError
from unweave.core.files import is_text
from unweave.lm.places import find_places
from unweave.lm.template import Message, apply, chat_date, has_template


class Role(IntEnum):
    """What a token is part of; stored as one byte per token."""

    SPECIAL = 0
    """The template's text and special tokens, and in plain text every special token."""
    SYSTEM = 1
    USER = 2
    ASSISTANT = 3
    TEXT = 4
    """Plain text outside any conversation."""
    PAD = 5


_ROLES = {"system": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT}


class _Span(NamedTuple):
    start: int
    end: int
    role: Role


class _Facts(NamedTuple):
    """What rendering needs to know of a tokenizer, valid as long as its template and its date stay the same."""

    template: Any
    day: date
    default_system: tuple[str, str] | None
    special_ids: frozenset[int]


_facts_of: WeakKeyDictionary[Any, _Facts] = WeakKeyDictionary()


def render(
    tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> tuple[list[int], list[int]]:
    """One conversation as token ids and the role of each token (two lists of equal length).

    Tokens of a message's content get its role, and so does a system prompt that the template inserts by itself; the
    template's text and special tokens are SPECIAL, while a special token that somebody typed is theirs.
    ``add_generation_prompt`` ends with the opening of an assistant turn. Raises UnweaveError when the tokenizer has no
    chat template or gives no offsets, when a role is unknown or refused by the template, or when a content cannot be
    followed into the rendering.
    """
    return render_many(tokenizer, [messages], add_generation_prompt=add_generation_prompt)[0]


def render_many(
    tokenizer: Any, conversations: Sequence[Sequence[Message]], *, add_generation_prompt: bool = False
) -> list[tuple[list[int], list[int]]]:
    """``render`` of several conversations, tokenised together, which is many times faster than one by one."""
    rendered = []
    for result in render_each(tokenizer, conversations, add_generation_prompt=add_generation_prompt):
        if isinstance(result, UnweaveError):
            raise result
        rendered.append(result)
    return rendered


def render_each(
    tokenizer: Any, conversations: Sequence[Sequence[Message]], *, add_generation_prompt: bool = False
) -> list[tuple[list[int], list[int]] | UnweaveError]:
    """``render_many`` with the reason in the place of every conversation that cannot be rendered."""
    if not conversations:
        return []
    _require_offsets(tokenizer)
    located = [_located(tokenizer, messages, add_generation_prompt) for messages in conversations]
    texts = [place[0] for place in located if not isinstance(place, UnweaveError)]
    encoded: Any = {"input_ids": [], "offset_mapping": []}
    if texts:
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    pairs = iter(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
    rendered: list[tuple[list[int], list[int]] | UnweaveError] = []
    for place in located:
        if isinstance(place, UnweaveError):
            rendered.append(place)
        else:
            ids, offsets = next(pairs)
            rendered.append((ids, _roles(offsets, place[1])))
    return rendered


def encode_text(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Plain text as token ids and roles: what ``tokenizer(text)`` gives, BOS included and never doubled.

    What a tokenizer appends (an end token, where it adds one) is left off: a prompt goes on, and what is packed gets
    its separators there. Special tokens are SPECIAL, everything else TEXT.
    """
    return encode_texts(tokenizer, [text])[0]


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
    """``encode_text`` of several texts, tokenised together."""
    if not texts:
        return []
    for text in texts:
        if (refused := _no_text(text)) is not None:
            raise refused
    special = special_ids(tokenizer)
    bos = tokenizer.bos_token_id
    rows = []
    marked = {"return_special_tokens_mask": True} if hasattr(tokenizer, "is_fast") else {}
    encoded = tokenizer(list(texts), verbose=False, **marked)
    for ids, added in zip(encoded["input_ids"], encoded.get("special_tokens_mask") or repeat([]), strict=False):
        ids = _without_end(ids, added, bos)
        if bos is not None and ids[:2] == [bos, bos]:  # the text brought its own
            ids = ids[1:]
        rows.append((ids, [Role.SPECIAL.value if i in special else Role.TEXT.value for i in ids]))
    return rows


def _no_text(text: str) -> UnweaveError | None:
    """Why a text cannot be tokenised: it holds half a surrogate pair, which a shell makes of an invalid byte."""
    if is_text(text):
        return None
    half = next(character for character in text if not is_text(character))
    return UnweaveError(
        f"half a surrogate pair, {half!r}, is not a character",
        where=repr(text[:80]),
        remedy="write the whole character",
    )


def _without_end(ids: list[int], added: list[int], bos: int | None) -> list[int]:
    """Token ids without those that the tokenizer added at the end (``added`` is 1 there, and 0 for typed ones).

    Of an empty text nothing is left but BOS.
    """
    end = len(ids)
    while end and added and added[end - 1]:
        end -= 1
    return ids[:end] if end else ids[: int(bos is not None and ids[:1] == [bos])]


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Every id that stands for no text: the named special tokens and those that the vocabulary marks as special."""
    return _facts(tokenizer).special_ids


def _require_offsets(tokenizer: Any) -> None:
    if tokenizer is None or not has_template(tokenizer):
        name = getattr(tokenizer, "name_or_path", "") or ""
        what = "this tokenizer has no chat template, so it cannot render conversations"
        remedy = "use an instruction-tuned model, give plain text, or set tokenizer.chat_template"
        raise UnweaveError(what, where=str(name), remedy=remedy)
    if not getattr(tokenizer, "is_fast", False):
        remedy = "use a fast tokenizer (one with a tokenizer.json file)"
        raise UnweaveError(f"{type(tokenizer).__name__} does not say which characters a token covers", remedy=remedy)


def _facts(tokenizer: Any) -> _Facts:
    template = getattr(tokenizer, "chat_template", None)
    facts, day = _facts_of.get(tokenizer), chat_date()
    if facts is None or facts.template != template or facts.day != day:
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        default = _default_system(tokenizer) if template else None
        facts = _facts_of[tokenizer] = _Facts(template, day, default, frozenset(special))
    return facts


def _marker(index: int) -> str:
    """A text that no template writes, strips or changes."""
    return f"Qj{index}Zx7{index}Wq"


def _default_system(tokenizer: Any) -> tuple[str, str] | None:
    """What the template writes before and as its own system prompt when a conversation brings none; None if nothing.

    The rendering of (system S, user A) is prefix + S + suffix; if that of (user A) alone is prefix + X + suffix, then
    X is the template's default.
    """
    system, user = _marker(0), _marker(1)
    question = {"role": "user", "content": user}
    try:
        with_system = apply(tokenizer, [{"role": "system", "content": system}, question])
        bare = apply(tokenizer, [question])
    except UnweaveError:
        return None  # a template that takes no system message, or none of this shape, has no default to mark
    prefix, separator, suffix = with_system.partition(system)
    whole = len(prefix) + len(suffix)
    if not separator or len(bare) <= whole or not (bare.startswith(prefix) and bare.endswith(suffix)):
        return None
    return prefix, bare[len(prefix) : len(bare) - len(suffix)]


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise UnweaveError("a conversation has no messages", remedy="leave empty conversations out")
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in _ROLES:
            raise UnweaveError(f"message {index} has the role {role!r}", remedy=f"the roles are {', '.join(_ROLES)}")
        if not isinstance(message.get("content"), str):
            raise UnweaveError(
                f"message {index} ({role}) has no text", remedy='every message needs "content" that is a string'
            )


def _located(
    tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool
) -> tuple[str, list[_Span]] | UnweaveError:
    try:
        text, spans = _locate(tokenizer, messages, add_generation_prompt)
    except UnweaveError as error:
        return error
    return _no_text(text) or (text, spans)


def _locate(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool) -> tuple[str, list[_Span]]:
    """The rendered text and the stretches that are somebody's words, in order and disjoint."""
    _check(messages)

    def rendered(some: Sequence[Message]) -> str:
        return apply(tokenizer, some, add_generation_prompt)

    text = rendered(messages)
    spans: list[_Span] = []
    default = _facts(tokenizer).default_system
    if default is not None and messages[0]["role"] != "system" and text.startswith(default[0] + default[1]):
        spans.append(_Span(len(default[0]), len(default[0]) + len(default[1]), Role.SYSTEM))
    places = find_places(rendered, messages, text)
    return text, spans + [_Span(place.start, place.end, _ROLES[messages[place.message]["role"]]) for place in places]


def _roles(offsets: Sequence[tuple[int, int]], spans: Sequence[_Span]) -> list[int]:
    """The role of each token from the characters it covers."""
    roles = np.zeros(len(offsets), dtype=np.int64)
    if len(offsets) and spans:
        where = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        first, last = where[:, 0], where[:, 1]
        starts, ends, kinds = (np.asarray(column) for column in zip(*spans, strict=True))
        span = np.clip(np.searchsorted(starts, first, side="right") - 1, 0, None)
        inside = (first >= starts[span]) & (last <= ends[span])
        # Some tokenizers cut blanks off offsets; a token left with no characters must lie strictly inside.
        inside &= (last > first) | ((first > starts[span]) & (last < ends[span]))
        roles[inside] = kinds[span][inside]
    return roles.tolist()
