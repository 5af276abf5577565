"""What the FAST recipe holds. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unweave.core.result import Result
from unweave.methods.explain.rubric.result import RubricResult
from unweave.methods.special_tokens.result import ByGroup, Group, GroupErrors, SpecialTokenResult, TokenErrors

Recipe = Literal["BT(P)", "BT(F)", "FAST"]
RECIPES: tuple[Recipe, ...] = ("BT(P)", "BT(F)", "FAST")
"""Block training on pre-training text, block training on conversations, whole conversations."""


@dataclass(frozen=True)
class Measure:
    """The log2 MSE of a group of tokens, with all of them or without norm outliers."""

    group: Group
    outliers: bool = True
    """whether norm outliers count"""

    def of(self, errors: TokenErrors) -> GroupErrors:
        """The errors that it is taken from."""
        return self._groups(errors).of(self.group)

    def whole(self, errors: TokenErrors) -> GroupErrors:
        """The errors of all tokens, whose L0 errors are compared at."""
        return self._groups(errors).all

    def _groups(self, errors: TokenErrors) -> ByGroup:
        return errors.everything if self.outliers else errors.without_outliers


MEASURES = (
    *(Measure("all"), Measure("special"), Measure("all", outliers=False), Measure("special", outliers=False)),
    *(Measure("user"), Measure("assistant")),
)


@dataclass(frozen=True)
class Measured:
    """One SAE and what was measured of it."""

    recipe: Recipe
    kind: str
    expansion: int
    """how many times as wide as the residual stream"""
    site: str
    k: int | None
    """the L0 that its training aimed at; None where a fixed coefficient decides"""
    seed: int
    errors: TokenErrors


@dataclass(frozen=True)
class RecipeErrors(Result):
    """The errors of every SAE of every recipe on the same conversations."""

    saes: tuple[Measured, ...]


@dataclass(frozen=True)
class Rated:
    """The ratings of one SAE of a recipe."""

    recipe: Recipe
    rubric: RubricResult


@dataclass(frozen=True)
class PartRun:
    """One of the runs that the recipe consists of, in the same folder."""

    part: Literal["train", "errors", "special-tokens", "rubric"]
    recipe: Recipe | None
    """None where it is of all of them"""
    run: str


@dataclass(frozen=True)
class InstructSaes(Result):
    """Whole conversations against block training."""

    scale: Literal["smoke", "paper"]
    sites: tuple[str, ...]
    tokens: int
    """that each SAE was trained on"""
    k: int | None
    """the L0 at which errors are compared; None: as trained, with equal coefficients, as in the paper"""
    saes: tuple[Measured, ...]
    ratings: tuple[Rated, ...]
    """empty where no judge was asked"""
    special_tokens: SpecialTokenResult
    """of one SAE that was trained on whole conversations"""
    runs: tuple[PartRun, ...]
