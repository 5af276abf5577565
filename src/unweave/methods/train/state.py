"""What a kind remembers between steps, and what a step learns beside gradients: plain values, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class State:
    """What a kind remembers between steps. Plain values, so that checkpoints hold them as they are."""

    coefficient: float = 1e-2
    """of the sparsity penalty, where it is steered"""
    batch_threshold: float | None = None
    """of kinds that choose over a batch: the last one's smallest winner, near which the next one's is looked for"""
    density: float = 1.0
    """share of entries that were active in the last step"""
    wait: int = 0
    """steps before sparse handling is tried again"""
    stage: int = 0
    """p-anneal: how many falls the power has behind it"""
    ratio: float = 1.0
    """p-anneal: what the coefficient is multiplied with to keep the penalty's size"""
    recent: list[tuple[float, float]] = field(default_factory=list)
    """p-anneal: the last sizes of the penalty, at this power and at the next"""


@dataclass
class Observed:
    """What a step learns beside gradients, equal in every process."""

    smallest: float | None = None
    """of kinds that choose over a batch: its smallest winner"""
    sizes: tuple[float, float] | None = None
    """p-anneal: the penalty before its coefficient, at this power and at the next"""

    def __add__(self, other: Observed) -> Observed:
        """Of two parts of a batch: the smaller of the smallest, sizes added up."""
        smallest, sizes = self.smallest, self.sizes
        if smallest is not None and other.smallest is not None:
            smallest = min(smallest, other.smallest)
        if sizes is not None and other.sizes is not None:
            sizes = (sizes[0] + other.sizes[0], sizes[1] + other.sizes[1])
        return Observed(smallest, sizes)
