"""What SAE to train, and how. Kept apart from the training itself so that commands can be described without PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unweave.core.spec import Spec, require


@dataclass(frozen=True, kw_only=True)
class SAESpec(Spec):
    """What SAE to train, and how. Defaults suit a million tokens of a small model's residual stream."""

    kind: Literal["topk", "batchtopk", "relu", "jumprelu"] = "topk"
    """topk: k latents per token; batchtopk: k per token on average; relu: L1 penalty; jumprelu: learned thresholds"""
    expansion: int = 8
    """latents per dimension of the input"""
    k: int = 32
    """active latents per token: exact for topk, a mean for batchtopk, aimed at by the penalties of relu and jumprelu"""
    tokens: int = 1_000_000
    """tokens to train on, repeats counted; the learning rate's schedule spans them"""
    batch: int = 2048
    """tokens per optimiser step"""
    lr: float = 3e-3
    """learning rate at its highest"""
    warmup: float = 0.05
    """share of the tokens over which the learning rate rises from 0"""
    decay: float = 0.5
    """share of the tokens, at the end, over which it falls to 0"""
    beta2: float = 0.999
    """Adam's memory of squared gradients"""
    init: Literal["data", "random", "kaiming"] = "random"
    """decoder rows at the start: directions of activations, uniform directions, or uniform entries"""
    centre: Literal["mean", "median", "none"] = "mean"
    """where activations are measured from: their mean, their geometric median, or the origin"""
    normalise: bool = True
    """scale activations to a mean squared norm of 1 while training (folded away in the result)"""
    aux_weight: float = 1 / 32
    """weight of AuxK, which revives dead latents; 0 switches it off"""
    k_aux: int = 64
    """how many dead latents a token's residual is explained with"""
    dead_after: int = 100_000
    """tokens without firing after which a latent counts as dead"""
    bandwidth: float = 0.05
    """jumprelu: width of the window in which thresholds feel a gradient, in units of the scaled activations"""

    def __post_init__(self) -> None:
        limits = {
            "expansion": self.expansion >= 1, "k": self.k >= 1, "tokens": self.tokens >= 1, "batch": self.batch >= 1,
            "lr": self.lr > 0, "warmup": 0 <= self.warmup <= 1, "decay": 0 <= self.decay <= 1,
            "beta2": 0 < self.beta2 < 1, "aux_weight": self.aux_weight >= 0, "k_aux": self.k_aux >= 1,
            "dead_after": self.dead_after >= 1, "bandwidth": self.bandwidth > 0,
        }  # fmt: skip
        require(self, limits)
