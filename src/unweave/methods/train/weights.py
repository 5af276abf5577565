"""The parameters of an SAE in training: where they begin, what they fold into, and how an SAE unfolds into them.

Training sees activations through ``Affine`` maps and keeps decoder rows at norm 1. ReLU, JumpReLU and TopK commute with
positive factors, so with x~ = (x - c) s and y~ = (y - c') s' the SAE of raw and that of scaled activations differ by

    W_enc = W~ s / s'    b_enc = b~ / s' - W_enc c    threshold = threshold~ / s'    f = f~ / s'
    W_skip = S~ s / s'   b_dec = b~_dec / s' + c' - c W_skip
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from unweave.core.site import Site
from unweave.data.policy import TokenPolicy
from unweave.methods.train import init
from unweave.methods.train.sae_spec import SAESpec
from unweave.methods.train.scaling import Affine
from unweave.sae.activations import Activation, JumpReLU, ReLU, TopK
from unweave.sae.module import SAE


def _parameter(t: Tensor) -> nn.Parameter:
    """Contiguous, as the fused optimiser and sums over processes take for granted."""
    return nn.Parameter(t.contiguous())


@dataclass
class Weights:
    """W_enc [F, D], W_dec [F, D_out], b_enc [F], b_dec [D_out] in the scaled space, and what only some kinds have.

    threshold [F] of jumprelu (``log_threshold`` instead, where its logarithm is trained); r_mag, b_mag [F] of gated,
    whose b_enc is the gate's; W_skip [D, D_out] of skip transcoders.
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    plain_threshold: nn.Parameter | None = None
    log_threshold: nn.Parameter | None = None
    r_mag: nn.Parameter | None = None
    b_mag: nn.Parameter | None = None
    W_skip: nn.Parameter | None = None

    @property
    def threshold(self) -> Tensor | None:
        """Thresholds [F] with their graph; None where the kind has none."""
        return self.plain_threshold if self.log_threshold is None else self.log_threshold.exp()

    def named(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        pairs = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: p for name, p in pairs if p is not None}

    @torch.no_grad()
    def constrain(self) -> None:
        """Decoder rows back to norm 1, thresholds back above 0."""
        init.unit_rows(self.W_dec.data)
        if self.plain_threshold is not None:
            self.plain_threshold.data.clamp_(min=0)

    def base(self, x: Tensor) -> Tensor:
        """What is said without any latent: [D_out], or [N, D_out] with a skip."""
        return self.b_dec if self.W_skip is None else torch.addmm(self.b_dec, x, self.W_skip)


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
    threshold = x.new_full((n_latents,), first_threshold(spec))
    if spec.threshold_by_norm:
        threshold = threshold * (init.kaiming(rows.shape[1]) * rows.norm(dim=1))
    zeros = x.new_zeros(n_latents)
    skip = None if spec.skip == "none" else _parameter(init.skip_weights(spec.skip, x, goal))
    unsaid = goal if skip is None else goal - x @ skip.detach()
    kind: init.CentreKind = "none" if spec.bias_init == "zero" else spec.bias_init
    made = Weights(
        _parameter(encoder), _parameter(zeros.clone()), _parameter(init.unit_rows(rows)),
        _parameter(init.centre(kind, unsaid)), W_skip=skip,
    )  # fmt: skip
    if spec.kind == "gated":
        made.r_mag, made.b_mag = _parameter(zeros.clone()), _parameter(zeros.clone())
    _set_thresholds(made, spec, threshold)
    return made


def first_threshold(spec: SAESpec) -> float:
    """jumprelu: the threshold of a latent that begins."""
    return spec.bandwidth if spec.threshold_init is None else spec.threshold_init


def _set_thresholds(weights: Weights, spec: SAESpec, threshold: Tensor) -> None:
    if spec.kind == "jumprelu" and spec.threshold_parameter == "log":
        weights.log_threshold = _parameter(threshold.log())
    elif spec.kind == "jumprelu":
        weights.plain_threshold = _parameter(threshold)


# -- to an SAE and back -----------------------------------------------------------------------------------------------


@torch.no_grad()
def fold(
    spec: SAESpec,
    weights: Weights,
    batch_threshold: float,
    source: Affine,
    goal: Affine,
    *,
    read: Site | None,
    write: Site | None,
    policy: TokenPolicy | None,
    provenance: Mapping[str, Any] | None,
) -> SAE:
    """The SAE of raw activations, decoder rows of norm 1.

    Gated: f = 1[u + b_gate > 0] relu(e^r u + b_mag) with u = x W is JumpReLU of e^r u + b_mag with the threshold
    max(0, b_mag - e^r b_gate). BatchTopK and Matryoshka become JumpReLU with one threshold.
    """
    s_in, s_out = source.scale, goal.scale
    encoder, bias, threshold = weights.W_enc.double(), weights.b_enc.double(), weights.threshold
    if weights.r_mag is not None and weights.b_mag is not None:
        factor = weights.r_mag.double().exp()
        threshold = (weights.b_mag - factor * bias).clamp_min(0)
        encoder, bias = encoder * factor[:, None], weights.b_mag.double()
    elif spec.one_threshold:
        threshold = torch.full_like(bias, batch_threshold)
    dtype = weights.W_enc.dtype
    activation: Activation = TopK(spec.k) if spec.kind == "topk" else ReLU()
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
    return SAE(
        W_enc.T.to(dtype).contiguous(), b_enc.to(dtype), weights.W_dec.clone(), b_dec.to(dtype), activation,
        W_skip=W_skip, read=read, write=write, policy=policy, provenance=provenance,
    )  # fmt: skip


@torch.no_grad()
def unfold(spec: SAESpec, sae: SAE, source: Affine, goal: Affine, like: Tensor) -> tuple[Weights, float]:
    """The weights in which ``sae`` goes on training as ``spec`` says, and the threshold of batchtopk kinds.

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
        skip = _parameter((skip * (s_out / s_in)).to(like))
    made = Weights(*(_parameter(t.to(like)) for t in (encoder, bias, rows / norms[:, None], b_dec)), W_skip=skip)
    threshold = torch.zeros_like(bias)
    if isinstance(sae.activation, JumpReLU):
        threshold = sae.activation.threshold.double().to(like.device).clamp_min(0) * norms * s_out
    if spec.kind == "gated":
        made.r_mag = _parameter(torch.zeros_like(made.b_enc))
        made.b_mag = _parameter(bias.to(like))
        made.b_enc = _parameter((bias - threshold).to(like))
    _set_thresholds(made, spec, threshold.to(like))
    return made, float(threshold.mean())
