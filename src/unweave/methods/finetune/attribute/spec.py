"""What attribution over a task can be asked. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from unweave.core.command import Command
from unweave.core.errors import UnweaveError
from unweave.core.rules import at_least, only_for
from unweave.core.spec import operational
from unweave.data.spec import DataSpec, ModelRef
from unweave.inputs.spec import OfSAEsSpec, unused
from unweave.methods.finetune.attribute.result import AttributeResult
from unweave.tasks.choices.spec import ChoiceSpec


@dataclass(frozen=True, kw_only=True)
class FinetuneAttributeSpec(OfSAEsSpec):
    """Finding what a model could learn a task by."""

    by: Literal["effect", "difference", "components"] = "effect"
    """effect: of every latent on the right answer; difference: how much more every latent writes in a fine-tuned model;
    components: principal components of the difference that fine-tuning made to activations, at the sites of the SAEs
    and of neurons."""
    task: ChoiceSpec = ChoiceSpec()
    """The task, of which training items are looked at: its metric is logit(correct) - logit(incorrect)."""
    chat: bool = False
    """Put prompts into the model's chat template."""
    data: DataSpec | None = None
    """In place of a task, conversations: the metric is the mean log-probability of the assistant's tokens."""
    tuned: Annotated[ModelRef | None, only_for("by", "difference", "components")] = None
    """The fine-tuned model: a folder, an adapter's too."""
    examples: Annotated[int | None, at_least(1)] = None
    """Look at so many at most; by default at all."""
    top: Annotated[int, at_least(1), only_for("by", "effect", "difference")] = 100
    """How many latents become candidates, of all sites together."""
    per_site: Annotated[bool, only_for("by", "effect", "difference")] = False
    """So many of each site instead."""
    sign: Annotated[Literal["positive", "negative", "either"], only_for("by", "effect", "difference")] = "positive"
    """Those with the largest scores, as in the paper; those with the lowest; or the largest of any sign."""
    components: Annotated[int, at_least(1), only_for("by", "components")] = 20
    """How many components of each site."""
    batch_tokens: Annotated[int, at_least(1)] = operational(2048)
    """Tokens that go through the model at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by != "effect" and self.tuned is None:
            raise UnweaveError(f"by {self.by} needs a fine-tuned model", where="tuned", remedy="name it with --tuned")
        unused(self, {"task": self.data is None, "chat": self.data is None})


COMMAND = Command(
    words="finetune attribute",
    spec=FinetuneAttributeSpec,
    result=AttributeResult,
    stage="unweave.methods.finetune.attribute.stage:run",
    summary="Find the latents that a task could be learnt by.",
    about="The effect of every latent of all SAEs on the right answer, over a task's training items, from one forward "
    "and one backward pass a batch; or on the assistant's words, over conversations. With --by difference or "
    "components, how a fine-tuned model differs from the one it came from. The strongest are candidates for "
    "`unweave finetune select`.",
    examples=(
        "unweave finetune attribute --saes runs/train-0123456789ab/sae",
        "unweave finetune attribute --saes sae --task.task double --task.first pronouns --task.second sports",
        "unweave finetune attribute --saes sae --by components --tuned runs/finetune-run-0123456789ab/model",
    ),
)
