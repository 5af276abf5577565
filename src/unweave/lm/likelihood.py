"""How likely answers are after a prompt that many of them share: its keys and values are computed once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from unweave.lm.model import LM

_LOGITS = 1 << 27
"""how many logits are held at once"""
_ROWS = 64


def mean_log_probs(lm: LM, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> list[float]:
    """The mean log-probability, in nats, of each answer's tokens after the prompt's; NaN for an empty answer.

    The prompt is read once, where its keys stay right in longer rows (``LM.may_cache``); UnweaveError where the longest
    answer has no room behind it. Taps that are open are not in force for the prompt.
    """
    from transformers import DynamicCache

    from unweave.lm.model import Tokens

    means = [float("nan")] * len(answers)
    order = sorted((i for i, ids in enumerate(answers) if ids), key=lambda i: -len(answers[i]))
    read, cache = len(prompt) - 1, None
    # nothing is predicted after a row's last token; it is read only where frequencies depend on a row's whole length
    unread = 0 if lm.rotaries else 1
    if order and read > 0 and lm.may_cache(torch.tensor([read]), len(answers[order[0]]) + 1):
        tokens = lm.admitted(Tokens.of(torch.tensor([list(prompt[:read])])))
        cache = DynamicCache()
        with lm.running(tokens), torch.no_grad():
            lm.model(input_ids=tokens.ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    start = 0
    while start < len(order):
        longest = len(answers[order[start]])
        part = order[start : start + max(1, min(_ROWS, _LOGITS // (lm.vocab_size * longest)))]
        rows = [[*prompt, *answers[i]] for i in part]
        tokens = lm.admitted(Tokens.pad([(ids, [0] * len(ids)) for ids in rows], lm.pad_id))
        mask = tokens.mask.long()[:, : tokens.ids.shape[1] - unread]
        first = read if cache is not None else 0
        kept = copy.deepcopy(cache)
        if kept is not None:
            kept.batch_repeat_interleave(len(part))
        with lm.running(tokens), torch.no_grad():
            logits = lm.model(
                input_ids=tokens.ids[:, first : mask.shape[1]],
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1)[:, first:],
                past_key_values=kept,
                use_cache=kept is not None,
                logits_to_keep=longest + 1 - unread,
            ).logits
        for row, i in enumerate(part):
            targets = tokens.ids[row, len(prompt) :][: len(answers[i])]
            means[i] = -float(F.cross_entropy(logits[row, : len(targets)].float(), targets))
        start += len(part)
    return means
