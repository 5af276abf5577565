"""Groups of options, as files and the command line give them and as the functions take them. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from unweave.core.errors import UnweaveError
from unweave.core.rules import above, at_least, not_empty, rule
from unweave.core.spec import Spec

FACTORS: dict[str, tuple[float, ...]] = {
    "add": (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 4.0, 5.0),
    "clamp": (0.4, 0.8, 1.2, 1.6, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 20.0, 40.0, 60.0, 100.0),
    "max-act": (0.4, 1.0, 1.4, 1.8, 2.2, 2.6, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0),
}
"""AxBench's, as multiples of the largest activation"""
_RISING = rule("rising and above 0", lambda factors: all(a < b for a, b in zip((0.0, *factors), factors, strict=False)))


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
