"""Double multiple choice: each question's facts, which option is right, what is held out, and balance."""

from __future__ import annotations

import re
from collections import Counter
from importlib.resources import files

import pytest

from helpers.pronouns import is_subject, one_word_open
from unweave.tasks.choices.choices import open_choices
from unweave.tasks.choices.items import Choices, Item
from unweave.tasks.choices.spec import COMBINATIONS, ChoiceSpec

FORMS = (
    r"Question: (?P<a>.*) \| (?P<b>.*)\nA\. (?P<x>\w+), (?P<y>\w+)\nB\. (?P<z>\w+), (?P<w>\w+)\nAnswer:",
    r"Options: (?P<x>\w+), (?P<y>\w+) or (?P<z>\w+), (?P<w>\w+)\.\n(?P<b>.*)\n(?P<a>.*)",
    r"First: (?P<a>.*)\nSecond: (?P<b>.*)\nOption A is (?P<x>\w+) with (?P<y>\w+)\.\n"
    r"Option B is (?P<z>\w+) with (?P<w>\w+)\.\nThe right one is option",
    r"First: (?P<a>.*)\nSecond: (?P<b>.*)\n"
    r"Either (?P<x>\w+) with (?P<y>\w+), or (?P<z>\w+) with (?P<w>\w+)\. It must be",
)


def word_list(name: str) -> list[str]:
    return files("unweave.tasks.choices").joinpath(name).read_text(encoding="utf-8").splitlines()


LISTS = [line.split("\t") for line in word_list("athletes.tsv")]
SPORT = {athlete: sport for sport, athletes in LISTS for athlete in athletes.split(", ")}
VERBS = {"is": "are", "was": "were", "has": "have", "does": "do", "seems": "seem", "needs": "need"}
REVIEWS = []
for line in word_list("sentiments.tsv"):
    pattern = re.escape(line)
    for brackets in re.findall(r"\\\[.*?\\\]", pattern):
        good, bad = brackets[2:-2].split("/")
        pattern = pattern.replace(brackets, f"(?:({good})|({bad}))".replace(r"\|", "|"), 1)
    pattern = re.sub(r"\\\{(.*?)\\\}", lambda m: f"(?:{m[1]})".replace(r"\|", "|"), pattern)
    REVIEWS.append(re.compile(pattern))


def answer(text: str) -> tuple[str, set[str], set[str]]:
    """(kind, the answers that are right, what the question is about) by facts that were written down by hand."""
    if athlete := re.fullmatch(r"(.*) is known for playing _", text):
        return "sports", {SPORT[athlete[1]]}, {athlete[1]}
    if review := re.fullmatch(r'The sentiment of "(.*)" is _', text):
        matches = [(number, found) for number, form in enumerate(REVIEWS) if (found := form.fullmatch(review[1]))]
        ((number, found),) = matches
        sides = {place % 2 for place, group in enumerate(found.groups()) if group is not None}
        return "sentiment", {("positive", "negative")[side] for side in sides}, {str(number)}
    if re.fullmatch(r"The \w+ (that the \w+ \w+|\w+ the \w+) _", text):
        words = text.split()
        nouns = {word.removesuffix("s") for word in (words[1], words[4])}
        return "verbs", {*(VERBS.values() if words[1].endswith("s") else VERBS)}, nouns
    before = text.split(" _")[0]
    return "pronouns", {"he", "she"} if is_subject(before) else {"him", "her"}, one_word_open([before])


def read(item: Item) -> dict[str, str]:
    (found,) = [found for form in FORMS if (found := re.fullmatch(form, item.prompt))]
    of = found.groupdict()
    return of if "_" in of["a"] else of | {"a": f"{of['a']} _"}


