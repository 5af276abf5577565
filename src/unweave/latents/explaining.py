"""Questions to a chat model: what a latent responds to, and which texts fit that; worded in ``explaining.toml``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unweave.core.files import read_toml
from unweave.judge.base import Conversation
from unweave.judge.form import Answer, Form, few_shot, integer
from unweave.latents.latent_record import Context

_PROMPTS = read_toml(Path(__file__).with_name("explaining.toml"))
_WORDS = r"(?i)explanation:\s*\[\[([^\[\]]*)\]\]"
_TEXTS = r"(?i)texts?:\s*\[{1,2}([^\[\]]*)\]"


# -- contexts as text -------------------------------------------------------------------------------------------------


def tokens_of(context: Context) -> list[str]:
    """The tokens as a judge sees them: line breaks and tabs as in code, and nothing that looks like a mark."""
    return [_plain(one.text) for one in context.shown()]


def _plain(text: str) -> str:
    for written, instead in (("\r", "\\r"), ("\n", "\\n"), ("\t", "\\t"), ("<<", "< <"), (">>", "> >")):
        text = text.replace(written, instead)
    return text


def fires(context: Context, threshold: float, largest: float | None = None) -> list[bool]:
    """Where a latent is above a share of its largest value (by default that in the context), by token shown."""
    shown = context.shown()
    bound = threshold * (max(one.value for one in shown if one.counted) if largest is None else largest)
    return [one.counted and one.value > bound and one.value > 0 for one in shown]


def marked(context: Context, on: Sequence[bool]) -> str:
    """The text with stretches of tokens that are ``on`` between << and >>."""
    parts, inside = [], False
    for token, here in zip(tokens_of(context), on, strict=True):
        parts += [">>" if inside else "<<"] * (here != inside) + [token]
        inside = here
    return "".join([*parts, ">>" * inside])


# -- what they have in common -----------------------------------------------------------------------------------------


def says(words: str) -> bool:
    """Whether words are more than signs, or what the question itself has in their place."""
    return any(character.isalnum() for character in words) and words.lower() != "a few words"


def _explain(case: Any) -> Conversation:
    return few_shot(_PROMPTS["explain"], _numbered(case.marked))


def _numbered(texts: Sequence[str]) -> str:
    return "\n".join(f"Text {i}: {text}" for i, text in enumerate(texts, 1))


def _words(text: str, case: Any) -> Answer:
    answers = re.findall(_WORDS, text)
    if not answers:
        raise ValueError("no explanation of the form asked for")
    words = " ".join(answers[-1].split())
    if not says(words):
        raise ValueError("the explanation is empty")
    return Answer(words=words)


def strangers(labels: Mapping[int, str], seed: int = 0) -> dict[int, str]:
    """Every latent with the explanation of another one; nothing where there is but one."""
    order = np.random.default_rng([seed, 2]).permutation(sorted(labels)).tolist()
    return {a: labels[b] for a, b in zip(order, order[1:] + order[:1], strict=True) if a != b}


# -- which texts fit --------------------------------------------------------------------------------------------------


class Selection(NamedTuple):
    """An explanation, and texts some of which it may fit."""

    explanation: str
    texts: tuple[str, ...]


def _select(case: Selection) -> Conversation:
    return few_shot(_PROMPTS["select"], f"Description: {case.explanation}\n{_numbered(case.texts)}")


def _selected(text: str, case: Selection) -> Answer:
    answers = re.findall(_TEXTS, text)
    if not answers:
        raise ValueError("no list of texts of the form asked for")
    written = answers[-1].strip().lower()
    parts = [] if written in ("", "none") else written.split(",")
    numbers = sorted({integer(part.strip(), range(1, len(case.texts) + 1)) for part in parts})
    return Answer(tuple(numbers), (-1,) * len(numbers))


EXPLAIN: Form[Any] = Form("explain", _PROMPTS["explain"]["version"], _explain, _words, until=_WORDS)
"""of anything with ``marked``: texts in which the tokens that a latent fires on are between << and >>"""
SELECT: Form[Selection] = Form("select", _PROMPTS["select"]["version"], _select, _selected, until=_TEXTS)
