"""What a comparison of steering methods can be asked, and what its functions take of that. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from unweave.core.command import Command
from unweave.core.errors import UnweaveError
from unweave.core.refs import FileRef
from unweave.core.rules import above, at_least, at_most, not_empty, only_where, rule
from unweave.core.spec import Spec, operational
from unweave.inputs.spec import OfSAEsSpec
from unweave.judge.spec import JudgeSpec
from unweave.methods.axbench.result import Comparison
from unweave.tasks.tagged.spec import TaggedSpec

FACTORS: dict[str, tuple[float, ...]] = {
    "add": (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 4.0, 5.0),
    "clamp": (0.4, 0.8, 1.2, 1.6, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 20.0, 40.0, 60.0, 100.0),
    "max-act": (0.4, 1.0, 1.4, 1.8, 2.2, 2.6, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0),
}
"""AxBench's, as multiples of the largest activation"""
_RISING = rule("rising and above 0", lambda factors: all(a < b for a, b in zip((0.0, *factors), factors, strict=False)))
Method = Literal["unedited", "sae", "random", "diffmean", "probe", "reft", "lora", "prompt"]
_DISTINCT = rule("without repetition", lambda values: len(set(values)) == len(values))
_CHAT = only_where(
    "a chat model rates or writes prompts",
    lambda spec: "chat" in spec.raters or spec.writer == "chat",
    "set raters or writer to chat",
)


@dataclass(frozen=True, kw_only=True)
class SteeringSpec(Spec):
    """How latents steer."""

    mode: Literal["clamp", "add", "min-clamp"] = "clamp"
    """Set a latent to a value, add that much of its direction, or raise it to the value where it is lower. Learnt
    directions are always added."""
    where: Literal["all", "policy"] = "all"
    """On all tokens, as in AxBench and the paper, or only on those that the SAE was trained on."""
    factors: Annotated[tuple[float, ...] | None, not_empty(), _RISING] = None
    """Strengths, as multiples of a latent's largest activation on the texts."""
    preset: Literal["add", "clamp", "max-act"] = "max-act"
    """Where factors are not given: AxBench's list for addition (0.2 to 5), clamping (0.4 to 100), or its variant by
    largest activation (0.4 to 10)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factors is not None and self.preset != "max-act":
            raise UnweaveError("preset has no effect where factors are given", where="steering", remedy="leave one out")

    @property
    def strengths(self) -> tuple[float, ...]:
        """The factors to use."""
        return self.factors or FACTORS[self.preset]


@dataclass(frozen=True, kw_only=True)
class GenerationSpec(Spec):
    """How texts are generated."""

    max_new_tokens: Annotated[int, at_least(1)] = 128
    """Length of a text at most."""
    temperature: Annotated[float, at_least(0)] = 1.0
    """0 is greedy; AxBench samples at 1."""


@dataclass(frozen=True, kw_only=True)
class TrainingSpec(Spec):
    """How something is trained on texts."""

    lr: Annotated[float, above(0)] = 0.01
    """Learning rate."""
    epochs: Annotated[int, at_least(1)] = 4
    """Times that it sees the texts."""
    batch: Annotated[int, at_least(1)] = 8
    """Texts per step."""


@dataclass(frozen=True, kw_only=True)
class ReftSpec(TrainingSpec):
    """How ReFT-r1 is trained."""

    k: Annotated[int, at_least(1)] = 10
    """How many of a text's largest values are averaged and not penalised."""
    l1: Annotated[float, at_least(0)] = 0.005
    """Penalty on the other values."""


@dataclass(frozen=True, kw_only=True)
class LoraSpec(TrainingSpec):
    """How LoRA is trained."""

    rank: Annotated[int, at_least(1)] = 4
    """Rank of the matrices."""
    alpha: Annotated[float, above(0)] = 32.0
    """Scale of what they add, over the rank."""
    lr: Annotated[float, above(0)] = 1e-3
    """Learning rate."""


@dataclass(frozen=True, kw_only=True)
class LearningSpec(Spec):
    """Texts with a concept and without it: to learn directions, weights and a classifier on, and held out."""

    examples: Annotated[int, at_least(2)] = 72
    """Texts of either kind to learn directions and LoRA on, per concept."""
    heldout: Annotated[int, at_least(2)] = 36
    """Held-out texts with the concept, others, and hard ones among these: each so many."""
    tokens: Annotated[int, at_least(2)] = 128
    """Of each text, so many tokens."""
    reft: ReftSpec = ReftSpec()
    """ReFT-r1."""
    lora: LoraSpec = LoraSpec()
    """LoRA."""


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
