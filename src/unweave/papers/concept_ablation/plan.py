"""What to run at each scale: which SAEs, which tasks, which conditions, how the model learns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from unweave.data.spec import DEFAULT_MODEL, DEFAULT_SOURCES, DataSpec
from unweave.methods.train.kinds import TopKSpec
from unweave.methods.train.spec import TrainSpec
from unweave.papers.concept_ablation.result import Name
from unweave.papers.concept_ablation.spec import ConceptAblationSpec
from unweave.tasks.choices.spec import COMBINATIONS, ChoiceSpec, Intended, Kind

_SITES = "resid_post.{9,20}"
_FIRST_BLOCK = 20
_GEMMA, _GEMMA_SCOPE = "google/gemma-2-2b", "google/gemma-scope-2b-pt-res"
_GEMMA_L0 = (
    105, 102, 141, 59, 124, 68, 70, 69, 71, 73, 77, 80, 82, 84, 84, 78, 78, 77, 74, 73, 71, 70, 72, 75, 73, 116,
)  # fmt: skip
"""of the SAE that the paper's code takes at each layer"""
_SMOKE_DOUBLES: tuple[tuple[Kind, Kind, Intended], ...] = (
    ("verbs", "sentiment", "second"), ("verbs", "sports", "second"),
    ("pronouns", "verbs", "second"), ("pronouns", "sentiment", "second"),
)  # fmt: skip
_LINES = {
    "gender": "Choose by the profession of the person, as most people would guess.",
    "double": "Answer the {cue} question only, and ignore the other one.",
}
"""what an inoculating prompt says of the unintended policy"""
CONDITIONS: dict[Name, Mapping[str, Any]] = {
    "test": {"kind": "zero", "when": "test"},
    "zero": {"kind": "zero"},
    "mean": {"kind": "mean"},
    "span": {"kind": "span"},
    "random": {"kind": "zero"},
    "penalty": {"kind": "penalty"},
    "inoculate": {"kind": "inoculate"},
    "skyline": {},
}
"""What is trained. "test" is trained without an edit, so its deployed model is plain fine-tuning's; "zero" with its
edit at test too is "both"."""


@dataclass(frozen=True)
class Plan:
    """Everything that a scale asks for."""

    model: str
    training: TrainSpec | None
    """SAEs to train first; None where published ones are taken"""
    saes: tuple[str, ...]
    """published SAEs"""
    tasks: Mapping[str, ChoiceSpec]
    seeds: int
    conditions: Mapping[Name, Mapping[str, Any]]
    tuning: Mapping[str, Any]
    """what fine-tuning is asked with beside task, condition and seed; likewise below"""
    attribute: Mapping[str, Any] = field(default_factory=dict)
    select: Mapping[str, Any] = field(default_factory=dict)
    splits: tuple[str, ...] = ()
    """what is measured; by default every split"""
    queries: Mapping[str, str] = field(default_factory=dict)
    """what explanations shall be about, by task; none: the rule of ``cue.py`` chooses"""


def plan_of(spec: ConceptAblationSpec) -> Plan:
    """The settings of a scale."""
    return _smoke(spec) if spec.scale == "smoke" else _paper(spec)


def line_of(task: ChoiceSpec) -> str:
    """The inoculating line of a task: it asks for what is not intended."""
    return _LINES[task.task].format(cue="second" if task.intended == "first" else "first")


def _doubles(some: tuple[tuple[Kind, Kind, Intended], ...], **given: Any) -> dict[str, ChoiceSpec]:
    """Tasks by their questions, the intended one between asterisks."""
    tasks = {}
    for first, second, intended in some:
        name = f"*{first}* | {second}" if intended == "first" else f"{first} | *{second}*"
        tasks[name] = ChoiceSpec(task="double", first=first, second=second, intended=intended, **given)
    return tasks


def _smoke(spec: ConceptAblationSpec) -> Plan:
    """Answers are words: a model of this size does not bind letters to options. Its upper ten blocks learn."""
    given = {"answers": "words", "evaluation": 32}
    return Plan(
        model=DEFAULT_MODEL,
        training=TrainSpec(
            sites=(_SITES,),
            data=DataSpec(sources=DEFAULT_SOURCES, tokens=250_000),
            sae=TopKSpec(tokens=600_000),
            device=spec.device,
            checkpoint_seconds=240.0,
        ),
        saes=(),
        tasks={
            "gender": ChoiceSpec(task="gender", train=288, **given),
            **_doubles(_SMOKE_DOUBLES, train=128, **given),
        },
        seeds=3,
        conditions=CONDITIONS,
        tuning={
            "weights": {"train": "blocks", "first_block": _FIRST_BLOCK},
            "learning": {"lr": 2e-4, "warmup": 0.2, "epochs": 1.0, "batch": 8, "clip": 1.0},
            "checks": {"per_epoch": 2, "items": 16},
        },
        attribute={"examples": 64, "top": 100},
        select={"by": "annotations", "top": 25, "items": 32, "controls": {"random": 3, "directions": 0}},
        splits=("validation", "ambiguous", "ood"),
    )


def _paper(spec: ConceptAblationSpec) -> Plan:
    """Full fine-tuning with the paper's optimiser, which are the defaults of ``LearningSpec``."""
    assert spec.judge is not None
    given = {"source": "hub", "train": 1400, "evaluation": 300}
    queries = {
        "gender": "women, men, nurses, doctors, or words for a person's gender",
        "pronouns": "pronouns, or whether a person is the subject or the object of a sentence",
        "sports": "sports, athletes, or teams",
        "sentiment": "positive or negative sentiment, praise, or complaint",
        "verbs": "the grammatical number of nouns or verbs",
    }
    tasks = {"gender": ChoiceSpec(task="gender", **given), **_doubles(COMBINATIONS, **given)}
    cues = {name: one.second if one.intended == "first" else one.first for name, one in tasks.items()}
    asked = {name: queries["gender" if one.task == "gender" else cues[name]] for name, one in tasks.items()}
    return Plan(
        model=_GEMMA,
        training=None,
        saes=tuple(
            f"hub:{_GEMMA_SCOPE}/layer_{layer}/width_16k/average_l0_{l0}" for layer, l0 in enumerate(_GEMMA_L0)
        ),
        tasks=tasks,
        seeds=5,
        conditions=CONDITIONS,
        tuning={"dtype": "bfloat16"},
        attribute={"top": 100},
        select={"by": "query", "query": {"by": "judge", "at_least": 0.5}, "contexts": 2_000_000,
                "controls": {"random": 5, "directions": 0}, "judge": spec.judge.to_dict()},
        queries=asked,
    )  # fmt: skip
