"""Short biographies of professors and nurses, in which gender can stand in for the profession (Bias in Bios).

1. ``read`` takes real ones: De-Arteaga et al.'s data set (``hub:LabHC/bias_in_bios``), or JSON lines, JSON or Parquet
   with its fields hard_text, profession (21 professor, 13 nurse) and gender (0 male, 1 female).
2. ``templated`` writes its own: an opening, two sentences about the work and one about anything else, from word lists
   and sentence patterns below. First name and pronouns carry the gender; the two sentences carry the profession, which
   is never named, in vocabulary of that work.
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
    """``train`` holds each of the four groups' biographies, equally many; ``test`` all four in turn.

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
        raise UnweaveError(
            f"{n} biographies cannot be drawn in equal parts from {len(groups)} groups of {fewest}",
            where="biographies",
            remedy=f"ask for a multiple of {len(groups)}, up to {fewest * len(groups)}",
        )
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
        raise UnweaveError(
            f"{n} biographies of each group were asked for ({split}), there are only {there}",
            where=source,
            remedy="ask for fewer, or give more biographies",
        )
    return _in_turn(by_group, seed)


def _rows(source: str, split: Split) -> Iterator[tuple[Any, str]]:
    if source.startswith("hub:"):
        yield from hub_rows(source.removeprefix("hub:"), split)
        return
    path = Path(source).expanduser()
    if not path.is_file():
        raise UnweaveError(
            "no such file of biographies",
            where=str(path),
            remedy=f'give JSON lines, JSON or Parquet, hub:LabHC/bias_in_bios, or "{TEMPLATED}"',
        )
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
    middle = [*_two_different(rng, _WORK[profession], split), _filled(rng, _OTHER, split)]
    rng.shuffle(middle)
    name = _name(rng, gender, split)
    words = dict(_PRONOUNS[gender], name=name)
    surname = words | {"They": name.split()[1]}
    sentences = [_put(_filled(rng, _OPENINGS, split), words)]
    for sentence in middle:  # some begin with the surname, as in real ones
        sentences.append(_put(sentence, surname if rng.random() < _SURNAMES else words))
    return " ".join(sentences)


def _two_different(rng: random.Random, patterns: Sequence[str], split: Split) -> list[str]:
    return [_filled(rng, (pattern,), split) for pattern in rng.sample(patterns, 2)]


def _name(rng: random.Random, gender: int, split: Split) -> str:
    while True:
        name = f"{rng.choice(FIRST_NAMES[gender])} {rng.choice(_LAST_NAMES)}"
        if _split_of(name) == split:
            return name


def _filled(rng: random.Random, patterns: Sequence[str], split: Split) -> str:
    """A pattern with its word slots filled so that it belongs to the split; name and pronouns still stand open."""
    while True:
        pattern = rng.choice(patterns)
        chosen = {slot: rng.choice(words) for slot, words in _SLOTS.items() if f"{{{slot}}}" in pattern}
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


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(phrase.strip() for phrase in text.split(","))


