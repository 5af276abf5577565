"""Training an SAE: activation x objective terms, in fp32, one optimiser step per batch.

1. Activations are centred and scaled to a mean squared norm of 1, both measured once on ``init_x``; the finished SAE
   has this folded into its weights, its decoder rows keep norm 1, and its latents are in units of the data.
2. A batch is encoded: its kind (``kinds``) selects entries of the pre-activations, and ``coding`` goes on with those.
3. The terms are summed and differentiated; what the gradient of a decoder row has along the row itself is removed (it
   would only change the norm that is set back), Adam moves, decoder rows return to norm 1.
4. Latents that have not fired for ``dead_after`` tokens are dead: AuxK teaches them the residual until they fire again,
   resampling starts them anew.

Several processes (``group``) train one SAE together: each gives its part of every batch, gradients are summed in one
exchange, and all that is decided is decided from numbers of the whole batch, so that they stay equal to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from unweave.core.dist import SOLO, Group
from unweave.core.errors import UnweaveError
from unweave.methods.train import coding, fit, init, objectives, resample, weights
from unweave.methods.train.coding import Attempt, Tally
from unweave.methods.train.entries import every
from unweave.methods.train.init import Affine
from unweave.methods.train.kinds import SAESpec
from unweave.methods.train.state import State
from unweave.sae.module import SAE
from unweave.sae.sparse import kernels

_SAMPLED, _WINDOW = 512, 4096
"""rows of a batch, at most and evenly spread over it, and of the last batches together, on which the one threshold of
batchtopk kinds is measured"""
_FIT_ROWS = 2048
"""rows of init_x, at most, on which the encoder's first scale is fitted"""


