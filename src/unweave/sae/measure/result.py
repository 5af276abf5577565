"""What is measured of an SAE in a model. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Density:
    """How many latents fire how often."""

    edges: tuple[float, ...]
    """bin edges in log10 of the firing rate, e.g. -5 for once in 100,000 tokens; one more than ``counts``"""
    counts: tuple[int, ...]
    never: int
    """latents that never fired, which no logarithm can place"""


@dataclass(frozen=True)
class Metrics:
    """What was measured. Means are over counted tokens unless a line says otherwise."""

    metric_set: str
    """Which definitions these numbers follow, with their version."""
    site: str
    """Where the SAE writes; for a transcoder this is not where it reads."""
    tokens: int
    """Counted tokens."""
    excluded: dict[str, int]
    """Tokens left out, by reason."""
    unexplained_variance: float
    """Squared error over the variance around the mean activation. 0: perfect; 1: no better than the mean."""
    explained_variance: float
    """1 - unexplained_variance."""
    mse: float
    """Squared error per element of the activation."""
    cosine: float
    """Cosine between activation and reconstruction."""
    norm_ratio: float
    """Length of the reconstruction over length of the activation; below 1 the SAE shrinks."""
    l0: float
    """How many latents are above zero on a token."""
    l1: float
    """Sum of a token's latents."""
    alive_fraction: float
    """Share of latents that were above zero on at least one of ``tokens``; more tokens can only raise it."""
    density: Density
    """How many latents fire how often."""
    unexplained_variance_all_tokens: float
    """The same with special ids and norm outliers counted too (padding never is); trap 6 shows in the difference."""
    l0_all_tokens: float
    """Likewise."""
    predictions: int
    """Over how many next tokens the four losses and three divergences below are means: all whose next token is real."""
    ce_clean: float
    """Next-token cross-entropy of the untouched model, in nats."""
    ce_sae: float
    """The same with the reconstruction in place of the activation of every counted token."""
    ce_mean: float
    """The same with the mean activation in its place."""
    ce_zero: float
    """The same with zeros in its place."""
    kl_sae: float
    """KL(clean || with the reconstruction) of the next-token distribution, in nats."""
    kl_mean: float
    """KL(clean || mean-ablated)."""
    kl_zero: float
    """KL(clean || zero-ablated)."""
    recovered_vs_mean: float | None
    """(ce_mean - ce_sae) / (ce_mean - ce_clean); None where there is nothing to recover, see ``notes``."""
    recovered_vs_zero: float | None
    """(ce_zero - ce_sae) / (ce_zero - ce_clean); easier, since zeros are far from any activation. None likewise."""
    notes: tuple[str, ...] = ()
    """What a reader must know about these numbers."""
