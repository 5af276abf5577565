"""What SAE to train, and how. Kept apart from the training itself so that commands can be described without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

from unweave.core.errors import UnweaveError
from unweave.core.spec import Spec, require
from unweave.methods.train.presets import PRESETS

Kind = Literal["topk", "batchtopk", "matryoshka", "relu", "p-anneal", "gated", "jumprelu"]


@dataclass(frozen=True, kw_only=True)
class SAESpec(Spec):
    """What SAE to train, and how. Defaults suit a million tokens of a small model's residual stream.

    In files and on the command line ``preset`` may stand beside the fields: a published recipe's values, which those
    given replace. An option that the kind does not use is refused when it differs from its default.
    """

    shorthands = {
        "preset": (
            Literal["fast-jumprelu", "fast-relu"] | None,
            "Start from a published recipe's values; fields that are given replace them.",
        )
    }

    kind: Kind = "topk"
    """topk: k latents per token; batchtopk: k per token on average; matryoshka: batchtopk whose first latents must
    reconstruct alone; relu: L1 penalty; p-anneal: its power falls from 1; gated: L1 on a gate; jumprelu: thresholds"""
    expansion: int = 8
    """latents per dimension of the input"""
    k: int = 32
    """active latents per token: exact for topk, a mean for batchtopk and matryoshka, aimed at by the other kinds unless
    sparsity fixes their penalty"""
    sparsity: float | None = None
    """coefficient of the sparsity penalty (not of topk kinds); none: steered so that about k latents are active"""
    sparsity_warmup: float = 0.0
    """share of the tokens over which a fixed sparsity coefficient rises from 0"""
    tokens: int = 1_000_000
    """tokens to train on, repeats counted; the learning rate's schedule spans them"""
    batch: int = 512
    """tokens per optimiser step (of all processes together); of so many tokens, smaller ones learn more, and slower"""
    seed: int = 0
    """of the initial weights, and of what resampling draws"""
    lr: float = 3e-3
    """learning rate at its highest"""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """learning rate after its rise: constant and a linear fall; a cosine to lr_end and a linear fall; or constant"""
    lr_end: float | None = None
    """cosine: learning rate at the end of the cosine; none: a tenth of lr"""
    warmup: float = 0.05
    """share of the tokens over which the learning rate rises from 0"""
    decay: float = 0.5
    """share of the tokens, at the end, over which it falls to 0"""
    beta1: float = 0.9
    """Adam's memory of gradients"""
    beta2: float = 0.999
    """Adam's memory of squared gradients"""
    clip: float | None = None
    """largest norm of a step's gradient, all parameters together; none: any"""
    init: Literal["data", "random", "kaiming", "independent"] = "data"
    """decoder rows at the start: directions of activations, uniform directions, or uniform entries, with an encoder of
    the same directions; independent: uniform entries for both, drawn apart"""
    centre: Literal["mean", "median", "none"] = "mean"
    """where activations are measured from: their mean, their geometric median, or the origin"""
    normalise: bool = True
    """scale activations to a mean squared norm of 1 while training (folded away in the result)"""
    bias_init: Literal["zero", "mean", "median"] = "zero"
    """the decoder's bias at the start, in the space of training: zero, or the mean or geometric median there"""
    skip: Literal["none", "zero", "fit"] = "none"
    """transcoders: a linear map beside the latents, trained from zero or from its least squares fit"""
    aux_weight: float = 1 / 8
    """weight of AuxK, which revives dead latents; 0 switches it off"""
    k_aux: int = 256
    """how many dead latents a token's residual is explained with"""
    dead_after: int = 30_000
    """tokens without firing after which a latent counts as dead"""
    resample_every: int = 0
    """tokens after which latents that were silent for half of them begin anew at badly explained inputs; 0: never"""
    multi_topk: float = 0.0
    """topk: weight of a second reconstruction, from 4k latents (1/8 in Gao et al. 2024)"""
    groups: tuple[float, ...] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)
    """matryoshka: shares of the latents that each nested reconstruction adds"""
    p_end: float = 0.2
    """p-anneal: the power at the end"""
    anneal_start: float = 0.2
    """p-anneal: share of the tokens before the power first falls"""
    anneal_end: float = 0.8
    """p-anneal: share of the tokens after which it stays"""
    anneal_updates: int = 10
    """p-anneal: in how many equal falls it gets there"""
    penalty: Literal["target", "step", "tanh"] = "target"
    """jumprelu: (L0 / k - 1)^2; L0; or the sum of tanh(tanh_scale f), which reaches the encoder too"""
    tanh_scale: float = 4.0
    """jumprelu: what penalty tanh multiplies latents with"""
    bandwidth: float = 0.05
    """jumprelu: width of the window in which thresholds feel a gradient, in units of the scaled activations"""
    threshold_init: float | None = None
    """jumprelu: thresholds at the start; none: the bandwidth"""
    threshold_by_norm: bool = False
    """jumprelu, init independent: thresholds start at threshold_init times the norm with which a decoder row is drawn,
    before that becomes 1 (FAST, appendix A)"""
    threshold_parameter: Literal["plain", "log"] = "plain"
    """jumprelu: train thresholds, kept from falling below 0, or their logarithms"""
    preact_weight: float = 0.0
    """jumprelu: weight of the pre-activation loss, the mean of sum relu(threshold - pre-activation) (3e-6 is usual)"""
    preact_on: Literal["dead", "all"] = "dead"
    """jumprelu: the pre-activation loss of dead latents, or of all"""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "", base: Spec | None = None) -> Self:
        """As ``Spec.from_dict``. ``preset`` names a published recipe: its values stand under those that are given.

        Of a ``base`` only ``tokens`` and ``batch``, where they are not the defaults, survive a preset.
        """
        if "preset" not in values:
            return super().from_dict(values, where=where, base=base)
        given = {name: value for name, value in values.items() if name != "preset"}
        name = values["preset"]
        if name not in PRESETS:
            raise UnweaveError(f"there is no preset {name!r}", where=where, remedy=f"presets: {', '.join(PRESETS)}")
        said = {} if base is None else changed(base)
        kept = {name: said[name] for name in ("tokens", "batch") if name in said}
        return super().from_dict({**PRESETS[name], **kept, **given}, where=where)

    @property
    def winners(self) -> bool:
        """Whether latents are chosen by rank, not by a bound of their own."""
        return self.kind in ("topk", "batchtopk", "matryoshka")

    @property
    def one_threshold(self) -> bool:
        """Whether latents are chosen over a whole batch, so that the SAE needs one threshold for single tokens."""
        return self.kind in ("batchtopk", "matryoshka")

    @property
    def aims(self) -> bool:
        """Whether k says something: latents are chosen by it, or a penalty asks for it."""
        return self._uses()["k"]

    @property
    def steered(self) -> bool:
        """Whether the sparsity coefficient follows the number of active latents towards k."""
        aims = self.kind == "jumprelu" and self.penalty == "target"
        return not self.winners and not aims and self.sparsity is None

    def __post_init__(self) -> None:
        require(self, self._limits())
        said = changed(self)
        for name, uses in self._uses().items():
            if not uses and name in said:
                raise UnweaveError(
                    f"{name} = {getattr(self, name)!r} would have no effect", where=f"SAESpec of kind {self.kind}",
                    remedy=f"leave {name} out, or see docs/kinds.md for what uses it",
                )  # fmt: skip

    def _limits(self) -> dict[str, bool]:
        shares = ("warmup", "decay", "sparsity_warmup", "anneal_start", "anneal_end")
        whole = ("expansion", "k", "tokens", "batch", "k_aux", "dead_after", "anneal_updates")
        above, least = (
            ("lr", "bandwidth", "tanh_scale"),
            ("aux_weight", "multi_topk", "preact_weight", "resample_every"),
        )
        return (
            {name: 0 <= getattr(self, name) <= 1 for name in shares}
            | {name: getattr(self, name) >= 1 for name in whole}
            | {name: getattr(self, name) > 0 for name in above}
            | {name: getattr(self, name) >= 0 for name in least}
            | {
                "warmup": self.warmup >= 0 and self.warmup + (self.decay if self.schedule == "cosine" else 0) <= 1,
                "sparsity": self.sparsity is None or self.sparsity >= 0,
                "lr_end": self.lr_end is None or 0 <= self.lr_end <= self.lr,
                "beta1": 0 <= self.beta1 < 1,
                "beta2": 0 < self.beta2 < 1,
                "clip": self.clip is None or self.clip > 0,
                "groups": len(self.groups) > 0 and min(self.groups) > 0 and abs(sum(self.groups) - 1) < 1e-6,
                "p_end": 0 < self.p_end <= 1,
                "anneal_end": self.anneal_start <= self.anneal_end <= 1,
                "threshold_init": self.threshold_init is None
                or (self.threshold_init > 0 if self.threshold_parameter == "log" else self.threshold_init >= 0),
            }
        )

    def _uses(self) -> dict[str, bool]:
        """Which fields have an effect, of those that may have none."""
        jump, annealed = self.kind == "jumprelu", self.kind == "p-anneal"
        aims = jump and self.penalty == "target"
        return {
            "k": self.winners or aims or self.steered,
            "sparsity": not self.winners,
            "sparsity_warmup": aims or self.sparsity is not None,
            "lr_end": self.schedule == "cosine",
            "decay": self.schedule != "constant",
            "k_aux": self.aux_weight > 0,
            "multi_topk": self.kind == "topk",
            "groups": self.kind == "matryoshka",
            "p_end": annealed, "anneal_start": annealed, "anneal_end": annealed, "anneal_updates": annealed,
            "penalty": jump, "bandwidth": jump, "threshold_init": jump, "threshold_parameter": jump,
            "preact_weight": jump,
            "tanh_scale": jump and self.penalty == "tanh",
            "threshold_by_norm": jump and self.init == "independent",
            "preact_on": jump and self.preact_weight > 0,
        }  # fmt: skip


def changed(spec: Spec) -> dict[str, Any]:
    """The fields that are not what the class has, by name."""
    return {f.name: getattr(spec, f.name) for f in fields(spec) if getattr(spec, f.name) != f.default}


def said_beside_presets(spec: SAESpec) -> dict[str, Any]:
    """What is left to say of a spec that begins with the defaults, or with a preset where that leaves less to say."""
    found = changed(spec)
    for preset in PRESETS:
        other = SAESpec.from_dict({"preset": preset})
        left = {f.name: getattr(spec, f.name) for f in fields(spec) if getattr(spec, f.name) != getattr(other, f.name)}
        found = min(found, left, key=len)
    return found
