"""End-to-end training: the SAE learns to leave the model's predictions as they are (Braun et al. 2024).

1. Without the SAE the model predicts next tokens; with it, reconstructions take the place of the activations that the
   policy counts, and the model predicts again.
2. The loss is KL(as it was || with reconstructions) at the counted tokens, plus the kind's penalty (sparsity, AuxK);
   gradients pass through the later blocks to the SAE alone.
3. Rows of tokens go through in parts, so that only one part's graph is alive; the optimiser moves once.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from unweave.core.dist import Group
from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.data.policy import TokenPolicy
from unweave.lm.model import LM, Tokens
from unweave.lm.taps import At
from unweave.methods.train.coding import Attempt
from unweave.methods.train.objectives import total
from unweave.methods.train.trainer import SAETrainer


def end_to_end_step(
    lm: LM,
    trainer: SAETrainer,
    tokens: Tokens,
    site: str | Site,
    policy: TokenPolicy | None = None,
    *,
    reconstruction: float = 0.0,
    part_tokens: int = 1024,
    nonfinite: Literal["stop", "drop"] = "stop",
) -> dict[str, float]:
    """One optimiser step of ``trainer`` on the model's predictions over ``tokens``. Returns its row, and ``kl``.

    ``kl`` is in nats, averaged over counted tokens; ``loss`` is kl + penalty + ``reconstruction`` times the squared
    error, all before the step. Each part of about ``part_tokens`` tokens (whole rows) is a batch of its own to what
    looks at a whole batch: BatchTopK's winners, and the L0 that a target compares with. Nested and multi-TopK
    reconstructions teach only through ``reconstruction``.

    The row also has ``outliers``, counted tokens that the policy's norm leaves out, and ``nonfinite``, counted tokens
    of rows in which the model's activations or predictions are NaN or infinite: attention carries those to the row's
    other tokens, so such rows are left out whole (``drop``) or stop the work.

    In a group, ``tokens`` are this process's rows, at least one. Raises UnweaveError, in all processes, where one has
    no row, where no token counts, and for NaN or infinity.
    """
    site, group = lm.site(site), trainer.group
    policy = policy or TokenPolicy()
    rows, kl, outliers, spoiled = 0, 0.0, 0, 0
    for part in _parts(tokens.to(lm.device), part_tokens, group):
        with lm.taps(read=[site]) as seen:
            logits = lm(part)
        assert logits is not None
        counts, left_out = _counted(seen[site], logits, part, policy)
        empty, of_norm, bad = group.sum(left_out).tolist()
        if bad and nonfinite == "stop":
            raise UnweaveError(
                f"{bad} tokens are in rows where the model's activations or predictions are NaN or infinite",
                where=f"{site}, training step {trainer.steps}",
                remedy="load the model in float32 or bfloat16, leave those documents out, or have such rows dropped "
                "and counted (stream.nonfinite: drop)",
            )
        outliers, spoiled = outliers + of_norm, spoiled + bad
        if empty:
            continue  # no token of it counts, in some process
        logits = logits[counts]
        attempt, edited = _with_sae(lm, trainer, part, site, counts)
        divergence = total(_divergence(logits, edited), group)
        other = attempt.penalty + reconstruction * attempt.reconstruction
        trainer.accumulate(attempt, divergence + attempt.rows * other)
        rows, kl = rows + attempt.rows, kl + float(divergence.detach())
    if rows == 0:
        raise UnweaveError("no token of this batch counts", where=str(site), remedy="give rows with ordinary tokens")
    return trainer.apply(over=rows) | {"kl": kl / rows, "outliers": outliers, "nonfinite": spoiled}


def _with_sae(lm: LM, trainer: SAETrainer, part: Tokens, site: Site, counts: Tensor) -> tuple[Attempt, Tensor]:
    """What the SAE makes of the tokens that count, and what the model then predicts there [n, V]."""
    attempts: list[Attempt] = []

    def put(x: Tensor, at: At) -> Tensor:
        attempts.append(trainer.attempt(x[counts]))
        return x.index_put((counts,), attempts[0].y.to(x))

    with lm.taps(edit={site: put}, grad=True):
        logits = lm(part)
    assert logits is not None
    return attempts[0], logits[counts]


def _counted(x: Tensor, logits: Tensor, part: Tokens, policy: TokenPolicy) -> tuple[Tensor, Tensor]:
    """Which tokens count, bool [B, P], from activations x [B, P, D] and predictions [B, P, V]; and int64 [3]: whether
    none does, how many are norm outliers, and how many are in rows that are not finite.
    """
    finite = torch.isfinite(x).all(-1) & torch.isfinite(logits.amax(-1)).to(x.device)
    whole = (finite | ~part.mask).all(1, keepdim=True)
    inside = TokenPolicy(policy.exclude_ids).keep(x, part.ids, part.mask)
    counts = policy.keep(x, part.ids, part.mask) & whole
    left_out = [~counts.any(), (inside & whole & ~counts).sum(), (inside & ~whole).sum()]
    return counts, torch.stack([number.long() for number in left_out])


def _parts(tokens: Tokens, part_tokens: int, group: Group) -> list[Tokens]:
    """Whole rows in parts of about ``part_tokens``: as many parts in every process."""
    n, width = tokens.ids.shape
    own = torch.tensor([-(-n * width // part_tokens), -n], device=tokens.ids.device)
    parts, fewest = group.max(own).tolist()
    if fewest == 0:
        raise UnweaveError(
            "a process has no rows", where=f"{group.size} processes", remedy="give each at least one: larger batches"
        )
    count = max(1, min(parts, -fewest))
    return [tokens.rows(slice(n * i // count, n * (i + 1) // count)) for i in range(count)]


def _divergence(clean: Tensor, edited: Tensor) -> Tensor:
    """Summed KL(clean || edited) of next-token distributions, from logits [n, V], at least in float32."""
    dtype = torch.promote_types(clean.dtype, torch.float32)
    log_p, log_q = clean.to(dtype).log_softmax(-1), edited.to(dtype).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()
