"""Short biographies of professors and nurses, in which gender can stand in for the profession (Bias in Bios).

1. ``read`` takes real ones: De-Arteaga et al.'s data set (``hub:LabHC/bias_in_bios``), or JSON lines, JSON or Parquet
   with its fields hard_text, profession (21 professor, 13 nurse) and gender (0 male, 1 female).
2. ``templated`` writes its own: an opening, two sentences about the work and one about anything else, from the word
   lists and sentence patterns of ``words.toml``. First name and pronouns carry the gender; the two sentences carry the
   profession, which is never named, in vocabulary of that work.
3. ``sets`` draws what SHIFT needs: a pool of the four groups to train on, and a test set of all four in equal parts.

Train and test share no sentence: every filled pattern, without name and pronouns, belongs to one of the two by a hash
of its words. So the same sentence about somebody of the other gender falls on the same side.
"""

from __future__ import annotations

import hashlib
import heapq
import random
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unweave.core.contents import tree_of
from unweave.core.errors import UnweaveError
from unweave.core.files import read_toml
from unweave.core.progress import task
from unweave.data.rows import hub_rows, json_rows, parquet_rows, without_halves

Split = Literal["train", "test"]
Group = tuple[int, int]
"""(profession, gender)"""

PROFESSIONS = ("professor", "nurse")
GENDERS = ("male", "female")
GROUPS: tuple[Group, ...] = ((0, 0), (0, 1), (1, 0), (1, 1))
AMBIGUOUS: tuple[Group, ...] = ((0, 0), (1, 1))
"""Male professors and female nurses: here gender and profession say the same."""

TEMPLATED = "templated"
TEMPLATED_NOTE = "templated biographies, written by this package from word lists: plainer than real ones"

_WORDS = read_toml(Path(__file__).with_name("words.toml"))["biographies"]
FIRST_NAMES = tuple(tuple(names.split()) for names in _WORDS["first_names"])
"""male and female"""
_LAST_NAMES = _WORDS["last_names"].split()
_TEST_SHARE = 0.3
_SURNAMES = 0.4
"""how often a sentence that could begin with He or She begins with the surname"""
_CODES = {21: 0, 13: 1}
"""Bias in Bios numbers its professions; these two are wanted"""
_FIELDS = ("hard_text", "profession", "gender")
_PRONOUNS = (
    {"They": "He", "they": "he", "Their": "His", "their": "his", "them": "him", "themself": "himself"},
    {"They": "She", "they": "she", "Their": "Her", "their": "her", "them": "her", "themself": "herself"},
)


@dataclass(frozen=True)
class Biography:
    """One text; profession 0 professor, 1 nurse; gender 0 male, 1 female."""

    text: str
    profession: int
    gender: int

    @property
    def group(self) -> Group:
        return (self.profession, self.gender)


@dataclass(frozen=True)
class Sets:
    """``train`` holds each of the four groups' biographies, equally many; ``test`` alternates all four.

    ``note`` says what a reader of results must know of them: empty for real ones.
    """

    train: dict[Group, list[Biography]]
    test: list[Biography]
    source: str
    note: str


def group_name(group: Group) -> str:
    """Such as "female professors"."""
    return f"{GENDERS[group[1]]} {PROFESSIONS[group[0]]}s"


def sets(source: str, *, pool: int, test: int, seed: int = 0) -> Sets:
    """``pool`` biographies of each group to train on and ``test`` of each to test on, from ``source``.

    ``source`` is "templated", ``hub:org/name`` or the path of a file. A hub dataset has a test split of its own; a
    file's rows are divided by a hash of their text. No text is in both. Raises UnweaveError where a group has too few.
    """
    if pool < 1 or test < 1:
        raise UnweaveError(f"{pool} to train on and {test} to test on make no sets", remedy="ask for at least one")
    if source == TEMPLATED:
        parts = {"train": templated(pool, split="train", seed=seed), "test": templated(test, split="test", seed=seed)}
        note = TEMPLATED_NOTE
    else:
        train = read(source, pool, split="train", seed=seed)
        parts = {"train": train, "test": read(source, test, split="test", seed=seed, without={b.text for b in train})}
        note = ""
    drawn = {group: [b for b in parts["train"] if b.group == group] for group in GROUPS}
    return Sets(drawn, parts["test"], source, note)


