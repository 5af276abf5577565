"""What each latent responds to and writes."""

from __future__ import annotations

from pathlib import Path

from unweave.core.run import Run
from unweave.inputs.inputs import (
    activation_source,
    data_of,
    open_sae,
    sae_digest,
    stream_of,
    token_store,
    tokens_for_records,
)
from unweave.latents.records import Records, RecordsSpec, collect
from unweave.latents.spec import LatentsSpec

VERSION = 2


def run(spec: LatentsSpec, runs: Path) -> Run:
    """Records of every latent, in the run's ``records/``."""
    with Run.open(runs, "latents", spec, version=VERSION, inputs={"sae": sae_digest(spec.sae)}) as run:
        if run.done:
            return run
        lm, sae, record = open_sae(spec)
        assert sae.read is not None
        asked, data = sae.provenance.get("train", {}), data_of(sae, spec.data)
        stored, read = tokens_for_records(data, spec.split, spec.tokens, own=spec.data is None)
        store, store_run = token_store(lm, spec.model or asked["model"], data, spec.split, stored, runs)
        # The sites of the training run, so that its activations on disk serve again.
        sites = {site for pair in lm.matching(asked.get("sites", [])) for site in pair}
        sites.add(lm.site(sae.read))
        dtype = asked.get("dtype", "float32")
        source = activation_source(lm, store, store_run, sorted(sites), stream_of(sae), dtype, runs)
        records = collect(lm, sae, source, store, RecordsSpec(seed=spec.seed), max_tokens=read)
        records.save(run.path / "records")
        fired = int((records.count > 0).sum())
        result = record | {
            "tokens": records.n_tokens,
            "latents": len(records),
            "alive": fired,
            "alive_fraction": fired / len(records),
            "special_share": records.special_share,
            "records": "records",
        }
        run.finish(result)
    return run


def load(run: Run) -> Records:
    """The records of a finished run."""
    return Records.load(run.folder("records"))
