"""Measuring an SAE on held-out text."""

from __future__ import annotations

import warnings
from pathlib import Path

from unweave.core.errors import UnweaveWarning
from unweave.core.run import Run
from unweave.data.batches import store_batches
from unweave.inputs.inputs import data_of, open_sae, sae_digest, token_store
from unweave.methods.evaluate.evaluate import drift, evaluate
from unweave.methods.evaluate.spec import EvalSpec

VERSION = 2


def run(spec: EvalSpec, runs: Path) -> Run:
    """Every number of ``evaluate.core`` on held-out text; the result holds them by name."""
    with Run.open(runs, "eval", spec, version=VERSION, inputs={"sae": sae_digest(spec.sae)}) as run:
        if run.done:
            return run
        lm, sae, record = open_sae(spec)
        data = data_of(sae, spec.data)
        model = spec.model or sae.provenance["train"]["model"]
        store, _ = token_store(lm, model, data, "heldout", spec.tokens, runs)
        _warn_of_context(data.pack.context, sae.provenance.get("data", {}).get("context"))
        metrics = evaluate(lm, sae, store_batches(lm, store, range(store.n_rows), spec.batch_tokens))
        findings = drift(metrics, sae.provenance.get("reference", {}))
        result = metrics.to_dict() | record | {"drift": findings}
        run.finish(result)
    return run


def _warn_of_context(here: int, trained: int | None) -> None:
    """Trap 8: positions beyond the ones trained on."""
    if trained is not None and here > trained:
        warnings.warn(
            f"rows of up to {here} tokens, and the SAE was trained on rows of up to {trained}",
            UnweaveWarning,
            stacklevel=3,
        )
