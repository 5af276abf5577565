"""What fine-tuning gives: a model or adapter, and how it does on every split. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unweave.core.result import Result
from unweave.core.shares import Share
from unweave.core.site import Site
from unweave.inputs.subject import Subject
from unweave.methods.finetune.diagnosis import Diagnosis


@dataclass(frozen=True)
class Accuracy:
    """Answers to items with two answers each."""

    right: Share
    """whose most likely token, of the whole vocabulary, is the correct answer"""
    between: Share
    """whose correct answer is likelier than the incorrect one"""
    cued: Share | None
    """whose likelier of the two answers is the cue's, of items with a known cue; None without any"""


@dataclass(frozen=True)
class Score:
    """How a model does on one split."""

    loss: float
    """mean cross-entropy of what is to be predicted, in nats"""
    accuracy: Accuracy | None
    """None for conversations"""


@dataclass(frozen=True)
class Check:
    """What is measured at one moment of training, without any edit. Losses before are means since the last check."""

    step: int
    epoch: float
    learning_rate: float
    loss: float | None
    """of the training items; None before the first step"""
    penalty: float | None
    """what the condition adds to the loss; None where it adds nothing"""
    scores: dict[str, Score]
    """by split"""
    projections: dict[Site, float]
    """mean of the unit directions' products with the activations of the validation items' tokens"""


@dataclass(frozen=True)
class Split:
    """A split of the data: how the base model and the tuned one do, the latter also under the condition's edit."""

    name: str
    items: int
    base: Score
    tuned: Score
    edited: Score | None
    """None where the condition has no edit"""


@dataclass(frozen=True)
class Weights:
    """What was trained."""

    kind: str
    trained: int
    """how many numbers"""
    of: int
    begins: Site | None
    """where training passes began; None: at the tokens"""


@dataclass(frozen=True)
class Finetuned(Result):
    """A fine-tuned model. ``folder`` holds it as an ordinary Hugging Face folder, or as a PEFT adapter."""

    subject: Subject
    data: str
    """in words"""
    skipped: dict[str, int]
    """items that could not be used, by reason"""
    condition: str
    """in words"""
    selection: str | None
    """its name, size and digest, in words"""
    weights: Weights
    seed: int
    steps: int
    batch: int
    splits: tuple[Split, ...]
    history: tuple[Check, ...]
    folder: Path
    diagnosis: Diagnosis | None
    """what the selection does to the untrained model, tried before training; None without a selection"""
