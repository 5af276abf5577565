"""The questions that are put to a chat model about latents, and how its answers are read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from unweave.judge.base import Conversation
from unweave.judge.form import Answer, Form, rating_form
from unweave.methods.explain.examples import Examples, fires, marked

THRESHOLD = 0.3
"""The share of a context's largest value above which a token is marked."""
_WORDS = r"(?i)explanation:\s*\[\[([^\[\]]*)\]\]"


class Claim(NamedTuple):
    """An explanation and a text that it is held against."""

    explanation: str
    text: str


def turns(task: str, examples: Sequence[tuple[str, str]], last: str) -> Conversation:
    """A conversation of answered examples and a question, without a system turn, which not every template has."""
    said = [part for example in examples for part in example] + [last]
    said[0] = f"{task}\n\n{said[0]}"
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


_EXPLAIN = (
    "A unit inside a language model reacts to some tokens. Below are texts in which it reacts, with the tokens that it "
    "reacts to between << and >>. Say in a few words what these have in common: what kind of word, meaning or context "
    "it is that the unit reacts to. Be as specific as the texts allow, and do not list them. Answer with one line of "
    "this form: explanation: [[a few words]]"
)
_EXPLAIN_EXAMPLES = (
    (
        "Text 1: we met in <<April>> last year\nText 2: until <<March>> 3rd, the\nText 3: by early <<October>> it had\n"
        "Text 4: born on <<June>> 12 in",
        "explanation: [[names of months in dates]]",
    ),
    (
        "Text 1: he did not go<<,>> but she\nText 2: the cat slept<<;>> however, the\nText 3: it is old<<,>> yet it "
        "works\nText 4: we tried<<,>> but failed",
        "explanation: [[punctuation before a contrast such as but or however]]",
    ),
)


def _explain(examples: Examples) -> Conversation:
    lines = [f"Text {i}: {marked(one, fires(one, THRESHOLD))}" for i, one in enumerate(examples.shown, 1)]
    return turns(_EXPLAIN, _EXPLAIN_EXAMPLES, "\n".join(lines))


def _words(text: str, case: Examples) -> Answer:
    answers = re.findall(_WORDS, text)
    if not answers:
        raise ValueError("no explanation of the form asked for")
    words = " ".join(answers[-1].split())
    if not any(character.isalnum() for character in words) or words.lower() == "a few words":
        raise ValueError("the explanation is empty")
    return Answer(words=words)


EXPLAIN: Form[Examples] = Form("explain", 1, _explain, _words, until=_WORDS)

_DETECT = (
    "You are given a description and a text. Decide whether something in the text fits the description. Answer with "
    "one line: Rating: [[1]] if something does, Rating: [[0]] if nothing does."
)
_DETECT_EXAMPLES = (
    ("Description: names of months in dates\nText: until March 3rd, the shop stays", "Rating: [[1]]"),
    ("Description: names of months in dates\nText: they march to the station and", "Rating: [[0]]"),
    ("Description: hot drinks\nText:  and she warmed her hands on the cocoa he", "Rating: [[1]]"),
    ("Description: verbs of motion\nText: The price of a ticket is nine", "Rating: [[0]]"),
)
_FUZZ = (
    "You are given a description and a text in which some tokens stand between << and >>. Decide whether exactly the "
    "tokens that are marked so fit the description. Answer with one line: Rating: [[1]] if they do, Rating: [[0]] if "
    "other tokens are marked."
)
_FUZZ_EXAMPLES = (
    ("Description: names of months in dates\nText: until <<March>> 3rd, the shop stays", "Rating: [[1]]"),
    ("Description: names of months in dates\nText: until March 3rd, the <<shop>> stays", "Rating: [[0]]"),
    ("Description: hot drinks\nText:  and she <<warmed>> her hands on the cocoa he", "Rating: [[0]]"),
    ("Description: verbs of motion\nText: they all <<ran>> home when it", "Rating: [[1]]"),
)


def _claim(claim: Claim) -> str:
    return f"Description: {claim.explanation}\nText: {claim.text}"


DETECTION: Form[Claim] = rating_form(
    "detection", 1, lambda claim: turns(_DETECT, _DETECT_EXAMPLES, _claim(claim)), (0, 1)
)
FUZZING: Form[Claim] = rating_form("fuzzing", 1, lambda claim: turns(_FUZZ, _FUZZ_EXAMPLES, _claim(claim)), (0, 1))

_RELEVANCE = (
    "A unit inside a language model was described in a few words. How much is it about the topic given: not at all "
    "(0), loosely (30), mostly (70), or exactly (100)? Answer with one line of this form: Rating: [[a number]]"
)
_RELEVANCE_EXAMPLES = (
    ("Topic: dates and times\nDescription: names of months in dates", "Rating: [[95]]"),
    ("Topic: cooking\nDescription: hot drinks", "Rating: [[45]]"),
    ("Topic: politics\nDescription: verbs of motion", "Rating: [[0]]"),
)
RELEVANCE: Form[Claim] = rating_form(
    "relevance",
    1,
    lambda claim: turns(
        _RELEVANCE, _RELEVANCE_EXAMPLES, f"Topic: {claim.text}\nDescription: {claim.explanation}"
    ),
    range(101),
)  # fmt: skip
