"""Where a model is sure of the next token, and not because it has just seen it (Marks et al. 2024, app. G.1).

1. Rows of a token store are cut into windows, so that every token has a context of the same beginning and at most so
   many tokens: what is measured on a context here is measured on the same context later.
2. One forward pass of a window gives the loss of all its tokens; logits are made for a few positions at a time.
3. Kept are tokens of low loss whose context does not hold the answer as a repetition. What else was dropped is counted.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from unweave.attribute.runner import Batch
from unweave.core.errors import UnweaveError
from unweave.core.progress import task
from unweave.core.site import Site
from unweave.data.batches import by_length
from unweave.lm.chat import Role, encode_text
from unweave.lm.model import LM, Side, Tokens
from unweave.lm.unembed import unembed
from unweave.methods.behaviours.result import Contexts, Counts, Example
from unweave.methods.behaviours.spec import ContextOptions
from unweave.tasks.answers import AnswerLoss, AnswerMetric

Repeats = Literal["bigram", "word", "answer"]
_LOGIT_ELEMENTS = 1 << 25
"""so many logits are held at a time: 128 MB"""
_BATCH_TOKENS = 2048
_SPREAD = 1.5
"""how many times longer than its shortest a batch's longest context may be"""


class Rows(Protocol):
    """What is read of a text: ``TokenStore`` and ``Texts`` have it."""

    @property
    def n_rows(self) -> int: ...

    @property
    def n_tokens(self) -> int: ...

    def row(self, index: int, /) -> tuple[np.ndarray, np.ndarray]:
        """Ids and roles of one row."""
        ...

    starts: np.ndarray
    documents: np.ndarray


class Texts:
    """Texts in memory, a row each."""

    def __init__(self, lm: LM, texts: Sequence[str]) -> None:
        if lm.tokenizer is None:
            raise UnweaveError("text needs a tokenizer", where=lm.name, remedy="use a model that comes with one")
        encoded = [encode_text(lm.tokenizer, text) for text in texts]
        self._rows = [(np.asarray(ids), np.asarray(roles)) for ids, roles in encoded if ids]
        self.starts = np.cumsum([0, *(len(ids) for ids, _ in self._rows)])
        self.documents = np.arange(len(self._rows))
        self.n_rows, self.n_tokens = len(self._rows), int(self.starts[-1])

    def row(self, index: int, /) -> tuple[np.ndarray, np.ndarray]:
        return self._rows[index]


def repeated(ids: Sequence[int], rule: Repeats, key: Callable[[int], object] | None = None) -> np.ndarray:
    """For every token whether it repeats what stands before it in ``ids``: bool [n], False at the first token.

    ``bigram``: the pair (token before, token) occurred before, the paper's filter against induction. ``word``: the
    same when case and leading blanks do not count (``key`` gives what is compared instead of an id); it leaves out
    what ``bigram`` does too. ``answer``: the token itself occurred before.
    """
    same: list[object] = [key(i) for i in ids] if rule == "word" and key is not None else list(ids)
    keys = same if rule == "answer" else [None, *itertools.pairwise(same)]
    out, seen = np.zeros(len(same), dtype=bool), set()
    for place in range(len(same)):
        out[place] = keys[place] in seen
        seen.add(keys[place])
    return out


