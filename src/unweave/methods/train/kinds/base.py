"""What all kinds of SAE share: the fields of their specs, and what a kind says of itself.

A kind is a Spec with methods: which entries of the pre-activations it selects, what it makes of them, which terms its
loss has, which parameters it adds, and what it becomes at inference. ``coding`` calls them in this order for a batch:

1. ``select`` picks entries of the pre-activations z [N, F]; ``narrowed`` those of them that are the SAE's own.
2. ``latents`` are the values at these entries; ``reconstructions`` what is decoded from them.
3. ``sums`` are what the other terms of the loss consist of, chunk by chunk of the rows; ``terms`` puts them together.
4. ``follow`` brings what the kind remembers up to date after a step.

``added`` and ``resumed`` make its parameters at the start, ``folded`` its inference form. What a kind does not define
is as here: latents are relu(z), and the loss has no other term than the reconstruction.

Commands describe themselves from these classes, so that files of kinds import torch inside of methods alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from unweave.core.errors import UnweaveError
from unweave.core.rules import at_least, only_where, share
from unweave.core.spec import Spec
from unweave.methods.train.presets import PRESETS
from unweave.methods.train.schedule import Optimisation
from unweave.methods.train.state import Observed, State

if TYPE_CHECKING:
    from torch import Tensor

    from unweave.core.dist import Group
    from unweave.methods.train.entries import Entries
    from unweave.methods.train.weights import Weights


_RATE = 0.02
"""how fast a steered coefficient follows the ratio of L0 to k, per step"""
_SAME = 1e-4
"""relative difference below which thresholds are taken to be one"""


@dataclass(frozen=True)
class Part:
    """A chunk of a batch's rows, coded: N rows, D width, F latents."""

    w: Weights
    x: Tensor
    """inputs [N, D], scaled"""
    goal: Tensor
    """what they should become, [N, D_out], scaled"""
    dead: Tensor
    """latents that count as dead, int64 indices"""
    rows: int
    """of the whole batch, in all processes: every sum over rows is divided by them"""
    state: State
    """what the kind remembers"""
    entries: Entries
    """the selected pre-activations"""
    f: Tensor
    """the latents, laid out like the entries"""


