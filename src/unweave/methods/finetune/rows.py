"""What is learned from: rows of tokens, and which token is to be predicted where.

    choices         the correct answer's token, at a prompt's last position
    conversations   what the assistant says, and the token that ends its turn

Batches are padded on the left, so that the last position is the last token of every row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.data.tokens import TokenStore
from unweave.lm.chat import Role
from unweave.lm.model import Tokens
from unweave.tasks.choices.encode import Encoded

IGNORE = -100
"""the label of positions that predict nothing"""


class Rows(Protocol):
    """Rows of tokens with labels."""

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, int64 [N]."""
        ...

    @property
    def answers(self) -> Encoded | None:
        """Items with two answers; None for conversations."""
        ...

    def batch(self, rows: Sequence[int]) -> tuple[Tokens, Tensor]:
        """Some rows, padded on the left, and the label of every position, int64 [B, P]."""
        ...


@dataclass(frozen=True)
class ChoiceRows:
    """Prompts whose last token predicts the correct answer; ``answers`` are padded on the left."""

    answers: Encoded

    def __post_init__(self) -> None:
        if not bool(self.answers.tokens.mask[:, -1].all()):
            raise UnweaveError("items are padded on the right", remedy='encode them with side="left"')

    @property
    def lengths(self) -> Tensor:
        return self.answers.tokens.mask.sum(1)

    def batch(self, rows: Sequence[int]) -> tuple[Tokens, Tensor]:
        own = self.answers.at(rows)
        labels = torch.full_like(own.tokens.ids, IGNORE)
        labels[:, -1] = own.correct
        return own.tokens, labels


@dataclass(frozen=True)
class ChatRows:
    """Rows of a token store, of which the assistant's tokens are predicted; of plain text all."""

    store: TokenStore
    pad_id: int
    answers: None = None

    @property
    def lengths(self) -> Tensor:
        starts = torch.from_numpy(self.store.starts)
        return starts[1:] - starts[:-1]

    @property
    def silent(self) -> int:
        """Rows in which no word is the assistant's."""
        said = np.isin(self.store.roles, (Role.ASSISTANT, Role.TEXT))
        return int((~np.logical_or.reduceat(said, self.store.starts[:-1])).sum())

    def batch(self, rows: Sequence[int]) -> tuple[Tokens, Tensor]:
        tokens, _ = self.store.batch(rows, self.pad_id, side="left")
        here, following = tokens.roles[:, :-1], tokens.roles[:, 1:]
        said = (following == Role.ASSISTANT) | (following == Role.TEXT)
        ends = (here == Role.ASSISTANT) & (following == Role.SPECIAL)
        labels = torch.full_like(tokens.ids, IGNORE)
        labels[:, :-1] = torch.where((said | ends) & tokens.mask[:, :-1], tokens.ids[:, 1:], IGNORE)
        return tokens, labels


def part(tokens: Tokens, labels: Tensor, rows: slice) -> tuple[Tokens, Tensor]:
    """Some rows of a batch, without the columns in which none of them has a token."""
    inside = tokens.rows(rows)
    unused = int((~inside.mask.any(0)).sum())
    columns = slice(unused, None)
    return inside.columns(columns), labels[rows, columns]
