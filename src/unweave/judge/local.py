"""A judge that runs here: any model that ``LM`` loads, answering greedily in batches of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any, Self

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.judge.base import Budget, Conversation, Reply
from unweave.judge.spec import JudgeSpec
from unweave.lm.chat import has_template, render_many
from unweave.lm.model import LM, Tokens

_SAMPLED = 64


class LocalModel:
    """A backend around an ``LM``. ``settings`` hold a digest of the weights: kept replies are of these weights."""

    def __init__(self, lm: LM, *, max_new_tokens: int = 160, at_once: int = 8) -> None:
        if lm.tokenizer is None or not has_template(lm.tokenizer):
            raise UnweaveError(
                "a judge must be a chat model, and this one has no chat template",
                where=lm.name,
                remedy="choose an instruct model with --judge.model; `unweave models` lists some",
            )
        self.name, self.note = lm.name, lm.note
        self._lm, self._max_new_tokens, self._at_once = lm, max_new_tokens, at_once
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

    def answer(self, conversations: Sequence[Conversation], budget: Budget) -> Iterator[tuple[int, Reply]]:
        """Longest prompts first, so that what does not fit into memory shows at once, and padding stays short."""
        plain = [_without_specials(conversation, self._lm.tokenizer) for conversation in conversations]
        rows = render_many(self._lm.tokenizer, plain, add_generation_prompt=True)
        order = sorted(range(len(rows)), key=lambda i: (-len(rows[i][0]), i))
        limit = getattr(self._lm.model.config, "max_position_embeddings", None)
        for first in range(0, len(order), self._at_once):
            batch = [i for i in order[first : first + self._at_once] if budget.take()]
            if not batch:
                return
            fitting = []
            for i in batch:
                n = len(rows[i][0]) + self._max_new_tokens
                if limit is None or n <= limit:
                    fitting.append(i)
                else:
                    yield i, Reply(None, f"prompt and reply need {n} tokens, the model has {limit} positions")
            if fitting:
                yield from zip(fitting, self._batch([rows[i] for i in fitting]), strict=True)

    def _batch(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[Reply]:
        tokens = Tokens.pad(rows, self._lm.pad_id, "left")
        new = self._lm.generate_ids(tokens, max_new_tokens=self._max_new_tokens).cpu()
        return [self._reply(len(ids), row) for (ids, _), row in zip(rows, new, strict=True)]

    def _reply(self, prompt_tokens: int, row: Tensor) -> Reply:
        own = self._lm.model.generation_config.eos_token_id
        ends = torch.tensor([] if own is None else own if isinstance(own, list) else [own], dtype=row.dtype)
        ended = torch.isin(row, ends).nonzero().flatten()
        n = int(ended[0]) + 1 if len(ended) else len(row)
        text = self._lm.decode(row[:n])
        return Reply(text, "", prompt_tokens, n, cut=not len(ended))


def _without_specials(conversation: Conversation, tokenizer: Any) -> list[dict[str, str]]:
    """Contents in which no stretch reads as a special token: text about `<|im_end|>` must not end the judge's turn."""
    names = sorted({str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}, key=len)
    found = []
    for message in conversation:
        content = message["content"]
        for name in reversed(names):
            content = content.replace(name, f"{name[:1]} {name[1:]}")
        found.append({"role": message["role"], "content": content})
    return found


def weights_digest(lm: LM) -> str:
    """Twelve digits over names, shapes and evenly spaced values of every parameter; exact, and quick for any size."""
    hashed = sha256()
    for name, parameter in lm.model.named_parameters():
        flat = parameter.detach().flatten()
        values = flat[:: max(1, len(flat) // _SAMPLED)].float().cpu().contiguous()
        hashed.update(f"{name} {list(parameter.shape)}".encode() + values.numpy().tobytes())
    return hashed.hexdigest()[:12]
