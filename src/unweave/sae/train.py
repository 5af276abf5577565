"""Training an SAE: activation x objective terms, in fp32, one optimiser step per batch.

1. Activations are centred and scaled to a mean squared norm of 1, both measured once on ``init_x``; the finished SAE
   has this folded into its weights, its decoder rows keep norm 1, and its latents are in units of the data.
2. A batch is encoded; TopK and BatchTopK find their winners chunk by chunk and go on with those alone (``kernels``),
   ReLU and JumpReLU keep the dense latents.
3. The objective's terms are summed and differentiated; what the gradient of a decoder row has along the row itself is
   removed (it would only change the norm that is set back), Adam moves, decoder rows return to norm 1.
4. Latents that have not fired for ``dead_after`` tokens are dead: AuxK teaches them the residual until they fire again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.data.policy import TokenPolicy
from unweave.sae import init, kernels, objectives
from unweave.sae.activations import Activation, JumpReLU, ReLU, TopK
from unweave.sae.module import SAE
from unweave.sae.spec import SAESpec

_EMA = 0.95
"""how much of BatchTopK's threshold each batch keeps; a slower mean lags behind and lets too many latents by"""
_FIT_ROWS = 2048
"""rows of init_x on which the encoder's first scale is fitted"""
_L1_START, _L1_RATE = 1e-2, 0.02
"""ReLU: the first L1 weight, and how fast it follows the ratio of L0 to k, per step"""


@dataclass(frozen=True)
class _Affine:
    """(x - centre) * scale: how training sees activations."""

    centre: Tensor
    scale: float

    @classmethod
    def measure(cls, x: Tensor, kind: init.CentreKind, normalise: bool) -> _Affine:
        if not bool(torch.isfinite(x).all()):
            raise UnweaveError(
                "the activations to start from hold NaN or infinity", remedy="look at the model and data"
            )
        point = init.centre(kind, x)
        mean_square = float((x.float() - point).square().sum(1).double().mean())
        if normalise and mean_square == 0:
            raise UnweaveError("all activations to start from are the same", remedy="look at the site and the data")
        return cls(point, 1 / math.sqrt(mean_square) if normalise else 1.0)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.add(self.centre * -self.scale, x.to(self.centre), alpha=self.scale)


