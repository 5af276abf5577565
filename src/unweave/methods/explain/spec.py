"""What explaining can be asked. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from unweave.core.command import Command
from unweave.core.errors import UnweaveError
from unweave.core.refs import FileRef
from unweave.core.rules import at_least, only_where, rule
from unweave.core.spec import Spec, operational
from unweave.data.spec import DataSpec
from unweave.inputs.spec import UseSpec
from unweave.judge.spec import JudgeSpec
from unweave.latents.relevance import QuerySpec
from unweave.methods.explain.result import ExplainResult

Score = Literal["detection", "fuzzing", "simulation", "rubric"]


@dataclass(frozen=True, kw_only=True)
class ExamplesSpec(Spec):
    """Contexts of each latent."""

    shown: Annotated[int, at_least(3)] = 10
    """Firing contexts that the explainer sees; fewer where a latent has fewer."""
    tests: Annotated[int, at_least(3)] = 6
    """Firing contexts to test with, and as many silent ones; of other documents than those shown."""
    tokens: Annotated[int | None, at_least(1)] = None
    """How many tokens of text contexts are taken from; by default 200,000, or all there are."""
    seed: int = 0
    """Choice of latents, contexts and controls."""


@dataclass(frozen=True, kw_only=True)
class PricesSpec(Spec):
    """What the judge costs, per million tokens."""

    prompt: Annotated[float | None, at_least(0)] = operational(None)
    """Of prompts."""
    reply: Annotated[float | None, at_least(0)] = operational(None)
    """Of replies."""
    most: Annotated[
        float | None, at_least(0), only_where("prompt and reply have prices",
        lambda spec: spec.prompt is not None and spec.reply is not None, "give both")
    ] = operational(None)  # fmt: skip
    """Refuse to ask where the estimate is above this."""


@dataclass(frozen=True, kw_only=True)
class ExplainSpec(UseSpec):
    """Having a chat model say what latents respond to, and testing what it says."""

    judge: JudgeSpec = JudgeSpec()
    """The chat model that explains and judges."""
    latents: Annotated[
        tuple[int, ...], rule("numbers from 0 on", lambda some: all(j >= 0 for j in some)),
        rule("all different", lambda some: len(set(some)) == len(some)),
    ] = ()  # fmt: skip
    """Which latents; by default some that are drawn at random."""
    random: Annotated[int | None, at_least(0)] = None
    """How many latents to draw at random: 8, or as many as are named, at most 16, as a control beside these."""
    scores: Annotated[tuple[Score, ...], rule("all different", lambda some: len(set(some)) == len(some))] = (
        "detection",
        "fuzzing",
    )
    """How explanations are tested: detection (which texts it fires in), fuzzing (on which tokens), simulation (how
    strongly on each), rubric (how clear its contexts are, whatever the explanation)."""
    examples: ExamplesSpec = ExamplesSpec()
    """Contexts to explain by and to test with."""
    explanations: FileRef | None = None
    """Explanations to test in place of the judge's own: annotations, or a file of Neuronpedia's."""
    query: QuerySpec = QuerySpec()
    """Which latents to select."""
    prices: PricesSpec = PricesSpec()
    """For the estimate."""
    check_judge: bool = True
    """Put known cases to the judge first; ratings of one that fails are shown as such."""
    ask: bool = True
    """Ask; with --no-ask only the first prompt, to say what all would take."""
    data: DataSpec | None = None
    """Other text to take contexts from; by default the training text."""
    split: Literal["train", "heldout"] = "train"
    """Which documents of that text: those to train on, or those held out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.latents and self.random == 0:
            raise UnweaveError("there are no latents to explain", where="random", remedy="name some, or draw some")

    @property
    def drawn(self) -> int:
        """How many latents are drawn at random."""
        if self.random is not None:
            return self.random
        return min(16, len(self.latents)) if self.latents else 8


COMMAND = Command(
    words="explain",
    spec=ExplainSpec,
    result=ExplainResult,
    stage="unweave.methods.explain.stage:run",
    summary="Have a chat model say what latents respond to, and test what it says.",
    about="The model sees contexts in which a latent fires, from strong to weak, and says what they share. Then the "
    "explanation is tested on contexts of other documents, beside the explanations of other latents, which should do "
    "no better than chance, and beside random latents. By default a small judge runs here; with --judge.base-url any "
    "OpenAI-compatible server. --no-ask says what all would take. Every reply is kept: after an interruption, none is "
    "asked again.",
    examples=(
        "unweave explain --sae runs/train-0123456789ab/sae --random 4",
        "unweave explain --sae runs/train-0123456789ab/sae --latents 12 907 --scores detection fuzzing simulation "
        '--query.text "dates and times"',
        "unweave explain --sae runs/train-0123456789ab/sae --no-ask --prices.prompt 0.15 --prices.reply 0.6",
    ),
)
