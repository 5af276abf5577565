"""Biographies: balanced groups, no sentence in both splits, gender told by names and pronouns alone."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from unweave.core.errors import UnweaveError
from unweave.methods.shift import biographies, relevance
from unweave.methods.shift.biographies import AMBIGUOUS, FIRST_NAMES, GROUPS, Biography

MALE = {"he", "him", "his", "himself"}
FEMALE = {"she", "her", "hers", "herself"}


@pytest.fixture(scope="module")
def sets() -> biographies.Sets:
    return biographies.sets("templated", pool=120, test=60)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def bare(text: str) -> list[str]:
    """A biography's sentences without names, surnames and pronouns."""
    name = re.search(rf"({'|'.join(FIRST_NAMES[0] + FIRST_NAMES[1])}) (\w+)", text)
    assert name is not None
    text = text.replace(name[0], "N").replace(name[2], "P")
    text = re.sub(r"\b(?:[Hh]e|[Ss]he)\b", "P", text)
    text = re.sub(r"\b(?:[Hh]is|[Hh]er)\b", "Q", text)
    return re.findall(r"[^.]+\.", text)


def test_groups_are_balanced_and_every_text_is_there_once(sets: biographies.Sets) -> None:
    assert {group: len(texts) for group, texts in sets.train.items()} == dict.fromkeys(GROUPS, 120)
    assert Counter(b.group for b in sets.test) == dict.fromkeys(GROUPS, 60)
    assert all(b.group == group for group, texts in sets.train.items() for b in texts)
    texts = [b.text for part in (*sets.train.values(), sets.test) for b in part]
    assert len(set(texts)) == len(texts)
    assert "templated" in sets.note


def test_no_sentence_is_in_both_splits(sets: biographies.Sets) -> None:
    """Not even one about somebody of the other gender."""
    train = {sentence for texts in sets.train.values() for b in texts for sentence in bare(b.text)}
    test = {sentence for b in sets.test for sentence in bare(b.text)}
    assert len(train) > 400 and len(test) > 200
    assert not train & test


def test_both_genders_have_the_same_sentences() -> None:
    """Of many biographies of one profession, men's and women's sentences are the same ones: nothing else tells."""
    found = biographies.templated(1500, split="train")
    frequent: dict[tuple[int, int], Counter[str]] = {group: Counter() for group in GROUPS}
    for biography in found:
        frequent[biography.group].update(bare(biography.text)[1:])
    for profession in (0, 1):
        male, female = (frequent[profession, gender] for gender in (0, 1))
        common = {sentence for sentence, n in male.items() if n >= 15}
        assert len(common) > 20
        assert all(sentence in female for sentence in common)


def test_pronouns_and_names_agree_with_the_gender(sets: biographies.Sets) -> None:
    pronouns = 0
    for b in (*sets.test, *(b for texts in sets.train.values() for b in texts)):
        found = set(words(b.text))
        assert not found & ((MALE, FEMALE)[1 - b.gender]), b.text
        pronouns += bool(found & (MALE, FEMALE)[b.gender])
        first = [name for name in re.findall(r"[A-Z][a-z]+", b.text) if name in FIRST_NAMES[0] + FIRST_NAMES[1]]
        assert first and all(name in FIRST_NAMES[b.gender] for name in first), b.text
        assert "{" not in b.text and "}" not in b.text
        assert re.fullmatch(r"(?:[A-Z][^.]+\. ?){4}", b.text), b.text
    assert pronouns > 600  # of 720: a few have the surname only


def test_no_text_names_its_profession() -> None:
    for b in biographies.templated(300, split="train"):
        assert not re.search(r"profess|nurs|doctor|universit|teacher", b.text, re.IGNORECASE), b.text


def test_name_lists_do_not_overlap() -> None:
    assert not set(FIRST_NAMES[0]) & set(FIRST_NAMES[1])
    assert len(set(FIRST_NAMES[0])) == len(set(FIRST_NAMES[1])) == 30


def test_the_rule_that_judges_latents_was_not_made_of_these_biographies(sets: biographies.Sets) -> None:
    """SHIFT's rule must find gender by what it knows of people, not by the templates' own words: beyond pronouns, which
    no list about gender can be without, the two share nothing."""
    names = {name.lower() for name in FIRST_NAMES[0] + FIRST_NAMES[1]}
    assert not names & relevance.FIRST_NAMES
    written = Counter(
        w for b in (*sets.test, *(b for texts in sets.train.values() for b in texts)) for w in words(b.text)
    )
    assert names < set(written)
    assert set(written) & relevance.GENDER_WORDS <= relevance.PRONOUNS


def test_the_same_seed_writes_the_same_and_another_others() -> None:
    first, again, other = (biographies.templated(20, split="test", seed=seed) for seed in (3, 3, 4))
    assert first == again and first != other


