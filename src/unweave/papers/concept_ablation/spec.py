"""What ``unweave paper concept-ablation`` can be asked. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from unweave.core import rules
from unweave.core.command import Command
from unweave.core.errors import UnweaveError
from unweave.core.rules import at_least, not_empty
from unweave.core.spec import Spec, operational
from unweave.judge.spec import JudgeSpec
from unweave.methods.finetune.select.spec import AttributionRef
from unweave.methods.finetune.spec import FinetuneSpec
from unweave.papers.concept_ablation.result import ConceptAblation


@dataclass(frozen=True, kw_only=True)
class ConceptAblationSpec(Spec):
    """Concept ablation fine-tuning on gender and double multiple choice."""

    scale: Literal["smoke", "paper"] = "smoke"
    """smoke: SmolLM2-135M with SAEs that are trained first, under an hour on two cores; paper: Gemma-2-2B with Gemma
    Scope at all 26 layers, all 24 combinations, 5 seeds."""
    judge: JudgeSpec | None = None
    """paper scale: the chat model that explains candidates and says whether they are about the unintended part; the
    paper's is Llama-3.3-70B. The smoke scale has a rule choose."""
    device: str | None = operational(None)
    """cpu, cuda, cuda:1...; by default a GPU where there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale == "smoke" and self.judge is not None:
            raise UnweaveError(
                "the smoke scale chooses latents by a rule", where="judge", remedy="leave it out, or give scale: paper"
            )
        if self.scale == "paper" and self.judge is None:
            raise UnweaveError(
                "the paper scale has a chat model explain and choose latents, and none is given",
                where="judge",
                remedy="give judge.model, judge.base_url and judge.api_key_env",
            )


@dataclass(frozen=True, kw_only=True)
class CueSpec(Spec):
    """Which candidates act on the unintended part of the training prompts."""

    attribution: AttributionRef
    """The run of `unweave finetune attribute`."""
    prompts: Annotated[int, at_least(1)] = 64
    """So many training prompts at most."""
    share: Annotated[float, rules.share()] = 0.5
    """The share of a candidate's effect from which on it is chosen."""
    least: Annotated[int, at_least(1)] = 4
    """At least so many are chosen: those with the largest shares."""


@dataclass(frozen=True, kw_only=True)
class TrialsSpec(Spec):
    """Fine-tunings of one model, of which figures are kept and no weights."""

    trials: Annotated[tuple[FinetuneSpec, ...], not_empty()]
    """In the order in which they run; all of the first one's model."""
    splits: tuple[str, ...] = ()
    """Which splits to measure on; by default all that the task has."""


COMMAND = Command(
    words="paper concept-ablation",
    spec=ConceptAblationSpec,
    result=ConceptAblation,
    stage="unweave.papers.concept_ablation.recipe:run",
    summary="Fine-tune with the latents of an unintended concept taken out, and see what is learnt.",
    about=(
        "Fine-tunes on tasks that two policies explain equally well (gender and pronouns, double multiple choice), "
        "under every condition and with several seeds: plainly, with chosen latents zeroed, set to their mean or "
        "projected out, with random ones, with the edit at test alone, penalised, with an inoculating line, and where "
        "the cue misleads. Trains SAEs, attributes, chooses; writes tables, figures and report.html. Finished parts "
        "are kept: after an interruption the same command goes on."
    ),
    examples=(
        "unweave paper concept-ablation --scale smoke    # under an hour on two cores",
        "unweave paper concept-ablation --scale paper --device cuda --judge.model llama-3.3-70b "
        "--judge.base-url http://localhost:8000/v1",
    ),
)
