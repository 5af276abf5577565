"""What a rubric holds: how clear a judge rates latents, beside its scores of shuffled contexts. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass

from unweave.core.intervals import Interval
from unweave.core.result import Result
from unweave.inputs.subject import Subject

SCALE = {
    5: "one clear pattern, and all five texts fit it",
    4: "one clear pattern, but one or two of the texts do not fit it",
    3: "a pattern overall, but several of the texts do not fit it",
    2: "a loose common theme without a clear pattern",
    1: "no pattern that you can see",
}
LEVEL = 0.05
"""the p value below which latents count as told from shuffled contexts"""


@dataclass(frozen=True)
class Difference(Interval):
    """How far two groups of items are apart, and how easily they would be if both were of one kind."""

    p: float | None
    """Two-sided p value of a permutation test; None where either group has fewer than five scores."""

    @property
    def shown(self) -> bool:
        """Whether the first group was shown to score higher, at 5 %."""
        return self.p is not None and self.p < LEVEL and self.value > 0


@dataclass(frozen=True)
class Scores:
    """The distribution of scores. ``scored + failed == asked``; measures are of what was scored, None without any."""

    asked: int
    scored: int
    failed: int
    failures: dict[str, int]
    """How often each reason occurred."""
    distribution: tuple[int, ...]
    """How many items got each score from 1 to 5."""
    mean: Interval | None
    high: Interval | None
    """Share of scores 4 and 5."""
    low: Interval | None
    """Share of scores 1 and 2."""


@dataclass(frozen=True)
class JudgeInfo:
    """Who scored."""

    model: str
    note: str
    """what readers must know of it, such as the precision of its weights"""
    local: bool
    """whether it ran here, and not behind an address"""


@dataclass(frozen=True)
class RatedLatent:
    """A latent with its score and the judge's name for it; without a score where the answer could not be used."""

    latent: int
    score: int | None
    name: str


@dataclass(frozen=True)
class RubricResult(Result):
    """How clear a judge rates what latents respond to. The SAE's digest and a number name a latent, here and in
    ``ratings.jsonl``, which holds every prompt and reply."""

    subject: Subject
    records_run: str
    """the run, in the same folder, whose records the contexts are from"""
    eligible: int
    """latents that fire in five documents or more, of which the rated ones were drawn"""
    judge: JudgeInfo
    real: Scores
    shuffled: Scores | None
    above_shuffled: Difference | None
    """by how much the mean score of latents is higher than that of shuffled contexts"""
    latents: tuple[RatedLatent, ...]
    prompt_tokens: int
    new_tokens: int
