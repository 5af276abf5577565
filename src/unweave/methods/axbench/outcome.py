"""What is kept of an experiment beside its scores: the table of all texts and ratings, pairs, detection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from unweave.core.intervals import interval
from unweave.core.writing import atomic_write
from unweave.latents.annotations import name_of
from unweave.methods.axbench.compare import Experiment, Ratings
from unweave.methods.axbench.generate import Handle, Job
from unweave.methods.axbench.result import RATINGS, Detection, LeftOut, Pair
from unweave.methods.axbench.scores import Array, plain, scored

_TEXT = ("latent", "concept", "method", "instruction", "prompt", "text", "judge")
_NUMBER = ("factor", "value", "rating", *(f"{name}_rating" for name in RATINGS))


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


def left_out_of(experiment: Experiment, reasons: Mapping[str, str]) -> tuple[LeftOut, ...]:
    """The pairs of concepts that have a reason to be left out."""
    pairs = [pair for pair in experiment.pairs if pair.label.label in reasons]
    return tuple(
        LeftOut(name_of(pair.site, pair.latent), pair.label.label, reasons[pair.label.label]) for pair in pairs
    )


def pair_results(
    experiment: Experiment, handles: Sequence[Handle], scores: Sequence[Mapping[str, float | None]], detection: Array
) -> tuple[Pair, ...]:
    """The pairs with what is known of their latents."""
    return tuple(
        Pair(
            name_of(pair.site, pair.latent), pair.label.label, handle.maximum, dict(known),
            dict(zip(("mean", "max", "max_hard"), map(plain, values), strict=True)),
        )
        for pair, handle, known, values in zip(experiment.pairs, handles, scores, detection, strict=True)
    )  # fmt: skip


def detections(experiment: Experiment, found: Mapping[str, Array], seed: int) -> tuple[Detection, ...]:
    """Each method's AUROC over pairs."""
    names = [pair.label.label for pair in experiment.pairs]
    return tuple(
        Detection(method, *(interval(column, names, seed) for column in values.T)) for method, values in found.items()
    )
