"""Gender and pronouns: what the sentences mean, that nothing leaks between splits, balance, and every process alike."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from helpers.pronouns import is_subject, one_word_open
from unweave.core.errors import UnweaveError
from unweave.tasks.choices.choices import open_choices
from unweave.tasks.choices.items import Choices, Item
from unweave.tasks.choices.sentences import CASES, own_sentences
from unweave.tasks.choices.spec import FEMALE, MALE, ChoiceSpec

MEN, WOMEN = {"he", "him"}, {"she", "her"}
SUBJECTS = {"he", "she"}


def read(item: Item) -> tuple[str, str, str, str, str]:
    """Of an item, from its prompt alone: text before the blank, profession, right and wrong pronoun, first option."""
    shown = re.fullmatch(
        r"Pick the pronoun that belongs in the blank\.\n\n"
        r"Question: (.*) _____[ .,;].*\nA\) (\w+)\nB\) (\w+)\n\nAnswer:",
        item.prompt,
    )
    if shown:
        before, options = shown[1], {"A": shown[2], "B": shown[3]}
        right, wrong, first = options[item.correct], options[item.incorrect], shown[2]
    else:
        words = re.fullmatch(r"(?:Pick the pronoun that comes next: (\w+) or (\w+)\.\n\n)?(.*)", item.prompt)
        assert words and (words[1] is None or {words[1], words[2]} == {item.correct, item.incorrect})
        before, right, wrong, first = words[3], item.correct, item.incorrect, words[1]
    (profession,) = [word for word in (*MALE, *FEMALE) if re.search(rf"\b[Tt]he {word}\b", before)]
    return before, profession, right, wrong, first


@pytest.mark.parametrize("answers", ["letters", "words"])
@pytest.mark.parametrize("many", [False, True])
def test_case_decides_and_the_profession_is_the_cue(answers: str, many: bool) -> None:
    people = {"male": MALE, "female": FEMALE} if many else {}
    choices = open_choices(ChoiceSpec.from_dict({"answers": answers, "train": 240, "evaluation": 80, **people}))
    assert list(choices.splits) == ["train", "validation", "ambiguous", "ood", "plain", "skyline"]
    for name, items in choices.splits.items():
        agrees = name in ("train", "validation", "ambiguous")
        seen = Counter()
        for item in items:
            before, profession, right, wrong, first = read(item)
            assert (right in SUBJECTS) == is_subject(before) != (wrong in SUBJECTS), before
            assert (right in MEN) != (wrong in MEN)
            assert ((right in MEN) == (profession in MALE)) == agrees
            assert item.cue == (item.correct if agrees else item.incorrect)
            seen["right", first == right] += 1
            seen["cue", first == (right if agrees else wrong)] += 1
        n = len(items)
        assert n == (240 if name in ("train", "skyline") else 80)
        if name != "plain":
            assert all(abs(seen[of, place] - n / 2) <= 2 for of in ("right", "cue") for place in (True, False))
        pronouns = Counter(read(item)[2] for item in items)
        assert len(pronouns) == 4 and max(pronouns.values()) - min(pronouns.values()) <= 2
        professions = Counter(read(item)[1] for item in items)
        assert len(professions) == (20 if many else 2) and max(professions.values()) <= 3 * min(professions.values())
    for one, other in zip(choices.splits["ambiguous"], choices.splits["ood"], strict=True):
        assert read(one)[:2] == read(other)[:2]


def test_no_sentence_and_no_template_is_on_two_sides() -> None:
    for seed in range(3):
        pools = own_sentences(seed)
        befores = {part: {s.before.casefold() for case in CASES for s in pools[part][case]} for part in pools}
        for case in CASES:
            sizes = {part: len(pools[part][case]) for part in pools}
            assert sizes["train"] > 2000 and min(sizes.values()) >= 300, sizes
            for part in pools:
                texts = [s.before.casefold() for s in pools[part][case]]
                assert len(set(texts)) == len(texts)
        assert (
            not befores["train"] & (befores["test"] | befores["validation"]) | befores["test"] & befores["validation"]
        )
        # Templates end in words of their own: no sentence of one part differs in one word from a sentence of another.
        gaps = {part: one_word_open(texts) for part, texts in befores.items()}
        assert not gaps["train"] & gaps["test"] and not gaps["train"] & gaps["validation"]


def test_no_form_of_a_sentence_tells_the_gender_or_the_letter() -> None:
    """What stands before a blank says nothing but the case: neither its last words nor its first."""
    items = open_choices(ChoiceSpec(train=4000)).splits["train"]
    for words in (slice(None, 3), slice(-2, None), slice(-1, None)):
        seen: dict[str, list[tuple[bool, bool]]] = {}
        for item in items:
            before, profession, right, _, _ = read(item)
            seen.setdefault(" ".join(before.replace(profession, "").split()[words]), []).append(
                (right in MEN, item.correct == "A")
            )
        large = [group for group in seen.values() if len(group) >= 100]
        assert len(large) >= 2
        for group in large:
            for fact in zip(*group, strict=True):
                assert abs(sum(fact) / len(fact) - 0.5) < 3 / len(fact) ** 0.5, len(group)


def test_items_are_different_and_held_out_ones_never_trained_on() -> None:
    choices = open_choices(ChoiceSpec(train=4000))
    befores = {name: [read(item)[0] for item in items] for name, items in choices.splits.items()}
    assert len(choices.splits["train"]) == 4000
    for name, texts in befores.items():
        assert len(set(texts)) == len(texts) and len({item.prompt for item in choices.splits[name]}) == len(texts)
    assert not set(befores["train"]) & {text for name in ("validation", "ambiguous", "ood") for text in befores[name]}
    assert not set(befores["validation"]) & set(befores["ambiguous"])


def digest(choices: Choices) -> str:
    return hashlib.sha256(repr(choices.splits).encode()).hexdigest()


def test_every_process_makes_the_same_items_and_seeds_differ() -> None:
    code = (
        "import hashlib\n"
        "from unweave.tasks.choices.choices import open_choices\n"
        "from unweave.tasks.choices.spec import ChoiceSpec\n"
        "for task in ('gender', 'double'):\n"
        "    splits = open_choices(ChoiceSpec(task=task, train=100, evaluation=50)).splits\n"
        "    print(hashlib.sha256(repr(splits).encode()).hexdigest())\n"
    )
    environments = [os.environ | {"PYTHONHASHSEED": seed} for seed in ("1", "2")]
    printed = [subprocess.run([sys.executable, "-c", code], env=e, check=True, capture_output=True, text=True).stdout
               for e in environments]  # fmt: skip
    assert printed[0] == printed[1] and printed[0].strip()
    made = [digest(open_choices(ChoiceSpec(seed=seed, train=100, evaluation=50))) for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2] and made[0] == printed[0].split()[0]


def test_a_task_shows_itself() -> None:
    choices = open_choices(ChoiceSpec(train=8, evaluation=8))
    shown = repr(choices)
    assert all(name in shown for name in choices.splits) and "train: 8, e.g." in shown
    bad = Choices("<b>", {"train": (Item("<script>", "a", "b"),)}, {"a <row>": 2})
    assert "<script>" not in bad._repr_html_() and "Left out 2: a &lt;row&gt;" in bad._repr_html_()
    assert "100%" in choices._repr_html_() and "0%" in choices._repr_html_()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"male": ["nurse"]}, "none of male"),
        ({"male": []}, "not empty"),
        ({"train": 1}, "at least 2"),
        ({"first": "sports"}, "only for task double"),
        ({"task": "double", "male": ["pilot"]}, "only for task gender"),
        ({"task": "double", "first": "verbs", "second": "verbs"}, "another kind than first"),
        ({"task": "mine.jsonl", "answers": "words"}, "gender or double"),
        ({"source": "hub", "answers": "words"}, "before their blank"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_rule(fields: dict[str, object], words: str) -> None:
    with pytest.raises(UnweaveError, match=words):
        ChoiceSpec.from_dict(fields)
