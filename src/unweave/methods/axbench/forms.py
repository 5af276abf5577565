"""What a chat model is asked: three ratings of a text, each 0, 1 or 2, and a prompt that asks for a concept.

The ratings are AxBench's (Wu et al. 2025), each its own question, in our words. The instruction's rating is of the
topic alone, so that a concept woven into an answer does not lower it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from unweave.core.errors import UnweaveError
from unweave.judge.base import Conversation, Judge
from unweave.judge.form import Form, rate, rating_form
from unweave.methods.axbench.result import RATINGS
from unweave.methods.axbench.scores import Array

_END = "Explain in one or two sentences, then end with your rating on a line of its own, in the form Rating: [[n]]."
_TEMPLATE = (
    "Whatever you are asked, write about {concept}. Bring {concept} into every answer, naturally and more than once, "
    "while you still do what is asked."
)


@dataclass(frozen=True)
class Case:
    """A text that was written to an instruction, and the concept that it should hold."""

    concept: str
    instruction: str
    text: str


def spoken(concept: str) -> str:
    """A tag as words: "works-with::mail" becomes "works with mail"."""
    return re.sub(r"[:_\-/.]+", " ", concept).strip()


def _form(
    name: str, task: str, levels: Sequence[str], shown: Callable[[Case], Sequence[tuple[str, str]]]
) -> Form[Case]:
    scale = "\n".join(f"{level}: {meaning}" for level, meaning in enumerate(levels))

    def messages(case: Case) -> Conversation:
        parts = "\n\n".join(f"{heading}:\n<<<\n{content}\n>>>" for heading, content in shown(case))
        return [{"role": "user", "content": f"{task}\n\n{scale}\n\n{parts}\n\n{_END}"}]

    return rating_form(f"axbench-{name}", 1, messages, range(len(levels)))


FORMS = {
    "concept": _form(
        "concept",
        "Rate whether a concept occurs in a text. Only the concept counts, not how well it is written.",
        ("the concept does not occur", "it occurs, but little or out of place", "the text clearly holds the concept"),
        lambda case: (("Concept", spoken(case.concept)), ("Text", case.text)),
    ),
    "instruction": _form(
        "instruction",
        "Rate whether a text is on an instruction's topic. It may be cut or bring in other things.",
        ("the text has nothing to do with it", "it touches the topic, but hardly", "the text is on the topic"),
        lambda case: (("Instruction", case.instruction), ("Text", case.text)),
    ),
    "fluency": _form(
        "fluency",
        "Rate how fluent a text is. Its content does not count, nor that it ends abruptly.",
        ("not readable: broken or endlessly repeated", "readable, but unnatural or repetitive", "fluent"),
        lambda case: (("Text", case.text),),
    ),
}


class ChatRater:
    """A chat model's three ratings."""

    def __init__(self, judge: Judge) -> None:
        self.name, self.note, self._judge = judge.name, judge.note, judge

    def rate(self, cases: Sequence[Case], ratings: Sequence[str] = RATINGS) -> tuple[Array, list[list[str]]]:
        """Ratings [cases, ratings], NaN where a reply is invalid, and the replies. Errors as in ``judge.ask``."""
        rated = [rate(self._judge, FORMS[name], cases) for name in ratings]
        replies = [[row.reply.text or row.failure for row in one.rows] for one in rated]
        return np.stack([one.values for one in rated], -1), [list(row) for row in zip(*replies, strict=True)]


def template_prompt(concept: str) -> str:
    """A prompt that asks for a concept, without a chat model."""
    return _TEMPLATE.format(concept=spoken(concept))


def written_prompts(judge: Judge, concepts: Sequence[str]) -> list[str]:
    """A prompt for each concept, written by a chat model. UnweaveError where it gave none."""
    question = (
        "Write an instruction for a language model, at most three sentences, so that it brings the concept below into "
        "every answer, clearly and naturally, while it still answers what it is asked. Reply with the instruction only."
        "\n\nConcept: "
    )
    replies = judge.ask([[{"role": "user", "content": question + spoken(concept)}] for concept in concepts])
    for concept, reply in zip(concepts, replies, strict=True):
        if not (reply.text or "").strip():
            what = f"no prompt was written for {concept!r}: {reply.failure or 'an empty reply'}"
            raise UnweaveError(what, where=judge.name, remedy="ask again, or use the template (writer: template)")
    return [(reply.text or "").strip() for reply in replies]
