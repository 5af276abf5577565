"""Gated: one half decides whether a latent is active, another how much; they share the encoder's directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from unweave.core.errors import UnweaveError
from unweave.methods.train.kinds.base import Part, Penalised

if TYPE_CHECKING:
    from unweave.methods.train.kinds.base import Entries, State, Tensor, Weights


@dataclass(frozen=True, kw_only=True)
class GatedSpec(Penalised):
    """a gate decides which latents are active, and bears the L1 penalty (Rajamanoharan et al. 2024a)

    f = 1[z > 0] relu(e^r u + b_mag) with u = x W and the gate's z = u + b_enc.
    """

    kind: Literal["gated"] = "gated"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.freeze == "encoder":
            raise UnweaveError(
                "a gated SAE has no frozen encoder: its magnitudes scale the encoder's rows",
                where="sae.freeze", remedy="use freeze: decoder, or another kind",
            )  # fmt: skip

    def latents(self, w: Weights, entries: Entries) -> Tensor:
        z = entries.values
        magnitude = (z - entries.of(w.b_enc)) * entries.of(w.own["r_mag"].exp()) + entries.of(w.own["b_mag"])
        return magnitude.relu() * (z.detach() > 0)

    def sums(self, part: Part) -> dict[str, Tensor]:
        """The gate's L1, and its own reconstruction through a decoder held fixed."""
        from unweave.methods.train import objectives

        gate = part.entries.values.relu()
        y = part.entries.decode(gate, part.w.W_dec.detach()) + part.w.base(part.x).detach()
        own = objectives.reconstruction(y, part.goal) * (len(part.x) / part.rows)
        return {"l1": objectives.l1(gate, part.rows), "own": own}

    def terms(self, sums: Mapping[str, Tensor], state: State, tokens_seen: int) -> Tensor:
        return self.weight(state, tokens_seen) * sums["l1"] + sums["own"]

    def added(self, zeros: Tensor, rows: Tensor) -> dict[str, Tensor]:
        return {"r_mag": zeros.clone(), "b_mag": zeros.clone()}

    def renewed(self) -> dict[str, float | Tensor]:
        return {"r_mag": 0.0, "b_mag": 0.0}

    def continues(self, threshold: Tensor) -> bool:
        return True

    def resumed(self, bias: Tensor, threshold: Tensor, like: Tensor) -> dict[str, Tensor]:
        return {"r_mag": bias.new_zeros(bias.shape), "b_mag": bias, "b_enc": bias - threshold}

    def folded(self, w: Weights, batch_threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        """JumpReLU of e^r u + b_mag with the threshold max(0, b_mag - e^r b_enc)."""
        encoder, gate, _ = super().folded(w, batch_threshold)
        factor, bias = w.own["r_mag"].double().exp(), w.own["b_mag"].double()
        return encoder * factor[:, None], bias, (w.own["b_mag"] - factor * gate).clamp_min(0)
