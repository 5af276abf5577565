"""Files and datasets of choices: every format, bad rows, splits by name and by hash, and the paper's datasets."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unweave.core.errors import UnweaveError
from unweave.core.stage import contents_of
from unweave.tasks.choices import rows
from unweave.tasks.choices.choices import open_choices
from unweave.tasks.choices.items import Choices, Item
from unweave.tasks.choices.spec import ChoiceSpec

Row = dict[str, Any]
ANIMALS = [
    f"{a}{b}" for a in ("cat", "dog", "owl", "eel", "hen", "fox", "bee", "ant", "cow", "pig") for b in "abcdefgh"
]
ROWS: list[Row] = [{"prompt": f"Pick. The {name} sat, é", "correct": "a", "incorrect": "b"} for name in ANIMALS]


def write(path: Path, values: list[Any]) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(values), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(values), path)
    else:
        with open(path, "w", encoding="utf-8", newline="") as handle:
            writer = csv.DictWriter(handle, list(dict.fromkeys(name for value in values for name in value)))
            writer.writeheader()
            writer.writerows(values)
    return str(path)


def opened(path: Path, values: list[Any], **fields: Any) -> Choices:
    return open_choices(ChoiceSpec.from_dict({"task": write(path, values), **fields}))


def prompts(choices: Choices) -> dict[str, set[str]]:
    return {name: {item.prompt for item in items} for name, items in choices.splits.items()}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_items(suffix: str, tmp_path: Path) -> None:
    named = [
        {"prompt": "one,\ntwo", "correct": " yes", "incorrect": "no", "cue": "yes", "split": "train"},
        {"prompt": "three", "correct": "yes", "incorrect": "no", "cue": "no", "split": "ood"},
        {"prompt": "four", "correct": "no", "incorrect": "yes", "cue": "", "split": "Val"},
    ]
    choices = opened(tmp_path / f"a{suffix}", named)
    assert choices.splits == {
        "train": (Item("one,\ntwo", "yes", "no", "yes"),),
        "ood": (Item("three", "yes", "no", "no"),),
        "validation": (Item("four", "no", "yes"),),
    }
    assert choices.left_out == {}
    plain = opened(tmp_path / f"b{suffix}", ROWS)
    assert set(plain.splits) == {"train", "validation", "ambiguous"}  # and no ood: nothing says what the cue is
    assert sum(map(len, plain.splits.values())) == len(ROWS)
    spec = ChoiceSpec(task=str(tmp_path / f"b{suffix}"))
    before = contents_of(spec)
    opened(tmp_path / f"b{suffix}", ROWS[:-1])
    assert contents_of(spec) != before, "the file's bytes are part of what is asked"


def test_the_hash_divides_by_prompt_and_seed_alone(tmp_path: Path) -> None:
    whole = prompts(opened(tmp_path / "a.jsonl", ROWS))
    turned = prompts(opened(tmp_path / "b.jsonl", ROWS[::-1]))
    twins = [{**row, "prompt": f"{row['prompt'].replace('sat, ', '')} sat,"} for row in ROWS] + ROWS
    assert prompts(opened(tmp_path / "c.jsonl", twins)) == prompts(opened(tmp_path / "d.jsonl", twins[::-1]))
    part = prompts(opened(tmp_path / "c.jsonl", ROWS[::2]))
    assert whole == turned
    assert all(part[name] <= whole[name] for name in part)
    assert whole != prompts(opened(tmp_path / "a.jsonl", ROWS, seed=1))
    assert 0.5 < len(whole["train"]) / len(ROWS) < 0.9
    few = opened(tmp_path / "a.jsonl", ROWS, train=7, evaluation=3)
    assert {name: len(items) for name, items in few.splits.items()} == {"train": 7, "validation": 3, "ambiguous": 3}
    assert all(prompts(few)[name] <= whole[name] for name in whole)


def test_near_duplicates_are_on_one_side_and_contradicting_ones_are_no_test(tmp_path: Path) -> None:
    """Of each sentence four rows: options in both orders, and the cue agreeing or contradicting."""
    form = (
        "Choose well.\n\nQuestion: They say that long ago the {} lived in a house of its own near the {}.\n{}\nAnswer:"
    )
    values = []
    for i, name in enumerate(ANIMALS):
        for options in ("A) he\nB) her", "A) her\nB) he"):
            prompt = form.format(name, ANIMALS[-i], options)
            values.append({"prompt": prompt, "correct": "A", "incorrect": "B", "cue": "A"})
            values.append({"prompt": prompt + " ", "correct": "B", "incorrect": "A", "cue": "A"})
    lone = [{"prompt": f"{name} alone", "correct": "B", "incorrect": "A", "cue": "A"} for name in ANIMALS]
    choices = opened(tmp_path / "a.jsonl", values + lone)
    sides: dict[str, set[str]] = {}
    for split, texts in prompts(choices).items():
        for text in texts:
            sides.setdefault(text.replace("\nA) her\nB) he\n", "\nA) he\nB) her\n").strip(), set()).add(split)
    assert all(found in ({"train"}, {"validation"}, {"ambiguous", "ood"}, {"ood"}) for found in sides.values())
    assert sum(found == {"ambiguous", "ood"} for found in sides.values()) >= 5
    assert {text for text in prompts(choices)["ood"] if "alone" in text} == {row["prompt"] for row in lone}
    assert all(
        (item.cue == item.incorrect) == (name == "ood") for name, items in choices.splits.items() for item in items
    )
    left = {reason: n for reason, n in choices.left_out.items() if "contradicts" in reason}
    assert left == {
        "the cue contradicts, and a near duplicate is in train": len(choices.splits["train"]),
        "the cue contradicts, and a near duplicate is in validation": len(choices.splits["validation"]),
    }
    same = [{**ROWS[0], "prompt": f"a b c d e f g h {name} and so forth for ever and ever"} for name in ANIMALS]
    assert rows.alike([row["prompt"] for row in same]) == list(range(len(same))), (
        "what all prompts begin with is no sign"
    )
    chained = [{**ROWS[0], "prompt": f"{i} {' '.join(ANIMALS)} {i}"} for i in range(20)]
    with pytest.raises(UnweaveError, match="20 of 20 prompts are near duplicates"):
        opened(tmp_path / "b.jsonl", chained)


def test_bad_rows_are_named_and_counted(tmp_path: Path) -> None:
    bad = [
        ({"prompt": "x", "correct": "a"}, "incorrect is missing"),
        ({"prompt": 3, "correct": "a", "incorrect": "b"}, "prompt is a number, not text"),
        ({"prompt": " ", "correct": "a", "incorrect": "b"}, "prompt is blank"),
        ({"prompt": "x", "correct": "a ", "incorrect": "a"}, "both answers are the same"),
        ({"prompt": "x", "correct": "a", "incorrect": "b", "cue": "c"}, "cue is neither of the answers"),
        ({"prompt": "x\ud800", "correct": "a", "incorrect": "b"}, "prompt holds half a surrogate pair"),
        ([1], "the row is a list, not an object with fields"),
    ]
    values = [*ROWS[:40], *(row for row, _ in bad), bad[0][0], ROWS[3]]
    choices = opened(tmp_path / "a.jsonl", values)
    file = tmp_path / "a.jsonl"
    assert choices.left_out == {
        **{f"{reason} (first: {file}, line {41 + i})": 2 if i == 0 else 1 for i, (_, reason) in enumerate(bad)},
        "the row is there twice": 1,
    }
    assert sum(map(len, choices.splits.values())) == 40
    named = [{**ROWS[0], "split": "train"}, {**ROWS[0], "split": "ood"}, {**ROWS[1], "split": " "}]
    choices = opened(tmp_path / "a.jsonl", named)
    assert set(choices.splits) == {"train"}
    assert choices.left_out == {"split is blank": 1, "the prompt is among those to train on": 1}


@pytest.mark.parametrize(
    ("name", "text", "words", "where"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": "y"}', "2 of 2 rows are not usable: prompt is missing", "line 1"),
        ("a.csv", "name,age\na,3\n", "1 of 1 rows are not usable: prompt is missing", "line 2"),
        ("a.csv", 'prompt,correct,incorrect\n"a"b,c,d\n', "not CSV", "behind line 1"),
        ("a.csv", "", "no rows", ""),
        ("a.jsonl", '{"prompt": \n', "not JSON", "line 1"),
        ("a.parquet", "PAR1", "cannot read it as Parquet", "a.parquet"),
        ("a.txt", "x", "no task", "a.txt"),
        ("gendre", None, "no task 'gendre'", "gendre"),
        ("a.jsonl", None, "no task", "a.jsonl"),
        ("a.jsonl", json.dumps({**ROWS[0], "split": "test"}), "no row is for training; there are splits test", ""),
    ],
)
def test_what_is_no_list_of_choices_is_refused(
    name: str, text: str | None, words: str, where: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(UnweaveError, match=words) as error:
        open_choices(ChoiceSpec(task=str(path) if name != "gendre" else name))
    assert where in str(error.value)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[Row]], str]:
    """Puts rows where ``datasets`` finds them by a name that stands for one on the hub."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def put(name: str, values: list[Row]) -> str:
        folder = tmp_path / name
        folder.mkdir()
        write(folder / "train.jsonl", values)
        return str(folder)

    return put


