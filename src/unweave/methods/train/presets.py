"""Published recipes as values of ``SAESpec``'s fields. Knows no torch.

``fast-jumprelu`` and ``fast-relu`` are the settings of the FAST paper on SAEs of instruct models, which trained with
SAELens 5: 320,000 steps of 128 tokens. Their coefficients belong to a loss of squared errors summed over dimensions and
averaged over tokens, of activations as they are (neither centred nor scaled), and to decoder rows of norm 1. Shares of
the tokens stand for its steps: 16,000 of warm-up, 64,000 of the final fall, 10,000 in which the coefficient rises.
SAELens always clips gradients at norm 1, and so do these. Thresholds begin at 0.001 times the norm with which a decoder
row was drawn (Kaiming-uniform, about the square root of 2), since the paper adjusts them when it sets that norm to 1.
"""

from __future__ import annotations

from typing import Any

_FAST: dict[str, Any] = {
    "expansion": 8,
    "tokens": 40_960_000,
    "batch": 128,
    "seed": 42,
    "lr": 7e-5,
    "lr_end": 7e-6,
    "schedule": "cosine",
    "warmup": 0.05,
    "decay": 0.2,
    "beta1": 0.9,
    "beta2": 0.999,
    "clip": 1.0,
    "sparsity_warmup": 10_000 / 320_000,
    "init": "independent",
    "centre": "none",
    "normalise": False,
    "bias_init": "median",
    "aux_weight": 0.0,
    "dead_after": 128_000,
}

PRESETS: dict[str, dict[str, Any]] = {
    "fast-jumprelu": _FAST
    | {
        "kind": "jumprelu",
        "penalty": "step",
        "sparsity": 0.01,
        "bandwidth": 0.001,
        "threshold_init": 0.001,
        "threshold_by_norm": True,
        "threshold_parameter": "log",
    },
    "fast-relu": _FAST | {"kind": "relu", "sparsity": 5.0},
}
