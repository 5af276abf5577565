"""Steering methods compared on the same concepts and instructions, as AxBench does (Wu et al. 2025).

1. Every pair gets its own instructions, each answered at every strength of every method, in batches of all of them.
2. Each rater rates every text: concept, instruction, fluency.
3. A pair's strength is chosen on some instructions and reported on others (``scores``); concepts are the bootstrap's
   unit, and methods are compared with random latents pair by pair.
4. Suppression: the prompt asks for the concept, and what the latent writes is taken away, or everything along its
   direction; what is left of the concept in the former and not in the latter came back through the SAE's error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from unweave.core.pieces import Pieces
from unweave.core.progress import task
from unweave.judge.check import Check
from unweave.latents.annotations import Pair, name_of
from unweave.methods.axbench import generate
from unweave.methods.axbench.forms import Case
from unweave.methods.axbench.generate import Handle, Job, Setting, sweep
from unweave.methods.axbench.lora import adapted
from unweave.methods.axbench.options import GenerationSpec, LearningSpec
from unweave.methods.axbench.result import (
    METHODS,
    RATINGS,
    SUPPRESSIONS,
    Interval,
    Judged,
    Point,
    Rated,
    Score,
    Selection,
    Suppression,
)
from unweave.methods.axbench.scores import Array, Chosen, Split, choose, harmonic, interval

_CHUNK = 256
"""cases that are rated before they are kept"""


class Rater(Protocol):
    """Whoever rates texts: a chat model, or scripted truth."""

    @property
    def name(self) -> str: ...

    @property
    def note(self) -> str: ...

    def rate(self, cases: Sequence[Case], ratings: Sequence[str] = RATINGS) -> tuple[Array, list[list[str]]]: ...


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What is compared. ``instructions`` [pairs, n] are places in ``pool``; ``prompts`` ask for each pair's concept."""

    pairs: Sequence[Pair]
    methods: Sequence[str]
    factors: Sequence[float]
    pool: Sequence[str]
    instructions: Array
    prompts: Sequence[str]
    suppression: bool = True
    generation: GenerationSpec = GenerationSpec()

    def strengths(self, method: str) -> tuple[float | None, ...]:
        """The factors of a method; one None for those without a strength."""
        return (
            (None,)
            if method in ("unedited", "prompt", "lora") or method.startswith("suppress")
            else tuple(self.factors)
        )

    @property
    def n_texts(self) -> int:
        """How many texts this asks for, equal ones counted each time."""
        per_pair = sum(len(self.strengths(method)) for method in self.methods) + 3 * self.suppression
        return per_pair * self.instructions.size

    def jobs(self, handles: Mapping[str, Sequence[Handle]]) -> list[Job]:
        """Every text to write but LoRA's."""
        jobs: list[Job] = []
        for p in range(len(self.pairs)):
            plain = self.asked(p)
            wished = [f"{self.prompts[p]}\n\nQuestion: {instruction}" for instruction in plain]
            for method in self.methods:
                if method in ("unedited", "prompt"):
                    jobs += sweep(method, p, wished if method == "prompt" else plain, [()])
                elif method != "lora":
                    jobs += sweep(method, p, plain, [handles[method][p].steered(factor) for factor in self.factors])
            if self.suppression:
                latent = handles["sae"][p]
                changes = {"prompt": (), "latent": latent.suppressed(span=False), "span": latent.suppressed(span=True)}
                for name, change in changes.items():
                    jobs += sweep(f"suppress-{name}", p, wished, [change])
        return jobs

    def asked(self, pair: int) -> list[str]:
        """The instructions of a pair."""
        return [self.pool[int(i)] for i in self.instructions[pair]]

    def case(self, job: Job, text: str) -> Case:
        pair, _, i = job.row
        return Case(self.pairs[pair].label.label, self.asked(pair)[i], text)


@dataclass(frozen=True)
class Ratings:
    """One rater's ratings of every job [jobs, 3], with what it said."""

    rater: Rater
    values: Array
    replies: list[list[str]]


