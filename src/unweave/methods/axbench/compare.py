"""Steering methods compared on the same concepts and instructions, as AxBench does (Wu et al. 2025).

1. Every pair gets its own instructions, each answered at every strength of every method, in batches of all of them.
2. Each rater rates every text: concept, instruction, fluency.
3. A pair's strength is chosen on some instructions and reported on others (``scores``); concepts are the bootstrap's
   unit, and methods are compared with random latents pair by pair.
4. Suppression: the prompt asks for the concept, and what the latent writes is taken away, or everything along its
   direction; what is left of the concept in the former and not in the latter came back through the SAE's error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from unweave.core.intervals import Interval, interval, rank_correlation
from unweave.core.pieces import Pieces
from unweave.core.progress import Task, task
from unweave.core.writing import atomic_write
from unweave.judge.check import Check
from unweave.latents.annotations import Pair, name_of
from unweave.methods.axbench import result
from unweave.methods.axbench.directions import adapted
from unweave.methods.axbench.forms import Case
from unweave.methods.axbench.generate import Handle, Job, Setting, by_chunks, sweep, write
from unweave.methods.axbench.scores import Array, Chosen, Split, choose, nanmean, plain, scored
from unweave.methods.axbench.spec import GenerationSpec, LearningSpec

_Rated = tuple[tuple[float | None, ...], tuple[str, ...]]
"""ratings (None where they failed), and what was said"""


class Rater(Protocol):
    """Whoever rates texts: a chat model, or scripted truth."""

    @property
    def name(self) -> str: ...

    @property
    def note(self) -> str: ...

    def rate(self, cases: Sequence[Case], ratings: Sequence[str] = result.RATINGS) -> tuple[Array, list[list[str]]]: ...


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
        has_none = method in ("unedited", "prompt", "lora") or method.startswith("suppress")
        return (None,) if has_none else tuple(self.factors)

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
            for edit in result.SUPPRESSIONS if self.suppression else ():
                changes = () if edit == "prompt" else handles["sae"][p].suppressed(span=edit == "span")
                jobs += sweep(f"suppress-{edit}", p, wished, [changes])
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
    texts = write(setting.lm, jobs, experiment.generation, setting.seed, pieces)
    if "lora" in experiment.methods:
        with task("LoRA", total=experiment.instructions.size, unit="texts") as shown:
            for p in range(len(experiment.pairs)):
                own, piece = sweep("lora", p, experiment.asked(p), [()]), f"lora-{p:04}"
                if pieces.has(piece):
                    shown.advance(len(own))
                make = partial(_adapted_texts, setting, own, experiment, learning, shown)
                texts += pieces.value(piece, tuple[str, ...], make)
                jobs += own
    return jobs, texts


def _adapted_texts(
    setting: Setting, jobs: Sequence[Job], experiment: Experiment, learning: LearningSpec, shown: Task
) -> tuple[str, ...]:
    examples = setting.concepts[experiment.pairs[jobs[0].row[0]].label.label].train_with
    with adapted(setting.lm, examples, most=learning.tokens, options=learning.lora, seed=setting.seed):
        return tuple(write(setting.lm, jobs, experiment.generation, setting.seed, Pieces(None), shown))


def rate_all(rater: Rater, cases: Sequence[Case], pieces: Pieces, name: str) -> Ratings:
    """Ratings of all cases; equal ones are rated once, finished chunks are kept in ``pieces``."""

    def rate(part: Sequence[Case], _start: int, shown: Task) -> tuple[_Rated, ...]:
        values, replies = rater.rate(part)
        shown.advance(len(part))
        return tuple((tuple(map(plain, row)), tuple(said)) for row, said in zip(values, replies, strict=True))

    rated = by_chunks(cases, rate, pieces, name, _Rated)
    values = np.array([rated[case][0] for case in cases], dtype=float)  # None becomes NaN
    return Ratings(rater, values, [list(rated[case][1]) for case in cases])


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
) -> result.Judged:  # fmt: skip
    """The scores of all methods from one rater's ratings."""
    by_block = blocks(jobs, ratings.values)
    methods = [method for method in result.METHODS if method in by_block]
    chosen = {method: [_chosen(block, splits) for block in by_block[method]] for method in methods}
    values = {method: np.array([[one.rating, *one.parts] for one in chosen[method]]) for method in methods}
    mean = partial(interval, groups=[pair.label.label for pair in experiment.pairs], seed=seed)
    scores = []
    for method, own in values.items():
        rating, *parts = map(mean, own.T)
        paired = "random" in values and method != "random"
        above = [mean((own - values["random"])[:, column]) if paired else None for column in (0, 1)]
        scores.append(result.Score(method, rating, tuple(parts), *above))
    return result.Judged(
        ratings.rater.name, ratings.rater.note, tuple(checks), tuple(scores),
        tuple(_points(experiment, {method: by_block[method] for method in methods})),
        tuple(_rated(experiment, by_block, chosen)),
        tuple(_selections(pair_scores, values["sae"], mean)) if "sae" in values else (),
        tuple(_suppressions(by_block, mean)) if experiment.suppression else (),
    )  # fmt: skip


def _chosen(ratings: Array, splits: Sequence[Split]) -> Chosen:
    """Without strengths to choose from, the plain mean over all instructions (as the paper does for prompts)."""
    everything = np.arange(ratings.shape[1])
    return choose(ratings, splits if len(ratings) > 1 else [(everything, everything)])


