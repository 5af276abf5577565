"""What a training run holds. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unweave.core.result import Result
from unweave.core.site import Site


@dataclass(frozen=True)
class Reference:
    """How an SAE does on held-out text, as its file remembers it."""

    unexplained_variance: float
    l0: float
    tokens: int


@dataclass(frozen=True)
class TrainedSAE:
    """One SAE of a training run."""

    name: str
    """site and variant, as its folder below sae/; empty for a run's only one"""
    read: Site
    write: Site
    kind: str
    d_in: int
    latents: int
    k: int | None
    folder: Path
    reference: Reference

    @property
    def label(self) -> str:
        """Its name, or its site where it has none."""
        return self.name or (str(self.write) if self.read == self.write else f"{self.read}->{self.write}")


@dataclass(frozen=True)
class SiteNorms:
    """What was measured of a site's activations before training."""

    site: Site
    tokens: int
    median: float
    quantiles: dict[str, float]
    gamma: float
    """||mean|| / ||standard deviation||"""
    max_norm: float | None
    outliers: int


@dataclass(frozen=True)
class Curve:
    """The course of training of one SAE, as the log has it; the lists are equally long."""

    tokens: tuple[int, ...]
    loss: tuple[float, ...]
    """unexplained variance of the batch"""
    dead_fraction: tuple[float, ...]


@dataclass(frozen=True)
class Training(Result):
    """SAEs trained on one stream of activations."""

    model: str
    note: str
    """what a reader must know of the model's weights"""
    tokens: int
    """that were trained on, repeats counted"""
    distinct_tokens: int
    epochs: float
    outliers_dropped: int
    nonfinite_dropped: int
    text: dict[str, Any]
    """what the token store says of itself: counts of what was left out, the template's date, ..."""
    norms: tuple[SiteNorms, ...]
    sites: tuple[Site, ...]
    processes: int
    saes: tuple[TrainedSAE, ...]

    def sae(self, name: str = "") -> TrainedSAE:
        """One of its SAEs by name; the only one by default."""
        if not name and len(self.saes) == 1:
            return self.saes[0]
        return next(sae for sae in self.saes if sae.name == name)


@dataclass(frozen=True)
class Cost:
    """What a training run will take."""

    saes: int
    latents: int
    distinct_tokens: int
    training_tokens: int
    epochs: float
    harvest_tokens_per_second: int
    train_tokens_per_second: int
    minutes: float
    memory_gb: float
    disk_gb: float


@dataclass(frozen=True)
class Checkup(Result):
    """What `unweave doctor` says before a training run."""

    model: str
    cost: Cost | None
    """None where the model, its sites or the SAEs are not to be had"""
    disk_free_gb: float
    problems: tuple[str, ...]