@dataclass(frozen=True, kw_only=True)
class SAESpec(Optimisation):
    """What SAE to train, and how. Defaults suit a million tokens of a small model's residual stream.

    Specs are of the kinds' classes: ``JumpReLUSpec(bandwidth=0.1)``, which ``SAESpec.from_dict`` makes of ``{"kind":
    "jumprelu", "bandwidth": 0.1}``. In files and on the command line ``preset`` may stand beside the fields: a
    published recipe's values, which those given replace.
    """

    shorthands = {
        "preset": (
            Literal["fast-jumprelu", "fast-relu"] | None,
            "Start from a published recipe's values; fields that are given replace them.",
        )
    }

    kind: str = "topk"
    """which latents are active, and how the SAE learns to be sparse"""
    expansion: Annotated[int, at_least(1)] = 8
    """latents per dimension of the input"""
    k: Annotated[
        int,
        at_least(1),
        only_where(
            "latents are chosen by rank, or the penalty is steered or aimed at k",
            lambda spec: spec.aims,
            "leave sparsity out",
        ),
    ] = 32
    """active latents per token, at most the number of latents: exact for topk, a mean for batchtopk and matryoshka,
    aimed at by the other kinds unless sparsity fixes their penalty"""
    seed: int = 0
    """of the initial weights, and of what resampling draws"""
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
    aux_weight: Annotated[float, at_least(0)] = 1 / 8
    """weight of AuxK, which revives dead latents; 0 switches it off"""
    k_aux: Annotated[
        int, at_least(1), only_where("aux_weight is above 0", lambda spec: spec.aux_weight > 0, "raise aux_weight")
    ] = 256
    """how many dead latents a token's residual is explained with"""
    dead_after: Annotated[int, at_least(1)] = 30_000
    """tokens without firing after which a latent counts as dead"""
    freeze: Literal["none", "decoder", "encoder"] = "none"
    """a matrix that stays as it begins: with init random, a baseline of SAEs that learn both (Korznikov et al. 2026)"""
    resample_every: Annotated[
        int,
        at_least(0),
        only_where("both matrices are trained", lambda spec: spec.freeze == "none", "leave freeze out"),
    ] = 0
    """tokens after which latents that were silent for half of them begin anew at badly explained inputs; 0: never"""

    by_rank: ClassVar[bool] = True
    """whether latents are chosen by rank, not by a bound of their own: then a batch is never handled densely"""
    one_threshold: ClassVar[bool] = False
    """whether latents are chosen over a whole batch, so that the SAE needs one threshold for single tokens"""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "", base: Spec | None = None) -> Self:
        """As ``Spec.from_dict``. ``preset`` names a published recipe: its values stand under those that are given.

        Of a ``base`` only ``tokens`` and ``batch``, where they are not the defaults, survive a preset.
        """
        if "preset" not in values:
            return super().from_dict(values, where=where, base=base)
        others = {name: value for name, value in values.items() if name != "preset"}
        name = values["preset"]
        if name not in PRESETS:
            raise UnweaveError(f"there is no preset {name!r}", where=where, remedy=f"presets: {', '.join(PRESETS)}")
        before = {} if base is None else changed(base)
        size = {name: before[name] for name in ("tokens", "batch") if name in before}
        return SAESpec.from_dict({**PRESETS[name], **size, **others}, where=where)  # type: ignore[return-value]

    @classmethod
    def kinds(cls) -> list[type[SAESpec]]:
        """The classes of all kinds."""
        return [kind for kind in cls.members.values() if issubclass(kind, SAESpec)]

    # -- what a kind says of itself -----------------------------------------------------------------------------------

    @property
    def aims(self) -> bool:
        """Whether k says something: latents are chosen by it, or a penalty asks for it."""
        return True

    @property
    def nested(self) -> bool:
        """Whether the loss has further reconstructions beside the SAE's own."""
        return False

    def refuse_size(self, n_latents: int) -> None:
        """Raises UnweaveError where there are too few latents."""
        if self.aims and self.k > n_latents:
            what = f"k must be at most the number of latents: k = {self.k} of only {n_latents} latents"
            raise UnweaveError(what, where="sae.k", remedy="lower k or raise expansion")

    def select(self, w: Weights, x: Tensor, state: State, group: Group) -> Entries | None:
        """The pre-activations that the kind selects of x [N, D], with a graph to x, W_enc and b_enc; None: all of
        them, because too many are selected for sparse handling to pay, here or in another process of the group."""
        raise NotImplementedError

    def narrowed(self, wide: Entries) -> Entries:
        """The entries that are the SAE's own, of those selected."""
        return wide

    def latents(self, w: Weights, entries: Entries) -> Tensor:
        """The latents at the entries, laid out like them; zero at entries that are not active."""
        return entries.values.relu()

    def reconstructions(
        self, w: Weights, x: Tensor, wide: Entries, entries: Entries, f: Tensor
    ) -> list[tuple[float, Tensor]]:
        """Weighted reconstructions [N, D_out] of which the loss is the sum; the last is the SAE's own."""
        return [(1.0, entries.decode(f, w.W_dec) + w.base(x))]

    def sums(self, part: Part) -> dict[str, Tensor]:
        """What the kind's other terms consist of: sums over the part's rows, divided by the rows of the batch."""
        return {}

    def terms(self, sums: Mapping[str, Tensor], state: State, tokens_seen: int) -> Tensor | None:
        """The loss's terms beside reconstruction and AuxK, from the sums over the whole batch; None: there are none."""
        return None

    def sizes(self, sums: Mapping[str, Tensor]) -> tuple[float, float] | None:
        """What ``follow`` wants to know of the sums."""
        return None

    def first_state(self) -> State:
        """What the kind remembers before the first step."""
        return State()

    def follow(self, state: State, observed: Observed, l0: float, tokens_seen: int) -> None:
        """After a step: ``l0`` of the whole batch, ``tokens_seen`` before it."""
        if observed.smallest is not None:
            state.batch_threshold = observed.smallest

    # -- parameters, and the inference form ---------------------------------------------------------------------------

    def added(self, zeros: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """The kind's own parameters [F] at the start, by name. ``zeros`` [F] gives device and type; ``rows`` [F, D_out]
        are the decoder's as they were drawn, before their norms become 1."""
        return {}

    def renewed(self) -> Mapping[str, float | Tensor]:
        """What the kind's own parameters are set to where a latent begins anew."""
        return {}

    def constrain(self, w: Weights) -> None:
        """After a step: brings the kind's own parameters back to where they must be."""

    def begun(self) -> tuple[str, ...]:
        """Fields that mean nothing to an SAE that has begun already."""
        return ("init", "bias_init")

    def continues(self, threshold: Tensor) -> bool:
        """Whether an SAE with ``threshold`` [F] (zeros: ReLU), as training sees it, has a form that this kind can go on
        with. SAEs that rank latents per token go on only as kinds with a ``topk``."""
        return False

    def resumed(self, bias: Tensor, threshold: Tensor, like: Tensor) -> Mapping[str, Tensor]:
        """The parameters [F] that an SAE's ``bias`` and ``threshold``, float64 and as training sees them, become: the
        kind's own, and ``b_enc`` where that is not the bias. ``like`` has the type of training."""
        return {}

    def folded(self, w: Weights, batch_threshold: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """Encoder [F, D], bias [F] and threshold [F] (None: none) of the inference form, as training is scaled."""
        return w.W_enc.double(), w.b_enc.double(), None

    def topk(self) -> int | None:
        """k where the inference form ranks each token's latents."""
        return None


@dataclass(frozen=True, kw_only=True)
class OverBatch(SAESpec):
    """What batchtopk and matryoshka share: latents are chosen over the batch, k per token on average, and the inference
    form is JumpReLU with one threshold."""

    one_threshold: ClassVar[bool] = True

    def select(self, w: Weights, x: Tensor, state: State, group: Group) -> Entries:
        from unweave.methods.train.entries import largest_of_batch

        return largest_of_batch(w, x, self.k, 0.8 * (state.batch_threshold or 0.0), group)

    def continues(self, threshold: Tensor) -> bool:
        largest = float(threshold.max())
        return largest > 0 and largest - float(threshold.min()) <= _SAME * largest

    def folded(self, w: Weights, batch_threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        encoder, bias, _ = super().folded(w, batch_threshold)
        return encoder, bias, bias.new_full(bias.shape, batch_threshold)


@dataclass(frozen=True, kw_only=True)
class Penalised(SAESpec):
    """What relu, p-anneal, gated and jumprelu share: any number of latents may be active; a penalty keeps it low."""

    sparsity: Annotated[float | None, at_least(0)] = None
    """coefficient of the sparsity penalty; none: steered so that about k latents are active"""
    sparsity_warmup: Annotated[
        float,
        share(),
        only_where(
            "the penalty's coefficient is fixed", lambda spec: spec.targets or spec.sparsity is not None, "set sparsity"
        ),
    ] = 0.0
    """share of the tokens over which a fixed sparsity coefficient rises from 0"""

    by_rank: ClassVar[bool] = False

    @property
    def targets(self) -> bool:
        """Whether the penalty itself asks for k, so that its coefficient need not be steered."""
        return False

    @property
    def steered(self) -> bool:
        """Whether the sparsity coefficient follows the number of active latents towards k."""
        return not self.targets and self.sparsity is None

    @property
    def aims(self) -> bool:
        return self.targets or self.steered

    def bound(self, w: Weights) -> Tensor:
        """Per latent the value that a pre-activation must exceed to matter, [F]."""
        import torch

        return torch.zeros_like(w.b_enc)

    def select(self, w: Weights, x: Tensor, state: State, group: Group) -> Entries | None:
        from unweave.methods.train.entries import above_bound

        return above_bound(w, x, self.bound(w), state, group)

    def weight(self, state: State, tokens_seen: int) -> float:
        """The sparsity coefficient of the step after ``tokens_seen`` tokens."""
        if self.steered:
            return state.coefficient * state.ratio
        fixed = 1.0 if self.sparsity is None else self.sparsity
        return fixed * state.ratio * self.rise(self.sparsity_warmup, tokens_seen)

    def follow(self, state: State, observed: Observed, l0: float, tokens_seen: int) -> None:
        super().follow(state, observed, l0, tokens_seen)
        if self.steered:
            error = math.log(max(l0, 1e-3) / self.k)
            state.coefficient *= math.exp(_RATE * max(-1.0, min(1.0, error)))


def default_of(spec: SAESpec, name: str) -> Any:
    """What a field is where it is not given."""
    return next(f.default for f in fields(spec) if f.name == name)


def changed(spec: Spec) -> dict[str, Any]:
    """The fields that are not what the class has, by name; of an SAE's spec also another kind than the default."""
    values = {f.name: getattr(spec, f.name) for f in fields(spec) if getattr(spec, f.name) != f.default}
    if isinstance(spec, SAESpec) and spec.kind != SAESpec.kind:
        values = {"kind": spec.kind} | values
    return values
