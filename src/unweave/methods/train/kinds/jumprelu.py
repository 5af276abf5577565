"""JumpReLU: latents above thresholds of their own, which are learned by straight-through gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from unweave.core.rules import Rule, above, at_least, only_for, only_where
from unweave.methods.train.kinds.base import Part, Penalised
from unweave.methods.train.state import State

if TYPE_CHECKING:
    from unweave.methods.train.kinds.base import Entries, Tensor, Weights


_threshold = Rule(
    "at least 0, and above 0 where threshold_parameter is log",
    lambda value, spec: value > 0 or (value == 0 and spec.threshold_parameter == "plain"),
)


@dataclass(frozen=True, kw_only=True)
class JumpReLUSpec(Penalised):
    """latents above thresholds of their own, which are learned (Rajamanoharan et al. 2024b)"""

    kind: Literal["jumprelu"] = "jumprelu"
    penalty: Literal["target", "step", "tanh"] = "target"
    """(L0 / k - 1)^2; L0; or the sum of tanh(tanh_scale f), which reaches the encoder too"""
    tanh_scale: Annotated[float, above(0), only_for("penalty", "tanh")] = 4.0
    """what penalty tanh multiplies latents with"""
    bandwidth: Annotated[float, above(0)] = 0.05
    """width of the window in which thresholds feel a gradient, in units of the scaled activations"""
    threshold_init: Annotated[float | None, _threshold] = None
    """thresholds at the start; none: the bandwidth"""
    threshold_by_norm: Annotated[bool, only_for("init", "independent")] = False
    """thresholds start at threshold_init times the norm with which a decoder row is drawn, before that becomes 1 (FAST,
    appendix A)"""
    threshold_parameter: Literal["plain", "log"] = "plain"
    """train thresholds, kept from falling below 0, or their logarithms"""
    preact_weight: Annotated[float, at_least(0)] = 0.0
    """weight of the pre-activation loss, the mean of sum relu(threshold - pre-activation) (3e-6 is usual)"""
    preact_on: Annotated[
        Literal["dead", "all"],
        only_where("preact_weight is above 0", lambda spec: spec.preact_weight > 0, "raise preact_weight"),
    ] = "dead"
    """the pre-activation loss of dead latents, or of all"""

    @property
    def targets(self) -> bool:
        return self.penalty == "target"

    def first_state(self) -> State:
        return State(coefficient=1e-3)

    def threshold(self, w: Weights) -> Tensor:
        """Thresholds [F] with their graph."""
        return w.own["log_threshold"].exp() if self.threshold_parameter == "log" else w.own["plain_threshold"]

    def bound(self, w: Weights) -> Tensor:
        """A threshold's window begins there."""
        return self.threshold(w).detach() - self.bandwidth / 2

    def latents(self, w: Weights, entries: Entries) -> Tensor:
        from unweave.methods.train import objectives

        return objectives.jump_relu(entries.values, entries.of(self.threshold(w)), self.bandwidth)

    def sums(self, part: Part) -> dict[str, Tensor]:
        from unweave.methods.train import objectives

        w, entries, threshold = part.w, part.entries, self.threshold(part.w)
        if self.penalty == "tanh":
            sums = {"tanh": objectives.tanh(part.f, self.tanh_scale, part.rows)}
        else:
            sums = {"l0": objectives.l0(entries.values, entries.of(threshold), self.bandwidth, part.rows)}
        if self.preact_weight > 0 and (self.preact_on == "all" or len(part.dead) > 0):
            dead = None
            if self.preact_on == "dead":
                dead = w.b_enc.new_zeros(len(w.b_enc)).bool().index_fill(0, part.dead, True)
            sums["silent"] = objectives.below_threshold(part.x, w.W_enc, w.b_enc, threshold, entries, dead, part.rows)
        return sums

    def terms(self, sums: Mapping[str, Tensor], state: State, tokens_seen: int) -> Tensor:
        from unweave.methods.train import objectives

        penalty = sums["tanh"] if self.penalty == "tanh" else sums["l0"]
        term = self.weight(state, tokens_seen) * (objectives.off_target(penalty, self.k) if self.targets else penalty)
        return term + self.preact_weight * sums["silent"] if "silent" in sums else term

    # -- parameters, and the inference form ---------------------------------------------------------------------------

    @property
    def first_threshold(self) -> float:
        """Of a latent that begins."""
        return self.bandwidth if self.threshold_init is None else self.threshold_init

    def _parameter(self, threshold: Tensor) -> dict[str, Tensor]:
        log = self.threshold_parameter == "log"
        return {"log_threshold": threshold.log()} if log else {"plain_threshold": threshold}

    def added(self, zeros: Tensor, rows: Tensor) -> dict[str, Tensor]:
        from unweave.methods.train import init

        threshold = zeros.new_full(zeros.shape, self.first_threshold)
        if self.threshold_by_norm:
            threshold = threshold * (init.kaiming(rows.shape[1]) * rows.norm(dim=1))
        return self._parameter(threshold)

    def renewed(self) -> dict[str, Tensor]:
        import torch

        return self._parameter(torch.tensor(self.first_threshold))

    def constrain(self, w: Weights) -> None:
        if self.threshold_parameter == "plain":
            w.own["plain_threshold"].data.clamp_(min=0)

    def begun(self) -> tuple[str, ...]:
        thresholds = ("threshold_by_norm",) if self.resample_every else ("threshold_by_norm", "threshold_init")
        return (*super().begun(), *thresholds)

    def continues(self, threshold: Tensor) -> bool:
        return self.threshold_parameter == "plain" or bool((threshold > 0).all())

    def resumed(self, bias: Tensor, threshold: Tensor, like: Tensor) -> dict[str, Tensor]:
        return self._parameter(threshold.to(like))

    def folded(self, w: Weights, batch_threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        encoder, bias, _ = super().folded(w, batch_threshold)
        return encoder, bias, self.threshold(w)
