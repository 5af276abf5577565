"""Special tokens: how well an SAE describes them, which latents answer to them, and what adding such a latent does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from unweave.core.errors import UnweaveError
from unweave.core.stage import Context, stage
from unweave.data.batches import store_batches
from unweave.data.tokens import TokenStore
from unweave.inputs.inputs import data_of, token_store
from unweave.inputs.saes import Opened, open_one
from unweave.lm.chat import Role
from unweave.methods.special_tokens import view
from unweave.methods.special_tokens.errors import special_token_errors
from unweave.methods.special_tokens.maxima import alpha_sweep, average_maxima, random_latents, strongest, sweet_spot
from unweave.methods.special_tokens.result import SpecialTokenResult, Steering
from unweave.methods.special_tokens.spec import SpecialTokensSpec
from unweave.tasks.special_tokens import QUESTIONS, SpecialTokens


@stage("special-tokens", version=4)
def run(spec: SpecialTokensSpec, ctx: Context) -> SpecialTokenResult:
    """Errors by role, the special tokens' latents, and answers along alpha; tables and figures in the run's folder."""
    opened = open_one(spec)
    lm, sae = opened.lm, opened.sae
    special = SpecialTokens.of(lm, spec.special_ids or None, spec.where)
    store, rows = _conversations(spec, opened, ctx.runs)
    batches = store_batches(lm, store, rows, spec.batch_tokens)
    errors = special_token_errors(lm, {"": sae}, batches, special=special)[""]
    sample = store_batches(lm, store, rows[: spec.samples], spec.batch_tokens)
    maxima = average_maxima(lm, sae, sample, special=special, max_norm=errors.max_norm)
    token, latent = (None, spec.latent) if spec.latent is not None else strongest(lm, maxima, spec.token)
    sweep = alpha_sweep(
        lm,
        sae,
        latent,
        spec.alphas,
        unit=1.0 if spec.unit == "absolute" else errors.median_norm_edited,
        questions=spec.questions or QUESTIONS,
        controls=random_latents(latent, errors.firing_counts, spec.controls, spec.seed),
        max_new_tokens=spec.max_new_tokens,
    )
    control = sweet_spot(sweep.control_levels, spec.sweet_spot) if sweep.control_levels else None
    steered = Steering(sweep, token, spec.unit, sweet_spot(sweep.levels, spec.sweet_spot), control)
    result = SpecialTokenResult(opened.subject, errors.plain(), tuple(maxima), steered)
    view.write(result, ctx.path)
    return result


def _conversations(spec: SpecialTokensSpec, opened: Opened, runs: Path) -> tuple[TokenStore, list[int]]:
    """Held-out text, a document a row, and which rows are conversations.

    An SAE that was trained on blocks is measured on whole conversations too, like every other (FAST, section 4.2).
    """
    data = data_of(opened.sae, spec.data)
    data = replace(data, pack=replace(data.pack, packing="documents"))
    store, _ = token_store(opened.lm, opened.model, data, "heldout", spec.tokens, runs)
    spoken = np.isin(store.roles, [int(Role.USER), int(Role.ASSISTANT)])
    rows = np.flatnonzero(np.logical_or.reduceat(spoken, store.starts[:-1])).tolist()
    if not rows:
        remedy = "name a source that holds some, e.g. --data.sources chitchat"
        raise UnweaveError("this text holds no conversations, so it has no special tokens to measure", remedy=remedy)
    return store, rows
