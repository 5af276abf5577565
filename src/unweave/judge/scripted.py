"""A judge whose answers are written beforehand, for tests and for trying a pipeline without a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from unweave.judge.base import Budget, Conversation, Reply

Answers = Sequence[str | None] | Callable[[Conversation], str | None]


class Scripted:
    """Answers from a list, in order, or from a function of the conversation; None stands for a failed request.

    It is a ``Judge`` by itself, and a backend for ``CachedJudge``. ``asked`` holds every conversation that reached it.
    Tokens are counted as words.
    """

    note = "scripted answers, no model"

    def __init__(self, answers: Answers, name: str = "scripted") -> None:
        self.name = name
        self.settings: Mapping[str, Any] = {"kind": "scripted"}
        self.asked: list[Conversation] = []
        self._answers = answers if callable(answers) else list(answers)

    def ask(self, conversations: Sequence[Conversation], until: str = "") -> list[Reply]:
        """One reply per conversation; IndexError when a list of answers is used up."""
        return [reply for _, reply in self.answer(conversations, Budget(), until)]

    def answer(
        self, conversations: Sequence[Conversation], budget: Budget, until: str = ""
    ) -> Iterator[tuple[int, Reply]]:
        del until  # what a script says is short
        for i, conversation in enumerate(conversations):
            if not budget.take():
                return
            text = self._answers(conversation) if callable(self._answers) else self._answers[len(self.asked)]
            self.asked.append(conversation)
            words = sum(len(message["content"].split()) for message in conversation)
            if text is None:
                yield i, Reply(None, "scripted failure", words)
            else:
                yield i, Reply(text, "", words, len(text.split()))
