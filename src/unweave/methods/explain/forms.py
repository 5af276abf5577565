"""Questions to a chat model about explanations, worded in ``prompts.toml``, and how answers are read."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from unweave.core.files import read_toml
from unweave.judge.base import Conversation
from unweave.judge.form import few_shot, rating_form

PROMPTS = read_toml(Path(__file__).with_name("prompts.toml"))


class Claim(NamedTuple):
    """An explanation and a text that it is held against."""

    explanation: str
    text: str

    def __str__(self) -> str:
        return f"Description: {self.explanation}\nText: {self.text}"


def turns(name: str, question: str) -> Conversation:
    """The task of that name with answered examples, and a question."""
    return few_shot(PROMPTS[name], question)


DETECTION, FUZZING = (
    rating_form(name, PROMPTS[name]["version"], lambda claim, name=name: turns(name, str(claim)), (0, 1))
    for name in ("detection", "fuzzing")
)