def test_draws_hold_their_groups(sets: biographies.Sets) -> None:
    found = biographies.ambiguous(sets.train, 80, seed=1)
    assert Counter(b.group for b in found) == dict.fromkeys(AMBIGUOUS, 40)
    assert found == biographies.ambiguous(sets.train, 80, seed=1) != biographies.ambiguous(sets.train, 80, seed=2)
    assert len({b.profession for b in found[:10]}) == 2, "shuffled: one epoch in this order must see both labels"
    found = biographies.balanced(sets.train, 80, seed=1)
    assert Counter(b.group for b in found) == dict.fromkeys(GROUPS, 20)
    for wrong in (0, 81, 484):
        with pytest.raises(UnweaveError, match="equal parts"):
            biographies.balanced(sets.train, wrong, seed=0)


def rows(n: int) -> list[dict[str, Any]]:
    codes = ((21, 0), (21, 1), (13, 0), (13, 1), (5, 0))
    return [
        {"hard_text": f"Somebody number {i}.", "profession": codes[i % 5][0], "gender": codes[i % 5][1]}
        for i in range(n)
    ]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_files_of_the_data_sets_form(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"bios.{kind}"
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows(200)), path)
    elif kind == "json":
        path.write_text(json.dumps(rows(200)))
    else:
        path.write_text("\n".join(map(json.dumps, rows(200))))
    found = biographies.sets(str(path), pool=8, test=5)
    assert found.note == ""
    by_text = {row["hard_text"]: row for row in rows(200)}
    train = [b for texts in found.train.values() for b in texts]
    for b in (*train, *found.test):
        row = by_text[b.text]
        assert (b.profession, b.gender) == ({21: 0, 13: 1}[row["profession"]], row["gender"])
    assert Counter(b.group for b in train) == dict.fromkeys(GROUPS, 8)
    assert Counter(b.group for b in found.test) == dict.fromkeys(GROUPS, 5)
    assert not {b.text for b in train} & {b.text for b in found.test}


def test_a_hub_data_set_keeps_its_own_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hub_rows(name: str, split: str) -> Any:
        asked.append((name, split))
        yield from ((row | {"hard_text": f"{split}: {row['hard_text']}"}, split) for row in rows(60))

    monkeypatch.setattr(biographies, "hub_rows", hub_rows)
    found = biographies.sets("hub:LabHC/bias_in_bios", pool=10, test=9)
    assert asked == [("LabHC/bias_in_bios", "train"), ("LabHC/bias_in_bios", "test")]
    assert all(b.text.startswith("test: ") for b in found.test)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bios.jsonl"
    path.write_text("\n".join(map(json.dumps, rows(40))))
    with pytest.raises(UnweaveError, match=r"100 biographies of each group.*only"):
        biographies.sets(str(path), pool=100, test=1)
    with pytest.raises(UnweaveError, match="no such file"):
        biographies.sets(str(tmp_path / "none.jsonl"), pool=1, test=1)
    for wrong in ({"hard_text": "x", "profession": 21}, {"hard_text": 3, "profession": 21, "gender": 0}, "x"):
        path.write_text(json.dumps(wrong) + "\n")
        with pytest.raises(UnweaveError, match="no biography") as caught:
            biographies.sets(str(path), pool=1, test=1)
        assert "line 1" in caught.value.where
    with pytest.raises(UnweaveError, match="no sets"):
        biographies.sets("templated", pool=0, test=1)
    with pytest.raises(UnweaveError, match="split"):
        biographies.templated(3, split="dev")  # type: ignore[arg-type]


def test_a_repeated_row_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "bios.jsonl"
    path.write_text("\n".join(map(json.dumps, [row for row in rows(100) for _ in range(3)])))
    found = biographies.read(str(path), 5, split="train")
    assert len({b.text for b in found}) == len(found) == 20
    assert isinstance(found[0], Biography)


def test_the_seed_chooses_among_all_whatever_their_order(tmp_path: Path) -> None:
    path, turned = tmp_path / "bios.jsonl", tmp_path / "turned.jsonl"
    path.write_text("\n".join(map(json.dumps, rows(900))))
    turned.write_text("\n".join(map(json.dumps, rows(900)[::-1])))

    def texts(source: Path, seed: int) -> set[str]:
        return {b.text for b in biographies.read(str(source), 10, split="train", seed=seed)}

    assert texts(path, 0) == texts(path, 0) == texts(turned, 0) != texts(path, 1)
    assert biographies.read(str(path), 10, split="train") == biographies.read(str(turned), 10, split="train")
    numbers = [int(re.findall(r"\d+", text)[0]) for seed in range(20) for text in texts(path, seed)]
    assert len(set(numbers)) > 300, "not always the same ones"
    assert 400 < sum(numbers) / len(numbers) < 500, "from all of the file alike"


def test_no_text_is_trained_and_tested_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub data set's own splits may share texts."""
    monkeypatch.setattr(biographies, "hub_rows", lambda _name, _split: ((row, "") for row in rows(100)))
    found = biographies.sets("hub:LabHC/bias_in_bios", pool=10, test=10)
    train = {b.text for texts in found.train.values() for b in texts}
    assert len(train) == 40 and not train & {b.text for b in found.test}
    with pytest.raises(UnweaveError, match=r"11 biographies of each group.*\(test\)"):
        biographies.sets("hub:LabHC/bias_in_bios", pool=10, test=11)
