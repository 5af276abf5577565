"""Choices from rows: a user's own file or dataset, and the paper's datasets on the hub.

A row of one's own has ``prompt``, ``correct`` and ``incorrect``, and may have ``cue`` (one of the two answers) and
``split``. Rows that cannot be used are left out and counted; where they are the greater part, the file is refused.

Without ``split``, 70 % of the rows are for training, 15 % for validation and 15 % held out as ``ambiguous``, by a hash
of the prompt; near duplicates (six words in a row, or the same words in another order, apart from what begins and
ends every prompt) are on one side. Rows whose cue is the wrong answer are ``ood``.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import numpy as np

from unweave.core.contents import tree_of
from unweave.core.errors import UnweaveError
from unweave.core.files import is_text, read_text
from unweave.data.alike import first_alike, min_hashes
from unweave.data.rows import hub_rows, json_rows, parquet_rows
from unweave.data.words import word_hashes
from unweave.tasks.choices.items import Choices, Item, Part, divided
from unweave.tasks.choices.questions import Question
from unweave.tasks.choices.sentences import CASES, Case, Sentence
from unweave.tasks.choices.spec import OWN, ChoiceSpec, Kind
from unweave.tasks.entries import faults, kind

HUB_SENTENCES = "hcasademunt/gender-pronoun-profession"
HUB_QUESTIONS: dict[Kind, str] = {
    "pronouns": "kh4dien/mc-gender",
    "sports": "hc-mats/sports-gemma-2-2b-top-1000",
    "sentiment": "kh4dien/mc-sentiment",
    "verbs": "hc-mats/subject-verb-agreement",
}
_FIELDS = ("prompt", "correct", "incorrect")
_NEEDS = "each row needs prompt, correct and incorrect (text), and may have cue and split"
_NAMES = {"val": "validation", "valid": "validation", "dev": "validation"}
_GRAM = 6
_T = TypeVar("_T")


def file_choices(spec: ChoiceSpec) -> Choices:
    """The items of a file or dataset. UnweaveError where it cannot be read or is no list of choices."""
    parsed, left_out = _checked(_rows(spec.task), _item, _NEEDS)
    left = Counter(left_out)
    if any(split for _, split in parsed):
        splits = _by_name(parsed, left)
    else:
        splits = _by_hash([item for item, _ in parsed], spec, left)
    for name, items in splits.items():
        Random(f"{spec.seed}/{name}").shuffle(items)
    most = {name: spec.train if name == "train" else spec.evaluation for name in splits}
    cut = {name: tuple(items[: most[name]]) for name, items in splits.items()}
    return Choices(spec.task.removeprefix("hub:").rpartition("/")[2], cut, dict(left))


def content_of(task: str) -> str:
    """Twelve digits over a file's bytes; empty for what is no file."""
    return "" if task in OWN else tree_of(task)


def _rows(task: str) -> Iterator[tuple[Any, str]]:
    path = Path(task).expanduser()
    suffix = path.suffix.lower()
    if task.startswith("hub:"):
        return hub_rows(task.removeprefix("hub:"), "train")
    if suffix in (".jsonl", ".ndjson", ".json") and path.is_file():
        return json_rows(path)
    if suffix == ".parquet" and path.is_file():
        return parquet_rows(path, (*_FIELDS, "cue", "split"), f"{_NEEDS}; it has")
    if suffix == ".csv" and path.is_file():
        return _csv_rows(path)
    remedy = "use gender, double, hub:org/name, or a file that is there: .jsonl, .json, .csv or .parquet"
    raise UnweaveError(f"no task {task!r}", where=str(path.absolute()), remedy=remedy)


def _csv_rows(path: Path) -> Iterator[tuple[Any, str]]:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        for row in reader:
            yield row, f"{path}, line {reader.line_num}"
    except csv.Error as error:
        where = f"{path}, behind line {reader.line_num}"
        raise UnweaveError(
            f"not CSV: {error}", where=where, remedy="quote fields that hold commas or quotes"
        ) from error


