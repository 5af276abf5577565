"""Is a judge shown to read? Known cases are put to it, and its ratings must tell the right ones from the wrong ones.

1. Cases with a known answer are rated: texts that mention a concept, near misses (its words in another meaning) and
   texts about something else; fluent texts and broken ones.
2. AUROC is the share of pairs of a right and a wrong case in which the right one is rated higher, ties as halves.
3. Below 0.8, or with more than a fifth of the answers unusable, the judge is not shown to read.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unweave.core.files import read_toml
from unweave.judge.base import Judge
from unweave.judge.form import Case, Form, rate

ENOUGH = 0.8
_MOST_FAILED = 0.2


class Known(NamedTuple):
    """A text and whether it mentions a concept."""

    concept: str
    text: str
    kind: str
    """mention, near miss or unrelated"""

    @property
    def right(self) -> bool:
        return self.kind == "mention"


@dataclass(frozen=True)
class Check:
    """What came of it, in plain values."""

    form: str
    judge: str
    auroc: float | None
    """None where no pair could be compared"""
    aurocs: dict[str, float | None]
    """by kind of wrong case"""
    asked: int
    failures: dict[str, int]

    @property
    def failed(self) -> int:
        return sum(self.failures.values())

    @property
    def reads(self) -> bool:
        """Whether the judge was shown to read."""
        return self.auroc is not None and self.auroc >= ENOUGH and self.failed <= _MOST_FAILED * self.asked

    @property
    def verdict(self) -> str:
        """In words, for whoever sees its ratings."""
        auroc = "no usable answers" if self.auroc is None else f"AUROC {self.auroc:.2f}"
        shown = "shown to read" if self.reads else "not shown to read"
        return f"{shown}: {auroc} on {self.asked} known cases" + (f", {self.failed} failed" if self.failed else "")


def check(judge: Judge, form: Form[Case], cases: Sequence[tuple[Case, bool, str]]) -> Check:
    """Rates cases (case, whether it is right, what kind it is) and compares; errors as in ``judge.ask``."""
    ratings = rate(judge, form, [case for case, _, _ in cases])
    return compared(form.id, judge.name, ratings.best, cases, ratings.failures)


def compared(
    form: str, judge: str, values: Any, cases: Sequence[tuple[Any, bool, str]], failures: dict[str, int]
) -> Check:
    """The same of cases that have been rated: values [N], NaN for failures."""
    values, right, kinds = (
        np.asarray(values),
        np.array([c[1] for c in cases], dtype=bool),
        np.array([c[2] for c in cases]),
    )
    by_kind = {
        kind: auroc(values[right], values[~right & (kinds == kind)]) for kind in dict.fromkeys(kinds[~right].tolist())
    }
    return Check(form, judge, auroc(values[right], values[~right]), by_kind, len(cases), failures)


def auroc(positive: Any, negative: Any) -> float | None:
    """The share of pairs whose positive value [n] is above the negative one [m], ties as halves; NaN counts nowhere.
    None where either side is empty."""
    a, b = (np.asarray(values, dtype=np.float64) for values in (positive, negative))
    a, b = a[~np.isnan(a)], np.sort(b[~np.isnan(b)])
    if not len(a) or not len(b):
        return None
    below, not_above = (np.searchsorted(b, a, side=side) for side in ("left", "right"))
    return float((below + not_above).mean() / (2 * len(b)))


_CONCEPTS = read_toml(Path(__file__).with_name("known.toml"))["concepts"]


def known_texts() -> list[Known]:
    """32 texts: of each of eight concepts two that mention it, a near miss, and one about another concept."""
    known = []
    for concept, other in zip(_CONCEPTS, _CONCEPTS[1:] + _CONCEPTS[:1], strict=True):
        name = concept["name"]
        known += [Known(name, text, "mention") for text in concept["mentions"]]
        known += [Known(name, concept["near_miss"], "near miss"), Known(name, other["mentions"][0], "unrelated")]
    return known


def fluency_texts(fluent: Sequence[str] | None = None) -> list[tuple[str, bool, str]]:
    """(text, whether it is fluent, kind): those given, or sixteen of our own; and each of them broken: its words in
    another order, or its first words over and over."""
    fluent = [text for concept in _CONCEPTS for text in concept["mentions"]] if fluent is None else fluent
    cases = [(text, True, "fluent") for text in fluent]
    for number, text in enumerate(fluent):
        words = text.split()
        if number % 2:
            cases.append((" ".join(words[:3] * max(1, len(words) // 3)), False, "loop"))
        else:
            random.Random(number).shuffle(words)
            cases.append((" ".join(words), False, "shuffled words"))
    return cases
