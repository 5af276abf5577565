"""Where the parameters of an SAE in training begin, what they fold into, and how an SAE unfolds into them.

Training sees activations through ``Affine`` maps and keeps decoder rows at norm 1. ReLU, JumpReLU and TopK commute with
positive factors, so with x~ = (x - c) s and y~ = (y - c') s' the SAE of raw and that of scaled activations differ by

    W_enc = W~ s / s'    b_enc = b~ / s' - W_enc c    threshold = threshold~ / s'    f = f~ / s'
    W_skip = S~ s / s'   b_dec = b~_dec / s' + c' - c W_skip
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from unweave.methods.train import init
from unweave.methods.train.init import Affine
from unweave.methods.train.kinds import SAESpec
from unweave.sae.activations import Activation, JumpReLU, ReLU, TopK
from unweave.sae.module import SAE


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
        """All of them, by name."""
        shared = {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        return shared | self.own | ({} if self.W_skip is None else {"W_skip": self.W_skip})

    def trained(self) -> dict[str, nn.Parameter]:
        """Those of ``named`` that move: all but a frozen matrix."""
        return {name: p for name, p in self.named().items() if p.requires_grad}

    @torch.no_grad()
    def constrain(self) -> None:
        """Decoder rows back to norm 1."""
        if self.W_dec.requires_grad:
            init.unit_rows(self.W_dec.data)

    def base(self, x: Tensor) -> Tensor:
        """What is reconstructed without any latent: [D_out], or [N, D_out] with a skip."""
        return self.b_dec if self.W_skip is None else torch.addmm(self.b_dec, x, self.W_skip)


def parameter(t: Tensor) -> nn.Parameter:
    """Contiguous, as the fused optimiser and sums over processes take for granted."""
    return nn.Parameter(t.contiguous())


def begin(spec: SAESpec, n_latents: int, x: Tensor, target: Tensor | None, generator: torch.Generator) -> Weights:
    """The first weights, from samples x [N, D] and target [N, D_out] (None: x itself) as training sees them."""
    goal = x if target is None else target
    rows = init.drawn_rows(spec.init, n_latents, x.shape[1], x, generator)
    if spec.init == "independent":
        encoder = init.encoder_rows(n_latents, x.shape[1], x, generator)
    else:
        encoder = init.unit_rows(rows.clone())
    if target is not None:
        rows = init.drawn_rows(spec.init, n_latents, target.shape[1], target, generator)
    zeros = x.new_zeros(n_latents)
    own = {name: parameter(value) for name, value in spec.added(zeros, rows).items()}
    skip = None if spec.skip == "none" else parameter(init.skip_weights(spec.skip, x, goal))
    unsaid = goal if skip is None else goal - x @ skip.detach()
    kind: init.CentreKind = "none" if spec.bias_init == "zero" else spec.bias_init
    return Weights(
        parameter(encoder), parameter(zeros), parameter(init.unit_rows(rows)),
        parameter(init.centre(kind, unsaid)), own, skip,
    )  # fmt: skip


# -- to an SAE and back -----------------------------------------------------------------------------------------------


@torch.no_grad()
def fold(spec: SAESpec, weights: Weights, batch_threshold: float, source: Affine, goal: Affine) -> SAE:
    """The SAE of raw activations, decoder rows of norm 1: TopK, JumpReLU or ReLU, as the kind says."""
    s_in, s_out = source.scale, goal.scale
    encoder, bias, threshold = spec.folded(weights, batch_threshold)
    dtype, k = weights.W_enc.dtype, spec.topk()
    activation: Activation = ReLU() if k is None else TopK(k)
    if threshold is not None:
        activation = JumpReLU((threshold.double() / s_out).to(dtype))
    W_enc = encoder * (s_in / s_out)
    b_enc = bias / s_out - W_enc @ source.centre.double()
    b_dec = weights.b_dec.double() / s_out + goal.centre.double()
    W_skip = None
    if weights.W_skip is not None:
        W_skip = weights.W_skip.double() * (s_in / s_out)
        b_dec = b_dec - source.centre.double() @ W_skip
        W_skip = W_skip.to(dtype)
    W_enc, b_enc, b_dec = W_enc.T.to(dtype).contiguous(), b_enc.to(dtype), b_dec.to(dtype)
    return SAE(W_enc, b_enc, weights.W_dec.clone(), b_dec, activation, W_skip=W_skip)


@torch.no_grad()
def unfold(spec: SAESpec, sae: SAE, source: Affine, goal: Affine, like: Tensor) -> tuple[Weights, float]:
    """The weights in which ``sae`` goes on training as ``spec`` says, and the mean of its thresholds.

    ``fit.latents`` says whether it can. Decoder norms move to the encoder (and so to the latents); a latent whose
    decoder row is zero keeps its encoder.
    """
    s_in, s_out, c_in = source.scale, goal.scale, source.centre.double()
    rows = sae.W_dec.double().to(like.device)
    norms = rows.norm(dim=1)
    norms = torch.where(norms > 0, norms, 1.0)
    W, b = sae.W_enc.T.double().to(like.device), sae.b_enc.double().to(like.device)
    encoder = W * (norms[:, None] * s_out / s_in)
    bias = (b + W @ c_in) * norms * s_out
    b_dec = (sae.b_dec.double().to(like.device) - goal.centre.double()) * s_out
    skip = None
    if sae.W_skip is not None:
        skip = sae.W_skip.double().to(like.device)
        b_dec = b_dec + s_out * (c_in @ skip)
        skip = parameter((skip * (s_out / s_in)).to(like))
    threshold = torch.zeros_like(bias)
    if isinstance(sae.activation, JumpReLU):
        threshold = sae.activation.threshold.double().to(like.device).clamp_min(0) * norms * s_out
    own = {name: parameter(value.to(like)) for name, value in spec.resumed(bias, threshold, like).items()}
    b_enc = own.pop("b_enc", parameter(bias.to(like)))
    unfolded = Weights(
        parameter(encoder.to(like)), b_enc, parameter((rows / norms[:, None]).to(like)), parameter(b_dec.to(like)),
        own, skip,
    )  # fmt: skip
    return unfolded, float(threshold.mean())