def _checked(
    rows: Iterable[tuple[Any, str]], parse: Callable[[Mapping[str, Any]], _T | str], needs: str
) -> tuple[list[_T], dict[str, int]]:
    """What ``parse`` makes of rows, and how many it gave a reason against, by the reason and its first place."""
    values: list[_T] = []
    counts: Counter[str] = Counter()
    places: dict[str, str] = {}
    where = ""
    for row, where in rows:
        value = parse(row) if isinstance(row, Mapping) else f"the row is {kind(row)}, not an object with fields"
        if isinstance(value, str):
            counts[value] += 1
            places.setdefault(value, where)
        else:
            values.append(value)
    n = len(values) + counts.total()
    if counts.total() > len(values):
        reason = counts.most_common(1)[0][0]
        what = f"{counts.total():,} of {n:,} rows are not usable: {reason}"
        raise UnweaveError(what, where=places[reason], remedy=needs)
    if not n:
        raise UnweaveError("there are no rows", remedy=needs)
    return values, {f"{reason} (first: {places[reason]})": count for reason, count in counts.items()}


def _item(row: Mapping[str, Any]) -> tuple[Item, str] | str:
    """An item and its split ("" where none is given), or what is wrong with the row."""
    optional = [name for name in ("cue", "split") if row.get(name) is not None]
    if bad := faults(row, (*_FIELDS, *optional)):
        return ", ".join(bad)
    for name in (*_FIELDS, *optional):
        if not is_text(row[name]):
            return f"{name} holds half a surrogate pair"
        if name in _FIELDS and not row[name].strip():
            return f"{name} is blank"
    correct, incorrect = row["correct"].strip(), row["incorrect"].strip()
    cue, split = ((row.get(name) or "").strip() for name in ("cue", "split"))
    if correct == incorrect:
        return "both answers are the same"
    if cue not in ("", correct, incorrect):
        return "cue is neither of the answers"
    return Item(row["prompt"], correct, incorrect, cue or None), split.lower()


def _by_name(rows: Sequence[tuple[Item, str]], left: Counter[str]) -> dict[str, list[Item]]:
    splits: dict[str, list[Item]] = {}
    for item, split in rows:
        if split:
            splits.setdefault(_NAMES.get(split, split), []).append(item)
        else:
            left["split is blank"] += 1
    trained = {item.prompt for item in splits.get("train", ())}
    for name, items in splits.items():
        different = [item for item in dict.fromkeys(items) if name == "train" or item.prompt not in trained]
        left["the row is there twice"] += len(items) - len(dict.fromkeys(items))
        left["the prompt is among those to train on"] += len(dict.fromkeys(items)) - len(different)
        splits[name] = different
    left += Counter()  # without zeros
    return dict(sorted(splits.items(), key=lambda item: item[0] != "train"))


def _by_hash(items: Sequence[Item], spec: ChoiceSpec, left: Counter[str]) -> dict[str, list[Item]]:
    different = list(dict.fromkeys(items))
    if len(items) > len(different):
        left["the row is there twice"] += len(items) - len(different)
    groups = alike([item.prompt for item in different])
    largest = Counter(groups).most_common(1)[0][1]
    if largest > len(different) / 2 > 1:
        what = f"{largest:,} of {len(different):,} prompts are near duplicates of one another: no part can be held out"
        raise UnweaveError(what, where=spec.task, remedy="give a column split, or prompts that differ more")
    contradicts = [item.cue == item.incorrect for item in different]
    agreeing = {group for group, other in zip(groups, contradicts, strict=True) if not other}
    splits: dict[str, list[Item]] = {name: [] for name in ("train", "validation", "ambiguous", "ood")}
    least: dict[int, str] = {}  # of each group: a name that does not depend on the order of rows
    for item, group in zip(different, groups, strict=True):
        least[group] = min(item.prompt, least.get(group, item.prompt))
    for item, group, other in zip(different, groups, contradicts, strict=True):
        draw = Random(f"{spec.seed}/{least[group]}").random()
        side = "train" if draw < 0.7 else "validation" if draw < 0.85 else "ambiguous"
        if not other:
            splits[side].append(item)
        elif side == "ambiguous" or group not in agreeing:
            splits["ood"].append(item)
        else:
            left[f"the cue contradicts, and a near duplicate is in {side}"] += 1
    return splits


