"""What a comparison of steering methods can be asked. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from unweave.core.command import Command
from unweave.core.errors import UnweaveError
from unweave.core.refs import FileRef
from unweave.core.rules import at_least, at_most, not_empty, only_where, rule
from unweave.core.spec import Spec, operational
from unweave.inputs.spec import OfSAEsSpec
from unweave.judge.spec import JudgeSpec
from unweave.methods.axbench.options import GenerationSpec, LearningSpec, SteeringSpec
from unweave.methods.axbench.result import Comparison
from unweave.tasks.tagged.spec import TaggedSpec

Method = Literal["unedited", "sae", "random", "diffmean", "probe", "reft", "lora", "prompt"]
_DISTINCT = rule("without repetition", lambda values: len(set(values)) == len(values))
_CHAT = only_where(
    "a chat model rates or writes prompts",
    lambda spec: "chat" in spec.raters or spec.writer == "chat",
    "set raters or writer to chat",
)


@dataclass(frozen=True, kw_only=True)
class ProtocolSpec(Spec):
    """Instructions, and how a pair's strength is chosen on them."""

    per_pair: Annotated[int, at_least(4), at_most(1000)] = 20
    """Instructions per pair, drawn without replacement."""
    instructions: FileRef | None = None
    """Instructions, one a line, or JSON lines with a field instruction, as AlpacaEval's; by default 104 of our own."""
    split: Literal["folds", "halves"] = "folds"
    """How a pair's strength is chosen: 10 repeats of 4 folds, or AxBench's first half for the second."""
    suppression: bool = True
    """Also ask for the concept in the prompt and take the latent away."""


@dataclass(frozen=True, kw_only=True)
class AxbenchSpec(OfSAEsSpec):
    """Comparing labelled latents with other ways to steer, on the same concepts and instructions."""

    pairs: FileRef
    """Latents with labels: the annotations that `unweave labels` wrote."""
    texts: TaggedSpec = TaggedSpec()
    """The texts with tags: concepts are their tags."""
    methods: Annotated[tuple[Method, ...], not_empty(), _DISTINCT] = (
        "unedited", "sae", "random", "diffmean", "probe", "prompt",
    )  # fmt: skip
    """What is compared; lora needs the extra finetune."""
    most_pairs: Annotated[int | None, at_least(1)] = 20
    """At most so many pairs, those with the highest score."""
    raters: Annotated[tuple[Literal["truth", "chat"], ...], not_empty(), _DISTINCT] = ("truth",)
    """Who rates: scripted truth, a chat model, or both."""
    judge: Annotated[JudgeSpec, _CHAT] = JudgeSpec()
    """The chat model that rates, or writes prompts."""
    writer: Literal["template", "chat"] = "template"
    """Who writes the prompts that ask for a concept."""
    protocol: ProtocolSpec = ProtocolSpec()
    """Instructions, and how strengths are chosen."""
    steering: SteeringSpec = SteeringSpec()
    """How latents steer."""
    generation: GenerationSpec = GenerationSpec()
    """How texts are generated."""
    learning: LearningSpec = LearningSpec()
    """The texts of each concept."""
    most_texts: Annotated[int, at_least(1)] = operational(50_000)
    """Refuse, before any work, to generate more texts than this."""
    seed: int = 0
    """Choice of instructions, texts, random latents and folds; sampling."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.protocol.suppression and "sae" not in self.methods:
            raise UnweaveError(
                "suppression needs the method sae", where="methods", remedy="add sae, or set suppression false"
            )


COMMAND = Command(
    words="axbench",
    spec=AxbenchSpec,
    result=Comparison,
    stage="unweave.methods.axbench.stage:run",
    summary="Compare labelled latents with other ways to steer, judged as AxBench does.",
    about="Every pair of a latent and a label is steered at all strengths on its own instructions, and rated for "
    "concept, instruction and fluency; random latents, learnt directions and prompts stand beside it. Refuses before "
    "any work what would generate more texts than most_texts; interrupted, it goes on where it was.",
    examples=(
        "unweave axbench --saes runs/train-0123456789ab/sae --pairs runs/labels-0123456789ab/labels.jsonl",
        "unweave axbench axbench.yaml --methods unedited sae random lora prompt --raters chat truth",
    ),
)
