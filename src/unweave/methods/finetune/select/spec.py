"""What a selection can be asked. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from unweave.core.command import Command
from unweave.core.errors import UnweaveError
from unweave.core.refs import Content, FileRef
from unweave.core.rules import at_least, only_for, share
from unweave.core.spec import Spec, operational
from unweave.judge.spec import JudgeSpec
from unweave.latents.relevance import QuerySpec
from unweave.methods.finetune.select.result import SelectResult

AttributionRef = Annotated[Path, Content("unweave.methods.finetune.attribute.result:content")]
"""A run of `unweave finetune attribute`."""


@dataclass(frozen=True, kw_only=True)
class ControlsSpec(Spec):
    """What to compare the chosen ones with."""

    random: Annotated[int, at_least(0)] = 3
    """How often to draw as many other candidates at random."""
    directions: Annotated[int, at_least(0)] = 1
    """How often to draw random directions that span as much at each site."""
    seed: int = 0
    """Of the draws."""


@dataclass(frozen=True, kw_only=True)
class FinetuneSelectSpec(Spec):
    """Choosing among candidates what a model shall not learn by."""

    attribution: AttributionRef
    """The run of `unweave finetune attribute` that has the candidates."""
    by: Literal["rule", "query", "label", "annotations"] = "rule"
    """rule: the strongest, of these sites and this sign; query: those whose explanation is about something; label:
    those whose labels have a name; annotations: those that somebody marked as relevant."""
    annotations: FileRef | None = None
    """JSON lines: explanations (of `unweave explain`), labels (of `unweave labels`), or what somebody marked as
    relevant."""
    query: Annotated[QuerySpec, only_for("by", "query")] = QuerySpec()
    """What explanations shall be about, by embeddings or a judge, and from which relevance on."""
    judge: Annotated[JudgeSpec, only_for("by", "query")] = JudgeSpec()
    """query.by judge: the chat model."""
    labels: Annotated[tuple[str, ...], only_for("by", "label")] = ()
    """Names of labels, also by pattern: gender::*"""
    auroc: Annotated[float, share(), only_for("by", "label")] = 0.6
    """The least AUROC of the label on texts held out."""
    top: Annotated[int | None, at_least(1)] = None
    """At most so many, the strongest."""
    sign: Literal["positive", "negative", "either"] = "either"
    """Only those with a score of this sign."""
    sites: tuple[str, ...] = ()
    """Only those at these sites, by pattern."""
    contexts: Annotated[int, at_least(0)] = 0
    """Tokens of the SAEs' training text to take contexts from. 0: none are shown, and by query what has no explanation
    is left out; with contexts it is judged by the tokens that it fires on and promotes."""
    items: Annotated[int, at_least(0)] = 100
    """Training items to try the ablation on, without training; 0 not to try."""
    controls: ControlsSpec = ControlsSpec()
    """Random controls."""
    device: str | None = operational(None)
    """cpu, cuda, cuda:1...; by default a GPU where there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by == "query" and not self.query.text:
            raise UnweaveError("there is no query", where="query.text", remedy='give --query.text "gender"')
        if self.by == "query" and self.annotations is None and not self.contexts:
            remedy = "give explanations with --annotations, or --contexts 200000"
            raise UnweaveError("nothing is known of the candidates", where="annotations", remedy=remedy)
        if self.by in ("label", "annotations") and self.annotations is None:
            what = f"by {self.by} needs a file of annotations"
            raise UnweaveError(what, where="annotations", remedy="name it with --annotations")
        if self.by == "label" and not self.labels:
            raise UnweaveError("there are no labels to choose by", where="labels", remedy='give --labels "gender::*"')


COMMAND = Command(
    words="finetune select",
    spec=FinetuneSelectSpec,
    result=SelectResult,
    stage="unweave.methods.finetune.select.stage:run",
    summary="Choose the latents that a model shall not learn by, and random ones to compare them with.",
    about="Chooses among the candidates of `unweave finetune attribute`: by a rule, by what explanations are about, by "
    "labels, or by a file that you edit (candidates.jsonl in the run directory is one). Writes selection.json for "
    "`unweave finetune run --selection`, and random controls of the same form. The ablation is first tried on the "
    "untrained model.",
    examples=(
        "unweave finetune select --attribution runs/finetune-attribute-0123456789ab --top 10",
        "unweave finetune select --attribution runs/finetune-attribute-0123456789ab --by query "
        '--query.text "women, men, and words for them" --contexts 200000 --query.at-least 0.3',
        "unweave finetune select --attribution runs/finetune-attribute-0123456789ab --by annotations "
        "--annotations mine.jsonl",
    ),
)
