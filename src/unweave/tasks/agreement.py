"""Subject-verb agreement: pairs of sentence beginnings that differ in one noun's number (Marks et al. 2024, sec. 3.2).

    simple       The key                            is / are
    within_rc    The pilot that the managers        know / knows
    across_rc    The pilot that the managers know   is / are
    across_pp    The key near the cabinets          is / are

1. A sentence is a choice of words and of the nouns' numbers; the patch prefix has the subject's number turned round.
2. The words alone decide, by a hash, whether a sentence is for training or for testing, so that no prefix is in both
   (a pair's patch prefix is another pair's clean prefix, and verbs and numbers only vary what the words allow).
3. Words are drawn in a seeded order, and those are kept that suit the tokenizer: see ``problem_of``.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.writing import write_file
from unweave.lm.chat import encode_text
from unweave.lm.model import LM, Tokens
from unweave.tasks.entries import entries, faults
from unweave.tasks.suitable import suitable, tokenizer_of

Structure = Literal["simple", "within_rc", "across_rc", "across_pp"]
Split = Literal["train", "test"]
STRUCTURES: tuple[Structure, ...] = ("simple", "within_rc", "across_rc", "across_pp")

_TEST_SHARE = 0.2
_DOES = 0.6
"""the share of right answers below which a model fails a task in which chance gives half"""
_NUMBERS = ("singular", "plural")


def _nouns(words: str) -> tuple[tuple[str, str], ...]:
    return tuple((word, word + "s") for word in words.split())


PEOPLE = _nouns(
    "actor author baker banker builder cook dancer designer doctor driver editor farmer friend gardener guard "
    "guest hunter judge king lawyer leader manager mother neighbor nurse officer owner painter parent pilot "
    "player poet president prisoner professor queen sailor scientist singer sister soldier student teacher "
    "tourist visitor waiter winner worker writer"
)
THINGS = _nouns(
    "apple bag ball bed bell bird boat book bottle bridge cabinet camera car card chair clock coat computer cup "
    "desk door engine field flower garden hat house key lamp letter machine map mountain painting phone photo "
    "picture plane plate pool ring road rock ship shoe song star street table tower train tree truck wall window"
)
PREPOSITIONS = ("near", "behind", "beside", "by", "with", "from", "below", "above")
DETERMINERS = ("The", "My", "Your", "His", "Her", "Our", "Their")
TRANSITIVE = tuple(
    (singular, plural)
    for plural, singular in _nouns("admire avoid call follow hate help hear know like love meet need remember see want")
)
VERBS = (("is", "are"), ("was", "were"), ("has", "have"), ("does", "do"), ("seems", "seem"), ("needs", "need"))
"""Answers: singular, plural."""


@dataclass(frozen=True)
class Pair:
    """Two sentence beginnings and the word that continues each; answers begin with a space.

    ``case`` is the clean subject's number, followed by the other noun's where there is one: ``singular_plural``.
    """

    clean_prefix: str
    patch_prefix: str
    clean_answer: str
    patch_answer: str
    case: str


@dataclass(frozen=True)
class AnswerDifference:
    """The metric m = logit(patch answer) - logit(clean answer), in nats: positive where the patch answer is preferred.

    ``clean`` and ``patch`` are token ids [B]. Called with logits [R, V] and the example of each row [R].
    """

    clean: Tensor
    patch: Tensor

    @property
    def logits_read(self) -> Tensor:
        """The ids whose logits it reads; others need not be computed."""
        return torch.cat([self.clean, self.patch]).unique()

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        rows = rows.to(self.clean.device)
        clean, patch = (ids[rows].to(logits.device).unsqueeze(1) for ids in (self.clean, self.patch))
        return (logits.gather(1, patch) - logits.gather(1, clean)).squeeze(1)


@dataclass(frozen=True)
class Accuracy:
    """In what share of the prefixes the right answer beats the wrong one; ``n`` pairs, two prefixes each."""

    n: int
    clean: float
    patch: float
    by_case: dict[str, float]

    @property
    def problem(self) -> str | None:
        """Why results on this task are unusable: the model fails it; else None.

        Guessing, and always giving the same answer, are right half the time.
        """
        mean = (self.clean + self.patch) / 2
        if mean >= _DOES:
            return None
        return (
            f"the model fails this task: its answer is right on {self.clean:.0%} of the clean and "
            f"{self.patch:.0%} of the patch texts, {_DOES:.0%} of both is the least"
        )


def pairs(lm: LM | Any, structure: Structure, n: int, *, seed: int = 0, split: Split = "train") -> list[Pair]:
    """``n`` different pairs of one structure that suit the tokenizer (an LM's, or the one given), in a seeded order.

    Raises UnweaveError when fewer than ``n`` qualify.
    """
    tokenizer = tokenizer_of(lm)
    if structure not in STRUCTURES:
        raise UnweaveError(f"unknown structure {structure!r}", remedy=f"use one of {', '.join(STRUCTURES)}")
    if split not in ("train", "test"):
        raise UnweaveError(f"unknown split {split!r}", remedy="use train or test")
    if n < 1:
        raise UnweaveError(f"{n} pairs were asked for", remedy="ask for at least one")
    qualified: list[Pair] = []
    problems: Counter[str] = Counter()
    for pair in _drawn(structure, split, random.Random(seed), _for_tokenizer(tokenizer, structure)):
        problem = problem_of(tokenizer, pair)
        if problem is not None:
            problems[problem] += 1
            continue
        qualified.append(pair)
        if len(qualified) == n:
            return qualified
    reasons = "; ".join(f"{count}: {reason}" for reason, count in problems.most_common(3))
    what = f"{n} {structure} pairs were asked for, but only {len(qualified)} qualify with this tokenizer"
    remedy = "ask for fewer, use another structure, or bring your own pairs as JSON lines"
    raise UnweaveError(what, where=f"{split} split" + (f"; left out {reasons}" if reasons else ""), remedy=remedy)


def problem_of(tokenizer: Any, pair: Pair) -> str | None:
    """Why a pair cannot be used with a tokenizer, or None: answers must be single tokens, prefixes equally long, and
    neither prefix may be tokenised in another way once an answer follows it."""
    clean, patch = (encode_text(tokenizer, prefix)[0] for prefix in (pair.clean_prefix, pair.patch_prefix))
    if not clean or not patch:
        return "a prefix has no tokens"
    if len(clean) != len(patch):
        return "the prefixes have different numbers of tokens"
    for prefix, ids in ((pair.clean_prefix, clean), (pair.patch_prefix, patch)):
        for answer in (pair.clean_answer, pair.patch_answer):
            whole = encode_text(tokenizer, prefix + answer)[0]
            if whole[: len(ids)] != ids:
                return "a prefix is tokenised differently once an answer follows it"
            if len(whole) != len(ids) + 1:
                return "an answer is not a single token"
    return None


def usable(lm: LM | Any, candidates: Iterable[Pair]) -> tuple[list[Pair], dict[str, int]]:
    """The pairs that suit the tokenizer, and how many were left out for which reason."""
    return suitable(lm, candidates, problem_of)


def batches(
    lm: LM, chosen: Sequence[Pair], *, max_rows: int | None = None
) -> list[tuple[Tokens, Tokens, AnswerDifference]]:
    """Pairs as (clean tokens, patch tokens, metric), grouped by length so that nothing is padded; shortest first.

    Raises UnweaveError for a pair that does not suit the tokenizer (see ``problem_of``).
    """
    tokenizer = tokenizer_of(lm)
    groups: dict[int, list[tuple[list[list[int]], list[int]]]] = {}
    for number, pair in enumerate(chosen):
        problem = problem_of(tokenizer, pair)
        if problem is not None:
            where = f"pair {number}: {pair.clean_prefix!r}, {pair.patch_prefix!r}"
            raise UnweaveError(problem, where=where, remedy="keep the good ones: usable(lm, pairs)")
        rows = [encode_text(tokenizer, prefix)[0] for prefix in (pair.clean_prefix, pair.patch_prefix)]
        answers = [
            encode_text(tokenizer, pair.clean_prefix + answer)[0][-1]
            for answer in (pair.clean_answer, pair.patch_answer)
        ]
        groups.setdefault(len(rows[0]), []).append((rows, answers))
    out = []
    for _, group in sorted(groups.items()):
        for start in range(0, len(group), max_rows or len(group)):
            part = group[start : start + (max_rows or len(group))]
            clean, patch = (Tokens.of(torch.tensor([rows[side] for rows, _ in part])) for side in (0, 1))
            answers = torch.tensor([answers for _, answers in part])
            out.append((clean, patch, AnswerDifference(answers[:, 0], answers[:, 1])))
    return out


def accuracy(lm: LM, chosen: Sequence[Pair], *, max_rows: int = 128) -> Accuracy:
    """How often the model prefers the right answer, on clean and on patch prefixes."""
    if not chosen:
        raise UnweaveError("there are no pairs", remedy="create some: pairs(lm, structure, n)")
    right: dict[str, list[tuple[bool, bool]]] = {}
    by_length: dict[int, list[Pair]] = {}
    for pair in chosen:
        by_length.setdefault(len(encode_text(lm.tokenizer, pair.clean_prefix)[0]), []).append(pair)
    ordered = [pair for _, group in sorted(by_length.items()) for pair in group]
    at = 0
    for clean, patch, metric in batches(lm, ordered, max_rows=max_rows):
        rows = torch.arange(len(clean))
        values = [metric(lm(tokens, keep_logits=1)[:, -1], rows) for tokens in (clean, patch)]  # type: ignore[index]
        for pair, a, b in zip(ordered[at:], (values[0] < 0).tolist(), (values[1] > 0).tolist(), strict=False):
            right.setdefault(pair.case, []).append((a, b))
        at += len(clean)
    everything = [both for group in right.values() for both in group]
    return Accuracy(
        len(everything),
        sum(a for a, _ in everything) / len(everything),
        sum(b for _, b in everything) / len(everything),
        {case: sum(a + b for a, b in group) / (2 * len(group)) for case, group in sorted(right.items())},
    )


def save(path: str | Path, chosen: Iterable[Pair]) -> None:
    """Writes pairs as JSON lines with the paper's keys."""
    lines = [json.dumps(asdict(pair), ensure_ascii=False) for pair in chosen]
    write_file(Path(path), "".join(line + "\n" for line in lines))


def load(path: str | Path) -> list[Pair]:
    """Reads pairs from JSON lines or one JSON array; ``case`` may be missing, other keys are passed over.

    Raises UnweaveError that names the bad line or entry, and the field.
    """
    names = [field.name for field in fields(Pair)]
    loaded = []
    for where, value in entries(path, "pairs", names[:4]):
        filled = {"case": "", **value}
        if bad := faults(filled, names):
            remedy = f"each pair needs {', '.join(names[:4])}"
            raise UnweaveError(", ".join(bad), where=where, remedy=remedy)
        loaded.append(Pair(**{name: filled[name] for name in names}))
    return loaded


# -- sentences ------------------------------------------------------------------------------------------------------

Words = tuple[tuple[str, ...], ...]
"""One slot of a sentence: its alternatives, each a (singular, plural) pair of forms, or a single invariable word."""


@dataclass(frozen=True)
class _Form:
    """``slots`` of words, ``n_nouns`` numbers, ``write(words, numbers) -> prefix``; noun ``subject`` decides the verb.

    A slot that varies with number holds (singular, plural) forms.
    """

    slots: tuple[Words, ...]
    n_nouns: int
    subject: int
    answers: Words
    write: Callable[[Sequence[tuple[str, ...]], Sequence[int]], str]


def _single(words: Iterable[str]) -> Words:
    return tuple((word,) for word in words)


_FORMS: dict[Structure, _Form] = {
    "simple": _Form((_single(DETERMINERS), PEOPLE + THINGS), 1, 0, VERBS, lambda w, n: f"{w[0][0]} {w[1][n[0]]}"),
    "within_rc": _Form((PEOPLE, PEOPLE), 2, 1, TRANSITIVE, lambda w, n: f"The {w[0][n[0]]} that the {w[1][n[1]]}"),
    "across_rc": _Form(
        (PEOPLE, PEOPLE, TRANSITIVE),
        2,
        0,
        VERBS,
        lambda w, n: f"The {w[0][n[0]]} that the {w[1][n[1]]} {w[2][n[1]]}",
    ),
    "across_pp": _Form(
        (PEOPLE + THINGS, _single(PREPOSITIONS), THINGS),
        2,
        0,
        VERBS,
        lambda w, n: f"The {w[0][n[0]]} {w[1][0]} the {w[2][n[1]]}",
    ),
}


def _for_tokenizer(tokenizer: Any, structure: Structure) -> _Form:
    """The structure without the words that cannot qualify: it saves drawing them, and changes no split."""

    def lengths(words: tuple[str, ...]) -> set[int]:
        bare = len(encode_text(tokenizer, "The")[0])
        return {len(encode_text(tokenizer, "The " + word)[0]) - bare for word in words}

    form = _FORMS[structure]
    slots = tuple(tuple(words for words in slot if len(lengths(words)) == 1) for slot in form.slots)
    answers = tuple(words for words in form.answers if lengths(words) == {1})
    return _Form(slots, form.n_nouns, form.subject, answers, form.write)


def _drawn(structure: Structure, split: Split, rng: random.Random, form: _Form) -> Iterator[Pair]:
    """Every pair of a split once, in a random order."""
    sizes = [len(slot) for slot in form.slots] + [2] * form.n_nouns + [len(form.answers)]
    total = 1
    for size in sizes:
        total *= size
    # An order of all of them is only worth making when a few draws have not been enough.
    few = rng.sample(range(total), min(total, 20_000))
    yield from _pairs_at(structure, split, form, sizes, few)
    if total > len(few):
        seen = set(few)
        rest = [index for index in range(total) if index not in seen]
        rng.shuffle(rest)
        yield from _pairs_at(structure, split, form, sizes, rest)


def _pairs_at(
    structure: Structure, split: Split, form: _Form, sizes: Sequence[int], indices: Iterable[int]
) -> Iterator[Pair]:
    n_slots = len(form.slots)
    for index in indices:
        digits = []
        for size in sizes:
            index, digit = divmod(index, size)
            digits.append(digit)
        words = [slot[digit] for slot, digit in zip(form.slots, digits, strict=False)]
        nouns = [group for group in words if len(group) == 2][: form.n_nouns]
        if len(set(nouns)) < len(nouns) or _split_of(structure, words) != split:
            continue
        numbers = digits[n_slots : n_slots + form.n_nouns]
        turned = [number ^ (place == form.subject) for place, number in enumerate(numbers)]
        answers = form.answers[digits[-1]]
        subject = numbers[form.subject]
        others = [_NUMBERS[number] for place, number in enumerate(numbers) if place != form.subject]
        yield Pair(
            form.write(words, numbers),
            form.write(words, turned),
            f" {answers[subject]}",
            f" {answers[1 - subject]}",
            "_".join([_NUMBERS[subject], *others]),
        )


def _split_of(structure: Structure, words: Sequence[tuple[str, ...]]) -> Split:
    key = "|".join([structure, *(group[-1] for group in words)])
    draw = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return "test" if draw < _TEST_SHARE else "train"
