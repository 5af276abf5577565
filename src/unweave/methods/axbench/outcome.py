"""What is kept of an experiment beside its scores: the table of all texts and ratings, pairs, detection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from unweave.core.writing import atomic_write
from unweave.latents.annotations import name_of
from unweave.methods.axbench.compare import Experiment, Ratings
from unweave.methods.axbench.generate import Handle, Job
from unweave.methods.axbench.result import RATINGS, Detection, Pair
from unweave.methods.axbench.scores import Array, harmonic, interval


def write_table(
    path: Path, experiment: Experiment, jobs: Sequence[Job], texts: Sequence[str], ratings: Sequence[Ratings]
) -> None:
    """A Parquet file with a row for every text and rater: what was asked, under which edit, the text, each rating (null
    where it failed), their harmonic mean, what the rater said, and its name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def plain(values: Array) -> list[float | None]:
        return [None if np.isnan(one) else float(one) for one in values]

    cases = [experiment.case(job, text) for job, text in zip(jobs, texts, strict=True)]
    pairs = [experiment.pairs[job.row[0]] for job in jobs]
    shared = {
        "latent": [name_of(pair.site, pair.latent) for pair in pairs],
        "concept": [case.concept for case in cases],
        "method": [job.block for job in jobs],
        "factor": [experiment.strengths(job.block)[job.row[1]] for job in jobs],
        "value": [job.changes[0].value if job.changes else None for job in jobs],
        "instruction": [case.instruction for case in cases],
        "prompt": [job.prompt for job in jobs],
        "text": [case.text for case in cases],
    }
    with atomic_write(path) as temporary:
        writer = None
        for one in ratings:
            columns = shared | {"judge": [one.rater.name] * len(jobs)}
            scores = {f"{name}_rating": one.values[:, r] for r, name in enumerate(RATINGS)} | {
                "rating": harmonic(one.values)
            }
            columns |= {name: pa.array(plain(values), pa.float64()) for name, values in scores.items()}
            columns |= {"replies": pa.array(one.replies, pa.list_(pa.string()))}
            table = pa.table(columns)
            writer = writer or pq.ParquetWriter(temporary, table.schema)
            writer.write_table(table.cast(writer.schema))
        if writer is not None:
            writer.close()


def pair_results(
    experiment: Experiment, handles: Sequence[Handle], scores: Sequence[Mapping[str, float | None]],
    detection: Array,
) -> tuple[Pair, ...]:  # fmt: skip
    """The pairs with what is known of their latents."""
    results = []
    for p, pair in enumerate(experiment.pairs):
        mean, largest, hard = map(_plain, detection[p])
        name = name_of(pair.site, pair.latent)
        results.append(
            Pair(
                name,
                pair.label.label,
                handles[p].maximum,
                dict(scores[p]),
                {"mean": mean, "max": largest, "max_hard": hard},
            )
        )
    return tuple(results)


def detections(experiment: Experiment, found: Mapping[str, Array], seed: int) -> tuple[Detection, ...]:
    """Each method's AUROC over pairs."""
    names = [pair.label.label for pair in experiment.pairs]
    return tuple(
        Detection(method, *(interval(values[:, column], names, seed) for column in range(3)))
        for method, values in found.items()
    )


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
