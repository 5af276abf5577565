"""Labelling latents by texts with tags."""

from __future__ import annotations

from pathlib import Path

from unweave.core.stage import Context, stage
from unweave.inputs.saes import open_saes
from unweave.latents.annotations import Annotation, ScoredLabel, name_of, write
from unweave.methods.labels.labels import label
from unweave.methods.labels.result import LabelsResult, SiteLabels
from unweave.methods.labels.spec import LabelsSpec
from unweave.tasks.tagged.texts import open_tagged

ANNOTATIONS = "labels.jsonl"


@stage("labels", version=1)
def run(spec: LabelsSpec, ctx: Context) -> LabelsResult:
    """Labels latents of all SAEs; ``labels.jsonl`` in the run's folder is a file of annotations. The handle is the SAEs
    where they are open already."""
    texts = open_tagged(spec.texts)
    opened = ctx.handle or open_saes(spec)
    found = label(
        opened.lm,
        opened.saes,
        texts,
        spec.match,
        folder=ctx.path / "parts",
        context=spec.context,
        batch_tokens=spec.batch_tokens,
        seed=spec.seed,
    )
    digests = {site: sae.digest() for site, sae in opened.saes.items()}
    write(ctx.path / ANNOTATIONS, [one for site in found.sites for one in lines_of(site, digests[site.site])])
    return LabelsResult(
        subject=opened.subject,
        source=texts.source,
        notes=texts.notes,
        chosen_on=found.chosen_on,
        heldout=found.heldout,
        uncounted=found.uncounted,
        labels=len(texts.names),
        supported=found.supported,
        prior=spec.match.prior,
        sites=found.sites,
        annotations=Path(ANNOTATIONS),
    )


def lines_of(site: SiteLabels, sae: str) -> list[Annotation]:
    """A line for each latent that has a label, with all its labels."""
    by_latent: dict[int, list[ScoredLabel]] = {}
    for pair in site.pairs:
        by_latent.setdefault(pair.latent, []).append(pair.label)
    return [
        Annotation(name_of(site.site, latent), "; ".join(one.label for one in labels), sae=sae, labels=tuple(labels))
        for latent, labels in by_latent.items()
    ]
