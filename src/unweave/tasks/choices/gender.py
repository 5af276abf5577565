"""Gender and pronouns: the case of the blank says which pronoun is right, the profession's usual gender is the cue.

The options are the pronoun that fits and that of the other gender and the other case, so that in training, where
doctors are men and nurses women, both case and gender point to it. Out of distribution doctors are women and nurses
men: the case still points to the right answer, the profession to the wrong one (Casademunt et al. 2025, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

from unweave.tasks.choices.items import Item, Part
from unweave.tasks.choices.sentences import CASES, FEMALE, MALE, Case, Sentence, pronouns
from unweave.tasks.choices.spec import ChoiceSpec

_LETTERS = "Pick the pronoun that belongs in the blank.\n\nQuestion: {sentence}\nA) {a}\nB) {b}\n\nAnswer:"
_WORDS = "Pick the pronoun that comes next: {a} or {b}.\n\n{before}"
Pool = Mapping[Part, Mapping[Case, Sequence[Sentence]]]


def gender_splits(spec: ChoiceSpec, pool: Pool) -> dict[str, tuple[Item, ...]]:
    """Items of every split; those of ambiguous, ood and plain are of the same sentences, one by one."""
    form = {"letters": _LETTERS, "words": _WORDS}[spec.answers]
    words = spec.answers == "words"
    return {
        "train": _items(spec, pool, "train", form, words, agrees=True),
        "validation": _items(spec, pool, "validation", form, words, agrees=True),
        "ambiguous": _items(spec, pool, "test", form, words, agrees=True),
        "ood": _items(spec, pool, "test", form, words, agrees=False),
        "plain": _items(spec, pool, "test", "{before}", True, agrees=False),
        "skyline": _items(spec, pool, "train", form, words, agrees=False),
    }


def _items(spec: ChoiceSpec, pool: Pool, part: Part, form: str, words: bool, *, agrees: bool) -> tuple[Item, ...]:
    """Equally many of each case, gender and place of the right option, up to one of each."""
    professions = {MALE: spec.male, FEMALE: spec.female}
    by_case = pool[part]
    most = min(spec.train if part == "train" else spec.evaluation, 2 * min(map(len, by_case.values())))
    items = []
    for i in range(most):
        gender, other = ((MALE, FEMALE), (FEMALE, MALE))[i // 2 % 2]
        people = professions[gender]
        sentence = by_case[CASES[i % 2]][i // 2].about(people[i // 8 % len(people)])
        right, wrong = pronouns(sentence, gender if agrees else other)
        a, b = (right, wrong) if i // 4 % 2 == 0 else (wrong, right)
        prompt = form.format(sentence=sentence.with_blank(), before=sentence.before, a=a, b=b)
        answers = (right, wrong) if words else ("A", "B") if a == right else ("B", "A")
        items.append(Item(prompt, *answers, cue=answers[0 if agrees else 1]))
    Random(f"{spec.seed}/gender/{part}").shuffle(items)
    return tuple(items)
