"""What each latent responds to and writes."""

from __future__ import annotations

from pathlib import Path

from unweave.core.run import Run
from unweave.core.stage import Context, stage
from unweave.inputs.inputs import activation_source, data_of, stream_of, token_store, tokens_for_records
from unweave.inputs.saes import open_one
from unweave.latents.records import Records, RecordsSpec, collect
from unweave.latents.result import LatentRecords
from unweave.latents.spec import LatentsSpec

RECORDS = "records"


@stage("latents", version=3)
def run(spec: LatentsSpec, ctx: Context) -> LatentRecords:
    """Records of every latent, in the run's ``records/``."""
    opened = open_one(spec)
    lm, sae = opened.lm, opened.sae
    assert sae.read is not None
    asked, data = sae.provenance.get("train", {}), data_of(sae, spec.data)
    stored, read = tokens_for_records(data, spec.split, spec.tokens, own=spec.data is None)
    store, store_run = token_store(lm, opened.model, data, spec.split, stored, ctx.runs)
    # The sites of the training run, so that its activations on disk serve again.
    sites = {site for pair in lm.matching(asked.get("sites", [])) for site in pair}
    sites.add(lm.site(sae.read))
    dtype = asked.get("dtype", "float32")
    source = activation_source(lm, store, store_run, sorted(sites), stream_of(sae), dtype, ctx.runs)
    records = collect(lm, sae, source, store, RecordsSpec(seed=spec.seed), max_tokens=read)
    records.save(ctx.path / RECORDS)
    return LatentRecords(
        subject=opened.subject,
        tokens=records.n_tokens,
        latents=len(records),
        alive=int((records.count > 0).sum()),
        special_share=records.special_share,
        records=Path(RECORDS),
    )


def load(run: Run[LatentRecords]) -> Records:
    """The records of a finished run."""
    return Records.load(run.folder(RECORDS))