class SAETrainer:
    """One SAE in training. ``step`` takes a batch; ``to_sae`` gives the inference form at any moment.

    W_enc, W_dec [F, D]; b_enc [F]; b_dec [D]; threshold [F] (jumprelu): fp32 parameters in the scaled space.
    ``dead_for`` int64 [F]: tokens since each latent last fired. ``tokens_seen`` and ``steps`` count what it has seen.
    """

    def __init__(
        self,
        spec: SAESpec,
        d_in: int,
        *,
        init_x: Tensor,
        init_target: Tensor | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        """``init_x`` [N, d_in]: a sample of activations (thousands) for the centre, the scale and the decoder's start.

        With ``init_target`` [N, d_out] a transcoder is trained: targets are another site's activations.
        """
        _check_width(init_x, d_in, "init_x")
        if len(init_x) == 0:
            raise UnweaveError("no activations to start from", remedy="give init_x a few thousand rows")
        self.spec, self.d_in, self.d_sae = spec, d_in, spec.expansion * d_in
        if spec.k > self.d_sae:
            raise UnweaveError(f"k = {spec.k} of only {self.d_sae} latents", remedy="lower k or raise expansion")
        self.device = torch.device(device) if device is not None else init_x.device
        x, target = init_x.to(self.device, torch.float32), init_target
        self._input = _Affine.measure(x, spec.centre, spec.normalise)
        self._output = self._input
        if target is not None:
            target = target.to(self.device, torch.float32)
            self._output = _Affine.measure(target, spec.centre, spec.normalise)
        self.d_out = d_in if target is None else target.shape[1]
        self.generator = torch.Generator().manual_seed(seed)
        self.tokens_seen, self.steps = 0, 0
        self._batch_threshold, self._last_threshold, self._l1 = 0.0, 0.0, _L1_START
        self._start(self._input(x), None if target is None else self._output(target))
        self.dead_for = torch.zeros(self.d_sae, dtype=torch.int64, device=self.device)
        self.optimiser = torch.optim.Adam(
            list(self._parameters().values()), lr=spec.lr, betas=(0.9, spec.beta2), **_fastest_adam(self.device)
        )

    def _start(self, x: Tensor, target: Tensor | None) -> None:
        spec = self.spec
        rows = init.decoder_rows(spec.init, self.d_sae, self.d_in, x, self.generator)
        self.W_enc = nn.Parameter(rows.clone())
        if target is None:
            self.W_dec = nn.Parameter(rows)
        else:
            self.W_dec = nn.Parameter(init.decoder_rows(spec.init, self.d_sae, self.d_out, target, self.generator))
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae, device=self.device))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out, device=self.device))
        self.threshold: nn.Parameter | None = None
        if spec.kind == "jumprelu":
            self.threshold = nn.Parameter(torch.full((self.d_sae,), spec.bandwidth, device=self.device))
        self._fit_encoder(x[:_FIT_ROWS], (x if target is None else target)[:_FIT_ROWS])

    @torch.no_grad()
    def _fit_encoder(self, x: Tensor, goal: Tensor) -> None:
        """Scales the encoder so that the first reconstructions are of the data's size.

        Rows that point the same way all answer the same input, and their sum overshoots many times over; the best
        single factor is <y, x> / <y, y>.
        """
        y = self._reconstruct(x)[0]
        factor = float((y * goal).sum() / y.square().sum().clamp_min(1e-30))
        if math.isfinite(factor) and factor > 0:
            self.W_enc.mul_(factor)

    def _parameters(self) -> dict[str, nn.Parameter]:
        named = {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        return named if self.threshold is None else {**named, "threshold": self.threshold}

    # -- one step ---------------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """All of the spec's tokens have been seen."""
        return self.tokens_seen >= self.spec.tokens

    @property
    def dead(self) -> Tensor:
        """Latents that have not fired for ``dead_after`` tokens, int64 indices."""
        return (self.dead_for >= self.spec.dead_after).nonzero().squeeze(1)

    def learning_rate(self) -> float:
        """What the next step uses: a linear rise, a plateau and a linear fall over the spec's tokens."""
        spec = self.spec
        part = self.tokens_seen / spec.tokens
        rise = 1.0 if spec.warmup == 0 else min(1.0, (part + spec.batch / spec.tokens) / spec.warmup)
        fall = 1.0 if spec.decay == 0 else min(1.0, (1 - part) / spec.decay)
        return spec.lr * min(rise, fall)

    def step(self, x: Tensor, target: Tensor | None = None) -> dict[str, float]:
        """One optimiser step on activations x [N, d_in] (and targets [N, d_out] of a transcoder).

        Returns loss, fvu (of the batch, before the step), l0, dead (latents) and lr. Raises UnweaveError, with the
        weights as the step found them, when the loss is not finite or the spec's tokens have all been seen.
        """
        _check_width(x, self.d_in, "a batch")
        if self.done:
            raise UnweaveError(f"training is over: {self.tokens_seen} tokens", remedy="raise tokens, or stop here")
        if (target is None) != (self._output is self._input):
            raise UnweaveError("targets belong to transcoders", remedy="give init_target and target both, or neither")
        x = self._input(x.to(self.device))
        goal = x if target is None else self._output(target.to(self.device))
        y, fired, total_l0, penalty = self._reconstruct(x)
        mse = objectives.reconstruction(y, goal)
        loss = mse if penalty is None else mse + penalty
        dead = self.dead
        if self.spec.aux_weight > 0 and len(dead) > 0:
            residual = goal - y.detach()
            loss = loss + self.spec.aux_weight * objectives.auxk(
                x, residual, self.W_enc, self.b_enc, self.W_dec, dead, self.spec.k_aux
            )
        value = float(loss.detach())
        if not math.isfinite(value):
            raise self._diverged(x, value)
        lr = self.learning_rate()
        self._move(loss, lr)
        l0 = total_l0 / len(x)
        self._count(fired, len(x), l0)
        variance = float(objectives.variance(goal))
        return {"loss": value, "fvu": float(mse.detach()) / max(variance, 1e-30), "l0": l0, "dead": len(dead), "lr": lr}

    def _reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor, int, Tensor | None]:
        return self._sparse(x) if self.spec.kind in ("topk", "batchtopk") else self._dense(x)

    def _sparse(self, x: Tensor) -> tuple[Tensor, Tensor, int, Tensor | None]:
        """Reconstruction, which latents fired, how many active latents there were, penalty (none)."""
        weights, biases = self.W_enc.detach(), self.b_enc.detach()
        if self.spec.kind == "topk":
            values, choice = kernels.choose_topk(x, weights, biases, self.spec.k)
        else:
            values, choice = kernels.choose_batch_topk(
                x, weights, biases, self.spec.k, guess=0.8 * self._batch_threshold
            )
            lowest = float(values.min()) if len(values) else 0.0
            self._last_threshold = max(lowest, 0.0)
        f = torch.relu(kernels.attach(x, self.W_enc, self.b_enc, values, choice))
        positive = values > 0
        fired = torch.zeros(self.d_sae, dtype=torch.bool, device=self.device)
        fired[choice.indices[positive].long()] = True
        return kernels.decode(f, choice, self.W_dec) + self.b_dec, fired, int(positive.sum()), None

    def _dense(self, x: Tensor) -> tuple[Tensor, Tensor, int, Tensor | None]:
        z = torch.addmm(self.b_enc, x, self.W_enc.T)
        if self.threshold is None:
            f = torch.relu(z)
            penalty = self._l1 * objectives.l1(f, self.W_dec)
        else:
            f = objectives.jump_relu(z, self.threshold, self.spec.bandwidth)
            penalty = objectives.l0_target(z, self.threshold, self.spec.bandwidth, self.spec.k)
        active = f.detach() > 0
        return f @ self.W_dec + self.b_dec, active.any(0), int(active.sum()), penalty

    def _move(self, loss: Tensor, lr: float) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():
            rows, slope = self.W_dec, self.W_dec.grad
            assert slope is not None
            slope.addcmul_(rows, torch.linalg.vecdot(slope, rows)[:, None], value=-1)
            for group in self.optimiser.param_groups:
                group["lr"] = lr
            self.optimiser.step()
            init.unit_rows(self.W_dec.data)
            if self.threshold is not None:
                self.threshold.data.clamp_(min=0)

    def _count(self, fired: Tensor, n: int, l0: float) -> None:
        """Clocks in tokens (trap 29), one step per batch (trap 28)."""
        self.dead_for = (self.dead_for + n).masked_fill_(fired, 0)
        if self.spec.kind == "batchtopk":
            first = self.steps == 0
            self._batch_threshold = (
                self._last_threshold if first else _EMA * self._batch_threshold + (1 - _EMA) * self._last_threshold
            )
        elif self.spec.kind == "relu":
            error = math.log(max(l0, 1e-3) / self.spec.k)
            self._l1 *= math.exp(_L1_RATE * max(-1.0, min(1.0, error)))
        self.tokens_seen += n
        self.steps += 1

    def _diverged(self, x: Tensor, value: float) -> UnweaveError:
        where = f"training step {self.steps} ({self.tokens_seen} tokens)"
        if not bool(torch.isfinite(x).all()):
            return UnweaveError(
                "this batch of activations holds NaN or infinity", where=where,
                remedy="look at the data and the model's dtype; the weights are still those of the step before",
            )  # fmt: skip
        return UnweaveError(
            f"the loss became {value}", where=where,
            remedy=f"lower lr (now {self.spec.lr:g}); the last checkpoint, before this step, is good",
        )  # fmt: skip

    # -- checkpoints and the result -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything from which ``load_state_dict`` continues bit for bit: tensors and plain values, no code."""
        return {
            "parameters": {name: p.detach().clone() for name, p in self._parameters().items()},
            "optimiser": _copied(self.optimiser.state_dict()),
            "scaling": [(a.centre.clone(), a.scale) for a in (self._input, self._output)],
            "dead_for": self.dead_for.clone(),
            "tokens_seen": self.tokens_seen,
            "steps": self.steps,
            "batch_threshold": self._batch_threshold,
            "l1": self._l1,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from ``state_dict``. Raises UnweaveError when it belongs to another spec's shapes."""
        named = self._parameters()
        saved = state["parameters"]
        if {n: tuple(p.shape) for n, p in named.items()} != {n: tuple(p.shape) for n, p in saved.items()}:
            raise UnweaveError(
                "this checkpoint is of another SAE", remedy="use the spec it was made with, or start anew"
            )
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(saved[name])
        self.optimiser.load_state_dict(_copied(state["optimiser"]))
        (centre_in, scale_in), (centre_out, scale_out) = state["scaling"]
        tied = self._output is self._input
        self._input = _Affine(centre_in.to(self.device), scale_in)
        self._output = self._input if tied else _Affine(centre_out.to(self.device), scale_out)
        self.dead_for = state["dead_for"].to(self.device).clone()
        self.tokens_seen, self.steps = state["tokens_seen"], state["steps"]
        self._batch_threshold, self._l1 = state["batch_threshold"], state["l1"]
        self.generator.set_state(state["generator"])

    @torch.no_grad()
    def to_sae(
        self,
        *,
        read: Site | None = None,
        write: Site | None = None,
        policy: TokenPolicy | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> SAE:
        """The SAE as it stands, with centring and scaling folded in; BatchTopK becomes JumpReLU with one threshold.

        Training computes y = relu((x - c) s W + b) V + v with y = (x_hat - c') s'. As ReLU, JumpReLU and TopK commute
        with positive factors, dividing pre-activations (and thresholds) by s' leaves decoder rows at norm 1.
        """
        s_in, s_out = self._input.scale, self._output.scale
        W_enc = self.W_enc.detach().double() * (s_in / s_out)
        b_enc = self.b_enc.detach().double() / s_out - W_enc @ self._input.centre.double()
        b_dec = self.b_dec.detach().double() / s_out + self._output.centre.double()
        activation: Activation
        if self.spec.kind == "topk":
            activation = TopK(self.spec.k)
        elif self.spec.kind == "relu":
            activation = ReLU()
        elif self.threshold is not None:
            activation = JumpReLU(self.threshold.detach() / s_out)
        else:
            activation = JumpReLU(torch.full_like(self.b_enc.detach(), self._batch_threshold / s_out))
        return SAE(
            W_enc.T.float().contiguous(), b_enc.float(), self.W_dec.detach().clone(), b_dec.float(), activation,
            read=read, write=write, policy=policy, provenance=provenance,
        )  # fmt: skip


def _fastest_adam(device: torch.device) -> dict[str, bool]:
    return {"fused": True} if device.type in ("cpu", "cuda") else {"foreach": True}


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    return [_copied(v) for v in value] if isinstance(value, list) else value


def _check_width(x: Tensor, width: int, name: str) -> None:
    if x.ndim != 2 or x.shape[1] != width:
        raise UnweaveError(f"{name} has shape {list(x.shape)}, not [tokens, {width}]", where="SAETrainer")


__all__ = ["SAESpec", "SAETrainer"]
