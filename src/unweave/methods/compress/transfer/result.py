"""What the study of SAEs on compressed models finds. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unweave.core.intervals import Interval
from unweave.core.result import Result
from unweave.core.site import Site
from unweave.inputs.subject import Subject
from unweave.methods.compress.result import Loss
from unweave.sae.measure.result import Metrics

On = Literal["original", "compressed"]
ORIGINAL, RETRAINED = "original", "retrained"
ALIKE = 0.9
"""the correlation from which on a latent counts as the same"""


def pruned(share: float) -> str:
    """The name of the SAE with this share of its weights taken out."""
    return f"pruned {100 * share:g} %"


@dataclass(frozen=True)
class Surviving:
    """The latents of one range of firing rates."""

    low: float
    """firing rate in the original model, from this"""
    high: float
    """to below this"""
    latents: int
    silenced: int
    """that never fire afterwards"""
    mean: Interval | None
    """of the correlations"""
    alike: float | None
    """the share of latents whose correlation is at least ``ALIKE``"""


@dataclass(frozen=True)
class Survival:
    """How each latent's activations go together before and after: Pearson's correlation over tokens, 0 for a latent
    that never fires afterwards."""

    every: Surviving
    """latents that fire often enough to say"""
    rare: int
    """that fire in the original model, but on too few tokens"""
    median: float | None
    by_rate: tuple[Surviving, ...]


@dataclass(frozen=True)
class Told:
    """How well latents tell their labels on texts held out."""

    pairs: int
    auroc: Interval | None
    """mean over pairs of latent and label"""
    change: Interval | None
    """from the original SAE in the original model, pair by pair"""
    shuffled: float | None
    """mean with the texts' labels shuffled"""


@dataclass(frozen=True)
class Steered:
    """What adding latents' directions at the end of a prompt does to the next token, before and after."""

    latents: int
    size: Interval | None
    """KL(steered || plain) in nats"""
    size_before: float | None
    alike: Interval | None
    """correlation over the vocabulary of the change in log-probability with that before"""
    random_alike: Interval | None
    """the same for random directions of the same lengths, in the two models"""


@dataclass(frozen=True)
class Cell:
    """One form of a site's SAE in one of the two models."""

    site: Site
    form: str
    sparsity: float | None
    """of a pruned SAE"""
    on: On
    metrics: Metrics
    survival: Survival | None
    """against the original SAE in the original model; None for that one, for retrained SAEs, and in the sweep"""
    told: Told | None
    steered: Steered | None


@dataclass(frozen=True)
class Damage:
    """What a compression does to the original SAE of a site."""

    site: Site
    survival: Survival
    unexplained_variance: float
    unexplained_before: float


@dataclass(frozen=True)
class Compression:
    """A compressed model."""

    name: str
    words: str
    """what was done, as "pruned by wanda, 50 % sparse" """
    loss: Loss
    sites: tuple[Damage, ...]


@dataclass(frozen=True)
class Overlap:
    """Whether two compressions damage the same latents of a site."""

    site: Site
    one: str
    other: str
    """in words"""
    latents: int
    rank_correlation: float
    """Spearman's, of 1 - r"""
    shared: float
    """of the tenth of latents that one damages most, the share that the other damages most too; 0.1 by chance"""


@dataclass(frozen=True)
class Predictor:
    """Damage log10(1 - r) by the first compression, predicted from the original SAE and model alone."""

    site: Site
    latents: int
    explained: float
    """R^2 on latents that were not fitted on"""
    low: float
    high: float
    """its 95 % interval over folds"""
    rank_correlation: float
    """Spearman's, on these"""
    weights: dict[str, float]
    """by feature, in standard deviations"""
    elsewhere: dict[str, float]
    """rank correlation of the same prediction with the damage by other compressions"""


@dataclass(frozen=True)
class Transfer(Result):
    """SAEs of a model in its compressed forms."""

    subject: Subject
    tokens: int
    cells: tuple[Cell, ...]
    compressions: tuple[Compression, ...]
    """the first is the one of the cells"""
    overlaps: tuple[Overlap, ...]
    predictors: tuple[Predictor, ...]
    latents: Path
    """a table of every latent: site, number, firing rate, and its correlation in each cell and compression"""

    def of(self, site: Site, form: str, on: On) -> Cell | None:
        """One cell."""
        return next((c for c in self.cells if (c.site, c.form, c.on) == (site, form, on)), None)

    @property
    def sites(self) -> list[Site]:
        return list(dict.fromkeys(cell.site for cell in self.cells))