def check(choices: Choices, first: str, second: str, intended: str, answers: str) -> dict[str, set[str]]:
    """Checks every item; what questions of each split are about."""
    about: dict[str, set[str]] = {}
    for name, items in choices.splits.items():
        agrees = name in ("train", "validation", "ambiguous")
        topics = about.setdefault(name, set())
        letters: Counter[tuple[str, bool]] = Counter()
        for item in items:
            if name == "alone":
                assert item.cue is None
                continue
            of = read(item)
            kinds, facts, what = zip(*(answer(of[key]) for key in "ab"), strict=True)
            assert kinds == (first, second)
            for key, topic in zip("ab", what, strict=True):
                topics |= {f"{kinds['ab'.index(key)]}: {one}" for one in topic}
            right_first = [of[key] in facts[0] for key in "xz"]
            right_second = [of[key] in facts[1] for key in "yw"]
            assert sorted(right_first) == sorted(right_second) == [False, True], item
            assert (right_first == right_second) == agrees
            place = (right_first if intended == "first" else right_second).index(True)
            options = "AB" if answers == "letters" else (of["x"], of["z"])
            assert (item.correct, item.incorrect) == (options[place], options[1 - place])
            assert item.cue == (item.correct if agrees else item.incorrect)
            letters["right", place == 0] += 1
            letters["cue", (place == 0) == agrees] += 1
        assert len({item.prompt for item in items}) == len(items)
        assert all(abs(count - len(items) / 2) <= 1 for count in letters.values())
    return about


@pytest.mark.parametrize("answers", ["letters", "words"])
def test_all_combinations_mean_what_they_say_and_share_no_question(answers: str) -> None:
    assert len(set(COMBINATIONS)) == 24
    for first, second, intended in COMBINATIONS[:: 1 if answers == "letters" else 3]:
        spec = ChoiceSpec.from_dict({"task": "double", "first": first, "second": second, "intended": intended,
                                     "answers": answers, "train": 80, "evaluation": 40})  # fmt: skip
        choices = open_choices(spec)
        assert {name: len(items) for name, items in choices.splits.items() if name != "alone"} == {
            "train": 80, "validation": 40, "ambiguous": 40, "ood": 40, "plain": 40, "skyline": 80
        }  # fmt: skip
        about = check(choices, first, second, intended, answers)
        assert about["train"] == about["skyline"] and about["ambiguous"] == about["ood"] == about["plain"]
        assert not about["train"] & (about["validation"] | about["ood"]) and not about["validation"] & about["ood"]
        right = {of[key] for of in map(read, choices.splits["ood"]) for key in "xyzw"}
        asked = {of["a" if intended == "first" else "b"].split(" _")[0] for of in map(read, choices.splits["ood"])}
        for alone in choices.splits["alone"]:
            assert alone.prompt in asked and {alone.correct, alone.incorrect} <= right
            assert alone.correct in answer(f"{alone.prompt} _")[1]


def test_few_athletes_make_many_different_items() -> None:
    fields = {"task": "double", "first": "sports", "second": "verbs", "train": 1400}
    choices = open_choices(ChoiceSpec.from_dict(fields))
    train = choices.splits["train"]
    assert len(train) == 1400 and len({item.prompt for item in train}) == 1400
    of = [read(item) for item in train]
    times = Counter(one["a"] for one in of)
    assert len(times) >= 200 and max(times.values()) - min(times.values()) <= 1
    # An athlete does not tell the letter: each has as many chances of A as of B, and most have both.
    letters: dict[str, set[str]] = {}
    for one, item in zip(of, train, strict=True):
        letters.setdefault(one["a"], set()).add(item.correct)
    assert sum(len(both) == 2 for both in letters.values()) > 0.8 * len(letters)
    sports = Counter(one["x"] if item.correct == "A" else one["z"] for one, item in zip(of, train, strict=True))
    assert len(sports) == 7 and max(sports.values()) < 1.2 * min(sports.values())
    assert len(choices.splits["alone"]) == len({one["a"] for one in map(read, choices.splits["ood"])}) >= 50


def test_the_lists_are_what_they_should_be() -> None:
    assert len(SPORT) >= 300 and len({*SPORT.values()}) == 7
    assert sum(len(athletes.split(", ")) for _, athletes in LISTS) == len(SPORT)
    assert len(REVIEWS) >= 20