class SAETrainer:
    """One SAE in training. ``step`` takes a batch; ``to_sae`` gives the inference form at any moment.

    ``weights`` are the parameters, in the scaled space and in ``dtype``. ``dead_for`` int64 [F]: tokens since each
    latent last fired. ``tokens_seen`` and ``steps`` count what it has seen, in all processes.
    """

    def __init__(
        self,
        spec: SAESpec,
        d_in: int,
        *,
        init_x: Tensor,
        init_target: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        start: SAE | None = None,
        group: Group = SOLO,
    ) -> None:
        """``init_x`` [N, d_in]: a sample of activations (thousands) for the centre, the scale and the decoder's start.

        With ``init_target`` [N, d_out] a transcoder is trained: targets are another site's activations. ``start`` is an
        SAE to go on training; the spec must be of a kind, an expansion and a k that it has. Where its latents are no
        whole multiple of ``d_in``, expansion keeps its default and has no meaning. ``dtype`` is float32 or float64. In
        a ``group``, ``init_x`` may differ between processes: what the first measures counts.
        """
        _check_width(init_x, d_in, "init_x")
        if len(init_x) == 0:
            raise UnweaveError("no activations to start from", remedy="give init_x a few thousand rows")
        if dtype not in (torch.float32, torch.float64):
            raise UnweaveError(f"training is in float32 or float64, not {dtype}", remedy="activations may be of any")
        self.spec, self.d_in = spec, d_in
        self.d_sae = fit.latents(spec, d_in, None if init_target is None else init_target.shape[1], start)
        self.device = torch.device(device) if device is not None else init_x.device
        self.group = group
        x, target = init_x.to(self.device, dtype), init_target
        self._input = self._measure(x)
        self._output = self._input
        if target is not None:
            target = target.to(self.device, dtype)
            self._output = self._measure(target)
        self.d_out = d_in if target is None else target.shape[1]
        self.generator = torch.Generator().manual_seed(spec.seed)
        self.tokens_seen, self.steps = 0, 0
        self.state = spec.first_state()
        self._window = x.new_empty(0, d_in)  # batchtopk kinds: rows of the last batches, in the scaled space
        self._begin(self._input(x), None if target is None else self._output(target), start)
        self.dead_for = torch.zeros(self.d_sae, dtype=torch.int64, device=self.device)
        self._gathered: tuple[Tally, Attempt] | None = None
        self.optimiser = torch.optim.Adam(
            list(self.weights.trained().values()), lr=spec.lr, betas=(spec.beta1, spec.beta2), **_fastest(self.device)
        )

    def _measure(self, x: Tensor) -> Affine:
        affine = Affine.measure(x, self.spec.centre, self.spec.normalise)
        scale = self.group.broadcast(torch.tensor([affine.scale], dtype=torch.float64, device=x.device))
        return Affine(self.group.broadcast(affine.centre), float(scale))

    def _begin(self, x: Tensor, target: Tensor | None, start: SAE | None) -> None:
        if start is not None:
            self.weights, threshold = weights.unfold(self.spec, start, self._input, self._output, x)
            if self.spec.one_threshold:
                self.state.batch_threshold = threshold
        else:
            drawing = torch.Generator().manual_seed(self.spec.seed)  # of its own: what it draws hangs on the sample
            self.weights = weights.begin(self.spec, self.d_sae, x, target, drawing)
            if self.spec.init != "independent":
                self._fit_encoder(x, x if target is None else target)
        for parameter in self.weights.named().values():
            self.group.broadcast(parameter.data)
        if self.spec.freeze != "none":
            self.weights.named()[{"encoder": "W_enc", "decoder": "W_dec"}[self.spec.freeze]].requires_grad_(False)

    @torch.no_grad()
    def _fit_encoder(self, x: Tensor, goal: Tensor) -> None:
        """Scales the encoder so that the first reconstructions are of the data's size.

        Rows that point the same way all answer the same input, and their sum overshoots many times over; the best
        single factor is <y, x> / <y, y>.
        """
        w = self.weights
        dense = _FIT_ROWS if self.spec.by_rank else kernels.chunk_rows(self.d_sae, x.element_size())
        x, goal = x[: min(_FIT_ROWS, dense)], goal[: min(_FIT_ROWS, dense)]
        base = w.base(x)
        entries = self.spec.select(w, x, self.spec.first_state(), SOLO) or every(w, x)
        y = entries.decode(self.spec.latents(w, entries), w.W_dec)
        factor = float((y * (goal - base)).sum() / y.square().sum().clamp_min(1e-30))
        if math.isfinite(factor) and factor > 0:
            w.W_enc.mul_(factor)

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
        """What the next step uses."""
        return self.spec.learning_rate(self.tokens_seen)

    def step(self, x: Tensor, target: Tensor | None = None) -> dict[str, float]:
        """One optimiser step on activations x [N, d_in] (and targets [N, d_out] of a transcoder).

        Returns loss, fvu (of the batch, before the step), l0, dead (latents) and lr. Raises UnweaveError, with the
        weights as the step found them, when the loss is not finite or the spec's tokens have all been seen. In a group,
        x is this process's part of the batch, and what is returned is of the whole.
        """
        attempt = self.attempt(x, target)
        return self.update(attempt, attempt.loss)

    def attempt(self, x: Tensor, target: Tensor | None = None) -> Attempt:
        """What the SAE makes of activations x [N, d_in], with a graph to the parameters, and to x if it has one."""
        _check_width(x, self.d_in, "a batch")
        if self.done:
            raise UnweaveError(f"training is over: {self.tokens_seen} tokens", remedy="raise tokens, or stop here")
        if (target is None) != (self._output is self._input):
            raise UnweaveError("targets belong to transcoders", remedy="give init_target and target both, or neither")
        if len(x) == 0:
            raise UnweaveError("a batch is empty", remedy="give at least one row to every process")
        spec, w, group = self.spec, self.weights, self.group
        x = self._input(x.to(self.device))
        goal = x if target is None else self._output(target.to(self.device))
        rows = int(group.sum(torch.tensor([len(x)], device=self.device))) if group.size > 1 else len(x)
        dead = self.dead
        coded = coding.code(spec, w, x, goal, dead, self.state, rows, group)
        share = len(x) / rows
        terms = [weight * share * objectives.reconstruction(y, goal) for weight, y in coded.reconstructions]
        reconstruction = objectives.total(torch.stack(terms).sum(), group)
        y = coded.reconstructions[-1][1]
        other, observed = coding.penalty(spec, coded, self.state, self.tokens_seen, group)
        penalty = reconstruction.new_zeros(()) if other is None else other
        if spec.aux_weight > 0 and len(dead) > 0:
            residual = goal.detach() - y.detach()
            aux = objectives.auxk(x, residual, w.W_enc, w.b_enc, w.W_dec, dead, spec.k_aux, group)
            penalty = penalty + spec.aux_weight * aux
        return Attempt(
            loss=reconstruction + penalty, reconstruction=reconstruction, penalty=penalty, scaled=y, x=x.detach(),
            goal=goal.detach(), rows=rows, fired=coded.fired, active=coded.active, observed=observed,
            output=self._output,
        )  # fmt: skip

    def update(self, attempt: Attempt, loss: Tensor) -> dict[str, float]:
        """One optimiser step down ``loss``, a scalar made of the attempt's parts. Returns what ``step`` returns.

        In a group its value must be equal in all processes (they stop together where it is not finite), and its
        gradient one's own share of that of the whole batch: ``objectives.total`` makes both of one's own share.
        """
        self.accumulate(attempt, loss)
        return self.apply()

    def accumulate(self, attempt: Attempt, loss: Tensor) -> None:
        """The first half of ``update``: adds the loss's gradient. Several attempts at parts of a batch can share one
        step, each with its part of the loss, so that only one part's graph is alive at a time.
        """
        value = float(loss.detach())
        if not math.isfinite(value):
            self._gathered = None
            raise self._diverged(attempt.x, value)
        if self._gathered is None:
            self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        tally = Tally.of(attempt, value)
        self._gathered = (tally if self._gathered is None else self._gathered[0] + tally, attempt)

    def apply(self, *, over: float = 1.0) -> dict[str, float]:
        """The second half of ``update``: one optimiser step on the gradients gathered since the last.

        ``over`` divides them and the loss: a number of rows that is known only after the last part of a batch, say.
        """
        if self._gathered is None:
            raise UnweaveError("there is no gradient to follow", remedy="call accumulate, or update, first")
        (tally, last), lr, dead = self._gathered, self.learning_rate(), len(self.dead)
        tally = tally.over(self.group)
        self._move(lr, over)
        l0 = float(tally.active) / tally.rows
        self.dead_for = (self.dead_for + tally.rows).masked_fill_(tally.fired, 0)  # trap 29: clocks in tokens
        coding.follow(self.spec, self.state, tally.observed, l0, self.d_sae, self.tokens_seen)
        if self.spec.one_threshold:
            self._extend_window(tally.inputs, tally.rows)
        before = self.tokens_seen
        self.tokens_seen += tally.rows
        self.steps += 1
        self._gathered = None
        if resample.due(self.spec, before, self.tokens_seen):
            silent = self.dead_for > self.spec.resample_every / 2
            resample.begin_anew(self, silent, last.x, last.goal, last.scaled.detach())
            self.dead_for = self.dead_for.masked_fill(silent, 0)
        return {"loss": tally.loss / over, "fvu": tally.fvu, "l0": l0, "dead": dead, "lr": lr}

    def _move(self, lr: float, over: float) -> None:
        named = self.weights.trained()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in named.values()]
        if self.group.size > 1:
            flat = self.group.sum(torch.cat([g.reshape(-1) for g in gradients]))
            parts = flat.split([g.numel() for g in gradients])
            gradients = [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]
        for parameter, gradient in zip(named.values(), gradients, strict=True):
            parameter.grad = gradient if over == 1 else gradient.div_(over)
        with torch.no_grad():
            rows, slope = self.weights.W_dec, self.weights.W_dec.grad
            for part, own in () if slope is None else zip(init.blocks(rows), init.blocks(slope), strict=True):
                own.addcmul_(part, torch.linalg.vecdot(own, part)[:, None], value=-1)
            if self.spec.clip is not None:
                torch.nn.utils.clip_grad_norm_(list(named.values()), self.spec.clip)
            for options in self.optimiser.param_groups:
                options["lr"] = lr
            self.optimiser.step()
            self.weights.constrain()
            self.spec.constrain(self.weights)

    def _diverged(self, x: Tensor, value: float) -> UnweaveError:
        where = f"training step {self.steps} ({self.tokens_seen} tokens)"
        what = f"the loss became {value}"
        remedy = f"lower lr (now {self.spec.lr:g}); the last checkpoint, before this step, is good"
        if not bool(torch.isfinite(x).all()):
            what = "this batch of activations holds NaN or infinity"
            remedy = "look at the data and the model's dtype; the weights are still those of the step before"
        return UnweaveError(what, where=where, remedy=remedy)

    # -- checkpoints and the result -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything from which ``load_state_dict`` continues bit for bit: tensors and plain values, no code."""
        return {
            "parameters": {name: p.detach().clone() for name, p in self.weights.named().items()},
            "optimiser": _copied(self.optimiser.state_dict()),
            "scaling": [(a.centre.clone(), a.scale) for a in (self._input, self._output)],
            "dead_for": self.dead_for.clone(),
            "tokens_seen": self.tokens_seen,
            "steps": self.steps,
            "kind": asdict(self.state),
            "window": self._window.clone(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from ``state_dict``. Raises UnweaveError when it belongs to another spec's shapes."""
        named = self.weights.named()
        saved = state["parameters"]
        if {n: tuple(p.shape) for n, p in named.items()} != {n: tuple(p.shape) for n, p in saved.items()}:
            remedy = "use the spec it was made with, or start anew"
            raise UnweaveError("this checkpoint is of another SAE", remedy=remedy)
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(saved[name])
        self.optimiser.load_state_dict(_copied(state["optimiser"]))
        (centre_in, scale_in), (centre_out, scale_out) = state["scaling"]
        transcodes = self._output is not self._input
        self._input = Affine(centre_in.to(self.device), scale_in)
        self._output = Affine(centre_out.to(self.device), scale_out) if transcodes else self._input
        self.dead_for = state["dead_for"].to(self.device).clone()
        self.tokens_seen, self.steps = state["tokens_seen"], state["steps"]
        self.state = State(**_copied(state["kind"]))
        self._window = state["window"].to(self.device).clone()
        self.generator.set_state(state["generator"])
        self._gathered = None

    def batch_threshold(self) -> float:
        """The one threshold of batchtopk kinds, scaled: measured on the last batches with the weights as they stand.

        Before the first step that of the SAE to start from; 0 where there is none.
        """
        if not len(self._window):
            return self.state.batch_threshold or 0.0
        w, n = self.weights, self.spec.k * len(self._window)
        with torch.no_grad():
            values, _ = kernels.choose_batch_topk(self._window, w.W_enc, w.b_enc, self.spec.k)
        return float(values.min()) if len(values) == n else 0.0

    @torch.no_grad()
    def _extend_window(self, inputs: Sequence[Tensor], rows: int) -> None:
        """Adds a sample of a batch of ``rows`` rows, of which ``inputs`` [m, D] are this process's own.

        A running mean of past thresholds would lag behind the weights, which move fast in the first steps. Every
        process holds the sample of the whole batch, so that the threshold does not depend on how a batch is divided.
        """
        own, stride = torch.cat(list(inputs)), -(-rows // _SAMPLED)
        counts = torch.cat(self.group.gather(torch.tensor([len(own)], device=own.device)))
        before = int(counts[: self.group.rank].sum())
        sample = torch.cat(self.group.gather(own[-before % stride :: stride]))
        self._window = torch.cat([self._window, sample])[-_WINDOW:]

    def to_sae(self) -> SAE:
        """The SAE as it stands, with centring and scaling folded in: ReLU, JumpReLU or TopK (see ``weights.fold``)."""
        return weights.fold(self.spec, self.weights, self.batch_threshold(), self._input, self._output)


def _fastest(device: torch.device) -> dict[str, bool]:
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
