"""The paper from text to table: three trainings, one measurement of all SAEs, ratings, steering, a page.

Each part is a run of its own, so an interrupted recipe goes on where it was and a finished part is not done again.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping

from unweave.core.refs import contents_of
from unweave.core.run import Run
from unweave.core.stage import Context, stage
from unweave.methods.explain.rubric import stage as rubric
from unweave.methods.explain.rubric.result import RubricResult
from unweave.methods.explain.rubric.spec import RubricSpec
from unweave.methods.special_tokens import stage as special_tokens
from unweave.methods.special_tokens.result import SpecialTokenResult
from unweave.methods.special_tokens.spec import SpecialTokensSpec
from unweave.methods.train import stage as train
from unweave.methods.train.result import Training
from unweave.papers.instruct_saes import errors_stage, view
from unweave.papers.instruct_saes.plan import MATCHED_L0, Plan, plan_of
from unweave.papers.instruct_saes.result import InstructSaes, PartRun, Rated, Recipe
from unweave.papers.instruct_saes.spec import InstructSaesSpec, RecipeErrorsSpec

_RATED_TOKENS = 60_000
_PARTS = (train.run, errors_stage.run, rubric.run, special_tokens.run)


def _planned(spec: InstructSaesSpec, _handle: object) -> dict[str, str]:
    """What the plan says and reads beside the question, and the versions of the parts."""
    planned: dict[str, str] = {"parts": " ".join(f"{part.name}/{part.version}" for part in _PARTS)}
    for name, training in plan_of(spec).trainings.items():
        planned[name] = training.digest()
        planned |= contents_of(training, f"{name}.")
    return planned


@stage("paper-instruct-saes", version=3, also=_planned)
def run(spec: InstructSaesSpec, ctx: Context) -> InstructSaes:
    """Everything of the paper at one scale. The run holds the tables, the figures and ``report.html``."""
    plan = plan_of(spec)
    trained: dict[Recipe, Run[Training]] = {}
    for name, training in plan.trainings.items():
        trained[name] = train.run(training, ctx.runs)
        gc.collect()  # a recipe's SAEs and activations take gigabytes
    trainings = tuple(plan.trainings.values())
    errors = RecipeErrorsSpec(trainings=trainings, data=plan.measured, special_ids=plan.special_ids, where=plan.where)
    measured = errors_stage.run(errors, ctx.runs)
    steered = _steered(spec, plan, trained["FAST"], ctx)
    rated = _rated(spec, plan, trained, ctx) if spec.rubric else {}
    saes, training = measured.result.saes, plan.trainings["FAST"]
    result = InstructSaes(
        scale=spec.scale,
        sites=training.sites,
        tokens=training.sae.tokens,
        k=MATCHED_L0 if any(sae.k == MATCHED_L0 for sae in saes) else None,  # the paper fixes coefficients instead
        saes=saes,
        ratings=tuple(Rated(name, part.result) for name, part in rated.items()),
        special_tokens=steered.result,
        runs=(
            *(PartRun("train", name, part.path.name) for name, part in trained.items()),
            PartRun("errors", None, measured.path.name),
            PartRun("special-tokens", "FAST", steered.path.name),
            *(PartRun("rubric", name, part.path.name) for name, part in rated.items()),
        ),
    )
    view.write(result, ctx.path)
    return result


def _rated(
    spec: InstructSaesSpec, plan: Plan, trained: Mapping[Recipe, Run[Training]], ctx: Context
) -> dict[Recipe, Run[RubricResult]]:
    """The rubric on one JumpReLU SAE per recipe: the same text, which none was trained on, and the same judge."""
    rated: dict[Recipe, Run[RubricResult]] = {}
    for name, training in trained.items():
        question = RubricSpec(
            sae=train.sae_folder(training, plan.examined), data=plan.read, split="heldout", latents=plan.rated,
            latents_tokens=_RATED_TOKENS if spec.scale == "smoke" else None, judge=spec.judge, device=spec.device,
        )  # fmt: skip
        rated[name] = rubric.run(question, ctx.runs)
    return rated


def _steered(spec: InstructSaesSpec, plan: Plan, trained: Run[Training], ctx: Context) -> Run[SpecialTokenResult]:
    """Special tokens of the SAE that was trained on whole conversations: its latents, and steering with them."""
    question = SpecialTokensSpec(
        sae=train.sae_folder(trained, plan.examined), data=plan.steered, samples=plan.conversations,
        special_ids=plan.special_ids, where=plan.where, device=spec.device,
    )  # fmt: skip
    return special_tokens.run(question, ctx.runs)
