"""Gender and pronouns: the case of the blank says which pronoun is right, the profession's usual gender is the cue.

The options are the pronoun that fits and that of the other gender and the other case, so that in training, where
doctors are men and nurses women, both case and gender point to it. Out of distribution doctors are women and nurses
men: the case still points to the right answer, the profession to the wrong one (Casademunt et al. 2025, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

from unweave.tasks.choices.items import Item, Part, balanced
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
    """Equally many of each case, gender and place of the right option.

    The draws depend on the part alone, so that two splits of one part differ in nothing but what is asked of them.
    """
    rng = Random(f"{spec.seed}/gender/{part}")
    professions = {MALE: spec.male, FEMALE: spec.female}
    most = min((spec.n_train if part == "train" else spec.n_evaluation) // 2, *map(len, pool[part].values()))
    items = []
    for case in CASES:
        # Drawn apart from the sentences' order, in which templates take turns: a template must not tell the gender.
        drawn = balanced([(gender, place) for gender in (MALE, FEMALE) for place in (0, 1)], most, rng)
        people = {gender: iter(balanced(names, most // 2 + 2, rng)) for gender, names in professions.items()}
        for sentence, (gender, place) in zip(pool[part][case], drawn, strict=False):
            about = sentence.about(next(people[gender]))
            options = pronouns(sentence, gender if agrees else FEMALE if gender == MALE else MALE)
            a, b = options[::-1] if place else options
            prompt = form.format(sentence=about.with_blank(), before=about.before, a=a, b=b)
            right, wrong = options if words else "BA" if place else "AB"
            items.append(Item(prompt, right, wrong, cue=right if agrees else wrong))
    rng.shuffle(items)
    return tuple(items)
