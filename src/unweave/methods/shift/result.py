"""What SHIFT holds: every row of the paper's Table 2, seed by seed, and why latents were ablated. Knows no torch."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Literal

from unweave.attribute.result import SiteSum
from unweave.circuits.about import Supporting
from unweave.core.result import Result
from unweave.core.shares import Share
from unweave.core.site import Site
from unweave.inputs.subject import Subject
from unweave.latents.annotations import name_of

Method = Literal["original", "concepts", "random", "shift", "retrain", "neurons", "features", "oracle"]
METHODS: tuple[Method, ...] = ("original", "concepts", "random", "shift", "retrain", "neurons", "features", "oracle")
"""In the order of the paper's Table 2."""
Measure = Literal["profession", "gender", "worst"]
MEASURES: tuple[Measure, ...] = ("profession", "gender", "worst")

LEAST_GAP = 0.2
"""between the original's and the oracle's worst group; a smaller one is made up of the test set's chance"""


@dataclass(frozen=True)
class Accuracies:
    """How often a classifier of professions says a test text's profession, and how often its gender."""

    profession: Share
    gender: Share
    groups: tuple[Share, ...]
    """the profession, by (profession, gender) = (0, 0), (0, 1), (1, 0), (1, 1)"""

    @property
    def worst(self) -> Share:
        """The group with the least."""
        return min(self.groups, key=lambda share: share.value)

    def share(self, measure: Measure) -> Share:
        """One of the three numbers of the table."""
        return getattr(self, measure)


@dataclass(frozen=True)
class TableRow:
    """What one method reaches with one seed."""

    method: Method
    draw: int
    """which draw of random latents; 0 for all other methods"""
    accuracies: Accuracies


@dataclass(frozen=True)
class Verdict:
    """``irrelevant`` True: about something else than the task, to be ablated; None: unknown. ``why`` in words."""

    site: Site
    latent: int
    irrelevant: bool | None
    why: str

    @property
    def name(self) -> str:
        return name_of(self.site, self.latent)


@dataclass(frozen=True)
class Judgement:
    """Verdicts on all latents of all seeds' circuits, and their source."""

    by: Literal["rule", "file", "chat"]
    verdicts: tuple[Verdict, ...]
    model: str = ""
    """the chat model's name"""
    note: str = ""
    """what readers must know of the chat model"""

    def ablated(self, circuit: tuple[Supporting, ...]) -> tuple[Supporting, ...]:
        """Those of a circuit's latents that are irrelevant, strongest first."""
        irrelevant = {(v.site, v.latent) for v in self.verdicts if v.irrelevant}
        return tuple(latent for latent in circuit if (latent.site, latent.latent) in irrelevant)

    def count(self, irrelevant: bool | None) -> int:
        """How many verdicts say so."""
        return sum(verdict.irrelevant is irrelevant for verdict in self.verdicts)


@dataclass(frozen=True)
class Seed:
    """Everything with one choice of training examples, first weights and random latents."""

    circuit: tuple[Supporting, ...]
    """the classifier's circuit, strongest first"""
    rows: tuple[TableRow, ...]
    sums: tuple[SiteSum, ...]
    """whether the effects of latents add up"""
    neuron_sums: tuple[SiteSum, ...]
    """likewise of neurons, for their skyline"""

    def of(self, method: Method) -> tuple[Accuracies, ...]:
        """What a method reaches: one, or one a draw."""
        return tuple(row.accuracies for row in self.rows if row.method == method)


@dataclass(frozen=True)
class ShiftResult(Result):
    """Table 2 of Marks et al. 2024: what ablating the latents for gender does to a classifier of professions."""

    subject: Subject
    site: Site
    """where the classifier reads"""
    biographies: str
    """their source: templated, hub:..., a file"""
    biographies_note: str
    """what a reader must know of them; empty for real ones"""
    judgement: Judgement
    seeds: tuple[Seed, ...]

    def values(self, method: Method, measure: Measure) -> list[float]:
        """Each seed's share, averaged over draws where there are several."""
        by_seed = [[reached.share(measure).value for reached in seed.of(method)] for seed in self.seeds]
        return [statistics.fmean(draws) for draws in by_seed]

    def mean(self, method: Method, measure: Measure) -> float:
        """Over seeds."""
        return statistics.fmean(self.values(method, measure))

    def spread(self, method: Method, measure: Measure) -> float | None:
        """The standard deviation over seeds; None for one."""
        values = self.values(method, measure)
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def gap(self) -> float:
        """Between the original's and the oracle's worst group."""
        return self.mean("oracle", "worst") - self.mean("original", "worst")

    def recovered(self, method: Method) -> float | None:
        """What share of the gap a method makes up; None where it is too small to say."""
        if self.gap < LEAST_GAP:
            return None
        return (self.mean(method, "worst") - self.mean("original", "worst")) / self.gap

    @property
    def ablated(self) -> list[int]:
        """How many latents were ablated, by seed."""
        return [len(self.judgement.ablated(seed.circuit)) for seed in self.seeds]