def written(
    setting: Setting, experiment: Experiment, handles: Mapping[str, Sequence[Handle]], learning: LearningSpec,
    pieces: Pieces,
) -> tuple[list[Job], list[str]]:  # fmt: skip
    """Every job with its text."""
    jobs = experiment.jobs(handles)
    texts = generate.write(setting.lm, jobs, experiment.generation, setting.seed, pieces)
    if "lora" not in experiment.methods:
        return jobs, texts
    with task("LoRA", total=len(experiment.pairs), unit="pairs") as shown:
        for p in range(len(experiment.pairs)):
            own = sweep("lora", p, experiment.asked(p), [()])
            make = partial(_adapted_texts, setting, own, experiment, learning)
            texts += pieces.value(f"lora-{p:04}", tuple[str, ...], make)
            jobs += own
            shown.advance()
    return jobs, texts


def _adapted_texts(
    setting: Setting, jobs: Sequence[Job], experiment: Experiment, learning: LearningSpec
) -> tuple[str, ...]:
    examples = setting.concepts[concept(experiment.pairs[jobs[0].row[0]])].train_with
    with adapted(setting.lm, examples, most=learning.tokens, options=learning.lora, seed=setting.seed):
        return tuple(
            generate.write(setting.lm, jobs, experiment.generation, setting.seed, Pieces(None), "LoRA's texts")
        )


def rate_all(rater: Rater, cases: Sequence[Case], pieces: Pieces, name: str) -> Ratings:
    """Ratings of all cases; equal ones are rated once, finished chunks are kept in ``pieces``."""
    alike: dict[Case, int] = {}
    which = [alike.setdefault(case, len(alike)) for case in cases]
    distinct = list(alike)
    values, replies = [], []
    for start in range(0, len(distinct), _CHUNK):
        make = partial(_plain_ratings, rater, distinct[start : start + _CHUNK])
        kind = tuple[tuple[tuple[float | None, ...], tuple[str, ...]], ...]
        for row, said in pieces.value(f"{name}-{start:07}", kind, make):
            values.append([math.nan if one is None else one for one in row])
            replies.append(list(said))
    return Ratings(rater, np.array(values)[which], [replies[i] for i in which])


def _plain_ratings(rater: Rater, cases: Sequence[Case]) -> tuple[tuple[tuple[float | None, ...], tuple[str, ...]], ...]:
    values, replies = rater.rate(cases)
    plain = [tuple(None if math.isnan(one) else float(one) for one in row) for row in values]
    return tuple((row, tuple(said)) for row, said in zip(plain, replies, strict=True))


def blocks(jobs: Sequence[Job], values: Array) -> dict[str, Array]:
    """Ratings [jobs, R] by block, [pairs, strengths, instructions, R]."""
    rows: dict[str, list[int]] = {}
    for i, job in enumerate(jobs):
        rows.setdefault(job.block, []).append(i)
    shaped = {}
    for block, mine in rows.items():
        places = np.array([jobs[i].row for i in mine])
        shaped[block] = np.full((*(places.max(0) + 1), values.shape[1]), np.nan)
        shaped[block][tuple(places.T)] = values[mine]
    return shaped


def judge(
    experiment: Experiment, jobs: Sequence[Job], ratings: Ratings, splits: Sequence[Split],
    pair_scores: Sequence[Mapping[str, float | None]], checks: Sequence[Check], seed: int = 0,
) -> Judged:  # fmt: skip
    """The scores of all methods from one rater's ratings."""
    by_block = blocks(jobs, ratings.values)
    names = [concept(pair) for pair in experiment.pairs]
    methods = [method for method in METHODS if method in by_block]
    chosen = {method: [_chosen(block, splits) for block in by_block[method]] for method in methods}
    mean = partial(interval, concepts=names, seed=seed)
    random = chosen.get("random")
    scores = []
    for method in methods:
        own = chosen[method]
        against = None if random is None or method == "random" else list(zip(own, random, strict=True))
        scores.append(
            Score(
                method,
                mean([one.rating for one in own]),
                tuple(mean([one.parts[r] for one in own]) for r in range(len(RATINGS))),
                None if against is None else mean([a.rating - b.rating for a, b in against]),
                None if against is None else mean([a.parts[0] - b.parts[0] for a, b in against]),
            )
        )
    return Judged(
        ratings.rater.name, ratings.rater.note, tuple(checks), tuple(scores),
        tuple(_points(experiment, {method: by_block[method] for method in methods})),
        tuple(_rated(experiment, by_block, chosen)),
        tuple(_selections(pair_scores, chosen["sae"], mean)) if "sae" in chosen else (),
        tuple(_suppressions(by_block, mean)) if experiment.suppression else (),
    )  # fmt: skip


