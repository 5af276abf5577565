"""What changes over a training run: the learning rate, the sparsity coefficient, the power of p-anneal.

All are functions of how many tokens have been seen, so that they do not depend on how steps are counted. With steps of
``batch`` tokens, a rise over W steps takes the values 1/W, 2/W, ..., 1, a fall over the last W 1, 1 - 1/W, ..., 1/W.
"""

from __future__ import annotations

import math

from unweave.methods.train.sae_spec import SAESpec


def _rise(spec: SAESpec, part: float, share: float) -> float:
    return 1.0 if share == 0 else min(1.0, (part + spec.batch / spec.tokens) / share)


def learning_rate(spec: SAESpec, tokens_seen: int) -> float:
    """What the step after ``tokens_seen`` tokens uses.

    linear: a rise from 0, a plateau at lr, a fall to 0. cosine: a rise, lr_end + (lr - lr_end)(1 + cos(pi t)) / 2
    with t from 0 to 1 between rise and fall, then a linear fall from lr_end to 0. constant: a rise, then lr.
    """
    part = tokens_seen / spec.tokens
    rise = _rise(spec, part, spec.warmup)
    fall = 1.0 if spec.decay == 0 or spec.schedule == "constant" else min(1.0, (1 - part) / spec.decay)
    if spec.schedule != "cosine" or rise < 1:
        return spec.lr * min(rise, fall)
    end = spec.lr / 10 if spec.lr_end is None else spec.lr_end
    middle = 1 - spec.warmup - spec.decay
    t = min(1.0, max(0.0, (part - spec.warmup) / middle)) if middle > 0 else 1.0
    level = end + (spec.lr - end) * (1 + math.cos(math.pi * t)) / 2
    return level if fall == 1 else end * fall


def sparsity_rise(spec: SAESpec, tokens_seen: int) -> float:
    """What the sparsity coefficient is multiplied with: a linear rise from 0 to 1."""
    return _rise(spec, tokens_seen / spec.tokens, spec.sparsity_warmup)


def stage(spec: SAESpec, tokens_seen: int) -> int:
    """p-anneal: how many of its falls the power has behind it. The first is at anneal_start, the last at anneal_end."""
    part, updates = tokens_seen / spec.tokens, spec.anneal_updates
    if part < spec.anneal_start:
        return 0
    span = spec.anneal_end - spec.anneal_start
    between = span / (updates - 1) if updates > 1 else 0.0
    passed = updates if between == 0 else 1 + math.floor((part - spec.anneal_start) / between + 1e-9)
    return min(updates, passed)


def power(spec: SAESpec, stage: int) -> float:
    """p-anneal: the power after ``stage`` falls, from 1 to p_end in equal steps."""
    return 1 - (1 - spec.p_end) * min(stage, spec.anneal_updates) / spec.anneal_updates


def resampling_due(spec: SAESpec, before: int, after: int) -> bool:
    """Whether a multiple of ``resample_every`` tokens lies in (before, after], other than the end of training."""
    every = spec.resample_every
    return every > 0 and before // every < after // every and after < spec.tokens
