"""What explanations of latents and their scores hold. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unweave.core.intervals import Interval
from unweave.core.result import Result
from unweave.inputs.subject import Subject
from unweave.judge.check import Check
from unweave.methods.explain.rubric.result import Difference, JudgeInfo

OUTPUT = 0.01
"""The output score from which a latent counts as one of output, as Arad et al. recommend."""
INPUT = 0.2
"""The share of contexts from which a latent counts as one of input."""
Kind = Literal["input", "output", "both", "neither"]


@dataclass(frozen=True)
class Estimate:
    """What asking would take, from the prompts themselves with a stand-in of an explanation."""

    prompts: int
    prompt_tokens: int
    """at four bytes each"""
    new_tokens: int
    price: float | None
    """in the currency of the prices given; None where none are"""
    tokens_per_latent: int


@dataclass(frozen=True)
class ScoreSummary:
    """A score over latents, beside its controls; see ``docs/explain.md`` for what each means."""

    score: str
    chosen: Interval | None
    """mean over the latents that were chosen"""
    shuffled: Interval | None
    """the same contexts under another latent's explanation; for the rubric, contexts of five different latents"""
    above: Difference | None
    """how far the first is above the second, paired by latent (not for the rubric)"""
    random: Interval | None
    """mean over latents drawn at random, beside those that were named"""
    asked: int
    """answers, all latents and controls together"""
    failed: int
    failures: dict[str, int]


@dataclass(frozen=True)
class ExplainedLatent:
    """A latent, what was said of it, and how well that holds. ``scores`` and ``shuffled`` have a value per score."""

    latent: int
    random: bool
    """whether it is one of the control, drawn at random beside those named"""
    explanation: str
    failure: str
    """why there is no explanation; empty where there is one"""
    scores: dict[str, float | None]
    shuffled: dict[str, float | None]
    input_score: float | None
    """share of the contexts seen whose strongest token is among the 20 that the latent promotes most"""
    output_score: float | None
    """``sae/output_score.py``; None where the SAE does not write into the residual stream"""
    relevance: float | None
    """to the query, from 0 to 1 (cosines from -1)"""
    selected: bool | None
    """whether that is enough; None without a query"""

    @property
    def kind(self) -> Kind | None:
        """What the latent is about, what the model reads or what it says."""
        if self.input_score is None or self.output_score is None:
            return None
        reads, writes = self.input_score >= INPUT, self.output_score >= OUTPUT
        return "both" if reads and writes else "input" if reads else "output" if writes else "neither"


@dataclass(frozen=True)
class ExplainResult(Result):
    """Explanations of latents with their scores; ``answers.parquet`` beside it has every prompt and reply."""

    subject: Subject
    judge: JudgeInfo
    records_run: str
    """the run, in the same folder, whose records the contexts are from"""
    too_few: tuple[int, ...]
    """latents that were left out because they have too few contexts"""
    estimate: Estimate
    seconds: float | None
    """what asking would take, from one prompt; only where nothing else was asked"""
    check: Check | None
    scores: tuple[ScoreSummary, ...]
    latents: tuple[ExplainedLatent, ...]
    prompt_tokens: int
    new_tokens: int
