"""Special tokens of chat models: which tokens count as such, and plain questions to steer on.

In the FAST paper (Li et al. 2025, sections 4.1 and 6) special tokens are a list of ids: those that open and close a
turn, and the role words that stand beside them. Here the list comes from the tokenizer and its chat template, and
an id counts only where the template wrote it, so that "user" inside a user's own words is an ordinary word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.lm.chat import Role, has_template, render
from unweave.lm.model import LM, Tokens
from unweave.lm.shown import pieces

ROLE_WORDS = ("user", "assistant", "system", "model")
"""Words by which chat templates name who speaks; "model" is Gemma's name of the assistant."""

PAPER_IDS = {"llama-3": (882, 78191, 128006, 128007, 128009), "qwen2.5": (872, 77091, 151644, 151645)}
"""The FAST paper's own lists (its table 11), without "system" and without Llama's begin-of-text."""

QUESTIONS = (
    "How do bees find their way back to the hive?",
    "What should I pack for a weekend of hiking?",
    "Explain why the sky is red at sunset.",
    "Write a short note that thanks a neighbour for watering the plants.",
    "A train leaves at 9:40 and the trip takes 2 hours and 35 minutes. When does it arrive?",
    "Which is heavier, a litre of water or a litre of oil, and why?",
    "Give me three ideas for a quiet evening at home.",
    "How does a bicycle stay upright while it is moving?",
    "Describe a small harbour early in the morning.",
    "What are the main steps of baking bread?",
)
"""Ten questions of different kinds (facts, advice, arithmetic, description) for the outputs of section 6."""

_MOST_PIECES = max(map(len, ROLE_WORDS))

Where = Literal["template", "anywhere"]


@dataclass(frozen=True)
class SpecialTokens:
    """Which tokens are special: an id in ``ids``, written by the chat template or the tokenizer (``where="template"``:
    ``Role.SPECIAL``), or wherever it stands (``where="anywhere"``)."""

    ids: tuple[int, ...]
    where: Where = "template"

    def __post_init__(self) -> None:
        if not self.ids:
            remedy = "name their ids, or use a model whose tokenizer has special tokens or a chat template"
            raise UnweaveError("there are no special tokens", remedy=remedy)

    @classmethod
    def of(cls, lm: LM, ids: Sequence[int] | None = None, where: Where = "template") -> Self:
        """Those of a model: ``ids``, or ``special_ids`` of the model where None.

        Raises UnweaveError for ids that the model does not have, and where there are none.
        """
        chosen = special_ids(lm) if ids is None else tuple(sorted({int(i) for i in ids}))
        for i in chosen:
            if not 0 <= i < lm.vocab_size:
                raise UnweaveError(f"there is no token {i}", where=lm.name, remedy=f"use ids below {lm.vocab_size}")
        return cls(chosen, where)

    def mask(self, tokens: Tokens) -> Tensor:
        """True at special tokens, bool [B, P]; never at padding."""
        special = torch.isin(tokens.ids, torch.tensor(self.ids, device=tokens.ids.device)) & tokens.mask
        return special & (tokens.roles == int(Role.SPECIAL)) if self.where == "template" else special


def special_ids(lm: LM) -> tuple[int, ...]:
    """The tokenizer's special ids, and the ids of which its chat template spells role words (mostly one a word)."""
    ids = set(lm.special_ids)
    if lm.tokenizer is not None and has_template(lm.tokenizer):
        ids |= _header_words(lm.tokenizer, ids)
    return tuple(sorted(ids))


def _header_words(tokenizer: Any, special: set[int]) -> set[int]:
    question, answer = {"role": "user", "content": "7"}, {"role": "assistant", "content": "8"}
    word_ids: set[int] = set()
    for talk in ([question, answer], [{"role": "system", "content": "9"}, question, answer]):
        try:
            ids, roles = render(tokenizer, talk)
        except UnweaveError:
            continue  # a template that takes no system message
        written = [role == Role.SPECIAL and i not in special for i, role in zip(ids, roles, strict=True)]
        texts = [piece.text.strip() for piece in pieces(tokenizer, ids)]
        for first in range(len(ids)):
            for end in range(first + 1, min(len(ids), first + _MOST_PIECES) + 1):
                if not all(written[first:end]):
                    break
                if all(texts[first:end]) and "".join(texts[first:end]) in ROLE_WORDS:
                    word_ids |= set(ids[first:end])
    return word_ids
