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
from typing import Any, NamedTuple

import numpy as np

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
    right = np.array([is_right for _, is_right, _ in cases])
    kinds = np.array([kind for _, _, kind in cases])
    best = ratings.best
    by_kind = {
        kind: auroc(best[right], best[~right & (kinds == kind)]) for kind in dict.fromkeys(kinds[~right].tolist())
    }
    return Check(form.id, judge.name, auroc(best[right], best[~right]), by_kind, len(cases), ratings.failures)


def auroc(positive: Any, negative: Any) -> float | None:
    """The share of pairs whose positive value [n] is above the negative one [m], ties as halves; NaN counts nowhere.
    None where either side is empty."""
    a, b = (np.asarray(values, dtype=np.float64) for values in (positive, negative))
    a, b = a[~np.isnan(a)], np.sort(b[~np.isnan(b)])
    if not len(a) or not len(b):
        return None
    below, not_above = (np.searchsorted(b, a, side=side) for side in ("left", "right"))
    return float((below + not_above).mean() / (2 * len(b)))


_CONCEPTS = (
    (
        "baking bread",
        "She kneaded the dough, let it rise by the stove and slid two loaves into the oven.",
        "A good crust needs steam in the first minutes; the bakery sold out of rye by nine.",
        "He earns his bread as a night watchman and kneads his sore shoulders after work.",
    ),
    (
        "earthquakes",
        "At dawn the ground shook for forty seconds and chimneys fell all over the town.",
        "Seismologists measured a magnitude of 6.1 with its focus eight kilometres deep.",
        "Her resignation was an earthquake for the party, and aftershocks are felt in every office.",
    ),
    (
        "the planet Mercury",
        "Closest to the Sun, Mercury circles it in 88 days and has hardly any atmosphere.",
        "The probe photographed the craters of the innermost planet during its third flyby.",
        "Old thermometers contain mercury, a metal that is liquid at room temperature.",
    ),
    (
        "beekeeping",
        "He smoked the hive, lifted out the frames and checked for the queen.",
        "In late summer we harvest the honey and feed the colonies for winter.",
        "The village was a hive of activity, and everybody was busy as a bee before the fair.",
    ),
    (
        "playing chess",
        "White gave up a bishop to open the file and mated with the rook four moves later.",
        "She prepared the Sicilian defence for the final round of the tournament.",
        "The bishop moved to a new diocese, and the knight was buried beside his castle.",
    ),
    (
        "tax law",
        "Deductions for a home office may be claimed only if the room is used for work alone.",
        "The court held that the levy on imported cars had been assessed unlawfully.",
        "Climbing the last hill was taxing, and the children laid down the law about breaks.",
    ),
    (
        "rivers flooding",
        "After three days of rain the river burst its banks and water stood in the cellars.",
        "Sandbags were piled along the quay as the gauge upstream passed its highest mark.",
        "Letters flooded the editor's desk in a river of complaints about the new layout.",
    ),
    (
        "learning to drive",
        "In her third lesson she stalled at the crossing and forgot the indicator.",
        "The examiner asked him to park in reverse between two vans, and he passed.",
        "The team lacks drive this season and has to learn how to finish an attack.",
    ),
)
_FLUENT = tuple(text for concept in _CONCEPTS for text in concept[1:3])


def known_texts() -> list[Known]:
    """32 texts: of each of eight concepts two that mention it, a near miss, and one about another concept."""
    known = []
    for (concept, *mentions, near), (_, other, *_) in zip(_CONCEPTS, _CONCEPTS[1:] + _CONCEPTS[:1], strict=True):
        known += [Known(concept, text, "mention") for text in mentions]
        known += [Known(concept, near, "near miss"), Known(concept, other, "unrelated")]
    return known


def fluency_texts() -> list[tuple[str, bool, str]]:
    """32 texts (text, whether it is fluent, kind): sixteen fluent ones, and each of them broken: its words in another
    order, or its first words over and over."""
    cases = [(text, True, "fluent") for text in _FLUENT]
    for number, text in enumerate(_FLUENT):
        words = text.split()
        if number % 2:
            cases.append((" ".join(words[:3] * (len(words) // 3)), False, "loop"))
        else:
            random.Random(number).shuffle(words)
            cases.append((" ".join(words), False, "shuffled words"))
    return cases
