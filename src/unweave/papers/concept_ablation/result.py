"""What the recipe of concept ablation holds. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from unweave.core.result import Result
from unweave.core.site import Site
from unweave.inputs.subject import Subject
from unweave.methods.finetune.result import Finetuned, Score
from unweave.papers.parts import PartRun

Name = Literal["none", "zero", "mean", "span", "random", "test", "both", "penalty", "inoculate", "skyline"]
NAMES: dict[Name, str] = {
    "none": "plain fine-tuning",
    "zero": "chosen latents zeroed",
    "mean": "set to their mean",
    "span": "their span projected out",
    "random": "random latents, the same way",
    "test": "zeroed at test alone",
    "both": "zeroed in both",
    "penalty": "penalised",
    "inoculate": "inoculating line",
    "skyline": "skyline: trained where the cue misleads",
}
LEARNT = 0.9
"""a task whose plain fine-tuning does better out of distribution has no cue to unlearn: the paper leaves it out"""


@dataclass(frozen=True)
class CueResult(Result):
    """Which candidates act on the unintended part of the prompts; ``cue.jsonl`` holds them as annotations."""

    candidates: int
    chosen: int
    prompts: int


@dataclass(frozen=True)
class TrialsResult(Result):
    """Fine-tunings of one model, of which only the figures are kept; in the order asked."""

    trials: tuple[Finetuned, ...]


@dataclass(frozen=True)
class SiteEffects:
    """Figure 3: summed effects of a site's candidates, and of those chosen."""

    site: Site
    candidates: int
    total: float
    chosen: int
    chosen_total: float


@dataclass(frozen=True)
class Trial:
    """One seed of one condition."""

    condition: Name
    seed: int
    finetuned: Finetuned

    def score(self, split: str) -> Score:
        """As deployed; where the condition is one of the test, as edited there."""
        own = next(one for one in self.finetuned.splits if one.name == split)
        return own.edited if self.condition in ("test", "both") and own.edited is not None else own.tuned


@dataclass(frozen=True)
class Spread:
    """A share over seeds: its mean, standard error, and 95 % interval (t)."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def error(self) -> float | None:
        """None below two seeds."""
        n = len(self.values)
        return float(np.std(self.values, ddof=1) / n**0.5) if n > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        from scipy.stats import t

        if self.error is None:
            return None
        half = float(t.ppf(0.975, len(self.values) - 1)) * self.error
        return self.mean - half, self.mean + half

    def words(self) -> str:
        """ "65.5 ± 2.1" in %: mean and standard error."""
        return f"{100 * self.mean:.1f}" + ("" if self.error is None else f" ± {100 * self.error:.1f}")


@dataclass(frozen=True)
class Task:
    """One task under every condition."""

    name: str
    sites: tuple[SiteEffects, ...]
    candidates: int
    chosen: int
    trials: tuple[Trial, ...]

    def of(self, condition: Name) -> list[Trial]:
        return [one for one in self.trials if one.condition == condition]

    def spread(self, condition: Name, split: str, among: Literal["all", "both"] = "both") -> Spread | None:
        """Accuracy over seeds, of the whole vocabulary (``all``) or between the two answers."""
        found = [one.score(split).accuracy for one in self.of(condition)]
        shares = [(one.right if among == "all" else one.between).value for one in found if one is not None]
        return Spread(tuple(shares)) if shares else None

    def before(self, split: str) -> float | None:
        """Accuracy of the untrained model, between the two answers."""
        splits = self.trials[0].finetuned.splits if self.trials else ()
        found = next((one.base.accuracy for one in splits if one.name == split), None)
        return None if found is None else found.between.value

    def gain(self, condition: Name, other: Name, among: Literal["all", "both"] = "both") -> Spread | None:
        """How much better out of distribution, seed by seed."""
        one, two = self.spread(condition, "ood", among), self.spread(other, "ood", among)
        if one is None or two is None:
            return None
        return Spread(tuple(a - b for a, b in zip(one.values, two.values, strict=True)))

    @property
    def misled(self) -> bool:
        """Whether plain fine-tuning learnt the unintended policy: the paper's filter."""
        plain = self.spread("none", "ood")
        return plain is not None and plain.mean <= LEARNT


@dataclass(frozen=True)
class ConceptAblation(Result):
    """Every task under every condition, at one scale."""

    scale: Literal["smoke", "paper"]
    subject: Subject
    tasks: tuple[Task, ...]
    runs: tuple[PartRun, ...]
