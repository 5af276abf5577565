"""An evaluation's metrics, and how they differ from those stored with the SAE."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from unweave.core.errors import UnweaveWarning
from unweave.sae.measure.result import Density, Metrics

METRIC_SET = "unweave.core/2"
"""Name and version of the definitions of ``evaluate.py``; raised whenever a number would change (trap 32)."""

_LEAST_GAIN = 0.1
"""nats below guessing, for a model that predicts; what has learnt anything of a text gains several"""
_LEAST_DAMAGE = 0.02
"""nats; ablating a layer's stream costs several, ablating one attention layer's output some tenths"""
_DENSITY_EDGES = tuple(-6.0 + 0.25 * i for i in range(25))


@dataclass(frozen=True)
class CoreMetrics(Metrics):
    """What ``evaluate`` measured, with the count of every latent."""

    firing_counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64), repr=False, compare=False)
    """On how many counted tokens each latent is above zero, int64 [F]."""

    def plain(self) -> Metrics:
        """Everything but the firing counts."""
        return Metrics(**{f.name: getattr(self, f.name) for f in fields(Metrics)})


def drift(measured: Metrics, reference: Mapping[str, float]) -> tuple[str, ...]:
    """Where an SAE behaves differently than in training (trap 6: trained without BOS, measured with it), and warns.

    ``reference`` holds ``l0`` and ``unexplained_variance`` as stored with the SAE; what it does not hold is passed
    over. Says so when L0 differs by more than 20 %, or unexplained variance by more than 25 % and more than 0.02.
    """
    differing = []
    l0, fvu, fvu_here = reference.get("l0"), reference.get("unexplained_variance"), measured.unexplained_variance
    if l0 is not None and not abs(measured.l0 - l0) <= 0.2 * abs(l0):
        differing.append(f"L0 is {measured.l0:.1f} here and was {l0:.1f}")
    if fvu is not None and not abs(fvu_here - fvu) <= max(0.25 * abs(fvu), 0.02):
        differing.append(f"unexplained variance is {fvu_here:.3f} here and was {fvu:.3f}")
    advice = "other text, another model, or tokens (a BOS, a chat template) that the SAE was not trained on"
    messages = tuple(f"{words} where the SAE was made: {advice}" for words in differing)
    for message in messages:
        warnings.warn(message, UnweaveWarning, stacklevel=2)
    return messages


def density_histogram(counts: Tensor, n_tokens: int) -> Density:
    """log10 firing rates of latents with ``counts`` [F] firings in ``n_tokens``, in bins of a quarter decade.

    Rates below one in a million go into the first bin; latents that never fired are counted as ``never`` instead.
    """
    fired = counts[counts > 0].double().cpu()
    edges = torch.tensor(_DENSITY_EDGES, dtype=torch.float64)
    places = (torch.bucketize((fired / n_tokens).log10(), edges, right=True) - 1).clamp(0, len(edges) - 2)
    histogram = torch.bincount(places, minlength=len(edges) - 1)
    return Density(_DENSITY_EDGES, tuple(histogram.tolist()), len(counts) - len(fired))


def recovered_share(ce: dict[str, float], ablation: str, vocabulary: int) -> tuple[float | None, str]:
    """The share of the ablation's damage that the SAE avoids; None and why, where there is nothing to recover.

    That is where the model hardly predicts the text better than by guessing among ``vocabulary`` tokens, and where the
    ablation costs less than 0.02 nats: a quotient of two such numbers looks like a result and is meaningless.
    """
    damage, guessing = ce[ablation] - ce["clean"], math.log(vocabulary)
    if ce["clean"] > guessing - _LEAST_GAIN:
        return None, (
            f"the model does not predict this text: its cross-entropy is {ce['clean']:.4f} nats, guessing among "
            f"{vocabulary:,} tokens costs {guessing:.4f}; so there is nothing to recover from {ablation} ablation"
        )
    if damage < _LEAST_DAMAGE:
        return None, (
            f"{ablation} ablation does not raise the cross-entropy by {_LEAST_DAMAGE} nats ({ce['clean']:.4f} -> "
            f"{ce[ablation]:.4f}), so the share recovered against it is undefined"
        )
    return (ce[ablation] - ce["sae"]) / damage, ""
