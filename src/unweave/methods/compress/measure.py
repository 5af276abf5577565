"""The model's loss on held-out text, row by row, and how two of them differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from unweave.core.errors import UnweaveError
from unweave.core.progress import task
from unweave.lm.model import LM, Tokens
from unweave.methods.compress.result import Loss

if TYPE_CHECKING:
    from unweave.lm.taps import Edits


def row_losses(lm: LM, batches: Sequence[Tokens], edit: Edits | None = None) -> np.ndarray:
    """Cross-entropies in nats summed over each row's next tokens, and how many there are: float64 [rows, 2]."""
    rows = []
    with task("loss", total=sum(batch.n_tokens for batch in batches), unit="tokens") as progress, torch.no_grad():
        for batch in batches:
            tokens = lm.admitted(batch)
            with lm.taps(edit=edit):
                logits = lm(tokens)
            assert logits is not None
            real = tokens.mask[:, 1:] & tokens.mask[:, :-1]
            targets = tokens.ids[:, 1:].flatten()
            losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="none")
            each = losses.view(real.shape).double().where(real, 0.0)
            rows.append(torch.stack([each.sum(1), real.sum(1).double()], 1).cpu())
            progress.advance(batch.n_tokens)
    table = torch.cat(rows).numpy()
    if not np.isfinite(table).all():
        raise UnweaveError("the loss on held-out text is not finite", where=lm.name, remedy="compress less")
    return table


def compare(before: np.ndarray, after: np.ndarray) -> Loss:
    """Losses of ``row_losses`` on the same rows, with the interval of their difference per token, a ratio of sums over
    rows (linearised variance)."""
    n, rows = before[:, 1].sum(), len(before)
    if not n:
        raise UnweaveError("no held-out token has a next token", remedy="use longer rows (data.pack.context)")
    difference = (after[:, 0].sum() - before[:, 0].sum()) / n
    residuals = after[:, 0] - before[:, 0] - difference * before[:, 1]
    spread = 1.96 * float(np.sqrt((residuals**2).sum() * rows / max(1, rows - 1))) / n
    low, high = (float(difference - spread), float(difference + spread)) if rows > 1 else (None, None)
    return Loss(int(n), float(before[:, 0].sum() / n), float(after[:, 0].sum() / n), low, high, rows)
