"""The paper from texts to table: SAEs, labels, their tests, steering, a page.

Each part is a run of its own, so an interrupted recipe goes on where it was and a finished part is not done again.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from unweave.core.run import Run
from unweave.core.stage import Context, stage
from unweave.methods.axbench import stage as axbench
from unweave.methods.axbench.result import Comparison
from unweave.methods.axbench.spec import AxbenchSpec
from unweave.methods.labels import stage as labels
from unweave.methods.labels.result import LabelsResult, survival
from unweave.methods.labels.spec import LabelsSpec
from unweave.methods.train import stage as train
from unweave.methods.train.result import Training
from unweave.papers.labelled_steering import texts, view
from unweave.papers.labelled_steering.plan import LOW, SEED, Plan, plan_of, with_texts
from unweave.papers.labelled_steering.result import (
    F1,
    Labelled,
    LabelledSteering,
    MixResult,
    Sample,
    Steered,
    Survival,
)
from unweave.papers.labelled_steering.simulation import simulate
from unweave.papers.labelled_steering.spec import LabelledSteeringSpec
from unweave.papers.parts import PartRun, named
from unweave.tasks.tagged.spec import TaggedSpec

Key = tuple[str, str, F1]
"""(corpus, set of SAEs, way of labelling)"""
_SAMPLED = 4
"""pairs whose texts are shown"""


@dataclass
class Parts:
    """The finished runs that the result is made from."""

    mixed: Run[MixResult] | None = None
    trained: Run[Training] | None = None
    labelled: dict[Key, Run[LabelsResult]] = field(default_factory=dict)
    steered: dict[Key, Run[Comparison]] = field(default_factory=dict)

    def all(self) -> Iterator[PartRun]:
        """Every run by what it is of."""
        if self.mixed is not None:
            yield PartRun("texts", "", self.mixed.path.name)
        if self.trained is not None:
            yield PartRun("train", "", self.trained.path.name)
        for key, one in self.labelled.items():
            yield PartRun("labels", ", ".join(key), one.path.name)
        for key, one in self.steered.items():
            yield PartRun("axbench", ", ".join(key), one.path.name)


def run(spec: LabelledSteeringSpec, runs: Path) -> Run[LabelledSteering]:
    """Everything of the paper at one scale. The run holds the tables and ``report.html``.

    Parts are asked for every time, at little cost where they are finished, so that a page is never of other parts.
    """
    return together(spec, runs, parts_of(plan_of(spec), runs))


def parts_of(plan: Plan, runs: Path) -> Parts:
    """Everything that a plan asks for."""
    parts = Parts()
    corpora, training = plan.corpora, plan.training
    if plan.mix is not None:
        parts.mixed = texts.run(plan.mix, runs)
        corpora = {"mixed": TaggedSpec(source=str(parts.mixed.file(texts.TAGGED)))}
        training = None if training is None else with_texts(training, str(parts.mixed.file(texts.TRAIN)))
    saes = dict(plan.saes)
    if training is not None:
        parts.trained = train.run(training, runs)
        saes |= {name: _folders(parts.trained, variant) for name, variant in plan.variants.items()}
        gc.collect()  # trainers and activations take gigabytes
    for corpus, tagged in corpora.items():
        for name, f1 in (*plan.comparisons, *plan.labelled):
            drawn = replace(tagged, texts=plan.drawn)
            parts.labelled[corpus, name, f1] = _labelled(plan, saes[name], drawn, f1, runs)
        for (name, f1), methods in plan.comparisons.items():
            pairs = parts.labelled[corpus, name, f1]
            asked = {
                "saes": saes[name],
                "pairs": str(pairs.file(str(pairs.result.annotations))),
                "texts": tagged.to_dict(),
            }
            steering = AxbenchSpec.from_dict({**plan.shared, **plan.compare, **asked, "methods": methods})
            parts.steered[corpus, name, f1] = axbench.run(steering, runs)
    return parts


def _folders(trained: Run[Training], variant: str) -> tuple[str, ...]:
    """The SAEs of one variant, one a site."""
    return tuple(
        str(train.sae_folder(trained, sae.name)) for sae in trained.result.saes if Path(sae.name).name == variant
    )


def _labelled(plan: Plan, saes: tuple[str, ...], tagged: TaggedSpec, f1: F1, runs: Path) -> Run[LabelsResult]:
    match = plan.labels["match"] | ({"prior": None} if f1 == "ordinary" else {})
    asked = {**plan.shared, **plan.labels, "match": match, "saes": saes, "texts": tagged.to_dict()}
    return labels.run(LabelsSpec.from_dict(asked), runs)


@stage("paper-labelled-steering", version=1, also=named)
def together(spec: LabelledSteeringSpec, ctx: Context) -> LabelledSteering:
    """The result and pages of parts that are finished; the handle is ``Parts``."""
    parts: Parts = ctx.handle
    main = next(run for (_, name, f1), run in parts.steered.items() if (name, f1) == (LOW, "calibrated"))
    result = LabelledSteering(
        scale=spec.scale,
        labelled=tuple(Labelled(*key, one.result) for key, one in parts.labelled.items()),
        steered=tuple(Steered(*key, one.result) for key, one in parts.steered.items()),
        survival=tuple(_survivals(parts.labelled)),
        origin={} if parts.mixed is None else parts.mixed.result.origin,
        samples=samples(main.result, main.file(str(main.result.generations))),
        simulation=simulate(),
        runs=tuple(parts.all()),
    )
    view.write(result, ctx.path)
    return result


def _survivals(labelled: Mapping[Key, Run[LabelsResult]]) -> Iterator[Survival]:
    """Of the first corpus, where SAEs of another seed were labelled."""
    for (corpus, name, f1), other in labelled.items():
        if name == SEED:
            own = labelled[corpus, LOW, f1]
            for one, two in zip(own.result.sites, other.result.sites, strict=True):
                yield Survival(one.site, len(one.labels), survival(one, two))


def samples(comparison: Comparison, table: Path) -> tuple[Sample, ...]:
    """What was generated for the best pairs: an instruction each, unedited where there is such a text, and steered by
    the latent and by a random one at the strength chosen for the latent."""
    import pyarrow.parquet as pq

    judged = comparison.judged[0]
    own = sorted((one for one in judged.rated if one.method == "sae"), key=lambda one: -(one.rating or 0.0))
    rows = [row for row in pq.read_table(table).to_pylist() if row["judge"] == judged.judge]
    shown = []
    for pair in own[:_SAMPLED]:
        of_pair = [row for row in rows if (row["latent"], row["concept"]) == (pair.pair, pair.concept)]
        instruction = of_pair[0]["instruction"]
        for method, factor in (("unedited", None), ("sae", pair.strength), ("random", pair.strength)):
            shown += [
                Sample(pair.pair, pair.concept, method, factor, instruction, row["text"], row["rating"])
                for row in of_pair
                if (row["method"], row["factor"], row["instruction"]) == (method, factor, instruction)
            ]
    return tuple(shown)
