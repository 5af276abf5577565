"""Questions that judges are asked: how a case becomes messages, which ratings there are, and how a reply is read.

1. A ``Form`` makes a conversation of each case; ``rate`` asks the judge all of them at once.
2. A reply is read by the form's parser. What is not exactly as asked for is a failure: counted with its reason, NaN
   among the values, and never a guess.
3. Where the judge gives log-probabilities, the expected rating is taken over the allowed ratings at the place where
   the rating stands, if they hold at least a quarter of the probability there.
4. ``until`` says where a reply is complete, so that a model that runs here need not go on.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from unweave.judge.base import Conversation, Judge, Reply

Case = TypeVar("Case")
_ENOUGH = 0.25
_LAST_RATING = r"(?i)rating:\s*\[{1,2}([^\[\]]*)\]"
"""Small models write single brackets too; the rating is as clear in them."""


class Answer(NamedTuple):
    """What a reply says: ratings (none where words alone were asked for), where in the reply the first character of
    each stands, and words."""

    values: tuple[int, ...] = ()
    places: tuple[int, ...] = ()
    words: str = ""


@dataclass(frozen=True)
class Form(Generic[Case]):
    """A kind of question. Its name and version are written beside every rating: raise the version with the wording.

    ``parse`` makes an ``Answer`` of a reply's text and its case; ValueError with a short reason where the reply is not
    as asked for. ``ratings`` are all that are allowed.
    """

    name: str
    version: int
    messages: Callable[[Case], Conversation]
    parse: Callable[[str, Case], Answer]
    ratings: tuple[int, ...] = ()
    until: str = ""
    """Regular expression of a complete answer; empty where the reply ends by itself."""

    @property
    def id(self) -> str:
        """E.g. ``detection-1``."""
        return f"{self.name}-{self.version}"


@dataclass(frozen=True)
class Rating(Generic[Case]):
    """What a judge made of a case: its answer, or the reason why there is none."""

    case: Case
    prompt: Conversation
    reply: Reply
    answer: Answer | None
    failure: str
    """Empty where there is an answer."""
    expected: tuple[float | None, ...]
    """The expected rating at each place of the answer; None where it is not known."""

    @property
    def value(self) -> float:
        """The first rating; NaN for failures."""
        return float(self.answer.values[0]) if self.answer and self.answer.values else math.nan

    @property
    def words(self) -> str:
        """The answer's words; empty for failures."""
        return self.answer.words if self.answer else ""

    @property
    def best(self) -> float:
        """The first expected rating where it is known, else the rating itself."""
        return self.value if not self.expected or self.expected[0] is None else self.expected[0]


@dataclass(frozen=True)
class Ratings(Generic[Case]):
    """Ratings of N cases, in order, with who gave them and to which question."""

    form: str
    judge: str
    note: str
    rows: tuple[Rating[Case], ...]

    @property
    def values(self) -> NDArray[np.float64]:
        """Each case's rating [N]; NaN for failures."""
        return np.array([row.value for row in self.rows], dtype=np.float64)

    @property
    def best(self) -> NDArray[np.float64]:
        """Each case's expected rating [N], or its rating where that is not known; NaN for failures."""
        return np.array([row.best for row in self.rows], dtype=np.float64)

    @property
    def failures(self) -> dict[str, int]:
        """How often each reason occurred, most frequent first."""
        return dict(Counter(row.failure for row in self.rows if row.failure).most_common())

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens of all prompts and of all replies."""
        return sum(row.reply.prompt_tokens for row in self.rows), sum(row.reply.new_tokens for row in self.rows)

    def columns(self) -> dict[str, list[Any]]:
        """A column of N plain values each, for a Parquet file: the question, the reply and what was read in it."""
        answers = [row.answer or Answer() for row in self.rows]
        return {
            "form": [self.form] * len(answers),
            "judge": [self.judge] * len(answers),
            "prompt": [json.dumps(list(row.prompt), ensure_ascii=False) for row in self.rows],
            "reply": [row.reply.text for row in self.rows],
            "values": [list(answer.values) for answer in answers],
            "expected": [list(row.expected) for row in self.rows],
            "words": [row.words for row in self.rows],
            "failure": [row.failure for row in self.rows],
            "prompt_tokens": [row.reply.prompt_tokens for row in self.rows],
            "new_tokens": [row.reply.new_tokens for row in self.rows],
        }


def rate(judge: Judge, form: Form[Case], cases: Sequence[Case]) -> Ratings[Case]:
    """Every case's rating, in order. Errors as in ``judge.ask``: no failed reply is one, and all may have failed."""
    prompts = [form.messages(case) for case in cases]
    replies = judge.ask(prompts, form.until)
    rows = tuple(_rating(form, *each) for each in zip(cases, prompts, replies, strict=True))
    return Ratings(form.id, judge.name, judge.note, rows)


