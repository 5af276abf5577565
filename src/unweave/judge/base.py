"""What a judge is: conversations in, replies out, each asked once.

1. ``CachedJudge.ask`` looks up which conversations have a kept reply: same model, settings and messages.
2. It hands the others to a backend (server, local model or script), which yields replies as they come.
3. Every reply is kept at once, one file each, so that whatever stops the work loses nothing that was paid for.
4. A budget stops it before the next request; failed requests are returned as failures, and never kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from unweave.core.errors import UnweaveError
from unweave.core.files import read_json
from unweave.core.progress import task
from unweave.core.writing import write_json
from unweave.judge.numbers import merged
from unweave.judge.spec import JudgeSpec

Conversation = Sequence[Mapping[str, str]]
"""Messages, each ``{"role": "system" | "user" | "assistant", "content": text}``."""

_Asked = tuple[Conversation, Mapping[str, Any]]
"""a conversation and what else is asked of it"""
_Answers = Iterator[tuple[int, "Reply"]]
_GIVE_UP = 5
_VERSION = 2


@dataclass(frozen=True)
class Reply:
    """A judge's reply: a text, or the reason for its absence."""

    text: str | None
    failure: str = ""
    """Why there is no text; empty where there is one."""
    prompt_tokens: int = 0
    new_tokens: int = 0
    cut: bool = False
    """Whether the reply ended because it reached the length allowed."""
    kept: bool = False
    """Whether it came from the cache, and so cost nothing now."""
    of_prompt: bool = False
    """Whether only this prompt failed, because it is too long; others may still be answered."""
    numbers: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    """For each number of the text that is one token: where it begins, and the log-probability of every number (at most
    three digits) that could have stood there. Empty where the judge gives no log-probabilities."""

    @property
    def tokens(self) -> int:
        """Tokens of the prompt and the reply together."""
        return self.prompt_tokens + self.new_tokens


class Judge(Protocol):
    """Anything that answers conversations."""

    name: str
    """The model's name."""
    note: str
    """What readers of its judgements must know of it, such as the precision of its weights; may be empty."""

    def ask(self, conversations: Sequence[Conversation], until: str = "") -> list[Reply]:
        """One reply per conversation, in order. UnweaveError when it cannot be asked at all or its budget is spent.

        ``until`` is a regular expression: what follows its first match in a reply is not needed, and a judge may end
        the reply there.
        """
        ...


class Budget:
    """How much may still be asked. ``max_requests`` counts prompts, ``max_tokens`` prompts and replies together."""

    def __init__(self, max_requests: int | None = None, max_tokens: int | None = None) -> None:
        self.max_requests, self.max_tokens = max_requests, max_tokens
        self.requests = self.tokens = 0
        self._lock = Lock()

    def take(self) -> bool:
        """Whether one more prompt may be asked; if so it is counted. Tokens are known only once a reply is there."""
        with self._lock:
            fine = self.max_requests is None or self.requests < self.max_requests
            fine = fine and (self.max_tokens is None or self.tokens < self.max_tokens)
            self.requests += fine
            return fine

    def spend(self, tokens: int) -> None:
        """Counts what a reply took."""
        with self._lock:
            self.tokens += tokens


class Backend(Protocol):
    """Who really answers; ``CachedJudge`` makes a ``Judge`` of it."""

    name: str
    note: str
    settings: Mapping[str, Any]
    """Plain values, besides the messages, that decide what the reply is. They are written to files."""

    def answer(
        self, conversations: Sequence[Conversation], budget: Budget, until: str = ""
    ) -> Iterator[tuple[int, Reply]]:
        """(index, reply) in any order, as they come; ends early where ``budget.take()`` refuses another one. A reply
        may end where the regular expression ``until`` first matches."""
        ...


