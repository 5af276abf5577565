"""End-to-end training: the SAE learns to leave the model's predictions as they are (Braun et al. 2024).

1. Without the SAE the model predicts next tokens; with it, reconstructions take the place of the activations that the
   policy counts, and the model predicts again.
2. The loss is KL(as it was || with reconstructions) at the counted tokens, plus the kind's penalty (sparsity, AuxK);
   gradients pass through the later blocks to the SAE alone.
3. Rows of tokens go through in parts, so that only one part's graph is alive; the optimiser moves once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unweave.core.dist import Group
from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.data.policy import TokenPolicy
from unweave.lm.model import LM, Tokens
from unweave.lm.taps import At
from unweave.sae.attempt import Attempt
from unweave.sae.objectives import total
from unweave.sae.train import SAETrainer


def end_to_end_step(
    lm: LM,
    trainer: SAETrainer,
    tokens: Tokens,
    site: str | Site,
    policy: TokenPolicy | None = None,
    *,
    reconstruction: float = 0.0,
    part_tokens: int = 1024,
) -> dict[str, float]:
    """One optimiser step of ``trainer`` on the model's predictions over ``tokens``. Returns its row, and ``kl``.

    ``kl`` is in nats, averaged over counted tokens; ``loss`` is kl + penalty + ``reconstruction`` times the squared
    error, all before the step. Each part of about ``part_tokens`` tokens (whole rows) is a batch of its own to what
    looks at a whole batch: BatchTopK's winners, and the L0 that a target compares with. Nested and multi-TopK
    reconstructions teach only through ``reconstruction``.

    In a group, ``tokens`` are this process's rows, at least one. Raises UnweaveError where no token counts.
    """
    site, group = lm.site(site), trainer.group
    policy = policy or TokenPolicy()
    rows, kl = 0, 0.0
    for part in _parts(tokens.to(lm.device), part_tokens, group):
        with lm.taps(read=[site]) as seen:
            logits = lm(part)
        assert logits is not None
        kept = policy.keep(seen[site], part.ids, part.mask)
        clean, attempts = logits[kept], list[Attempt]()
        if int(group.sum(torch.tensor([-int(not kept.any())], device=kept.device))) < 0:
            continue  # nothing counts in it, in some process

        def put(x: Tensor, at: At, kept: Tensor = kept, attempts: list[Attempt] = attempts) -> Tensor:
            attempt = trainer.attempt(x[kept])
            attempts.append(attempt)
            return x.index_put((kept,), attempt.y.to(x))

        with lm.taps(edit={site: put}, grad=True):
            logits = lm(part)
        assert logits is not None
        (attempt,) = attempts
        divergence = total(_divergence(clean, logits[kept]), group)
        other = attempt.penalty + reconstruction * attempt.reconstruction
        trainer.accumulate(attempt, divergence + attempt.rows * other)
        rows, kl = rows + attempt.rows, kl + float(divergence.detach())
    if rows == 0:
        raise UnweaveError("no token of this batch counts", where=str(site), remedy="give rows with ordinary tokens")
    return trainer.apply(over=rows) | {"kl": kl / rows}


def _parts(tokens: Tokens, part_tokens: int, group: Group) -> list[Tokens]:
    """Whole rows in parts of about ``part_tokens``: as many parts in every process."""
    n, width = tokens.ids.shape
    wanted = torch.tensor([-(-n * width // part_tokens), -n], device=tokens.ids.device)
    parts, fewest = group.max(wanted).tolist()
    count = max(1, min(parts, -fewest))
    return [tokens.rows(slice(n * i // count, n * (i + 1) // count)) for i in range(count)]


def _divergence(clean: Tensor, edited: Tensor) -> Tensor:
    """Summed KL(clean || edited) of next-token distributions, from logits [n, V], at least in float32."""
    dtype = torch.promote_types(clean.dtype, torch.float32)
    log_p, log_q = clean.to(dtype).log_softmax(-1), edited.to(dtype).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()
