"""What fine-tuning under a condition can be asked. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from unweave.core.errors import UnweaveError
from unweave.core.rules import above, only_for, only_where
from unweave.core.spec import Spec

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
