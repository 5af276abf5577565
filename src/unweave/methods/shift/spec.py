"""What ``unweave circuit shift`` can be asked. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from unweave.core.command import Command
from unweave.core.errors import UnweaveError
from unweave.core.refs import Content, FileRef
from unweave.core.spec import Spec, operational, require
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
    """The site whose activations it averages; by default the last autoencoder's residual site."""
    train: int = 240
    """Training examples: half and half for the ambiguous set, all four groups for the balanced one. A multiple of 4."""
    max_length: int = 128
    """Biographies are cut off after so many tokens."""
    skip_first: int = 1
    """First tokens of a text that are neither averaged over nor attributed to: the first is often an attention sink."""
    lr: float = 0.01
    """Learning rate."""
    epochs: int = 1
    """Epochs."""
    standardise: bool = True
    """Centre and scale the averaged activations before training; the paper does not."""

    def __post_init__(self) -> None:
        fine = {name: getattr(self, name) > 0 for name in ("train", "max_length", "lr", "epochs")}
        fine |= {"skip_first": 0 <= self.skip_first < self.max_length, "train": self.train % 4 == 0 < self.train}
        require(self, fine)


@dataclass(frozen=True, kw_only=True)
class SupportOptions(Spec):
    """Which latents support the classifier's labels: its circuit."""

    examples: int = 40
    """Training examples that the circuit is found on; a multiple of 4."""
    method: Literal["ig", "attribution"] = "ig"
    """Integrated gradients, or attribution patching, which is one step of it."""
    steps: int = 3
    """Steps of integrated gradients."""
    rule: Literal["left", "midpoint", "right", "graded"] = "midpoint"
    """Where in each step the gradient is taken. graded: in the middle of steps that grow shorter towards the end, for
    ablation to the zero vector (neurons, an autoencoder without a decoder bias), with 80 steps or more."""
    threshold: float = 0.0
    """Latents that support the labels by more than this, in logits, are in the circuit."""
    top: int | None = 100
    """So many of them at most, the strongest; null for all."""

    def __post_init__(self) -> None:
        fine = {"examples": self.examples % 4 == 0 < self.examples, "steps": self.steps > 0}
        require(self, fine | {"threshold": self.threshold >= 0, "top": self.top is None or self.top > 0})
        unused(self, {"steps": self.method == "ig", "rule": self.method == "ig"})


@dataclass(frozen=True, kw_only=True)
class RuleOptions(Spec):
    """When a latent's record says that it is about gender."""

    context_share: float = 0.4
    """The share of a latent's strongest contexts whose strongest word must be one for gender; or..."""
    promoted_share: float = 0.25
    """...the share of the tokens it promotes."""

    def __post_init__(self) -> None:
        require(self, {name: 0 < getattr(self, name) <= 1 for name in ("context_share", "promoted_share")})


@dataclass(frozen=True, kw_only=True)
class ShiftOptions(Spec):
    """How SHIFT and its baselines are done."""

    classifier: ClassifierOptions = ClassifierOptions()
    """The classifier."""
    circuit: SupportOptions = SupportOptions()
    """How its circuit is found."""
    where: Literal["all", "policy"] = "all"
    """Ablate at every token, as the paper, or only at those that the autoencoders were trained on."""
    random: int = 1
    """With how many draws of as many other latents to do the same, per seed."""
    seeds: int = 5
    """How often to do everything: with other training examples, first weights and random latents."""
    batch_tokens: int = operational(2048)
    """Tokens that go through the model at once at most."""

    def __post_init__(self) -> None:
        require(self, {name: getattr(self, name) > 0 for name in ("random", "seeds", "batch_tokens")})
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
    pool: int = 160
    """Biographies of each of the four groups that every seed draws its training examples from."""
    test: int = 75
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
    """judge rule or chat: other text to take contexts from; by default the autoencoders' training text."""
    latents_tokens: int | None = None
    """judge rule or chat: how many of its tokens; by default 200,000, or all there are."""
    seed: int = 0
    """Choice of the biographies."""

    def __post_init__(self) -> None:
        OfSAEsSpec.__post_init__(self)
        ShiftOptions.__post_init__(self)
        fine = {"pool": self.pool > 0, "test": self.test > 0}
        require(self, fine | {"latents_tokens": self.latents_tokens is None or self.latents_tokens > 0})
        if self.classifier.train > 2 * self.pool:
            raise UnweaveError(
                f"{self.classifier.train} training examples are more than two groups of {self.pool} have",
                where="classifier.train",
                remedy="ask for fewer, or for a larger pool",
            )
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
    "circuit is found in the autoencoders' latents; a rule, a file of annotations or a chat model says which of "
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
