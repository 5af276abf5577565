"""The parameters of an SAE in training, in the space of scaled activations."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from unweave.methods.train import init


@dataclass
class Weights:
    """W_enc [F, D], W_dec [F, D_out], b_enc [F], b_dec [D_out]; W_skip [D, D_out] of skip transcoders.

    ``own`` are parameters [F] that only the kind has, by name: thresholds of jumprelu, r_mag and b_mag of gated, whose
    b_enc is the gate's.
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    own: dict[str, nn.Parameter] = field(default_factory=dict)
    W_skip: nn.Parameter | None = None

    def named(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        shared = {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        return shared | self.own | ({} if self.W_skip is None else {"W_skip": self.W_skip})

    @torch.no_grad()
    def constrain(self) -> None:
        """Decoder rows back to norm 1."""
        init.unit_rows(self.W_dec.data)

    def base(self, x: Tensor) -> Tensor:
        """What is reconstructed without any latent: [D_out], or [N, D_out] with a skip."""
        return self.b_dec if self.W_skip is None else torch.addmm(self.b_dec, x, self.W_skip)


def parameter(t: Tensor) -> nn.Parameter:
    """Contiguous, as the fused optimiser and sums over processes take for granted."""
    return nn.Parameter(t.contiguous())
