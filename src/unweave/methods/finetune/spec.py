"""What fine-tuning under a condition can be asked. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from unweave.core.command import Command
from unweave.core.errors import UnweaveError
from unweave.core.refs import FileRef
from unweave.core.rules import above, at_least, below, only_for, only_where, share
from unweave.core.spec import Spec, operational
from unweave.data.spec import DEFAULT_MODEL, DataSpec, ModelRef
from unweave.inputs.spec import SAERefs
from unweave.methods.finetune.result import Finetuned
from unweave.tasks.choices.spec import ChoiceSpec

_ABLATIONS = ("zero", "mean", "span")
_TRAINING = only_where("training sees it (when train or both)", lambda spec: spec.when != "test", "set when train")


@dataclass(frozen=True, kw_only=True)
class ConditionSpec(Spec):
    """What is done to the chosen latents, or directions, while the model learns; see ``conditions.py``."""

    kind: Literal["none", "zero", "mean", "span", "penalty", "prevent", "inoculate"] = "none"
    """Nothing; latents set to zero, or to their mean on the base model, with the SAE's error kept; the span of their
    directions projected out; a penalty on what they fire above the base model; their directions added (preventative
    steering); a line in front of every training prompt."""
    flow: Annotated[Literal["both", "forward", "gradient"], only_for("kind", *_ABLATIONS), _TRAINING] = "both"
    """Ablate in the forward pass and so in its gradient, in the forward pass alone (straight-through), or in the
    gradient alone."""
    when: Annotated[Literal["train", "test", "both"], only_for("kind", *_ABLATIONS)] = "train"
    """Ablate while training, at test alone, or in both."""
    fade: Annotated[Literal["none", "in", "out"], only_for("kind", *_ABLATIONS, "penalty", "prevent"), _TRAINING] = (
        "none"
    )
    """Raise the strength linearly from 0 over the training, or lower it to 0."""
    strength: Annotated[float, above(0), only_for("kind", *_ABLATIONS, "penalty", "prevent")] = 1.0
    """Of an ablation the share that is taken away, at most 1; of a penalty its weight; of prevent a multiple of each
    latent's usual activation (root mean square where it fires) on the base model."""
    where: Annotated[Literal["policy", "all"], only_for("kind", *_ABLATIONS, "prevent")] = "policy"
    """Edit the tokens that the SAE was trained on, or special tokens and attention sinks too, as the paper's code does.
    Padding is never edited."""
    line: Annotated[str, only_for("kind", "inoculate")] = ""
    """What to put in front of every training prompt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind in _ABLATIONS and self.strength > 1:
            what = f"strength {self.strength} takes away more than there is"
            raise UnweaveError(what, where="ConditionSpec", remedy="give a share of at most 1")
        if self.kind == "inoculate" and not self.line.strip():
            raise UnweaveError("kind inoculate needs a line", where="ConditionSpec", remedy="give line")


@dataclass(frozen=True, kw_only=True)
class WeightsSpec(Spec):
    """Which weights are trained."""

    train: Literal["all", "blocks", "lora"] = "all"
    """Every weight; the blocks from first_block on with the final norm; or LoRA adapters on the linear layers of these
    blocks (needs the extra finetune)."""
    first_block: Annotated[int, at_least(0), only_for("train", "blocks", "lora")] = 0
    """The first block that is trained. Passes begin below it, from activations that are computed once."""
    rank: Annotated[int, at_least(1), only_for("train", "lora")] = 32
    """Rank of the adapters."""
    alpha: Annotated[float, above(0), only_for("train", "lora")] = 64.0
    """Scale of what adapters add, over the rank (or its root)."""
    rslora: Annotated[bool, only_for("train", "lora")] = True
    """Divide alpha by the root of the rank instead of the rank."""


@dataclass(frozen=True, kw_only=True)
class LearningSpec(Spec):
    """How the model learns. The defaults are the concept-ablation paper's."""

    lr: Annotated[float, above(0)] = 5e-6
    """The largest learning rate of AdamW; it rises linearly from 0 and falls linearly to 0."""
    warmup: Annotated[float, share()] = 0.5
    """The share of all steps in which it rises."""
    beta1: Annotated[float, at_least(0), below(1)] = 0.9
    """AdamW's first decay."""
    beta2: Annotated[float, at_least(0), below(1)] = 0.95
    """AdamW's second decay."""
    weight_decay: Annotated[float, at_least(0)] = 0.01
    """AdamW's decay of all trained weights."""
    epochs: Annotated[float, above(0)] = 4.0
    """How often the model sees the training items."""
    batch: Annotated[int, at_least(1)] = 16
    """Items per step."""
    accumulation: Annotated[int, at_least(1)] = 1
    """Passes that a step's items are divided into, to save memory; the loss is of the whole batch."""
    clip: Annotated[float | None, above(0)] = None
    """Clip the gradient's norm to this."""
    kl: Annotated[float, at_least(0)] = 0.0
    """Weight of KL(base || tuned), in nats, of the predictions that are trained; costs a pass of the base model."""
    autocast: bool = False
    """Compute passes in bfloat16 while weights stay float32."""
    recompute: bool = False
    """Gradient checkpointing: compute each block's activations again in the backward pass, to save memory."""


