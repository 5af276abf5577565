"""A judge that runs here: any model that ``LM`` loads, answering greedily in batches of similar length.

1. Prompts are rendered by the model's chat template; text in them that reads as a special token is broken up.
2. What all prompts begin with (instructions, examples) goes through the model once, and each batch starts from there.
   Not in models with sliding windows: there the padding between the beginning and the rest would use up the window.
   Nor where position frequencies change with a row's length: keys made before are then of another length.
3. Batches go from the longest prompts to the shortest, padded on the left of what is not shared.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import pairwise
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.judge.base import Budget, Conversation, Reply
from unweave.judge.numbers import as_number, merged
from unweave.judge.spec import JudgeSpec
from unweave.lm.chat import has_template, render_many
from unweave.lm.decoding import Rows
from unweave.lm.model import LM
from unweave.lm.rotary import rows_apart
from unweave.lm.unembed import knows, unembed

_SAMPLED = 64
_WORTH_SHARING = 16
_SPACES = "\u0120\u2581 "
"""how vocabularies write a space before a word"""
_FAINT = -16.0
"""log-probabilities below are left out: together they move no expected rating by a millionth"""


class _Beginning(NamedTuple):
    """How many tokens all prompts share, and the model's state after them (None where there are none)."""

    length: int
    state: Any


class _New(NamedTuple):
    """New tokens of a row, whether the reply has ended with them, and for each that is a number the log-probabilities
    of all numbers."""

    ids: list[int]
    ended: bool
    numbers: dict[int, dict[str, float]]