class CachedJudge:
    """A ``Judge`` that keeps every reply in ``folder`` (None: only for the call) and holds to a budget."""

    def __init__(self, backend: Backend, folder: Path | None = None, budget: Budget | None = None) -> None:
        self.name, self.note = backend.name, backend.note
        self.reads = hasattr(backend, "read")
        """Whether it can ``read``: models that run here can."""
        self.budget = budget or Budget()
        self._backend, self._folder = backend, folder

    def ask(self, conversations: Sequence[Conversation], until: str = "") -> list[Reply]:
        """One reply per conversation, in order; the same conversation is asked once.

        Raises UnweaveError when the budget is spent, when the backend cannot be used, and when it fails for one
        conversation after the other, those that are too long for it aside. What was answered until then is kept, and
        asking again goes on from there.
        """
        asked = [(conversation, {"until": until} if until else {}) for conversation in conversations]
        return self._all(asked, lambda some: self._backend.answer([one for one, _ in some], self.budget, until))

    def read(self, conversations: Sequence[Conversation], places: Sequence[Sequence[int]]) -> list[Reply]:
        """What the judge would write inside of replies that are given: each conversation ends with the assistant's own
        message, and ``numbers`` of its reply are the log-probabilities at ``places`` (characters) of that message.

        UnweaveError where it cannot read; else as ``ask``.
        """
        if not self.reads:
            raise UnweaveError("this judge does not score given text", where=self.name, remedy="use one that runs here")
        asked = [(one, {"places": list(each)}) for one, each in zip(conversations, places, strict=True)]
        read: Any = self._backend
        return self._all(
            asked, lambda some: read.read([one for one, _ in some], [more["places"] for _, more in some], self.budget)
        )

    def _all(self, asked: Sequence[_Asked], answer: Callable[[Sequence[_Asked]], _Answers]) -> list[Reply]:
        keys = [self._key(*one) for one in asked]
        replies: dict[str, Reply] = {}
        missing: dict[str, _Asked] = {}
        for key, one in zip(keys, asked, strict=True):
            if key not in replies and key not in missing:
                cached = self._load(key)
                if cached is None:
                    missing[key] = one
                else:
                    replies[key] = cached
        with task("judge", total=len(replies) + len(missing), unit="replies", done=len(replies)) as progress:
            for key, reply in self._answers(missing, answer):
                replies[key] = reply
                progress.advance()
            if len(replies) < len(set(keys)):
                raise self._spent(sum(reply.text is not None for reply in replies.values()), len(set(keys)))
        return [replies[key] for key in keys]

    def _answers(
        self, missing: Mapping[str, _Asked], answer: Callable[[Sequence[_Asked]], _Answers]
    ) -> Iterator[tuple[str, Reply]]:
        """New replies as they come, kept before they are passed on."""
        keys, in_a_row = list(missing), 0
        for i, reply in answer(list(missing.values())) if missing else ():
            self.budget.spend(reply.tokens)
            if reply.text is not None:
                self._keep(keys[i], self._request(*missing[keys[i]]), reply)
            in_a_row = 0 if reply.text is not None else in_a_row + (not reply.of_prompt)
            if in_a_row == _GIVE_UP:
                what = f"the judge failed {_GIVE_UP} times in a row: {reply.failure}"
                remedy = "fix this and ask again; the replies so far are kept"
                raise UnweaveError(what, where=", ".join(filter(None, (self.name, self.note))), remedy=remedy)
            yield keys[i], reply

    def _spent(self, have: int, needed: int) -> UnweaveError:
        used = f"{self.budget.requests:,} prompts and {self.budget.tokens:,} tokens"
        return UnweaveError(
            f"the judge's budget is spent ({used}) with {have:,} of {needed:,} replies",
            where=self.name,
            remedy="ask again to continue with the same budget, or raise judge.budget_requests or judge.budget_tokens; "
            "replies are kept",
        )

    # -- the kept replies -----------------------------------------------------------------------------------------

    def _request(self, conversation: Conversation, more: Mapping[str, Any]) -> dict[str, Any]:
        messages = [{"role": message["role"], "content": message["content"]} for message in conversation]
        return {
            "version": _VERSION,
            "model": self.name,
            "settings": dict(self._backend.settings),
            "messages": messages,
            **more,
        }

    def _key(self, conversation: Conversation, more: Mapping[str, Any]) -> str:
        text = json.dumps(self._request(conversation, more), sort_keys=True, allow_nan=False)
        return sha256(text.encode()).hexdigest()

    def _path(self, key: str) -> Path | None:
        return None if self._folder is None else Path(self._folder) / key[:2] / f"{key}.json"

    def _load(self, key: str) -> Reply | None:
        """A cached reply; None where there is no readable file, which the new reply then replaces."""
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        try:
            stored = read_json(path)["reply"]
            text, *counts, cut = (stored[n] for n in ("text", "prompt_tokens", "new_tokens", "cut"))
            numbers = {int(at): merged(row.items()) for at, row in stored.get("numbers", {}).items()}
        except (UnweaveError, KeyError, TypeError, ValueError, AttributeError):
            return None
        if not isinstance(text, str) or not isinstance(cut, bool):
            return None
        if any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in counts):
            return None
        return Reply(text, "", *counts, cut=cut, kept=True, numbers=numbers)

    def _keep(self, key: str, request: Mapping[str, Any], reply: Reply) -> None:
        path = self._path(key)
        if path is not None:
            names = ("text", "prompt_tokens", "new_tokens", "cut", *(("numbers",) if reply.numbers else ()))
            write_json(path, {**request, "reply": {name: getattr(reply, name) for name in names}})


def check_judge(spec: JudgeSpec) -> None:
    """Finds what ``open_judge`` would miss, before other work is done: the package and key of a server, or the files
    of a model that runs here, which are fetched if need be. Raises UnweaveError."""
    if spec.base_url is None:
        from unweave.lm.sources import locate

        locate(spec.model)
    else:
        from unweave.judge.client import ChatServer

        ChatServer.connect(spec)


def open_judge(spec: JudgeSpec, folder: Path | None, device: str | None = None) -> CachedJudge:
    """The judge of a spec, keeping its replies in ``folder``; a model that runs here is loaded on ``device``.

    Raises UnweaveError when a package, the key's variable or the model is missing.
    """
    if spec.base_url is None:
        from unweave.judge.local import LocalModel

        backend: Backend = LocalModel.load(spec, device)
    else:
        from unweave.judge.client import ChatServer

        backend = ChatServer.connect(spec)
    return CachedJudge(backend, folder, Budget(spec.budget_requests, spec.budget_tokens))


REPLIES = "judge-replies"
"""The folder under the runs' root with every judge's kept replies, shared by all runs."""
