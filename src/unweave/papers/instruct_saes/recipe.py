"""The paper from text to table: three trainings, one measurement of all SAEs, ratings, steering, a page.

Each part is a run of its own, so an interrupted recipe goes on where it was and a finished part is not done again.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unweave.core.progress import task
from unweave.core.run import Run
from unweave.core.spec import Spec
from unweave.data.spec import DataSpec
from unweave.inputs.inputs import load_lm, token_store
from unweave.methods.rubric import stage as rubric
from unweave.methods.rubric.spec import RubricSpec
from unweave.methods.special_tokens import stage as special_tokens
from unweave.methods.special_tokens.errors import TokenErrors, token_errors
from unweave.methods.special_tokens.spec import SpecialTokensSpec
from unweave.methods.train import stage as train
from unweave.papers.instruct_saes import page
from unweave.papers.instruct_saes.compare import Measured
from unweave.papers.instruct_saes.plan import Plan, plan_of
from unweave.papers.instruct_saes.spec import InstructSaesSpec
from unweave.sae.module import SAE
from unweave.tasks.special_tokens import SpecialTokens

VERSION = 2
_RATED_TOKENS = 60_000


@dataclass(frozen=True, kw_only=True)
class _ErrorsQuestion(Spec):
    """What identifies the measurement of a recipe's SAEs."""

    model: str
    dtype: str
    data: DataSpec
    special_ids: tuple[int, ...] = ()
    """which ids are special; none: the tokenizer's, and the template's words for who speaks"""
    where: Literal["template", "anywhere"] = "template"


def run(spec: InstructSaesSpec, runs: Path) -> Run:
    """Everything of the paper at one scale. The run holds the tables, the figures and ``report.html``."""
    plan = plan_of(spec)
    inputs = {name: training.digest() for name, training in plan.trainings.items()}
    with Run.open(runs, "paper-instruct-saes", spec, version=VERSION, inputs=inputs) as done:
        if done.done:
            return done
        trained = {}
        for name, training in plan.trainings.items():
            trained[name] = train.run(training, runs)
            gc.collect()  # a recipe's SAEs and activations take gigabytes
        measured = _measured(plan, trained, runs)
        steered = _steered(spec, plan, trained, runs)
        rated = _rated(spec, plan, trained, runs) if spec.rubric else {}
        rows = [Measured(**row) for row in measured.result["rows"]]
        found = page.write(done.path, spec, plan, rows, rated, steered)
        done.finish(
            found
            | {
                "runs": {name: part.path.name for name, part in trained.items()}
                | {"errors": measured.path.name, "special tokens": steered.path.name}
                | {f"rubric {name}": part.path.name for name, part in rated.items()}
            }
        )
    return done


def _measured(plan: Plan, trained: Mapping[str, Run], runs: Path) -> Run:
    """The errors of every SAE of every recipe on the same held-out conversations, from one forward pass."""
    training = plan.trainings["FAST"]
    asked = _ErrorsQuestion(
        model=training.model, dtype=training.dtype, data=plan.measured, special_ids=plan.special_ids, where=plan.where
    )
    inputs = {name: part.digest for name, part in trained.items()}
    with Run.open(runs, "instruct-saes-errors", asked, version=VERSION, inputs=inputs) as run:
        if run.done:
            return run
        lm = load_lm(training.model, training.dtype, training.device)
        store, _ = token_store(lm, training.model, plan.measured, "heldout", None, runs)
        places = {f"{name}/{row['name']}": (name, row) for name, part in trained.items() for row in part.result["saes"]}
        saes = {}
        with task("load SAEs", total=len(places), unit="SAEs") as progress:
            for key, (name, row) in places.items():
                saes[key] = SAE.load(train.sae_folder(trained[name], row["name"])).to(lm.device)
                progress.advance()
        special = SpecialTokens.of(lm, plan.special_ids, plan.where) if plan.special_ids else None
        errors = token_errors(lm, saes, store, range(store.n_rows), special=special)
        rows = [
            {"recipe": name, "site": row["site"], **_setting(row), "errors": _kept(found)}
            for (name, row), found in zip(places.values(), errors.values(), strict=True)
        ]
        one = next(iter(errors.values()))
        run.finish(
            {
                "rows": rows,
                "conversations": one.sequences,
                "tokens": one.everything["all"].tokens,
                "special_tokens": one.everything["special"].tokens,
                "special_ids": lm.token_strings(one.special_ids) if lm.tokenizer else [],
            }
        )
    return run


def _setting(row: Mapping[str, Any]) -> dict[str, Any]:
    """Kind, k (0: none) and seed of an SAE, by its name in the training run. Different widths are different kinds."""
    found = {key: re.search(rf"(?:^|[-/]){key}(\d+)(?=-|$)", row["name"]) for key in ("k", "seed", "expansion")}
    number = {key: int(match[1]) if match else 0 for key, match in found.items()}
    kind = f"{row['kind']} {number['expansion']}x" if number["expansion"] else row["kind"]
    return {"kind": kind, "k": number["k"], "seed": number["seed"]}


def _kept(found: TokenErrors) -> dict[str, Any]:
    alive = float((found.firing_counts > 0).float().mean())
    return found.to_dict() | {"alive_fraction": alive}


def _rated(spec: InstructSaesSpec, plan: Plan, trained: Mapping[str, Run], runs: Path) -> dict[str, Run]:
    """The rubric on one JumpReLU SAE per recipe: the same text, which none was trained on, and the same judge."""
    return {
        name: rubric.run(
            RubricSpec(
                sae=train.sae_folder(part, plan.examined),
                data=plan.read,
                split="heldout",
                latents_tokens=_RATED_TOKENS if spec.scale == "smoke" else None,
                latents=plan.rated,
                judge=spec.judge,
                device=spec.device,
            ),
            runs,
        )
        for name, part in trained.items()
    }


def _steered(spec: InstructSaesSpec, plan: Plan, trained: Mapping[str, Run], runs: Path) -> Run:
    """Special tokens of the SAE that was trained on whole conversations: its latents, and steering with them."""
    return special_tokens.run(
        SpecialTokensSpec(
            sae=train.sae_folder(trained["FAST"], plan.examined),
            data=plan.steered,
            samples=plan.conversations,
            special_ids=plan.special_ids,
            where=plan.where,
            device=spec.device,
        ),
        runs,
    )
