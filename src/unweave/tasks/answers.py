"""Single inputs: a text and the word that should follow it, to be explained by ablation (Marks et al. 2024, sec. 5).

    {"context": "The capital of France is", "answer": " Paris"}              one object a line
    {"context": ["The", " capital"], "answer": " of"}                        the tokens' texts, joined
    [{"context": ..., "answer": ...}, ...]                                   one array
    {"17": {"context": ..., "answer": ...}, "18": ...}                       the paper's form: one object

The metric is what the model loses when the answer becomes less likely: -log p(answer), as in the paper, or
-logit(answer), as in its released code. A node's effect is positive where ablating it hurts the answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.writing import write_file
from unweave.lm.chat import encode_text
from unweave.lm.model import LM, Tokens
from unweave.tasks.entries import entries, faults
from unweave.tasks.suitable import suitable, tokenizer_of

AnswerMetric = Literal["neg-log-p", "neg-logit"]


@dataclass(frozen=True)
class Input:
    """A text and what follows it; the answer usually begins with a space."""

    context: str
    answer: str


@dataclass(frozen=True)
class AnswerLoss:
    """The metric m = -log p(answer) in nats, or m = -logit(answer), at the last token.

    ``answers`` are token ids [B]. Called with logits [R, V] and the example of each row [R].
    """

    answers: Tensor
    kind: AnswerMetric = "neg-log-p"

    def __post_init__(self) -> None:
        if self.kind not in ("neg-log-p", "neg-logit"):
            raise UnweaveError(f"unknown metric {self.kind!r}", remedy="use neg-log-p or neg-logit")

    @property
    def logits_read(self) -> Tensor | None:
        """The ids whose logits it reads, where that is not all of them."""
        return self.answers.unique() if self.kind == "neg-logit" else None

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        ids = self.answers[rows.to(self.answers.device)].to(logits.device).unsqueeze(1)
        values = torch.log_softmax(logits, -1) if self.kind == "neg-log-p" else logits
        return -values.gather(1, ids).squeeze(1)


def problem_of(tokenizer: Any, example: Input) -> str | None:
    """Why an input cannot be used with a tokenizer, or None: its answer must be a single token that leaves the
    context's own tokens as they are."""
    ids = encode_text(tokenizer, example.context)[0]
    whole = encode_text(tokenizer, example.context + example.answer)[0]
    if not ids:
        return "the context has no tokens"
    if whole[: len(ids)] != ids:
        return "the context is tokenised differently once the answer follows it"
    return None if len(whole) == len(ids) + 1 else "the answer is not a single token"


def usable(lm: LM | Any, candidates: Iterable[Input]) -> tuple[list[Input], dict[str, int]]:
    """The inputs that suit the tokenizer (an LM's, or the one given), and how many were left out for which reason."""
    return suitable(lm, candidates, problem_of)


def batches(
    lm: LM,
    chosen: Sequence[Input],
    *,
    metric: AnswerMetric = "neg-log-p",
    pad: bool = False,
    max_rows: int | None = None,
) -> list[tuple[Tokens, None, AnswerLoss]]:
    """Inputs as (tokens, no patch, metric), shortest first.

    Each batch holds rows of one length; with ``pad``, rows of any lengths, padded on the right, which is for effects
    that are summed over positions. Raises UnweaveError for an input that does not suit the tokenizer.
    """
    if max_rows is not None and max_rows < 1:
        raise UnweaveError(f"batches of {max_rows} rows", remedy="give at least one row")
    tokenizer = tokenizer_of(lm)
    encoded: list[tuple[tuple[list[int], list[int]], int]] = []
    for number, example in enumerate(chosen):
        problem = problem_of(tokenizer, example)
        if problem is not None:
            where = f"input {number}: {example.context!r}, {example.answer!r}"
            raise UnweaveError(problem, where=where, remedy="keep the good ones: usable(lm, inputs)")
        answer = encode_text(tokenizer, example.context + example.answer)[0][-1]
        encoded.append((encode_text(tokenizer, example.context), answer))
    encoded.sort(key=lambda row: len(row[0][0]))
    grouped = []
    start = 0
    while start < len(encoded):
        width = len(encoded[start][0][0])
        group = encoded[start : start + (max_rows or len(encoded))]
        if not pad:
            group = [row for row in group if len(row[0][0]) == width]
        answers = torch.tensor([answer for _, answer in group])
        grouped.append((Tokens.pad([row for row, _ in group], lm.pad_id), None, AnswerLoss(answers, metric)))
        start += len(group)
    return grouped


def save(path: str | Path, chosen: Iterable[Input]) -> None:
    """Writes inputs as JSON lines."""
    lines = [json.dumps(asdict(example), ensure_ascii=False) for example in chosen]
    write_file(Path(path), "".join(line + "\n" for line in lines))


def load(path: str | Path) -> list[Input]:
    """Reads inputs from JSON lines, from one JSON array, or from one object of the paper's form. Other keys are passed
    over.

    Raises UnweaveError that names the bad line or entry, and the field.
    """
    return [_input(value, where) for where, value in entries(path, "inputs", ("context", "answer"))]


def _input(value: Mapping[str, Any], where: str) -> Input:
    context = value.get("context")
    if isinstance(context, list) and context and all(isinstance(token, str) for token in context):
        value = {**value, "context": "".join(context)}
    if bad := faults(value, ("context", "answer")):
        remedy = 'each needs "context" (text, or a list of tokens\' texts) and "answer" (text)'
        raise UnweaveError(", ".join(bad), where=where, remedy=remedy)
    return Input(value["context"], value["answer"])
