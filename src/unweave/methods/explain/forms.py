"""The questions that are put to a chat model about latents, worded in ``prompts.toml``, and how answers are read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from unweave.core.files import read_toml
from unweave.judge.base import Conversation
from unweave.judge.form import Answer, Form, few_shot, rating_form
from unweave.methods.explain.examples import Examples, fires, marked

THRESHOLD = 0.3
"""The share of a context's largest value above which a token is marked."""
PROMPTS = read_toml(Path(__file__).with_name("prompts.toml"))
_WORDS = r"(?i)explanation:\s*\[\[([^\[\]]*)\]\]"


class Claim(NamedTuple):
    """An explanation and a text that it is held against."""

    explanation: str
    text: str

    def __str__(self) -> str:
        return f"Description: {self.explanation}\nText: {self.text}"


def turns(name: str, question: str) -> Conversation:
    """The task of that name with answered examples, and a question."""
    return few_shot(PROMPTS[name], question)


def says(words: str) -> bool:
    """Whether words are more than signs, or what the question itself has in their place."""
    return any(character.isalnum() for character in words) and words.lower() != "a few words"


def _explain(examples: Examples) -> Conversation:
    lines = [f"Text {i}: {marked(one, fires(one, THRESHOLD))}" for i, one in enumerate(examples.shown, 1)]
    return turns("explain", "\n".join(lines))


def _words(text: str, case: Examples) -> Answer:
    answers = re.findall(_WORDS, text)
    if not answers:
        raise ValueError("no explanation of the form asked for")
    words = " ".join(answers[-1].split())
    if not says(words):
        raise ValueError("the explanation is empty")
    return Answer(words=words)


EXPLAIN: Form[Examples] = Form("explain", PROMPTS["explain"]["version"], _explain, _words, until=_WORDS)
DETECTION, FUZZING = (
    rating_form(name, PROMPTS[name]["version"], lambda claim, name=name: turns(name, str(claim)), (0, 1))
    for name in ("detection", "fuzzing")
)