def concept(pair: Pair) -> str:
    """What a pair's label names; the unit of the bootstrap."""
    return pair.label.label


def _chosen(ratings: Array, splits: Sequence[Split]) -> Chosen:
    """Without strengths to choose from, the plain mean over all instructions (as the paper does for prompts)."""
    everything = np.arange(ratings.shape[1])
    return choose(ratings, splits if len(ratings) > 1 else [(everything, everything)])


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _rated(
    experiment: Experiment, by_block: Mapping[str, Array], chosen: Mapping[str, Sequence[Chosen]]
) -> Iterator[Rated]:
    for method, scores in chosen.items():
        for p, (pair, score) in enumerate(zip(experiment.pairs, scores, strict=True)):
            yield Rated(
                name_of(pair.site, pair.latent), concept(pair), method, experiment.strengths(method)[score.strength],
                _plain(score.rating), tuple(map(_plain, score.parts)),
                int(np.isnan(by_block[method][p]).any(-1).sum()),
            )  # fmt: skip


def _points(experiment: Experiment, by_block: Mapping[str, Array]) -> Iterator[Point]:
    for method, ratings in by_block.items():
        for s, factor in enumerate(experiment.strengths(method)):
            rows = ratings[:, s].reshape(-1, ratings.shape[-1])
            together = _mean(harmonic(rows))
            yield Point(method, factor, together, tuple(_mean(rows[:, r]) for r in range(rows.shape[1])))


def _mean(values: Array) -> float | None:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None


def _selections(
    pair_scores: Sequence[Mapping[str, float | None]], chosen: Sequence[Chosen], mean: partial[Interval | None]
) -> Iterator[Selection]:
    """The better half of the pairs by each score that at least four of them have."""
    from scipy.stats import rankdata

    for name in dict.fromkeys(key for scores in pair_scores for key in scores):
        values = np.array([np.nan if scores.get(name) is None else scores[name] for scores in pair_scores], dtype=float)
        ratings = np.array([one.rating for one in chosen])
        known = ~np.isnan(values) & ~np.isnan(ratings)
        if known.sum() < 4:
            continue
        order = np.argsort(np.where(known, -values, np.inf), kind="stable")
        best = np.isin(np.arange(len(values)), order[: int(known.sum()) // 2])
        varied = len(set(values[known])) > 1 and len(set(ratings[known])) > 1
        yield Selection(
            name, int(best.sum()), mean(np.where(best, ratings, np.nan)),
            mean(np.where(best, [one.parts[0] for one in chosen], np.nan)),
            mean(np.where(known & ~best, ratings, np.nan)),
            float(np.corrcoef(rankdata(values[known]), rankdata(ratings[known]))[0, 1]) if varied else None,
        )  # fmt: skip


def _suppressions(by_block: Mapping[str, Array], mean: partial[Interval | None]) -> Iterator[Suppression]:
    means = {name: np.array([[_nan(_mean(rows)) for rows in pair[0].T] for pair in by_block[f"suppress-{name}"]])
             for name in SUPPRESSIONS}  # fmt: skip
    for name, of_pairs in means.items():
        less = None if name == "prompt" else mean(means["prompt"][:, 0] - of_pairs[:, 0])
        yield Suppression(name, tuple(mean(of_pairs[:, r]) for r in range(len(RATINGS))), less)


def _nan(value: float | None) -> float:
    return math.nan if value is None else value