def next_token_losses(lm: LM, tokens: Tokens) -> Tensor:
    """-log p(token) of every token from the second on, float32 [B, P - 1] on the CPU; 0 at padding.

    Logits are made for a few positions at a time, from what the final norm puts out. Padding must be on the right.
    """
    batch, norm = tokens.to(lm.device), Site("final_norm")
    with lm.taps(read=[norm], stop=norm) as seen:
        lm(batch)
    wanted = batch.mask[:, 1:]
    hidden, answers = seen[norm][:, :-1][wanted], batch.ids[:, 1:][wanted]
    step = max(1, _LOGIT_ELEMENTS // lm.vocab_size)
    parts = [hidden.new_zeros(0, dtype=torch.float32)]
    with torch.no_grad():
        for start in range(0, len(hidden), step):
            logits = unembed(lm, hidden[start : start + step]).float()
            chosen = logits.gather(1, answers[start : start + step, None])[:, 0]
            parts.append(logits.logsumexp(-1) - chosen)
    losses = torch.zeros(wanted.shape, device=lm.device)
    losses[wanted] = torch.cat(parts)
    return losses.cpu()


def find(lm: LM, store: Rows, options: ContextOptions | None = None, *, seed: int = 0) -> Contexts:
    """All tokens of a text of which the model is sure, without repetitions, thinned out as ``options`` says.

    Special tokens and those of a chat template are never answers. Raises UnweaveError when no token is left, and for
    NaN losses.
    """
    options, key = options or ContextOptions(), _speller(lm)
    special = np.asarray(lm.special_ids, dtype=np.int64)
    counts: dict[str, int] = {"scanned": 0, "sure": 0, "repeated": 0}
    examples: list[Example] = []
    batches = _batches_of(_windows(lm, store, options))
    with task("find sure tokens", total=store.n_tokens, unit="tokens") as shown:
        for batch in batches:
            rows = [(window.ids.tolist(), [Role.TEXT.value] * len(window.ids)) for window in batch]
            losses = next_token_losses(lm, Tokens.pad(rows, lm.pad_id)).numpy()
            for window, of_row in zip(batch, losses, strict=True):
                loss = np.concatenate([[np.inf], of_row[: len(window.ids) - 1]])
                if np.isnan(loss).any():
                    where = f"document {window.document} of the text"
                    remedy = "load the model in float32 or bfloat16"
                    raise UnweaveError("the model's loss is NaN", where=where, remedy=remedy)
                able = ~np.isin(window.ids, special) & (window.roles != Role.SPECIAL.value)
                able[: options.min_context] = False
                sure = able & (loss < options.max_loss)
                again = sure & repeated(window.ids.tolist(), options.repeats, key)
                for name, marks in (("scanned", able), ("sure", sure), ("repeated", again)):
                    counts[name] += int(marks.sum())
                examples += [window.example(int(at), float(loss[at])) for at in np.flatnonzero(sure & ~again)]
                shown.advance(len(window.ids))
    if not examples:
        raise UnweaveError(
            f"the model is sure of none of {counts['scanned']:,} tokens without repetition "
            f"({counts['sure']:,} have a loss below {options.max_loss} nats, {counts['repeated']:,} of them repeat)",
            remedy="raise max_loss, allow longer contexts, or give more text",
        )
    return _thinned(examples, options, counts, seed)


def _thinned(sure: list[Example], options: ContextOptions, counts: Mapping[str, int], seed: int) -> Contexts:
    """Each context once, and at most so many of each document and in all, drawn at random."""
    first: dict[tuple[tuple[int, ...], int], Example] = {}
    for example in sorted(sure, key=lambda example: example.place):
        first.setdefault((example.ids, example.answer), example)
    in_order, of_document, chosen = list(first.values()), Counter[int](), list[Example]()
    for index in np.random.default_rng(seed).permutation(len(in_order)).tolist():
        example = in_order[index]
        of_document[example.document] += 1
        if of_document[example.document] <= options.per_document:
            chosen.append(example)
    left = chosen[: options.limit]
    thinned = Counts(
        **counts, same=len(sure) - len(first), crowded=len(first) - len(chosen), surplus=len(chosen) - len(left),
        kept=len(left),
    )  # fmt: skip
    return Contexts(thinned, tuple(sorted(left, key=lambda example: example.place)))


# -- windows ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Window:
    """A stretch of a row, with the row's BOS in front where it has one. ``start``: its first token's place."""

    ids: np.ndarray
    roles: np.ndarray
    start: int
    lead: int
    document: int

    def example(self, at: int, loss: float) -> Example:
        ids = tuple(self.ids[:at].tolist())
        return Example(ids, int(self.ids[at]), loss, self.document, self.start + at - self.lead)


def _windows(lm: LM, store: Rows, options: ContextOptions) -> list[_Window]:
    bos = getattr(lm.tokenizer, "bos_token_id", None)
    windows = []
    for row in range(store.n_rows):
        ids, roles = store.row(row)
        # BOS opens a row as the tokenizer does it; ChatML's BOS, which opens every turn, is no such mark.
        lead = int(bos is not None and ids[0] == bos and bos not in ids[1:])
        size = options.context + 1 - lead
        for start in range(lead, len(ids), size):
            part = slice(start, start + size)
            if len(ids[part]) + lead <= options.min_context:
                continue
            own_ids, own_roles = (np.concatenate([values[:lead], values[part]]) for values in (ids, roles))
            windows.append(_Window(own_ids, own_roles, int(store.starts[row]) + start, lead, int(store.documents[row])))
    return windows


def _batches_of(windows: list[_Window]) -> Iterator[list[_Window]]:
    """Windows of like length together."""
    ordered = sorted(windows, key=lambda window: (-len(window.ids), window.start))
    while ordered:
        n = max(1, _BATCH_TOKENS // len(ordered[0].ids))
        yield ordered[:n]
        del ordered[:n]


def _speller(lm: LM) -> Callable[[int], object]:
    """What a token says without case and blanks around it; its id where that is nothing, or without a tokenizer."""
    known: dict[int, object] = {}

    def spelled(token: int) -> object:
        if token not in known:
            text = "" if lm.tokenizer is None else lm.token_strings([token])[0].strip().casefold()
            known[token] = text or token
        return known[token]

    return spelled


# -- examples as input of the methods ---------------------------------------------------------------------------------


def batches(
    lm: LM,
    examples: Sequence[Example],
    *,
    metric: AnswerMetric = "neg-log-p",
    side: Side = "right",
    max_tokens: int = 2048,
) -> list[Batch]:
    """Examples as batches without patch (zero ablation), contexts of like length together, in the order of
    ``order_of``.

    Padded on the left, all answers stand at one position, and methods that run a batch many times make few logits.
    """
    out: list[Batch] = []
    for part in _grouped(examples, max_tokens):
        few = [examples[i] for i in part]
        rows = [(example.ids, [Role.TEXT.value] * len(example.ids)) for example in few]
        answers = torch.tensor([example.answer for example in few])
        out.append((Tokens.pad(rows, lm.pad_id, side), None, AnswerLoss(answers, metric)))
    return out


def order_of(examples: Sequence[Example], *, max_tokens: int = 2048) -> list[int]:
    """Which example each row of ``batches`` is, batch after batch."""
    return [i for part in _grouped(examples, max_tokens) for i in part]


def _grouped(examples: Sequence[Example], max_tokens: int) -> Iterator[list[int]]:
    return by_length([len(example.ids) for example in examples], max_tokens, _SPREAD)
