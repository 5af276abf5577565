"""Random items with two answers, as tokens."""

from __future__ import annotations

import torch

from helpers.models import VOCAB
from unweave.lm.model import Tokens
from unweave.methods.finetune.rows import ChoiceRows
from unweave.tasks.choices.encode import Encoded
from unweave.tasks.choices.items import Item


def random_choices(n: int, seed: int = 0, shortest: int = 3, longest: int = 12) -> Encoded:
    """``n`` prompts of random tokens and lengths; the answers are two of four tokens, the cue either, or unknown."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (n,), generator=g).tolist()
    rows = [(torch.randint(8, VOCAB, (length,), generator=g).tolist(), [4] * length) for length in lengths]
    tokens = Tokens.pad(rows, 2, side="left")
    pairs = torch.stack([torch.randperm(4, generator=g)[:2] + 4 for _ in range(n)])
    cues = torch.cat([pairs, torch.full((n, 1), -1)], 1).gather(1, torch.randint(0, 3, (n, 1), generator=g)).squeeze(1)
    last = torch.full((n,), tokens.ids.shape[1] - 1)
    items = tuple(Item(str(i), "a", "b") for i in range(n))
    return Encoded(items, tokens, last, pairs[:, 0], pairs[:, 1], cues, {})


def random_rows(n: int, seed: int = 0) -> ChoiceRows:
    return ChoiceRows(random_choices(n, seed))
