"""The errors of every SAE of every recipe on the same held-out conversations, from one forward pass."""

from __future__ import annotations

from pathlib import Path

from unweave.core.progress import task
from unweave.core.stage import Context, stage
from unweave.data.batches import store_batches
from unweave.inputs.inputs import load_lm, token_store
from unweave.methods.special_tokens.errors import special_token_errors
from unweave.methods.train import stage as train
from unweave.methods.train.kinds import SAESpec
from unweave.methods.train.members import Member, members
from unweave.papers.instruct_saes.result import RECIPES, Measured, Recipe, RecipeErrors
from unweave.papers.instruct_saes.spec import RecipeErrorsSpec
from unweave.sae.module import SAE
from unweave.tasks.special_tokens import SpecialTokens


@stage("instruct-saes-errors", version=3, also=lambda _spec, _handle: {"train": str(train.run.version)})
def run(spec: RecipeErrorsSpec, ctx: Context) -> RecipeErrors:
    """Measures what the trainings of ``spec`` made; a training that has not finished is finished first."""
    training = spec.trainings[-1]
    trained = [train.run(one, ctx.runs) for one in spec.trainings]
    lm = load_lm(training.model, training.dtype, training.device)
    store, _ = token_store(lm, training.model, spec.data, "heldout", None, ctx.runs)
    every: list[tuple[Recipe, Member, Path]] = [
        (recipe, member, train.sae_folder(run, member.name))
        for recipe, run, training in zip(RECIPES, trained, spec.trainings, strict=True)
        for member in members(training, lm)
    ]
    saes = {}
    with task("load SAEs", total=len(every), unit="SAEs") as progress:
        for _, _, folder in every:
            saes[str(folder)] = SAE.load(folder).to(lm.device)
            progress.advance()
    special = SpecialTokens.of(lm, spec.special_ids, spec.where) if spec.special_ids else None
    errors = special_token_errors(lm, saes, store_batches(lm, store, range(store.n_rows)), special=special)
    return RecipeErrors(
        tuple(
            Measured(
                recipe=recipe,
                kind=member.spec.kind,
                expansion=member.spec.expansion,
                site=str(member.write),
                k=aimed_at(member.spec),
                seed=member.spec.seed,
                errors=errors[str(folder)].plain(),
            )
            for recipe, member, folder in every
        )
    )


def aimed_at(spec: SAESpec) -> int | None:
    """The L0 that a training aims at; None where a fixed coefficient decides."""
    return spec.k if spec.aims else None