def _rating(form: Form[Case], case: Case, prompt: Conversation, reply: Reply) -> Rating[Case]:
    if reply.text is None:
        return Rating(case, prompt, reply, None, reply.failure, ())
    try:
        answer = form.parse(reply.text, case)
    except ValueError as error:
        reason = f"{error}, cut at the length allowed" if reply.cut else str(error)
        return Rating(case, prompt, reply, None, reason, ())
    places = zip(answer.values, answer.places, strict=True)
    expected = tuple(expectation(reply.numbers.get(place, {}), form.ratings, value) for value, place in places)
    return Rating(case, prompt, reply, answer, "", expected)


def expectation(
    logprobs: Mapping[str, float], ratings: Sequence[int], value: int | None = None, *, enough: float = _ENOUGH
) -> float | None:
    """The expected rating under log-probabilities of numbers at one place, renormalised over the allowed ``ratings``.

    None where these hold less than ``enough`` of the probability, or nothing, and where the numbers are but digits of
    longer ratings: where the tokenizer writes 85 as 8 and 5, "8" stands for 8 and for the eighties. ``value`` is the
    rating that stands there, if one does.
    """
    if (value is not None and str(value) not in logprobs) or (
        max(ratings) > 9 and max(map(len, logprobs), default=0) < 2
    ):
        return None
    weights = {rating: math.exp(logprobs[str(rating)]) for rating in ratings if str(rating) in logprobs}
    mass = sum(weights.values())
    return sum(rating * weight for rating, weight in weights.items()) / mass if weights and mass >= enough else None


def integer(text: str, ratings: Sequence[int]) -> int:
    """A rating as it was written. ValueError where it is not one of those allowed."""
    if text.isascii() and text.isdecimal() and int(text) in ratings and str(int(text)) == text:
        return int(text)
    raise ValueError(f"the rating is no whole number from {min(ratings)} to {max(ratings)}")


def rating_form(
    name: str, version: int, messages: Callable[[Case], Conversation], ratings: Sequence[int]
) -> Form[Case]:
    """A form whose answers hold one rating: what stands in the last ``Rating: [[n]]`` (or ``[n]``) of the reply."""
    allowed = tuple(ratings)

    def parse(text: str, case: Case) -> Answer:
        answers = list(re.finditer(_LAST_RATING, text))
        if not answers:
            raise ValueError("no rating of the form asked for")
        written = answers[-1][1]
        place = answers[-1].start(1) + len(written) - len(written.lstrip())
        return Answer((integer(written.strip(), allowed),), (place,), text[: answers[-1].start()].strip())

    return Form(name, version, messages, parse, allowed, _LAST_RATING)


def few_shot(prompt: Mapping[str, Any], question: str) -> Conversation:
    """A prompt's ``task``, its answered ``examples`` (pairs of texts), and a question; without a system turn, which not
    every template has."""
    texts = [text for example in prompt["examples"] for text in example] + [question]
    texts[0] = f"{prompt['task']}\n\n{texts[0]}"
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