def content_of_source(source: str) -> str:
    """Twelve digits over a local file of biographies; empty for others."""
    return "" if source == TEMPLATED else tree_of(source)


def ambiguous(train: Mapping[Group, Sequence[Biography]], n: int, seed: int) -> list[Biography]:
    """``n`` male professors and female nurses, half and half, drawn and shuffled with a seed."""
    return _drawn(train, AMBIGUOUS, n, seed)


def balanced(train: Mapping[Group, Sequence[Biography]], n: int, seed: int) -> list[Biography]:
    """``n`` biographies of all four groups in equal parts, drawn and shuffled with a seed."""
    return _drawn(train, GROUPS, n, seed)


def _drawn(train: Mapping[Group, Sequence[Biography]], groups: Sequence[Group], n: int, seed: int) -> list[Biography]:
    each, left = divmod(n, len(groups))
    fewest = min(len(train.get(group, ())) for group in groups)
    if left or not 0 < each <= fewest:
        what = f"{n} biographies cannot be drawn in equal parts from {len(groups)} groups of {fewest}"
        remedy = f"ask for a multiple of {len(groups)}, up to {fewest * len(groups)}"
        raise UnweaveError(what, where="biographies", remedy=remedy)
    rng = random.Random(f"biographies {seed}")
    chosen = [biography for group in groups for biography in rng.sample(list(train[group]), each)]
    rng.shuffle(chosen)
    return chosen


# -- real ones ----------------------------------------------------------------------------------------------------


def read(
    source: str, n: int, *, split: Split, seed: int = 0, without: Collection[str] = frozenset()
) -> list[Biography]:
    """``n`` different biographies of each group in turn, drawn with a seed from all of the split, in whatever order.

    Rows of other professions, and texts of ``without``, are passed over. Raises UnweaveError for rows without the
    fields, and for a group that is too small.
    """
    drawn: dict[Group, list[tuple[float, str]]] = {group: [] for group in GROUPS}
    texts_drawn: set[str] = set()
    with task(f"biographies ({split})", total=0, unit="rows") as shown:
        for row, where in _rows(source, split):
            shown.advance()
            biography = _biography(row, where)
            if biography is None or biography.text in texts_drawn or biography.text in without:
                continue
            if not source.startswith("hub:") and _split_of(biography.text) != split:
                continue
            # The texts of the smallest hashes are a random draw in which every text counts once, in bounded memory.
            heap, entry = drawn[biography.group], (-_hash(f"draw {seed}|{biography.text}"), biography.text)
            texts_drawn.add(biography.text)
            if len(heap) < n:
                heapq.heappush(heap, entry)
            else:
                texts_drawn.remove(heapq.heappushpop(heap, entry)[1])
    by_group = {group: [Biography(text, *group) for _, text in sorted(heap)] for group, heap in drawn.items()}
    short = {group: len(texts) for group, texts in by_group.items() if len(texts) < n}
    if short:
        there = ", ".join(f"{count} {group_name(group)}" for group, count in short.items())
        what = f"{n} biographies of each group are needed ({split}), there are only {there}"
        raise UnweaveError(what, where=source, remedy="ask for fewer, or give more biographies")
    return _in_turn(by_group, seed)


def _rows(source: str, split: Split) -> Iterator[tuple[Any, str]]:
    if source.startswith("hub:"):
        yield from hub_rows(source.removeprefix("hub:"), split)
        return
    path = Path(source).expanduser()
    if not path.is_file():
        remedy = f'give JSON lines, JSON or Parquet, hub:LabHC/bias_in_bios, or "{TEMPLATED}"'
        raise UnweaveError("no such file of biographies", where=str(path), remedy=remedy)
    if path.suffix == ".parquet":
        yield from parquet_rows(path, _FIELDS, f"rename its columns to {', '.join(_FIELDS)}")
    else:
        yield from json_rows(path)


