"""Choices as token ids: a prompt that ends where the answer begins, and the one token of each answer.

An answer is what a tokenizer makes of prompt and answer together: the prompt's own tokens must stay as they are, and
exactly one more must follow. Where prompts are plain text a space stands before the answer, unless there is one
already, or the tokenizer has no word and its space in one token; under a chat template, what the template puts there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.data.batches import by_length
from unweave.lm.chat import encode_texts, render_many
from unweave.lm.model import LM, Side, Tokens
from unweave.lm.template import apply
from unweave.tasks.choices.items import Item
from unweave.tasks.suitable import tokenizer_of

_Row = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Encoded:
    """N items as a batch of tokens [N, P]; all other tensors are int64 [N].

    ``last`` is the position of each prompt's last token, ``correct`` and ``incorrect`` are the ids of the answers,
    ``cue`` that of the cue's, -1 where there is none.
    """

    items: tuple[Item, ...]
    tokens: Tokens
    last: Tensor
    correct: Tensor
    incorrect: Tensor
    cue: Tensor
    skipped: Mapping[str, int]
    """how many items were left out, for which reason"""

    def __len__(self) -> int:
        return len(self.items)

    def at(self, rows: Sequence[int] | Tensor) -> Encoded:
        """Some of the items, in the order given, without the columns in which all of them have padding."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        columns = self.tokens.mask[index].any(0).nonzero().squeeze(1)
        first, end = int(columns[0]), int(columns[-1]) + 1
        tokens = Tokens(*(part[index, first:end] for part in (self.tokens.ids, self.tokens.mask, self.tokens.roles)))
        correct, incorrect, cue = (part[index] for part in (self.correct, self.incorrect, self.cue))
        chosen = tuple(self.items[i] for i in index.tolist())
        return Encoded(chosen, tokens, self.last[index] - first, correct, incorrect, cue, {})

    def groups(self, max_tokens: int) -> Iterator[Encoded]:
        """Items of like length, at most ``max_tokens`` tokens together with padding, and at least one item."""
        return (self.at(group) for group in by_length(self.tokens.mask.sum(1).tolist(), max_tokens))


def encode_choices(
    lm: LM, items: Sequence[Item], *, chat: bool = False, side: Side = "left", skip: bool = False
) -> Encoded:
    """Items as tokens, padded on one side; ``chat`` puts each prompt into the model's chat template.

    Raises UnweaveError for an item whose answers are not single tokens, or the same token; with ``skip`` such items are
    left out and counted, and the error is raised when none remains.
    """
    if not items:
        raise UnweaveError("there are no items", remedy="give a split that has some")
    tokenizer = tokenizer_of(lm)
    rows = _prompts(tokenizer, items, chat)
    attempts = [_answers(tokenizer, items, rows, chat, blank) for blank in ((_gap(tokenizer),) if chat else (" ", ""))]
    # The first that suits any item: with a space, else without.
    answers = next((made for made in attempts if any(not isinstance(one, str) for one in made)), attempts[0])
    problems = Counter(one for one in answers if isinstance(one, str))
    good = [i for i, one in enumerate(answers) if not isinstance(one, str)]
    if problems and (not skip or not good):
        number = next(i for i, one in enumerate(answers) if isinstance(one, str))
        item = items[number]
        remedy = "use answers that are one token each" + ("" if skip else ", or skip such items")
        where = f"item {number} of {len(items):,}: {item.prompt[-60:]!r}, {item.correct!r} or {item.incorrect!r}"
        raise UnweaveError(f"{answers[number]} ({problems.total():,} such items)", where=where, remedy=remedy)
    tokens = Tokens.pad([rows[i] for i in good], lm.pad_id, side)
    correct, incorrect = torch.tensor([answers[i] for i in good]).unbind(1)
    chosen = tuple(items[i] for i in good)
    cue = [-1 if item.cue is None else int(item.cue != item.correct) for item in chosen]
    cues = torch.stack([correct, incorrect, torch.full_like(correct, -1)]).gather(0, torch.tensor([cue]) % 3)[0]
    positions = torch.arange(tokens.ids.shape[1]).expand_as(tokens.ids)
    last = positions.masked_fill(~tokens.mask, -1).amax(1)
    return Encoded(chosen, tokens, last, correct, incorrect, cues, dict(problems))


def _prompts(tokenizer: Any, items: Sequence[Item], chat: bool) -> list[_Row]:
    if not chat:
        return encode_texts(tokenizer, [item.prompt for item in items])
    talks = [[{"role": "user", "content": item.prompt}] for item in items]
    return render_many(tokenizer, talks, add_generation_prompt=True)


def _gap(tokenizer: Any) -> str:
    """The blank that a chat template puts between the opening of the assistant's turn and its first word."""
    talk = [{"role": "user", "content": "Is it so?"}]
    opening, whole = apply(tokenizer, talk, True), apply(tokenizer, [*talk, {"role": "assistant", "content": "Yes"}])
    gap = whole.removeprefix(opening).partition("Yes")[0]
    return gap if whole.startswith(opening) and gap.isspace() else ""


def _answers(
    tokenizer: Any, items: Sequence[Item], rows: Sequence[_Row], chat: bool, blank: str
) -> list[tuple[int, int] | str]:
    """The ids of (correct, incorrect) of each item, or why it has none."""
    texts = []
    for item in items:
        opening = apply(tokenizer, [{"role": "user", "content": item.prompt}], True) if chat else item.prompt
        for answer in (item.correct, item.incorrect):
            apart = opening[-1:].isspace() or answer[:1].isspace()
            texts.append(opening + ("" if apart else blank) + answer)
    if chat:  # the template has written its own special tokens
        whole: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        whole = [ids for ids, _ in encode_texts(tokenizer, texts)]
    return [
        _pair(rows[i][0], right, wrong) for i, (right, wrong) in enumerate(zip(whole[::2], whole[1::2], strict=True))
    ]


def _pair(prompt: list[int], right: list[int], wrong: list[int]) -> tuple[int, int] | str:
    if not prompt:
        return "the prompt has no tokens"
    for ids in (right, wrong):
        if ids[: len(prompt)] != prompt:
            return "the prompt is tokenised differently once the answer follows it"
        if len(ids) != len(prompt) + 1:
            return "an answer is not a single token"
    return (right[-1], wrong[-1]) if right[-1] != wrong[-1] else "both answers are the same token"
