"""What ``unweave circuit shift`` can be asked. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from unweave.attribute.options import GradientOptions
from unweave.core.command import Command
from unweave.core.errors import UnweaveError
from unweave.core.refs import Content, FileRef
from unweave.core.rules import above, at_least, at_most, below, multiple_of, only_for
from unweave.core.spec import Spec, operational
from unweave.data.spec import DataSpec
from unweave.inputs.spec import OfSAEsSpec, unused
from unweave.judge.spec import JudgeSpec
from unweave.methods.shift.result import ShiftResult

BiographiesRef = Annotated[str, Content("unweave.methods.shift.biographies:content_of_source", named=True)]
"""Where biographies come from; those of a file count by its content too."""


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions(Spec):
    """A linear classifier of averaged activations, and what it is trained on."""

    site: str | None = None
    """The site whose activations it averages; by default the last SAE's residual site."""
    train: Annotated[int, at_least(4), multiple_of(4)] = 240
    """Training examples: half and half for the ambiguous set, all four groups for the balanced one. A multiple of 4."""
    max_length: Annotated[int, at_least(1)] = 128
    """Biographies are cut off after so many tokens."""
    skip_first: Annotated[int, at_least(0), below("max_length")] = 1
    """First tokens of a text that are neither averaged over nor attributed to: the first is often an attention sink."""
    lr: Annotated[float, above(0)] = 0.01
    """Learning rate."""
    epochs: Annotated[int, at_least(1)] = 1
    """Epochs."""
    standardise: bool = True
    """Centre and scale the averaged activations before training; the paper does not."""


@dataclass(frozen=True, kw_only=True)
class SupportOptions(GradientOptions):
    """Which latents support the classifier's labels: its circuit."""

    examples: Annotated[int, at_least(4), multiple_of(4)] = 40
    """Training examples that the circuit is found on; a multiple of 4."""
    steps: Annotated[int, at_least(1), only_for("method", "ig")] = 3
    """Steps of integrated gradients."""
    threshold: Annotated[float, at_least(0)] = 0.0
    """Latents that support the labels by more than this, in logits, are in the circuit."""
    top: Annotated[int | None, at_least(1)] = 100
    """So many of them at most, the strongest; null for all."""


@dataclass(frozen=True, kw_only=True)
class RuleOptions(Spec):
    """When a latent's record says that it is about gender."""

    context_share: Annotated[float, above(0), at_most(1)] = 0.4
    """The share of a latent's strongest contexts whose strongest word must be one for gender; or..."""
    promoted_share: Annotated[float, above(0), at_most(1)] = 0.25
    """...the share of the tokens it promotes."""


@dataclass(frozen=True, kw_only=True)
class ShiftOptions(Spec):
    """How SHIFT and its baselines are done."""

    classifier: ClassifierOptions = ClassifierOptions()
    """The classifier."""
    circuit: SupportOptions = SupportOptions()
    """How its circuit is found."""
    where: Literal["all", "policy"] = "all"
    """Ablate at every token, as the paper, or only at those that the SAEs were trained on."""
    random: Annotated[int, at_least(1)] = 1
    """With how many draws of as many other latents to do the same, per seed."""
    seeds: Annotated[int, at_least(1)] = 5
    """How often to do everything: with other training examples, first weights and random latents."""
    batch_tokens: Annotated[int, at_least(1)] = operational(2048)
    """Tokens that go through the model at once at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.circuit.examples > self.classifier.train:
            raise UnweaveError(
                f"the circuit cannot be found on {self.circuit.examples} of {self.classifier.train} training examples",
                where="circuit.examples",
                remedy="ask for no more than classifier.train",
            )


@dataclass(frozen=True, kw_only=True)
class CircuitShiftSpec(ShiftOptions, OfSAEsSpec):
    """Making a classifier forget what it should not rely on (SHIFT)."""

    biographies: BiographiesRef = "templated"
    """hub:LabHC/bias_in_bios, a file of its form (JSON lines, JSON, Parquet: hard_text, profession, gender), or
    templated: written from word lists, with the same two professions."""
    pool: Annotated[int, at_least(1)] = 160
    """Biographies of each of the four groups that every seed draws its training examples from."""
    test: Annotated[int, at_least(1)] = 75
    """Biographies of each of the four groups to test on, none of which is trained on."""
    judge: Literal["rule", "file", "chat"] = "rule"
    """Who says which latents are about gender: a rule over their contexts and the tokens they promote, a file of
    annotations, or a chat model."""
    gender: RuleOptions = RuleOptions()
    """judge rule: the rule."""
    annotations: FileRef | None = None
    """judge file: JSON lines as `unweave annotate` writes them; latents with relevant: false are ablated."""
    chat: JudgeSpec = JudgeSpec()
    """judge chat: the chat model."""
    data: DataSpec | None = None
    """judge rule or chat: other text to take contexts from; by default the SAEs' training text."""
    latents_tokens: Annotated[int | None, at_least(1)] = None
    """judge rule or chat: how many of its tokens; by default 200,000, or all there are."""
    seed: int = 0
    """Choice of the biographies."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classifier.train > 2 * self.pool:
            what = f"{self.classifier.train} training examples are more than two groups of {self.pool} have"
            raise UnweaveError(what, where="classifier.train", remedy="ask for fewer, or for a larger pool")
        asked = self.judge != "file"
        uses = {"gender": self.judge == "rule", "annotations": not asked, "chat": self.judge == "chat"}
        unused(self, uses | {"data": asked, "latents_tokens": asked})
        if self.judge == "file" and self.annotations is None:
            raise UnweaveError("there is no file to judge by", where="annotations", remedy="name it with --annotations")


COMMAND = Command(
    words="circuit shift",
    spec=CircuitShiftSpec,
    result=ShiftResult,
    stage="unweave.methods.shift.stage:run",
    summary="Make a classifier forget what it should not rely on, without labels that tell the two apart (SHIFT).",
    about="A linear classifier of professors and nurses is trained where all professors are men, all nurses women. Its "
    "circuit is found in the SAEs' latents; a rule, a file of annotations or a chat model says which of "
    "them are about gender; those are ablated, and the classifier is tested on all four groups, as it is and "
    "trained anew. Beside it every baseline of the paper's Table 2: concept bottleneck, random latents, skylines "
    "by neurons and latents that use labels of gender, and the oracle. Writes table.md, a figure, and why each "
    "latent was ablated. After an interruption the same command goes on where it was.",
    examples=(
        "unweave circuit shift --saes runs/train-0123456789ab/sae",
        "unweave circuit shift --saes runs/train-0123456789ab/sae --judge file --annotations mine.jsonl --seeds 1",
        "unweave circuit shift --saes runs/train-0123456789ab/sae --biographies hub:LabHC/bias_in_bios --judge chat",
    ),
)
