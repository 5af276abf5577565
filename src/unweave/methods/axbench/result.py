"""What a comparison of steering methods finds. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from unweave.core.intervals import Interval
from unweave.core.result import Result
from unweave.inputs.subject import Subject
from unweave.judge.check import Check

METHODS = {
    "unedited": "the model as it is",
    "sae": "the labelled latents",
    "random": "random latents, with the labels of the pairs",
    "diffmean": "difference of means",
    "probe": "linear probe",
    "reft": "ReFT-r1",
    "lora": "LoRA",
    "prompt": "the prompt asks for the concept",
}
SUPPRESSIONS = {
    "prompt": "nothing taken away",
    "latent": "what the latent writes",
    "span": "everything along its direction, the SAE's error too",
}
RATINGS = ("concept", "instruction", "fluency")
"""each 0, 1 or 2"""


@dataclass(frozen=True)
class Cost:
    """What is asked for, known before any of it is done."""

    pairs: int
    texts: int
    """generated, of all methods"""
    tokens: int
    """new tokens at most"""
    prompts: int
    """to the chat model that judges"""


@dataclass(frozen=True)
class Pair:
    """A latent and the concept that its label names."""

    name: str
    concept: str
    maximum: float
    """its largest activation on the texts: strength 1"""
    scores: dict[str, float | None]
    """of the labelling: calibrated F1, output score, token confidence, where they are known"""
    detection: dict[str, float | None]
    """held-out AUROC by ``mean`` and ``max`` of a passage, with hard negatives among the others; ``max_hard``:
    against these alone"""


@dataclass(frozen=True)
class LeftOut:
    """A pair whose concept has too few texts."""

    pair: str
    concept: str
    reason: str


@dataclass(frozen=True)
class Rated:
    """One pair steered by one method, at its own strength, on instructions that did not choose it."""

    pair: str
    concept: str
    method: str
    strength: float | None
    """the factor chosen most often; None where the method has none"""
    rating: float | None
    parts: tuple[float | None, ...]
    """concept, instruction, fluency"""
    failed: int
    """texts without all three ratings"""


@dataclass(frozen=True)
class Score:
    """A method over all pairs; intervals, here and below, are over concepts with all their pairs."""

    method: str
    rating: Interval | None
    parts: tuple[Interval | None, ...]
    above_random: Interval | None
    """the rating less that of random latents, pair by pair"""
    concept_above_random: Interval | None


@dataclass(frozen=True)
class Point:
    """Mean ratings over pairs and instructions at one strength."""

    method: str
    factor: float | None
    rating: float | None
    parts: tuple[float | None, ...]


@dataclass(frozen=True)
class Selection:
    """The pairs that a score would select: the better half."""

    score: str
    pairs: int
    rating: Interval | None
    concept: Interval | None
    others: Interval | None
    """rating of the other half"""
    correlation: float | None
    """Spearman's, of score and rating, over pairs"""


@dataclass(frozen=True)
class Suppression:
    """How much of a concept that the prompt asks for is left after an edit."""

    edit: str
    parts: tuple[Interval | None, ...]
    less: Interval | None
    """by how much the concept's rating is lower than without an edit, pair by pair"""


@dataclass(frozen=True)
class Judged:
    """All methods as one judge rates them."""

    judge: str
    note: str
    checks: tuple[Check, ...]
    """of each rating: ``form`` is its name"""
    scores: tuple[Score, ...]
    points: tuple[Point, ...]
    rated: tuple[Rated, ...]
    selection: tuple[Selection, ...]
    suppression: tuple[Suppression, ...]


@dataclass(frozen=True)
class Detection:
    """How well a method's values tell held-out texts with the concept from others, over pairs."""

    method: str
    mean: Interval | None
    """AUROC by a passage's mean"""
    max: Interval | None
    max_hard: Interval | None
    """by the largest value, against hard negatives alone"""


@dataclass(frozen=True)
class Comparison(Result):
    """Steering methods, compared on the same concepts and instructions."""

    schema: ClassVar[int] = 2

    subject: Subject
    pairs: tuple[Pair, ...]
    left_out: tuple[LeftOut, ...]
    instructions: int
    """per pair"""
    texts: str
    """where concepts' texts are from"""
    mode: str
    split: str
    cost: Cost
    judged: tuple[Judged, ...]
    detection: tuple[Detection, ...]
    hard_negatives: int
    """per concept"""
    generations: Path
    """Parquet: every text with every rating and its judge"""
