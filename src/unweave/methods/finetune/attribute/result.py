"""What attribution over a task finds: candidates to choose from. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unweave.core.contents import content_of
from unweave.core.errors import UnweaveError
from unweave.core.files import printable
from unweave.core.result import Result
from unweave.core.run import Run
from unweave.core.site import Site
from unweave.inputs.subject import Subject
from unweave.latents.annotations import name_of


@dataclass(frozen=True)
class Candidate:
    """A latent, or a principal component, of one site."""

    site: Site
    number: int
    score: float
    """its effect on the metric; how much more it writes in the fine-tuned model; or the share of variance explained"""
    margin: float
    """half of the score's 95 % interval over examples; 0 for components"""
    activation: float
    """the latent's mean activation on the text, in the model itself"""
    frequency: float
    """on what share of the tokens it fires there"""
    size: float | None = None
    """of a difference between models: in standard deviations over examples"""

    @property
    def key(self) -> tuple[Site, int]:
        return self.site, self.number

    @property
    def name(self) -> str:
        """``resid_post.9/123``"""
        return name_of(*self.key)


@dataclass(frozen=True)
class SiteTotal:
    """One site among those looked at."""

    site: Site
    latents: int
    firing: int
    """latents that fire on the text"""
    candidates: int
    """of the site"""
    total: float
    """the sum of their scores"""
    sae: str | None
    """the SAE's name and digest; None for components"""
    digest: str | None
    mean_share: float | None = None
    """of components: how much of the mean squared difference between the models is one and the same at every token,
    which no component has"""


@dataclass(frozen=True)
class AttributeResult(Result):
    """Candidates, the strongest first; ``candidates.jsonl`` beside it is a file of annotations with a line for each."""

    subject: Subject
    model: str
    """the name that the model was loaded by"""
    by: str
    task: str
    metric: str
    """what scores are in, in words"""
    tuned: str | None
    """the fine-tuned model, where models were compared"""
    examples: int
    tokens: int
    skipped: dict[str, int]
    """how many examples were left out, for which reason"""
    candidates: tuple[Candidate, ...]
    sites: tuple[SiteTotal, ...]
    directions: Path | None
    """principal components by site, [C, D] each"""


def attribution_at(folder: Path) -> Run[AttributeResult]:
    """A finished run of ``unweave finetune attribute``. UnweaveError for anything else."""
    run = Run.at(folder, AttributeResult)
    if run.asked["stage"] != "finetune-attribute" or not run.done:
        what = "this is no finished run of `unweave finetune attribute`"
        raise UnweaveError(what, where=printable(folder), remedy="give its run directory, as it was printed")
    return run


def content(folder: Path) -> str:
    """Twelve digits over a run's question and its result."""
    run = attribution_at(folder)
    return f"{run.digest} {content_of(run.path / 'result.json')}"