def _biography(row: Any, where: str) -> Biography | None:
    """A row's biography; None for other professions."""
    try:
        text, profession, gender = (row[name] for name in _FIELDS)
        profession, gender = _number(profession), _number(gender)
        good = isinstance(text, str) and gender in (0, 1)
    except (KeyError, TypeError, ValueError, OverflowError):
        good, text, profession, gender = False, "", -1, -1
    if not good:
        remedy = "each row needs hard_text (text), profession (21 professor, 13 nurse) and gender (0 male, 1 female)"
        raise UnweaveError("this row is no biography", where=where, remedy=remedy)
    if profession not in _CODES or not text.strip():
        return None
    return Biography(without_halves(text).strip(), _CODES[profession], gender)


def _number(value: Any) -> int:
    """A whole number, which may be written as text or as a float. ValueError, TypeError or OverflowError for others."""
    if isinstance(value, bool) or int(value) != float(value):
        raise ValueError("no whole number")
    return int(value)


# -- our own ------------------------------------------------------------------------------------------------------


def templated(n: int, *, split: Split, seed: int = 0) -> list[Biography]:
    """``n`` different biographies of each group in turn; the same seed writes the same ones.

    Raises UnweaveError when the patterns do not give that many.
    """
    if split not in ("train", "test"):
        raise UnweaveError(f"unknown split {split!r}", remedy="use train or test")
    by_group: dict[Group, list[Biography]] = {group: [] for group in GROUPS}
    seen: set[str] = set()
    for group in GROUPS:
        rng = random.Random(f"biographies {seed} {split} {group}")
        for _ in range(20 * n):
            text = _written(rng, group, split)
            if text not in seen:
                seen.add(text)
                by_group[group].append(Biography(text, *group))
            if len(by_group[group]) == n:
                break
        else:
            raise UnweaveError(
                f"the patterns give fewer than {n} {group_name(group)}", where=split, remedy="ask for fewer"
            )
    return _in_turn(by_group, seed)


def _in_turn(by_group: Mapping[Group, list[Biography]], seed: int) -> list[Biography]:
    for group, texts in by_group.items():
        random.Random(f"in turn {seed} {group}").shuffle(texts)
    return [biography for four in zip(*by_group.values(), strict=True) for biography in four]


def _written(rng: random.Random, group: Group, split: Split) -> str:
    profession, gender = group
    work = [_filled(rng, (pattern,), split) for pattern in rng.sample(_WORDS["work"][profession], 2)]
    middle = [*work, _filled(rng, _WORDS["other"], split)]
    rng.shuffle(middle)
    name = _name(rng, gender, split)
    words = dict(_PRONOUNS[gender], name=name)
    surname = words | {"They": name.split()[1]}
    sentences = [_put(_filled(rng, _WORDS["openings"], split), words)]
    for sentence in middle:  # some begin with the surname, as in real ones
        sentences.append(_put(sentence, surname if rng.random() < _SURNAMES else words))
    return " ".join(sentences)


def _name(rng: random.Random, gender: int, split: Split) -> str:
    while True:
        name = f"{rng.choice(FIRST_NAMES[gender])} {rng.choice(_LAST_NAMES)}"
        if _split_of(name) == split:
            return name


def _filled(rng: random.Random, patterns: Sequence[str], split: Split) -> str:
    """A pattern with its word slots filled so that it belongs to the split; name and pronouns still stand open."""
    while True:
        pattern = rng.choice(patterns)
        chosen = {slot: rng.choice(words) for slot, words in _WORDS["slots"].items() if f"{{{slot}}}" in pattern}
        sentence = _put(pattern, chosen)
        if _split_of(sentence) == split:
            return sentence


def _put(pattern: str, words: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda slot: words.get(slot[1], slot[0]), pattern)


def _split_of(text: str) -> Split:
    return "test" if _hash(text) < _TEST_SHARE else "train"


def _hash(text: str) -> float:
    """A number from 0 to 1 that a text always has."""
    return int.from_bytes(hashlib.sha256(f"biographies|{text}".encode()).digest()[:8], "big") / 2**64