def alike(prompts: Sequence[str]) -> list[int]:
    """The first prompt of each prompt's group of near duplicates."""
    words = [prompt.lower().split() for prompt in prompts]
    start = _shared(words)
    end = _shared([row[start:][::-1] for row in words])
    cores = [row[start : len(row) - end] or ["-"] for row in words]
    orders = word_hashes(["_".join(sorted(row)) for row in cores])[0]
    keys = np.column_stack([min_hashes([" ".join(row) for row in cores], _GRAM), orders])
    return first_alike(keys).tolist()


def _shared(rows: Iterable[Sequence[str]]) -> int:
    """With how many equal words all rows begin."""
    return sum(1 for _ in takewhile(lambda words: len({*words}) == 1, zip(*rows, strict=False)))


# -- the paper's datasets ---------------------------------------------------------------------------------------------


def hub_sentences(seed: int) -> tuple[dict[Part, dict[Case, list[Sentence]]], dict[str, int]]:
    """The paper's sentences, those that are there twice left out altogether, and how many rows are not usable."""
    needs = "each row needs text with $PRONOUN$ and $PROFESSION$, and category: nominative or object"
    rows, left_out = _checked(hub_rows(HUB_SENTENCES, "train"), _sentence, needs)
    counts = Counter(rows)
    once: dict[Case, list[Sentence]] = {c: [s for s, n in counts.items() if n == 1 and s.case == c] for c in CASES}
    if twice := len(rows) - sum(map(len, once.values())):
        left_out["the text is there more than once"] = twice
    parts = {case: divided(sentences, Random(f"{seed}/hub/{case}")) for case, sentences in once.items()}
    return {part: {case: parts[case][part] for case in CASES} for part in parts["subject"]}, left_out


def _sentence(row: Mapping[str, Any]) -> Sentence | str:
    if bad := faults(row, ("text", "category")):
        return ", ".join(bad)
    cases: dict[str, Case] = {"nominative": "subject", "object": "object"}
    if row["category"] not in cases:
        return "category is neither nominative nor object"
    before, blank, after = row["text"].strip().replace("$PROFESSION$", "{p}").partition("$PRONOUN$")
    if not blank or "$PRONOUN$" in after or "{p}" not in before + after:
        return "text has not one $PRONOUN$ and a $PROFESSION$"
    return Sentence(before.rstrip(), after, cases[row["category"]])


def hub_questions(kind: Kind, seed: int, most: int) -> tuple[dict[Part, list[Question]], dict[str, int]]:
    """At most ``most`` of the paper's questions of each part, and how many rows are not usable."""
    needs = "each row needs question, correct and incorrect (text)"
    questions, left_out = _checked(hub_rows(HUB_QUESTIONS[kind], "train"), _question, needs)
    different = {question.text.casefold(): question for question in questions}
    if twice := len(questions) - len(different):
        left_out["the question is there more than once"] = twice
    parts = divided(list(different.values()), Random(f"{seed}/hub/{kind}"))
    return {part: chosen[:most] for part, chosen in parts.items()}, left_out


def _question(row: Mapping[str, Any]) -> Question | str:
    if bad := faults(row, ("question", "correct", "incorrect")):
        return ", ".join(bad)
    text, right, wrong = (row[name].strip() for name in ("question", "correct", "incorrect"))
    if not (text and right and wrong) or right == wrong:
        return "a field is blank" if right != wrong else "both answers are the same"
    return Question(text, f"Question: {text}\nAnswer:", right, wrong)
