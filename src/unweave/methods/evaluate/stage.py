"""Measuring an SAE on held-out text."""

from __future__ import annotations

import warnings

from unweave.core.errors import UnweaveWarning
from unweave.core.stage import Context, stage
from unweave.data.batches import store_batches
from unweave.inputs.inputs import data_of, token_store
from unweave.inputs.saes import open_one
from unweave.methods.evaluate.result import Evaluation
from unweave.methods.evaluate.spec import EvalSpec
from unweave.sae.measure.evaluate import drift, evaluate


@stage("eval", version=3)
def run(spec: EvalSpec, ctx: Context) -> Evaluation:
    """Every number of ``evaluate`` on held-out text."""
    opened = open_one(spec)
    lm, sae = opened.lm, opened.sae
    data = data_of(sae, spec.data)
    store, _ = token_store(lm, opened.model, data, "heldout", spec.tokens, ctx.runs)
    trained = sae.provenance.get("data", {}).get("context")
    if trained is not None and data.pack.context > trained:  # positions beyond the ones trained on (trap 8)
        words = f"rows of up to {data.pack.context} tokens, and the SAE was trained on rows of up to {trained}"
        warnings.warn(words, UnweaveWarning, stacklevel=2)
    metrics = evaluate(lm, sae, store_batches(lm, store, range(store.n_rows), spec.batch_tokens))
    return Evaluation(opened.subject, metrics.plain(), drift(metrics, sae.provenance.get("reference", {})))
