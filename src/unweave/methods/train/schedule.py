"""How long training takes, and with which steps: the learning rate over a training run. Knows no torch.

All is a function of how many tokens have been seen, so that it does not depend on how steps are counted. With steps of
``batch`` tokens, a rise over W steps takes the values 1/W, 2/W, ..., 1, a fall over the last W 1, 1 - 1/W, ..., 1/W.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from unweave.core.errors import UnweaveError
from unweave.core.rules import above, at_least, at_most, below, only_for, share
from unweave.core.spec import Spec


@dataclass(frozen=True, kw_only=True)
class Optimisation(Spec):
    """How long to train, and with which steps."""

    tokens: Annotated[int, at_least(1)] = 1_000_000
    """tokens to train on, repeats counted; the learning rate's schedule spans them"""
    batch: Annotated[int, at_least(1)] = 512
    """tokens per optimiser step (of all processes together); of so many tokens, smaller ones learn more, and slower"""
    lr: Annotated[float, above(0)] = 3e-3
    """learning rate at its highest"""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """learning rate after its rise: constant and a linear fall; a cosine to lr_end and a linear fall; or constant"""
    lr_end: Annotated[float | None, at_least(0), at_most("lr"), only_for("schedule", "cosine")] = None
    """learning rate at the end of the cosine; none: a tenth of lr"""
    warmup: Annotated[float, share()] = 0.05
    """share of the tokens over which the learning rate rises from 0"""
    decay: Annotated[float, share(), only_for("schedule", "linear", "cosine")] = 0.5
    """share of the tokens, at the end, over which it falls to 0; with a cosine, at most what warmup leaves"""
    beta1: Annotated[float, at_least(0), below(1)] = 0.9
    """Adam's memory of gradients"""
    beta2: Annotated[float, above(0), below(1)] = 0.999
    """Adam's memory of squared gradients"""
    clip: Annotated[float | None, above(0)] = None
    """largest norm of a step's gradient, all parameters together; none: any"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule == "cosine" and self.warmup + self.decay > 1:
            what = f"warmup and decay must be at most 1 together; {self.warmup:g} and {self.decay:g} were given"
            remedy = "lower one of them: the cosine lies between the two"
            raise UnweaveError(what, where=type(self).__name__, remedy=remedy)

    def rise(self, share: float, tokens_seen: int) -> float:
        """A linear rise from 0 to 1 over a share of the tokens, at the step after ``tokens_seen`` tokens."""
        return 1.0 if share == 0 else min(1.0, (tokens_seen / self.tokens + self.batch / self.tokens) / share)

    def learning_rate(self, tokens_seen: int) -> float:
        """What the step after ``tokens_seen`` tokens uses.

        linear: a rise from 0, a plateau at lr, a fall to 0. cosine: a rise, lr_end + (lr - lr_end)(1 + cos(pi t)) / 2
        with t from 0 to 1 between rise and fall, then a linear fall from lr_end to 0. constant: a rise, then lr.
        """
        part = tokens_seen / self.tokens
        rise = self.rise(self.warmup, tokens_seen)
        fall = 1.0 if self.decay == 0 or self.schedule == "constant" else min(1.0, (1 - part) / self.decay)
        if self.schedule != "cosine" or rise < 1:
            return self.lr * min(rise, fall)
        end = self.lr / 10 if self.lr_end is None else self.lr_end
        middle = 1 - self.warmup - self.decay
        t = min(1.0, max(0.0, (part - self.warmup) / middle)) if middle > 0 else 1.0
        level = end + (self.lr - end) * (1 + math.cos(math.pi * t)) / 2
        return level if fall == 1 else end * fall
