"""The four kinds of questions with a right and a wrong answer that double multiple choice is made of.

    pronouns    The others heard that the client was late because _ had lost a bet.    she / him
    sports      Larry Bird is known for playing _                                      basketball / golf
    sentiment   The sentiment of "The soup was stale, and the cooks were rude." is _    negative / positive
    verbs       The keys near the cabinet _                                            are / is

What a question is about lies in one part alone: athletes, nouns of sentences with verbs, and templates of the others
are divided into those for training, validation and testing before any question is made.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from itertools import chain, zip_longest
from random import Random
from typing import NamedTuple

from unweave.tasks.choices.items import PARTS, Part, divided
from unweave.tasks.choices.sentences import CASES, FEMALE, MALE, own_sentences, pronouns
from unweave.tasks.choices.spec import Kind
from unweave.tasks.choices.templates import filled, lines

PERSONS = ("client", "teacher", "customer", "neighbor", "visitor", "student", "driver", "writer", "guest", "colleague")
_POLAR = re.compile(r"\[([^\[\]/]*)/([^\[\]/]*)\]")
_POLARITIES = ("positive", "negative")


class Question(NamedTuple):
    """``text`` with a blank, ``cloze``: what stands before an answer that is written out; two answers."""

    text: str
    cloze: str
    right: str
    wrong: str


@lru_cache(maxsize=8)
def own_questions(kind: Kind, seed: int, most: int) -> dict[Part, list[Question]]:
    """At most ``most`` different questions of each part, in a random order; every right answer about as often.

    What is returned is kept and to be read only.
    """
    rng = Random(f"{seed}/{kind}")
    questions = {}
    for part, by_answer in _MAKERS[kind](seed, rng, most).items():
        different = [list({q.text.casefold(): q for q in group}.values()) for group in by_answer]
        for group in different:
            rng.shuffle(group)
        turns = [question for question in chain.from_iterable(zip_longest(*different)) if question is not None]
        questions[part] = turns[:most]
        rng.shuffle(questions[part])
    return questions


Groups = dict[Part, list[list[Question]]]
"""Questions of each part, in groups of one right answer."""


def _pronouns(seed: int, rng: Random, most: int) -> Groups:
    groups: Groups = {}
    for part, by_case in own_sentences(seed).items():
        groups[part] = [[] for _ in range(4)]
        for i, case in enumerate(CASES):
            for sentence in by_case[case]:
                about, which = sentence.about(rng.choice(PERSONS)), rng.randrange(2)
                answers = pronouns(sentence, (MALE, FEMALE)[which])
                groups[part][2 * i + which].append(Question(about.with_blank("_"), about.before, *answers))
    return groups


def _sports(seed: int, rng: Random, most: int) -> Groups:
    groups: Groups = {part: [] for part in PARTS}
    named = dict(line.split("\t") for line in lines("athletes.tsv"))
    for sport, names in named.items():
        others = [other for other in named if other != sport]
        for part, athletes in divided(names.split(", "), rng).items():
            texts = [f"{athlete} is known for playing" for athlete in athletes]
            groups[part].append([Question(f"{text} _", text, sport, rng.choice(others)) for text in texts])
    return groups


def _sentiment(seed: int, rng: Random, most: int) -> Groups:
    groups: Groups = {}
    for part, templates in divided(lines("sentiments.tsv"), rng).items():
        groups[part] = []
        for i, right in enumerate(_POLARITIES):
            reviews = [text for template in templates for text in filled(_POLAR.sub(rf"{{\{i + 1}}}", template))]
            starts = [f'The sentiment of "{text}" is' for text in reviews]
            groups[part].append([Question(f"{start} _", start, right, _POLARITIES[1 - i]) for start in starts])
    return groups


def _verbs(seed: int, rng: Random, most: int) -> Groups:
    from unweave.tasks.agreement import PEOPLE, PREPOSITIONS, THINGS, TRANSITIVE, VERBS

    groups: Groups = {}
    people, things = divided(PEOPLE, rng), divided(THINGS, rng)
    for part in PARTS:
        groups[part] = [[], []]
        for _ in range(4 * most):  # of which some are equal
            number, other_number = rng.randrange(2), rng.randrange(2)
            if rng.random() < 0.5:
                noun, other = rng.choice([*people[part], *things[part]]), rng.choice(things[part])
                text = f"The {noun[number]} {rng.choice(PREPOSITIONS)} the {other[other_number]}"
            else:
                noun, other = rng.sample(people[part], 2)
                text = f"The {noun[number]} that the {other[other_number]} {rng.choice(TRANSITIVE)[other_number]}"
            verb = rng.choice(VERBS)
            if noun != other:
                groups[part][number].append(Question(f"{text} _", text, verb[number], verb[1 - number]))
    return groups


_MAKERS: dict[Kind, Callable[[int, Random, int], Groups]] = {
    "pronouns": _pronouns,
    "sports": _sports,
    "sentiment": _sentiment,
    "verbs": _verbs,
}
