"""Resampling: latents that never fire begin anew, pointing at inputs that are badly explained (Bricken et al. 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unweave.methods.train import init
from unweave.methods.train.kinds import SAESpec

if TYPE_CHECKING:
    from unweave.methods.train.trainer import SAETrainer

_QUIET = 0.2
"""norm of a new encoder row, as a share of the living ones' mean: it takes part, but does not take over"""


@torch.no_grad()
def begin_anew(trainer: SAETrainer, silent: Tensor, x: Tensor, goal: Tensor, y: Tensor) -> None:
    """Gives the latents in ``silent`` (bool [F]) new weights, in place.

    x [N, D], goal and its reconstruction y [N, D_out] are the last batch, scaled.

    For each a row of the batch is drawn with a probability proportional to its squared error |goal - y|^2, its share of
    the loss (published versions take the error's norm, or the loss squared). The decoder row becomes the goal's
    direction, the encoder row the input's at 0.2 times the mean norm of the others, biases 0, the threshold what it was
    at the start, and Adam's memory of all of these 0. In a group rows are drawn from the whole batch.
    """
    which, weights, group = silent.nonzero().squeeze(1), trainer.weights, trainer.group
    if len(which) == 0:
        return
    masses = group.gather((goal - y).square().sum(1).double())
    before, whole = sum(len(m) for m in masses[: group.rank]), torch.cat(masses).cpu()
    if not float(whole.sum()) > 0:
        return
    distinct = len(which) <= int((whole > 0).sum())
    drawn = torch.multinomial(whole, len(which), replacement=not distinct, generator=trainer.generator).to(x.device)
    own = (drawn >= before) & (drawn < before + len(x))
    inputs, goals = (group.sum(_rows_at(t, drawn - before, own)) for t in (x, goal))
    alive = weights.W_enc[~silent].norm(dim=1)
    size = float(alive.mean()) if len(alive) else 1.0
    weights.W_enc[which] = init.unit_rows(inputs) * (_QUIET * size)
    weights.W_dec[which] = init.unit_rows(goals)
    weights.b_enc[which] = 0
    for name, value in trainer.spec.renewed().items():
        own = weights.own[name]
        own[which] = torch.as_tensor(value).to(own)
    for name, parameter in weights.named().items():
        if name not in ("b_dec", "W_skip"):
            for memory in trainer.optimiser.state[parameter].values():
                if memory.shape == parameter.shape:
                    memory[which] = 0


def due(spec: SAESpec, before: int, after: int) -> bool:
    """Whether a multiple of ``resample_every`` tokens lies in (before, after], other than the end of training."""
    every = spec.resample_every
    return every > 0 and before // every < after // every and after < spec.tokens


def _rows_at(t: Tensor, places: Tensor, own: Tensor) -> Tensor:
    """Rows of t at places, zeros where they are another process's."""
    return torch.where(own[:, None], t[places.clamp(0, len(t) - 1)], 0)