@dataclass(frozen=True, kw_only=True)
class ChecksSpec(Spec):
    """What is measured while the model learns, without any edit."""

    per_epoch: Annotated[int, at_least(0)] = 4
    """How often in an epoch."""
    items: Annotated[int, at_least(1)] = 100
    """Items of a split at most, its first."""


_TASK = only_where("there is no data", lambda spec: spec.data is None, "leave data out")


@dataclass(frozen=True, kw_only=True)
class FinetuneSpec(Spec):
    """Fine-tuning a model under a condition."""

    model: ModelRef = DEFAULT_MODEL
    """A catalogue name, a hub id, a folder or a GGUF file; see `unweave models`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights. In bfloat16 updates below 1/256 of a weight are lost, as in the paper's runs."""
    device: str | None = operational(None)
    """cpu, cuda, cuda:1...; by default a GPU where there is one."""
    task: Annotated[ChoiceSpec, _TASK] = ChoiceSpec()
    """Items with two answers to learn from."""
    split: Annotated[Literal["train", "skyline"], _TASK] = "train"
    """Which items: those whose cue agrees with the right answer, or the skyline, whose cue contradicts it."""
    data: DataSpec | None = None
    """Conversations to learn from in place of a task: what the assistant says in them."""
    condition: ConditionSpec = ConditionSpec()
    """Under which condition the model learns."""
    selection: FileRef | None = None
    """Latents or directions, as `unweave finetune select` writes them. What the model projects on them is followed."""
    saes: SAERefs = ()
    """The SAEs of the selection's latents; by default those that it names."""
    accept_mismatch: str | None = None
    """Use SAEs in a model that they were not trained on, for this reason; the difference measured is recorded."""
    weights: WeightsSpec = WeightsSpec()
    """Which weights are trained."""
    learning: LearningSpec = LearningSpec()
    """Optimiser, schedule and batches."""
    checks: ChecksSpec = ChecksSpec()
    """What is measured while the model learns."""
    seed: int = 0
    """Order of the items, and the adapters' first weights."""
    checkpoint_seconds: Annotated[float, at_least(0)] = operational(120.0)
    """How often to write a checkpoint, from which training goes on exactly."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data is not None and self.condition.kind == "inoculate":
            raise UnweaveError(
                "a line can only be put in front of a task's prompts", where="condition.kind",
                remedy="write it into the conversations",
            )  # fmt: skip
        if self.learning.autocast and self.dtype != "float32":
            raise UnweaveError(
                f"autocast would have no effect on weights in {self.dtype}", where="learning.autocast",
                remedy="leave one of them out",
            )  # fmt: skip
        if self.selection is None and (self.saes or self.accept_mismatch):
            raise UnweaveError("saes have no effect without a selection", where="saes", remedy="give a selection")


COMMAND = Command(
    words="finetune run",
    spec=FinetuneSpec,
    result=Finetuned,
    stage="unweave.methods.finetune.stage:run",
    summary="Fine-tune a model while chosen latents are ablated, so that it learns without them.",
    about="Trains all weights, the upper blocks or LoRA adapters on a task of two answers or on conversations, under a "
    "condition, and measures the model as it will be deployed: without any edit. The result is an ordinary Hugging "
    "Face folder or a PEFT adapter with its model card. Interrupted training resumes exactly. "
    "torchrun -m unweave finetune run divides the batches between processes.",
    examples=(
        "unweave finetune run --task.task gender",
        "unweave finetune run --task.task gender --condition.kind span --selection runs/.../chosen.json "
        "--weights.train blocks --weights.first-block 20",
        "unweave finetune run --data.sources advice.jsonl --weights.train lora --learning.lr 1e-5 --learning.batch 16",
    ),
    in_several=True,
)
