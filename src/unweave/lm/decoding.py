"""Generation token by token: keys and values are kept where they stay right, and edits persist in them or do not.

1. An edit *persists* where later tokens attend to what it changed: keys and values of edited tokens are kept, as every
   server of a steered model does it.
2. Where it does not, it changes what the model says next and nothing that the model remembers: every pass edits its
   last token alone, and the keys and values that later tokens see are those of the unedited model. A pass then holds
   two tokens: the one before, read again without the edit and kept, and the newest, edited and dropped from the cache.
3. A row's draws depend on its seed alone, not on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from unweave.core.errors import UnweaveError

if TYPE_CHECKING:
    from unweave.lm.model import LM, Tokens
    from unweave.lm.taps import Edits


def decode(
    lm: LM,
    tokens: Tokens,
    edit: Edits | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int | Sequence[int] = 0,
    persist: bool = True,
) -> Generator[Tensor]:
    """The new token of every row, int64 [B], one pass after the other; ``pad_id`` in rows that have ended.

    Arguments as in ``LM.generate_ids``. The model is taken until the last token is read, or the iterator is closed.
    """
    tokens = lm.admitted(tokens.columns(slice(int(tokens.mask.any(0).int().argmax()), None)), max_new_tokens)
    draws = _generators(seed, len(tokens))
    ends = torch.tensor(lm.end_ids, dtype=torch.int64, device=lm.device)
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=lm.device)
    with lm.running(tokens), torch.no_grad():
        row = Rows(lm, tokens.ids, tokens.mask, lm.may_cache(tokens.mask.sum(1), max_new_tokens), persist)
        with lm.taps(edit=edit, newest=not persist):
            for step in range(max_new_tokens):
                logits = row.logits()
                most, new = logits.max(-1)
                lost = ~(most.isfinite() | ended)  # NaN is the largest
                if bool(lost.any()):
                    what = f"the logits of new token {step} are not finite in rows {lost.nonzero().flatten().tolist()}"
                    raise UnweaveError(what, remedy="edit with smaller strengths, or load the model in float32")
                if temperature > 0:
                    new = _drawn((logits.double() - most.unsqueeze(1)) / temperature, [one.random() for one in draws])
                new = torch.where(ended, lm.pad_id, new)
                ended = ended | torch.isin(new, ends)
                yield new
                if bool(ended.all()):
                    return
                row.add(new)


class Rows:
    """Rows of tokens as far as they have come, and the model's keys and values of those that need no pass any more.

    ids, mask [B, P], padded on the left. ``kept``: keys and values stay right while tokens are added (``may_cache``);
    ``cache`` holds those of the first ``read`` positions, where a pass has read them before.
    """

    def __init__(
        self, lm: LM, ids: Tensor, mask: Tensor, kept: bool, persist: bool = True, cache: Any = None, read: int = 0
    ) -> None:
        from transformers import DynamicCache

        self._lm, self._kept, self._persist = lm, kept, persist
        self._ids, self._mask = ids, mask.long()
        self._cache, self._read = cache, read
        if kept and not persist and self._ids.shape[1] > 1:
            self._cache = DynamicCache()  # whole, for windows cannot be shortened at their end
            self._pass(self._ids.shape[1] - 1)

    def logits(self) -> Tensor:
        """Of the token behind the last, [B, V]."""
        logits = self._pass(self._ids.shape[1])
        if self._kept and not self._persist:
            self._cache.crop(-1)
            self._read -= 1
        return logits[:, -1].float()

    def _pass(self, until: int) -> Tensor:
        mask = self._mask[:, :until]
        out = self._lm.model(
            input_ids=self._ids[:, self._read : until],
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, self._read :],
            past_key_values=self._cache,
            use_cache=self._kept,
            logits_to_keep=1,
        )
        if self._kept:
            self._cache, self._read = out.past_key_values, until
        return out.logits

    def add(self, new: Tensor) -> None:
        """Tokens [B] behind the last of each row."""
        self._ids = torch.cat([self._ids, new.unsqueeze(1)], 1)
        self._mask = torch.cat([self._mask, torch.ones_like(new).unsqueeze(1)], 1)


def row_seed(seed: int, row: int) -> int:
    """The seed of one of many rows that were given one."""
    return (seed << 32) + row


def _generators(seed: int | Sequence[int], rows: int) -> list[np.random.Generator]:
    """Where each row's draws come from; of one seed, each row has its own."""
    seeds = [row_seed(seed, row) for row in range(rows)] if isinstance(seed, int) else seed
    if len(seeds) != rows:
        raise UnweaveError(f"{len(seeds)} seeds are given for {rows} rows", remedy="give one, or one for each row")
    return [np.random.default_rng(one % (1 << 128)) for one in seeds]


def _drawn(logits: Tensor, draws: Sequence[float]) -> Tensor:
    """Tokens [B] of the distributions that logits [B, V], float64, stand for, by one draw in [0, 1) a row: the first
    whose cumulated probability is larger."""
    cumulated = torch.softmax(logits, -1).cumsum(-1)
    places = torch.tensor(draws, dtype=torch.float64, device=logits.device).unsqueeze(1) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, places, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)