FIRST_NAMES = (
    _words(
        "Adam Nathan Scott Gary Jason Eric Ryan Justin Roger Keith Jeremy Sean Carl Ethan Bruce Ralph Roy Vincent "
        "Howard Craig Stuart Duncan Neil Nigel Ian Colin Derek Trevor Hugh Leonard"
    ),
    _words(
        "Amy Angela Brenda Pamela Nicole Christine Janet Heather Teresa Gloria Judith Megan Andrea Hannah Olivia Joan "
        "Denise Marilyn Danielle Natalie Abigail Doris Kathleen Joyce Fiona Isabel Claire Molly Wendy Sheila"
    ),
)
"""Male and female. None is among the names by which SHIFT's rule knows a latent about gender: a rule that had the
biographies' own names would be told what it has to find."""
_LAST_NAMES = _words(
    "Adams Baker Barnes Bennett Brooks Butler Carter Clarke Coleman Cooper Davies Dawson Dixon Ellis Fisher Foster "
    "Gibson Graham Griffin Hamilton Harper Harris Hayes Hughes Hunt Jenkins Kelly Lambert Lawson Marsh Mason Morris "
    "Murray Newman Owens Palmer Parker Pearson Perry Porter Powell Price Reed Russell Sanders Shaw Spencer Stone "
    "Turner Wallace Walsh Warren Watson Webb Wells Wheeler Young"
)
_SLOTS: dict[str, tuple[str, ...]] = {
    "town": _words(
        "Leeds Bristol Boston Denver Dublin Toronto Chicago Glasgow Oxford Portland Austin Sydney Seattle Oakland "
        "Cardiff Norwich Dallas Atlanta Phoenix Brighton Belfast Ottawa Perth Memphis Albany"
    ),
    "year": tuple(str(year) for year in range(1978, 2019)),
    "county": _words("Kent Devon Ohio Texas Maine Oregon Norfolk Ontario Kansas Essex Cornwall Vermont Iowa Yorkshire"),
    "pet": _phrases("two dogs, an old cat, three cats, a spaniel, a parrot, two rabbits, a greyhound, a small terrier"),
    "hobby": _phrases(
        "hiking, swimming, gardening, cooking, painting, sailing, cycling, photography, chess, baking, running, "
        "fishing, camping, knitting, pottery, singing, dancing, woodwork"
    ),
    "sport": _words("football tennis cricket hockey rugby golf basketball baseball snooker cycling rowing"),
    "language": _words("French Spanish German Italian Welsh Polish Russian Dutch Greek Arabic Hindi Swedish"),
    "country": _words("Spain France Italy Greece Kenya India Norway Chile Peru Japan Iceland Portugal Morocco Canada"),
    "music": _phrases("the piano, the guitar, the violin, the flute, the drums, the organ, the trumpet, the cello"),
    "season": _words("spring summer autumn winter"),
    "weekday": _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    "number": _words("two three four five six seven eight nine ten twelve"),
    "topic": _phrases(
        "medieval trade, coastal erosion, modern poetry, labour law, plant genetics, early cinema, water policy, "
        "number theory, church music, public health, voting systems, desert insects, urban housing, sleep, "
        "chronic pain, ageing, child nutrition, infection, the history of medicine, wound healing"
    ),
    "care": _phrases(
        "burns, a stroke, heart trouble, surgery, broken hips, pneumonia, diabetes, long illness, high fevers, "
        "accidents, asthma, kidney failure"
    ),
}
_OPENINGS = (
    "{name} grew up in {town} and moved to {county} in {year}.",
    "{name} was born in {town} and has lived in {county} since {year}.",
    "Since {year}, {name} has lived near {town} in {county}.",
    "In {year}, {name} left {town} for a new life in {county}.",
    "After some years in {country}, {name} came to {town} in {year}.",
    "Originally from {town}, {name} settled in {county} in {year}.",
    "{name} came back to {town} in {year} after a long stay in {country}.",
)
_WORK = (
    (
        "{They} gives a seminar on {topic} every {weekday}.",
        "{They} has written {number} papers on {topic}.",
        "{They} lectures on {topic} each {season}.",
        "{Their} latest book deals with {topic}.",
        "{They} supervises {number} theses on {topic}.",
        "{They} edits a journal about {topic}.",
        "{They} spends each {season} marking essays on {topic}.",
        "{They} won a grant to study {topic} in {country}.",
        "{They} spoke about {topic} at a conference in {country}.",
        "{They} runs a small laboratory that looks into {topic}.",
    ),
    (
        "{They} looks after people with {care} every {weekday}.",
        "{They} works {number} night shifts a month on a ward.",
        "{They} cares for patients recovering from {care}.",
        "{They} checks the charts of those with {care}.",
        "{They} visits {number} homes a week to change dressings.",
        "{They} helps families of people with {care}.",
        "{They} gave flu vaccinations in {county} last {season}.",
        "{They} hands out medication on a ward in {town}.",
        "{They} sits with people with {care} on {weekday} nights.",
        "{They} trained at a hospital in {county} in the {season} of {year}.",
    ),
)
_OTHER = (
    "{They} loves {hobby} and {sport}.",
    "At home {they} keeps {pet}.",
    "{They} plays {music} and speaks {language}.",
    "When {they} is free, {they} enjoys {hobby}.",
    "{Their} parents came from {country}.",
    "{They} spends every {season} in {country}.",
    "On {weekday}s {they} meets friends for {sport}.",
    "{They} is learning {language} and {music}.",
)
