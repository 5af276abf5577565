"""Double multiple choice: two questions, two options with an answer to each; only one of the questions is meant.

In training an option is right for both questions or for neither. Out of distribution each option is right for one, and
the answer is the option that is right for the intended question: who learnt to read the other one is wrong every time
(Casademunt et al. 2025, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import lcm
from random import Random

from unweave.tasks.choices.items import Item, Part, balanced
from unweave.tasks.choices.questions import Question
from unweave.tasks.choices.spec import ChoiceSpec

_FORMS = {
    "letters": "Question: {a} | {b}\nA. {x}, {y}\nB. {z}, {w}\nAnswer:",
    "words": "Options: {x}, {y} or {z}, {w}.\n{b}\n{cloze}",  # a small model goes on with the last sentence
}
_PLAIN = {
    "letters": "First: {a}\nSecond: {b}\nOption A is {x} with {y}.\nOption B is {z} with {w}.\nThe right one is option",
    "words": "First: {a}\nSecond: {b}\nEither {x} with {y}, or {z} with {w}. It must be",
}
Pool = Mapping[Part, Sequence[Question]]


def double_splits(spec: ChoiceSpec, first: Pool, second: Pool) -> dict[str, tuple[Item, ...]]:
    """Items of every split; those of ambiguous, ood and plain are of the same questions, one by one."""
    form, plain = _FORMS[spec.answers], _PLAIN[spec.answers]
    pairs = {part: _pairs(spec, first[part], second[part], part) for part in first}
    asked = 0 if spec.intended == "first" else 1
    return {
        "train": _items(spec, pairs["train"], form, agrees=True),
        "validation": _items(spec, pairs["validation"], form, agrees=True),
        "ambiguous": _items(spec, pairs["test"], form, agrees=True),
        "ood": _items(spec, pairs["test"], form, agrees=False),
        "plain": _items(spec, pairs["test"], plain, agrees=False),
        "alone": tuple(dict.fromkeys(Item((q := pair[asked]).cloze, q.right, q.wrong) for *pair, _ in pairs["test"])),
        "skyline": _items(spec, pairs["train"], form, agrees=False),
    }


Pair = tuple[Question, Question, int]
"""Two questions, and which option is right."""


def _pairs(spec: ChoiceSpec, first: Sequence[Question], second: Sequence[Question], part: Part) -> list[Pair]:
    """Different pairs. A kind with few questions has each of them several times, with others beside it."""
    rng = Random(f"{spec.seed}/{spec.first}/{spec.second}/{part}")
    n = min(spec.n_train if part == "train" else spec.n_evaluation, len(first) * len(second))
    together = lcm(len(first), len(second)) if n else 1  # after so many, the second list moves on by one
    places = balanced((0, 1), n, rng)
    pairs = [(first[i % len(first)], second[(i + i // together) % len(second)], places[i]) for i in range(n)]
    rng.shuffle(pairs)
    return pairs


def _items(spec: ChoiceSpec, pairs: Sequence[Pair], form: str, *, agrees: bool) -> tuple[Item, ...]:
    items = []
    for a, b, place in pairs:
        other = place if agrees else 1 - place
        at = (place, other) if spec.intended == "first" else (other, place)  # where each question's right answer is
        options = [tuple(q.right if i == k else q.wrong for q, i in zip((a, b), at, strict=True)) for k in (0, 1)]
        (x, y), (z, w) = options
        prompt = form.format(a=a.text, b=b.text, cloze=a.cloze, x=x, y=y, z=z, w=w)
        answers = "AB" if spec.answers == "letters" else (x, z)
        items.append(Item(prompt, answers[place], answers[1 - place], cue=answers[other]))
    return tuple(items)
