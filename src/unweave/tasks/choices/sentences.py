"""Sentences with a person and a blank for a pronoun, of which what stands before the blank decides the case.

``sentences.tsv`` holds templates: case, the text before the blank, the text after it. ``{a|b}`` is one of several
words, ``{p}`` the person. Nobody else in a sentence is one woman or one man, so the pronoun stands for that person.
Sentences that differ only behind the blank are one sentence. Templates are divided into those for training,
validation and testing: no sentence of one part has the form of another part's.
"""

from __future__ import annotations

from functools import cache, lru_cache
from itertools import chain, zip_longest
from random import Random
from typing import Literal, NamedTuple

from unweave.tasks.choices.items import PARTS, Part, divided
from unweave.tasks.choices.templates import filled, lines

Case = Literal["subject", "object"]
CASES: tuple[Case, ...] = ("subject", "object")
BLANK = "_____"
MALE, FEMALE = "male", "female"
PRONOUNS = {
    (MALE, "subject"): "he",
    (MALE, "object"): "him",
    (FEMALE, "subject"): "she",
    (FEMALE, "object"): "her",
}


class Sentence(NamedTuple):
    """``before`` and ``after`` the blank, with ``{p}`` for the person; ``after`` brings its own space or stop."""

    before: str
    after: str
    case: Case

    def about(self, person: str) -> Sentence:
        """The sentence with a person put in."""
        return self._replace(before=self.before.replace("{p}", person), after=self.after.replace("{p}", person))

    def with_blank(self, blank: str = BLANK) -> str:
        """The whole sentence."""
        return f"{self.before} {blank}{self.after}"


def pronouns(sentence: Sentence, gender: str) -> tuple[str, str]:
    """The pronoun that fits, and the one of the other gender and the other case."""
    other_gender = FEMALE if gender == MALE else MALE
    other_case = "object" if sentence.case == "subject" else "subject"
    return PRONOUNS[gender, sentence.case], PRONOUNS[other_gender, other_case]


@lru_cache(maxsize=4)
def own_sentences(seed: int) -> dict[Part, dict[Case, list[Sentence]]]:
    """Every sentence of each part and case, in a seeded order in which templates take turns; to be read only."""
    pools: dict[Part, dict[Case, list[Sentence]]] = {part: {} for part in PARTS}
    for case in CASES:
        rng = Random(f"{seed}/sentences/{case}")
        for part, chosen in divided([row for row in _templates() if row[0] == case], rng).items():
            turns = chain.from_iterable(zip_longest(*(_filled(row, rng) for row in chosen)))
            different = {sentence.before.casefold(): sentence for sentence in turns if sentence is not None}
            pools[part][case] = list(different.values())
    return pools


@cache
def _templates() -> list[tuple[Case, str, str]]:
    rows = [line.split("\t") for line in lines("sentences.tsv")]
    return [("subject" if case == "subject" else "object", before, after) for case, before, after in rows]


def _filled(template: tuple[Case, str, str], rng: Random) -> list[Sentence]:
    """Every text before the blank, each with one of the texts behind it, shuffled."""
    case, before, after = template
    sentences = []
    for start in filled(before):
        end = rng.choice(filled(after))
        sentences.append(Sentence(start, end if end[:1] in ".,;" else f" {end}", case))
    rng.shuffle(sentences)
    return sentences