class LocalModel:
    """A backend around an ``LM``. ``settings`` hold a digest of the weights: kept replies are of these weights."""

    def __init__(self, lm: LM, *, max_new_tokens: int = 160, at_once: int = 8) -> None:
        if lm.tokenizer is None or not has_template(lm.tokenizer):
            what = "a judge must be a chat model, and this one has no chat template"
            remedy = "choose an instruct model with --judge.model; `unweave models` lists some"
            raise UnweaveError(what, where=lm.name, remedy=remedy)
        self.name, self.note = lm.name, lm.note
        self._lm, self._max_new_tokens, self._at_once = lm, max_new_tokens, at_once
        words = ((i, as_number(token.lstrip(_SPACES))) for token, i in lm.tokenizer.get_vocab().items())
        self._numbers = {i: word for i, word in words if word is not None}
        self.settings: Mapping[str, Any] = {
            "kind": "local",
            "weights": weights_digest(lm),
            "dtype": str(lm.dtype).removeprefix("torch."),
            "tokenizer": lm.tokenizer_fingerprint(),
            "max_new_tokens": max_new_tokens,
            "temperature": 0,
        }

    @classmethod
    def load(cls, spec: JudgeSpec, device: str | None = None) -> Self:
        """Loads the spec's model; errors as in ``LM.load``."""
        lm = LM.load(spec.model, dtype=spec.dtype or "float32", device=device)
        return cls(lm, max_new_tokens=spec.max_new_tokens, at_once=spec.at_once)

    def answer(
        self, conversations: Sequence[Conversation], budget: Budget, until: str = ""
    ) -> Iterator[tuple[int, Reply]]:
        """Longest prompts first, so that what does not fit into memory shows at once, and padding stays short.

        Prompts with no room in the model are not asked, so they take nothing of the budget.
        """
        rows = self._rendered(conversations)

        def work(batch: Sequence[int], beginning: _Beginning) -> list[Reply]:
            new = self._generate([rows[i] for i in batch], beginning, until)
            return [self._reply(len(rows[i]), *row) for i, row in zip(batch, new, strict=True)]

        yield from self._batches(rows, self._max_new_tokens, budget, work)

    def read(
        self, conversations: Sequence[Conversation], places: Sequence[Sequence[int]], budget: Budget
    ) -> Iterator[tuple[int, Reply]]:
        """See ``CachedJudge.read``: one pass over each conversation, with a token's end at every place."""
        tokenizer: Any = self._lm.tokenizer
        rows, ends = self._rendered([conversation[:-1] for conversation in conversations]), []
        for row, conversation, each in zip(rows, conversations, places, strict=True):
            given, here = conversation[-1]["content"], []
            for first, last in pairwise([0, *each]):
                piece = _without_specials([{**conversation[-1], "content": given[first:last]}], tokenizer)[0]["content"]
                row += tokenizer(piece, add_special_tokens=False)["input_ids"]
                here.append(len(row))
            ends.append(here)

        def work(batch: Sequence[int], beginning: _Beginning) -> list[Reply]:
            read = self._read([rows[i] for i in batch], [ends[i] for i in batch], beginning)
            return [
                Reply(
                    conversations[i][-1]["content"], "", len(rows[i]), numbers=dict(zip(places[i], each, strict=True))
                )
                for i, each in zip(batch, read, strict=True)
            ]

        yield from self._batches(rows, 0, budget, work)

    def _rendered(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        plain = [_without_specials(conversation, self._lm.tokenizer) for conversation in conversations]
        return [row for row, _ in render_many(self._lm.tokenizer, plain, add_generation_prompt=True)]

    def _batches(
        self, ids: list[list[int]], new: int, budget: Budget, work: Callable[[Sequence[int], _Beginning], list[Reply]]
    ) -> Iterator[tuple[int, Reply]]:
        order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))
        limit = getattr(self._lm.model.config, "max_position_embeddings", None)
        room = max(map(len, ids), default=0) if limit is None else limit - new
        fitting = [i for i in order if len(ids[i]) <= room]
        for i in order[: len(order) - len(fitting)]:
            reason = f"prompt and reply need {len(ids[i]) + new} tokens, the model has {limit} positions"
            yield i, Reply(None, reason, of_prompt=True)
        beginning = self._beginning([ids[i] for i in fitting])
        for first in range(0, len(fitting), self._at_once):
            batch = [i for i in fitting[first : first + self._at_once] if budget.take()]
            if not batch:
                return
            yield from zip(batch, work(batch, beginning), strict=True)

    @torch.no_grad()
    def _beginning(self, rows: Sequence[list[int]]) -> _Beginning:
        """What all rows share, never the whole of one."""
        length = next((n for n, each in enumerate(zip(*rows, strict=False)) if len(set(each)) > 1), None)
        length = min((len(row) for row in rows), default=1) - 1 if length is None else length
        if len(rows) < 2 or length < _WORTH_SHARING or _has_windows(self._lm.model.config):
            return _Beginning(0, None)
        if not self._lm.may_cache(torch.tensor([length]), max(map(len, rows)) + self._max_new_tokens - length):
            return _Beginning(0, None)
        shared = torch.tensor([rows[0][:length]], device=self._lm.device)
        with rows_apart(self._lm.rotaries):
            out = self._lm.model(input_ids=shared, use_cache=True, logits_to_keep=1)
        return _Beginning(length, out.past_key_values)

    @torch.no_grad()
    def _generate(self, rows: Sequence[list[int]], beginning: _Beginning, until: str) -> list[_New]:
        """The likeliest new tokens of each row, up to its end."""
        lm, (ids, mask, state) = self._lm, self._started(rows, beginning)
        kept = lm.may_cache(mask.sum(1), self._max_new_tokens)
        new = [_New([], False, {}) for _ in rows]
        with rows_apart(lm.rotaries):
            state, read = (state, beginning.length) if kept else (None, 0)
            whole = Rows(lm, ids, mask, kept, cache=state, read=read)
            for _ in range(self._max_new_tokens):
                logits = whole.logits()
                ids = logits.argmax(-1)
                new = [self._extended(*row, until) for row in zip(new, ids.tolist(), logits, strict=True)]
                if all(row.ended for row in new):
                    break
                whole.add(ids)
        return new

    @torch.no_grad()
    def _read(
        self, rows: Sequence[list[int]], ends: Sequence[Sequence[int]], beginning: _Beginning
    ) -> list[list[dict[str, float]]]:
        """The log-probabilities of numbers as the token that follows each row's first ``ends[i]`` tokens."""
        ids, mask, state = self._started(rows, beginning)
        ids, positions = (whole[:, beginning.length :] for whole in (ids, (mask.cumsum(-1) - 1).clamp(min=0)))
        options = {"attention_mask": mask, "position_ids": positions, "past_key_values": state, "use_cache": True}
        read = []
        with rows_apart(self._lm.rotaries):
            if known := knows(self._lm):  # no logits where nobody reads them
                out = self._lm.model.base_model(input_ids=ids, **options).last_hidden_state
            else:
                out = self._lm.model(input_ids=ids, **options).logits
        for row, here, hidden in zip(rows, ends, out, strict=True):
            at = torch.tensor(here, device=out.device) - len(row) - 1  # counted from the row's end: it is padded before
            logits = unembed(self._lm, hidden[at]) if known else hidden[at]
            read.append([self._likely(one) for one in logits.float().log_softmax(-1)])
        return read

    def _started(self, rows: Sequence[list[int]], beginning: _Beginning) -> tuple[Tensor, Tensor, Any]:
        """Ids and mask [B, P], padded between the beginning and what follows it, and the state to go on from."""
        width, padded = max(map(len, rows)), []
        for row in rows:
            padding = [self._lm.pad_id] * (width - len(row))
            padded.append((row[: beginning.length] + padding + row[beginning.length :], len(padding)))
        ids = torch.tensor([row for row, _ in padded], device=self._lm.device)
        mask = torch.ones_like(ids)
        for i, (_, n) in enumerate(padded):
            mask[i, beginning.length : beginning.length + n] = 0
        state = copy.deepcopy(beginning.state)
        if state is not None:
            state.batch_repeat_interleave(len(rows))
        return ids, mask, state

    def _likely(self, logprobs: Tensor) -> dict[str, float]:
        """The numbers among log-probabilities [V]."""
        values = logprobs[list(self._numbers)].tolist()
        return merged((text, p) for text, p in zip(self._numbers.values(), values, strict=True) if p > _FAINT)

    def _extended(self, new: _New, token: int, logits: Tensor, until: str) -> _New:
        """A reply with its next token, unless it has ended; ``logits`` [V] are those that chose it."""
        if new.ended:
            return new
        if token in self._numbers:
            new.numbers[len(new.ids)] = self._likely(logits.float().log_softmax(-1))
        ids = [*new.ids, token]
        ended = token in self._lm.end_ids or bool(until and re.search(until, self._lm.decode(torch.tensor(ids))))
        return _New(ids, ended, new.numbers)

    def _reply(self, prompt_tokens: int, ids: list[int], ended: bool, numbers: Mapping[int, dict[str, float]]) -> Reply:
        text, places = self._lm.decode(torch.tensor(ids)), {}
        for step, logprobs in numbers.items():
            before = self._lm.decode(torch.tensor(ids[:step])) if step else ""
            if text.startswith(before):  # not where a decoder tidies spaces
                places[len(text) - len(text[len(before) :].lstrip())] = logprobs
        return Reply(text, "", prompt_tokens, len(ids), cut=not ended, numbers=places)


def _has_windows(config: Any) -> bool:
    """Whether some layer has a sliding window."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ()
    return bool(getattr(text, "sliding_window", None)) or any(kind != "full_attention" for kind in kinds)


def _without_specials(conversation: Conversation, tokenizer: Any) -> list[dict[str, str]]:
    """Contents in which no stretch reads as a special token: text about `<|im_end|>` must not end the judge's turn."""
    names = sorted({str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}, key=len)
    messages = []
    for message in conversation:
        content = message["content"]
        for name in reversed(names):
            content = content.replace(name, f"{name[:1]} {name[1:]}")
        messages.append({"role": message["role"], "content": content})
    return messages


def weights_digest(lm: LM) -> str:
    """Twelve digits over names, shapes and evenly spaced values of every parameter; exact, and quick for any size."""
    hashed = sha256()
    for name, parameter in lm.model.named_parameters():
        flat = parameter.detach().flatten()
        values = flat[:: max(1, len(flat) // _SAMPLED)].float().cpu().contiguous()
        hashed.update(f"{name} {list(parameter.shape)}".encode() + values.numpy().tobytes())
    return hashed.hexdigest()[:12]
