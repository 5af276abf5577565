"""What ``unweave circuit shift`` can be asked. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unweave.core.errors import UnweaveError
from unweave.core.refs import FileRef
from unweave.core.spec import operational, require
from unweave.data.spec import DataSpec
from unweave.inputs.spec import OfSAEsSpec, unused
from unweave.judge.spec import JudgeSpec


@dataclass(frozen=True, kw_only=True)
class CircuitShiftSpec(OfSAEsSpec):
    """Making a classifier forget what it should not rely on (SHIFT)."""

    probe: str | None = None
    """The site whose activations the classifier averages; by default the last autoencoder's residual site."""
    biographies: str = "templated"
    """hub:LabHC/bias_in_bios, a file of its form (JSON lines, JSON, Parquet: hard_text, profession, gender), or
    templated: written from word lists, with the same two professions."""
    pool: int = 160
    """Biographies of each of the four groups that every seed draws its training examples from."""
    train: int = 240
    """Training examples of a classifier: half and half for the ambiguous set, all four groups for the balanced one."""
    test: int = 75
    """Biographies of each of the four groups to test on, none of which is trained on."""
    max_length: int = 128
    """Biographies are cut off after so many tokens."""
    skip_first: int = 1
    """First tokens of a text that are neither averaged over nor attributed to: the first is often an attention sink."""
    lr: float = 0.01
    """Learning rate of the classifier."""
    epochs: int = 1
    """Epochs of the classifier."""
    standardise: bool = True
    """Centre and scale the averaged activations before the classifier is trained; the paper does not."""
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
    judge: Literal["rule", "file", "chat"] = "rule"
    """Who says which latents are about gender: a rule over their contexts and the tokens they promote, a file of
    annotations, or a chat model."""
    context_share: float = 0.4
    """rule: the share of a latent's strongest contexts whose strongest word must be one for gender; or..."""
    promoted_share: float = 0.25
    """rule: ...the share of the tokens it promotes."""
    annotations: FileRef | None = None
    """file: JSON lines as `unweave annotate` writes them; latents with relevant: false are ablated."""
    chat: JudgeSpec = JudgeSpec()
    """chat: the chat model."""
    data: DataSpec | None = None
    """rule, chat: other text to take contexts from; by default the autoencoders' training text."""
    latents_tokens: int | None = None
    """rule, chat: how many of its tokens; by default 200,000, or all there are."""
    where: Literal["all", "policy"] = "all"
    """Ablate at every token, as the paper, or only at those that the autoencoders were trained on."""
    random: int = 1
    """With how many draws of as many other latents to do the same, per seed."""
    seeds: int = 5
    """How often to do everything: with other training examples, first weights and random latents."""
    seed: int = 0
    """Choice of the biographies."""
    batch_tokens: int = operational(2048)
    """Tokens that go through the model at once at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = ("pool", "train", "test", "max_length", "epochs", "examples", "steps", "seeds", "random")
        fine = {name: getattr(self, name) > 0 for name in (*sizes, "batch_tokens", "lr")}
        fine |= {
            "skip_first": 0 <= self.skip_first < self.max_length,
            "train": self.train % 4 == 0 and self.train <= 2 * self.pool,
            "examples": self.examples % 4 == 0 and self.examples <= self.train,
            "threshold": self.threshold >= 0,
            "top": self.top is None or self.top > 0,
            "context_share": 0 < self.context_share <= 1,
            "promoted_share": 0 < self.promoted_share <= 1,
            "latents_tokens": self.latents_tokens is None or self.latents_tokens > 0,
        }
        require(self, fine)
        asked = self.judge != "file"
        ruled = self.judge == "rule"
        uses = {"context_share": ruled, "promoted_share": ruled, "annotations": not asked, "chat": self.judge == "chat"}
        uses |= {"data": asked, "latents_tokens": asked, "steps": self.method == "ig", "rule": self.method == "ig"}
        unused(self, uses)
        if self.judge == "file" and self.annotations is None:
            raise UnweaveError("there is no file to judge by", where="annotations", remedy="name it with --annotations")
