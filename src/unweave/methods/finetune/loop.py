"""The training loop: AdamW on the cross-entropy of what is to be predicted, under a condition.

    L = sum over a batch's labels of CE / labels + kl sum KL(base || tuned) / labels + the condition's penalty

1. Items are shuffled anew in every epoch by (seed, epoch) alone; a step takes the next ``batch`` of them.
2. They are divided among the processes and then into ``accumulation`` passes. What divides the sums is known before, of
   the whole batch, so neither division changes the gradient but by rounding.
3. The learning rate rises linearly from 0 over the first share ``warmup`` of all steps and falls linearly to 0.
4. A loss or gradient that is not finite ends the training before the weights take it in.

The model stays in evaluation mode: there is no dropout. A checkpoint holds weights, moments and history; the rest
follows from the step, so an interrupted training ends with the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unweave.core.errors import UnweaveError
from unweave.core.progress import task
from unweave.core.result import from_plain, to_plain
from unweave.core.site import Site
from unweave.lm.model import Tokens
from unweave.lm.shortcuts import recomputed
from unweave.lm.taps import Start
from unweave.methods.finetune.checkpoint import Checkpoints
from unweave.methods.finetune.conditions import Condition, base_values
from unweave.methods.finetune.result import Check, Score
from unweave.methods.finetune.rows import IGNORE, Rows, part
from unweave.methods.finetune.spec import LearningSpec
from unweave.methods.finetune.starts import Starts
from unweave.methods.finetune.weights import Trainable

Measured = tuple[dict[str, Score], dict[Site, float]]


@dataclass(frozen=True)
class Plan:
    """Steps of a training, and after which of them something is measured (``checks`` times an epoch)."""

    items: int
    options: LearningSpec
    seed: int = 0
    checks: int = 0

    @property
    def in_epoch(self) -> int:
        return math.ceil(self.items / self.options.batch)

    @property
    def steps(self) -> int:
        return max(1, round(self.options.epochs * self.in_epoch))

    @property
    def checked(self) -> frozenset[int]:
        """Numbers of steps done, 0 and all of them included."""
        if not self.checks:
            return frozenset()
        times = math.ceil(self.options.epochs * self.checks)
        return frozenset({0, self.steps} | {round(i * self.in_epoch / self.checks) for i in range(times)})

    def rows(self, step: int) -> list[int]:
        """The items of a step."""
        epoch, place = divmod(step, self.in_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.items)
        return order[place * self.options.batch :][: self.options.batch].tolist()

    def learning_rate(self, step: int) -> float:
        rise = math.ceil(self.options.warmup * self.steps)
        if step < rise:
            return self.options.lr * step / rise
        return self.options.lr * (self.steps - step) / max(1, self.steps - rise)


@dataclass
class _Since:
    """What has gathered since the last check."""

    loss: float = 0.0
    penalty: float = 0.0
    steps: int = 0


@dataclass
class _Training:
    """A training under way."""

    model: Trainable
    rows: Rows
    condition: Condition
    plan: Plan
    starts: Starts | None
    checkpoints: Checkpoints
    step: int = 0
    since: _Since = field(default_factory=_Since)
    history: list[Check] = field(default_factory=list)

    def __post_init__(self) -> None:
        o = self.plan.options
        self.weights = list(self.model.named.values())
        self.optimiser = torch.optim.AdamW(self.weights, lr=o.lr, betas=(o.beta1, o.beta2), weight_decay=o.weight_decay)

    # -- one step ---------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """One optimiser step. Raises UnweaveError, with the weights as they were, where it would not be finite."""
        options, group = self.plan.options, self.checkpoints.group
        rows = self.plan.rows(self.step)
        rows = [rows[i] for i in self.rows.lengths[rows].argsort(stable=True).tolist()]
        tokens, labels = self.rows.batch(rows)
        total = (max(1, int((labels != IGNORE).sum())), tokens.n_tokens)
        own = range(len(rows))[group.share(len(rows))]
        parts = [chunk.tolist() for chunk in np.array_split(np.array(own), min(options.accumulation, max(1, len(own))))]
        sums = torch.zeros(2, dtype=torch.float64)
        self.optimiser.zero_grad(set_to_none=True)
        for chunk in filter(None, parts):
            span = slice(chunk[0], chunk[-1] + 1)
            sums += self.one_pass(*part(tokens, labels, span), rows[span], total)
        loss, penalty = group.sum(sums).tolist()
        norm = self.gathered()
        if not math.isfinite(loss + penalty + norm):
            self.checkpoints.save(self.state(), self.step)
            rate = self.plan.learning_rate(self.step)
            raise UnweaveError(
                f"the loss is no longer finite: {loss + penalty:g}, gradient norm {norm:g}",
                where=f"step {self.step + 1} of {self.plan.steps}",
                remedy=f"lower learning.lr (the rate is {rate:.3g} here), or set learning.clip; the checkpoint has the "
                "weights before this step",
            )
        if options.clip is not None and norm > options.clip:
            for weight in self.weights:
                if weight.grad is not None:
                    weight.grad.mul_(options.clip / norm)
        for parameters in self.optimiser.param_groups:
            parameters["lr"] = self.plan.learning_rate(self.step)
        self.optimiser.step()
        self.step += 1
        self.since = _Since(self.since.loss + loss, self.since.penalty + penalty, self.since.steps + 1)

    def gathered(self) -> float:
        """Sums the gradients of all processes; their norm."""
        group = self.checkpoints.group
        for weight in self.weights if group.size > 1 else ():
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            group.sum(weight.grad)
        norms = [_wide(weight.grad).norm() for weight in self.weights if weight.grad is not None]
        return float(torch.stack(norms).double().norm()) if norms else 0.0

    def one_pass(self, tokens: Tokens, labels: Tensor, rows: list[int], total: tuple[int, int]) -> Tensor:
        """Adds the gradient of some rows' part of the loss; (cross-entropy, everything else), float64 [2]."""
        lm, options, condition = self.model.lm, self.plan.options, self.condition
        progress = self.step / max(1, self.plan.steps - 1)
        columns = (labels != IGNORE).any(0).nonzero().squeeze(1).to(lm.device)
        tokens, labels = tokens.to(lm.device), labels.to(lm.device)
        start = None if self.starts is None else self.starts.start(rows, tokens.ids.shape[1])
        goal = labels[:, columns]
        there = goal != IGNORE
        with torch.autocast(lm.device.type, torch.bfloat16, enabled=options.autocast):
            base_logits, base = self.of_base(tokens, columns, there, start)
        with ExitStack() as stack:
            if options.recompute:
                stack.enter_context(recomputed(lm))
            edits = condition.edits(progress)
            seen = stack.enter_context(lm.taps(edit=edits, read=condition.reads, grad=True, start=start))
            stack.enter_context(torch.autocast(lm.device.type, torch.bfloat16, enabled=options.autocast))
            logits = lm(tokens, keep_logits=columns)
            assert logits is not None
            picked = _wide(logits[there])
            loss = F.cross_entropy(picked, goal[there], reduction="sum") / total[0]
            other = condition.penalty(seen, tokens, base, progress)
            rest = loss.new_zeros(()) if other is None else other * (tokens.n_tokens / total[1])
            if base_logits is not None:
                kl = F.kl_div(picked.log_softmax(-1), base_logits.log_softmax(-1), log_target=True, reduction="sum")
                rest = rest + options.kl * kl / total[0]
            (loss + rest).backward()
        return torch.tensor([float(loss.detach()), float(rest.detach())], dtype=torch.float64)

    def of_base(
        self, tokens: Tokens, columns: Tensor, there: Tensor, start: Start | None
    ) -> tuple[Tensor | None, dict[Site, Tensor]]:
        """What the base model predicts at the labels, [L, V], and its chosen latents' values; where anything asks."""
        lm, kl = self.model.lm, self.plan.options.kl > 0
        if not kl and not self.condition.reads:
            return None, {}
        values, logits = {}, None
        with self.model.as_base():
            if self.condition.reads:
                values = base_values(lm, self.condition, tokens, start)
            if kl:
                with lm.taps(start=start):
                    logits = lm(tokens, keep_logits=columns)
        return (None if logits is None else _wide(logits[there])), values

    # -- what is kept -------------------------------------------------------------------------------------------------

    def check(self, measured: Measured) -> Check:
        """Notes what was measured after the last step, and the losses since the check before."""
        n, since = self.since.steps, self.since
        adds = self.condition.spec.kind == "penalty" or self.plan.options.kl > 0
        rate = self.plan.learning_rate(self.step)
        check = Check(
            self.step, self.step / self.plan.in_epoch, rate, since.loss / n if n else None,
            since.penalty / n if n and adds else None, *measured,
        )  # fmt: skip
        self.history.append(check)
        self.since = _Since()
        return check

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "weights": {name: weight.detach() for name, weight in self.model.named.items()},
            "optimiser": self.optimiser.state_dict(),
            "since": vars(self.since),
            "history": to_plain(self.history),
        }

    def resume(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, weight in self.model.named.items():
                weight.copy_(state["weights"][name])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.since = state["step"], _Since(**state["since"])
        self.history = list(from_plain(tuple[Check, ...], state["history"], "checkpoint"))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def finetune(
    model: Trainable,
    rows: Rows,
    condition: Condition,
    plan: Plan,
    *,
    starts: Starts | None = None,
    measure: Callable[[], Measured] = lambda: ({}, {}),
    checkpoints: Checkpoints | None = None,
) -> tuple[Check, ...]:
    """Trains the weights of ``model`` (see ``trainable``) on ``rows``; returns what was measured on the way.

    ``measure`` is called without any tap open, ``plan.checks`` times an epoch. ``condition`` must have been opened on
    the base model. Raises UnweaveError where the loss explodes, and where the batch is smaller than the group.
    """
    checkpoints = checkpoints or Checkpoints()
    _refuse(rows, plan, checkpoints)
    training = _Training(model, rows, condition, plan, starts, checkpoints)
    saved = checkpoints.load()
    if saved is not None:
        training.resume(saved)
    with task("fine-tune", total=plan.steps, unit="steps", done=training.step) as shown:
        while True:
            if training.step in plan.checked and (not training.history or training.history[-1].step < training.step):
                check = training.check(measure())
                shown.note(_note(check))
            if training.step == plan.steps:
                break
            training.advance()
            shown.advance()
            if checkpoints.due:
                checkpoints.save(training.state(), training.step)
    return tuple(training.history)


def _note(check: Check) -> str:
    words = [] if check.loss is None else [f"loss {check.loss:.3f}"]
    words += [f"{name} {100 * s.accuracy.right.value:.0f} %" for name, s in check.scores.items() if s.accuracy]
    return ", ".join(words)


def _refuse(rows: Rows, plan: Plan, checkpoints: Checkpoints) -> None:
    if len(rows.lengths) != plan.items or plan.items == 0:
        raise UnweaveError(f"there are {len(rows.lengths)} training items, not {plan.items}", remedy="give some")
    if plan.options.batch < checkpoints.group.size:
        raise UnweaveError(
            f"batches of {plan.options.batch} cannot be divided among {checkpoints.group.size} processes",
            where="learning.batch", remedy="use larger batches or fewer processes",
        )  # fmt: skip