def _rated(
    experiment: Experiment, by_block: Mapping[str, Array], chosen: Mapping[str, Sequence[Chosen]]
) -> Iterator[result.Rated]:
    for method, scores in chosen.items():
        for pair, score, ratings in zip(experiment.pairs, scores, by_block[method], strict=True):
            strength = experiment.strengths(method)[score.strength]
            yield result.Rated(
                name_of(pair.site, pair.latent), pair.label.label, method, strength, plain(score.rating),
                tuple(map(plain, score.parts)), int(np.isnan(ratings).any(-1).sum()),
            )  # fmt: skip


def _points(experiment: Experiment, by_block: Mapping[str, Array]) -> Iterator[result.Point]:
    for method, ratings in by_block.items():
        means = nanmean(scored(ratings), (0, 2))
        for factor, (rating, *parts) in zip(experiment.strengths(method), means, strict=True):
            yield result.Point(method, factor, plain(rating), tuple(map(plain, parts)))


def _selections(
    pair_scores: Sequence[Mapping[str, float | None]], values: Array, mean: partial[Interval | None]
) -> Iterator[result.Selection]:
    """The better half of the pairs by each score that at least four of them have; values [pairs, 1 + ratings]."""
    ratings = values[:, 0]
    for name in dict.fromkeys(key for scores in pair_scores for key in scores):
        score = np.array([scores.get(name) for scores in pair_scores], dtype=float)
        known = ~np.isnan(score) & ~np.isnan(ratings)
        if (n := int(known.sum())) < 4:
            continue
        order = np.argsort(np.where(known, -score, np.inf), kind="stable")
        best = np.isin(np.arange(len(score)), order[: n // 2])
        rating, in_concept = (mean(np.where(best, values[:, column], np.nan)) for column in (0, 1))
        others = mean(np.where(known & ~best, ratings, np.nan))
        yield result.Selection(name, n // 2, rating, in_concept, others, rank_correlation(score[known], ratings[known]))


def _suppressions(by_block: Mapping[str, Array], mean: partial[Interval | None]) -> Iterator[result.Suppression]:
    means = {edit: nanmean(by_block[f"suppress-{edit}"][:, 0], 1) for edit in result.SUPPRESSIONS}
    for edit, ratings in means.items():
        less = None if edit == "prompt" else mean((means["prompt"] - ratings)[:, 0])
        yield result.Suppression(edit, tuple(map(mean, ratings.T)), less)


_TEXT = ("latent", "concept", "method", "instruction", "prompt", "text", "judge")
_NUMBER = ("factor", "value", "rating", *(f"{name}_rating" for name in result.RATINGS))


def write_table(
    path: Path, experiment: Experiment, jobs: Sequence[Job], texts: Sequence[str], ratings: Sequence[Ratings]
) -> None:
    """A Parquet file with a row for every text and rater: what was asked, under which edit, the text, each rating (null
    where it failed), their harmonic mean, what the rater said, and its name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = (
        dict.fromkeys(_TEXT, pa.string()) | dict.fromkeys(_NUMBER, pa.float64()) | {"replies": pa.list_(pa.string())}
    )
    schema = pa.schema(kinds)
    with atomic_write(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for one in ratings:
            rows = []
            for job, text, values, replies in zip(jobs, texts, scored(one.values), one.replies, strict=True):
                pair, case = experiment.pairs[job.row[0]], experiment.case(job, text)
                rows.append(
                    {"latent": name_of(pair.site, pair.latent), "concept": case.concept, "method": job.block}
                    | {"factor": experiment.strengths(job.block)[job.row[1]], "instruction": case.instruction}
                    | {"value": job.changes[0].value if job.changes else None, "prompt": job.prompt, "text": text}
                    | dict(zip(_NUMBER[2:], map(plain, values), strict=True))
                    | {"judge": one.rater.name, "replies": replies}
                )
            writer.write_table(pa.Table.from_pylist(rows, schema))


def left_out_of(experiment: Experiment, reasons: Mapping[str, str]) -> tuple[result.LeftOut, ...]:
    """The pairs of concepts that have a reason to be left out."""
    pairs = [pair for pair in experiment.pairs if pair.label.label in reasons]
    return tuple(
        result.LeftOut(name_of(pair.site, pair.latent), pair.label.label, reasons[pair.label.label]) for pair in pairs
    )


def pair_results(
    experiment: Experiment, handles: Sequence[Handle], scores: Sequence[Mapping[str, float | None]], detection: Array
) -> tuple[result.Pair, ...]:
    """The pairs with what is known of their latents."""
    return tuple(
        result.Pair(
            name_of(pair.site, pair.latent), pair.label.label, handle.maximum, dict(known),
            dict(zip(("mean", "max", "max_hard"), map(plain, values), strict=True)),
        )
        for pair, handle, known, values in zip(experiment.pairs, handles, scores, detection, strict=True)
    )  # fmt: skip


def detections(experiment: Experiment, found: Mapping[str, Array], seed: int) -> tuple[result.Detection, ...]:
    """Each method's AUROC over pairs."""
    names = [pair.label.label for pair in experiment.pairs]
    return tuple(
        result.Detection(method, *(interval(column, names, seed) for column in values.T))
        for method, values in found.items()
    )