def test_the_paper_s_sentences_are_read_from_the_hub(
    hub: Callable[[str, list[Row]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = [
        {"text": f"The $PROFESSION$ saw {name} before $PRONOUN$ left.", "category": "nominative"} for name in ANIMALS
    ]
    values += [
        {"text": f"The {name} saw the $PROFESSION$ and met $PRONOUN$.", "category": "object"} for name in ANIMALS
    ]
    values += [values[0], {"text": "no blank", "category": "object"}, {"text": "$PRONOUN$", "category": "verb"}]
    monkeypatch.setattr(rows, "HUB_SENTENCES", hub("gender", values))
    choices = open_choices(ChoiceSpec(source="hub", evaluation=20))
    used = set()
    for name, items in choices.splits.items():
        for item in items:
            text = item.prompt.split("Question: ")[-1].split("\n")[0]
            male = "doctor" in text
            options = dict(line.split(") ") for line in item.prompt.splitlines() if line[1:2] == ")")
            if options:
                agrees = name in ("train", "validation", "ambiguous")
                nominative = " before _____ left." in text
                assert nominative or text.endswith(" and met _____.")
                right = {(True, True): "he", (True, False): "him", (False, True): "she", (False, False): "her"}
                assert options[item.correct] == right[male == agrees, nominative]
                assert item.cue == (item.correct if agrees else item.incorrect)
            used.add(text)
    assert not any(f"saw {ANIMALS[0]} before" in text for text in used), "a text that is there twice is left out"
    assert sorted(choices.left_out.values()) == [1, 1, 2]


def test_the_paper_s_questions_are_read_from_the_hub(
    hub: Callable[[str, list[Row]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = ("question", "correct", "incorrect")
    monkeypatch.setitem(
        rows.HUB_QUESTIONS,
        "sports",
        hub("s", [dict(zip(columns, (f"{n} plays", " golf", " chess"), strict=True)) for n in ANIMALS]),
    )
    monkeypatch.setitem(
        rows.HUB_QUESTIONS,
        "verbs",
        hub("v", [dict(zip(columns, (f"The {n}s", "are", "is"), strict=True)) for n in [*ANIMALS, "cata"]]),
    )
    fields = {
        "task": "double",
        "source": "hub",
        "first": "verbs",
        "second": "sports",
        "intended": "second",
        "train": 200,
    }
    choices = open_choices(ChoiceSpec.from_dict(fields))
    assert choices.left_out == {"verbs: the question is there more than once": 1}
    assert len({item.prompt for item in choices.splits["train"]}) == 200  # of 56 questions of each kind
    letters: dict[str, set[str]] = {}
    for item in choices.splits["train"]:
        letters.setdefault(item.prompt.split(" | ")[0], set()).add(item.correct)
    assert sum(len(both) == 2 for both in letters.values()) > 0.7 * len(letters), "a question must not tell the letter"
    for name, agrees in (("train", True), ("ood", False)):
        for item in choices.splits[name]:
            lines = {line[0]: line[3:] for line in item.prompt.splitlines() if line[1:3] == ". "}
            assert lines[item.correct] == ("are, golf" if agrees else "is, golf")
    athletes = {
        name: {item.prompt.split("| ")[1].split("\n")[0] for item in choices.splits[name]} for name in ("train", "ood")
    }
    assert len(athletes["train"]) == 56 and not athletes["train"] & athletes["ood"]
    assert choices.splits["alone"][0].prompt.endswith(" plays\nAnswer:")


def test_a_dataset_of_one_s_own_and_one_that_is_not_there(hub: Callable[[str, list[Row]], str]) -> None:
    path = hub("mine", [{**row, "split": "train"} for row in ROWS])
    assert len(open_choices(ChoiceSpec(task=f"hub:{path}")).splits["train"]) == len(ROWS)
    with pytest.raises(UnweaveError, match="cannot read the dataset"):
        open_choices(ChoiceSpec(task=f"hub:{path}/nowhere"))
