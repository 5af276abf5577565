"""A judge behind an OpenAI-compatible address: OpenAI itself, vLLM, llama.cpp, Ollama and others.

1. The key comes from the environment variable that the spec names, goes to the server, and nowhere else: whatever the
   server says is searched for it before it is kept or shown.
2. So many requests are in flight at a time, each in a thread; replies are passed on as they come.
3. What may pass is tried again, waiting longer each time or as long as the server asks; what will not (no key, no such
   model) stops everything; what concerns one prompt is that prompt's failure.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import timedelta
from threading import Event
from typing import Any, Self

from unweave.core.errors import UnweaveError
from unweave.judge.base import Budget, Conversation, Reply
from unweave.judge.spec import JudgeSpec

_TIMEOUT = 120.0
_LONGEST_WAIT = 60.0
_PASSING = (408, 409, 425, 429)
_HOPELESS = (401, 402, 403, 404)
_NO_KEY = "none"
_TOO_LARGE = 413
_TOO_LONG = re.compile(r"context[ _](?:length|size|window)|too long", re.IGNORECASE)
"""How OpenAI, vLLM and llama.cpp say that a prompt does not fit, besides answering 400."""


class _Passing(Exception):
    """Something that may be better the next time; ``after`` seconds where the server said when."""

    def __init__(self, what: str, after: float | None = None) -> None:
        super().__init__(what)
        self.after = after


class ChatServer:
    """A backend that asks ``{base_url}/chat/completions`` at temperature 0.

    ``attempts`` is how often one prompt is tried at most, ``first_wait`` the seconds before the second try.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        key: str | None = None,
        max_new_tokens: int = 160,
        at_once: int = 8,
        timeout: float = _TIMEOUT,
        attempts: int = 6,
        first_wait: float = 1.0,
    ) -> None:
        openai, self._stamina = _packages()
        self._openai = openai
        self.name, self.note = model, f"asked at {base_url}"
        self.settings: Mapping[str, Any] = {
            "kind": "chat completions",
            "base_url": base_url,
            "max_tokens": max_new_tokens,
            "temperature": 0,
        }
        self._key, self._at_once, self._attempts, self._first_wait = key, at_once, attempts, first_wait
        # Always a key of our own: without one the package takes another service's from the environment.
        self._client = openai.OpenAI(api_key=key or _NO_KEY, base_url=base_url, timeout=timeout, max_retries=0)

    @classmethod
    def connect(cls, spec: JudgeSpec) -> Self:
        """The server of a spec with a base_url. UnweaveError when the key's variable is not set."""
        assert spec.base_url is not None
        key = None
        if spec.api_key_env is not None:
            key = os.environ.get(spec.api_key_env, "").strip()
            if not key:
                raise UnweaveError(
                    f"the environment variable {spec.api_key_env} is not set",
                    where="judge.api_key_env",
                    remedy=f"put the key into it: export {spec.api_key_env}=...",
                )
        return cls(
            spec.model,
            spec.base_url,
            key=key,
            max_new_tokens=spec.max_new_tokens,
            at_once=spec.at_once,
            timeout=spec.timeout or _TIMEOUT,
        )

    def answer(self, conversations: Sequence[Conversation], budget: Budget) -> Iterator[tuple[int, Reply]]:
        """Raises UnweaveError for what no other prompt would mend; replies that were under way are yielded before."""
        pool = ThreadPoolExecutor(self._at_once, thread_name_prefix="judge")
        over = Event()
        running: dict[Future[Reply], int] = {}
        waiting = iter(range(len(conversations)))
        stopped: UnweaveError | None = None
        try:
            while True:
                while stopped is None and len(running) < self._at_once:
                    i = next(waiting, None)
                    if i is None or not budget.take():
                        break
                    running[pool.submit(self._one, conversations[i], over)] = i
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    i = running.pop(future)
                    try:
                        reply = future.result()
                    except UnweaveError as error:
                        stopped = error
                        continue
                    yield i, reply
        finally:
            over.set()
            pool.shutdown(wait=False, cancel_futures=True)
        if stopped is not None:
            raise stopped

    def _one(self, conversation: Conversation, over: Event) -> Reply:
        """One prompt's reply, after as many tries as it takes, or until nobody waits for it any more."""

        def when_again(error: Exception) -> bool | timedelta:
            if not isinstance(error, _Passing) or over.is_set():
                return False
            return True if error.after is None else timedelta(seconds=error.after)

        try:
            for attempt in self._stamina.retry_context(
                on=when_again,
                attempts=self._attempts,
                timeout=None,
                wait_initial=self._first_wait,
                wait_max=_LONGEST_WAIT,
                wait_jitter=self._first_wait,
            ):
                with attempt:
                    return self._request(conversation)
        except _Passing as error:
            return Reply(None, f"{error} ({self._attempts} tries)")
        raise AssertionError("a retry ends with a reply or an error")

    def _request(self, conversation: Conversation) -> Reply:
        try:
            raw = self._client.chat.completions.with_raw_response.create(
                model=self.name,
                messages=[{"role": m["role"], "content": m["content"]} for m in conversation],  # type: ignore[misc]
                temperature=0,
                max_tokens=self.settings["max_tokens"],
            )
            body = raw.http_response.content
        except self._openai.APIStatusError as error:
            return self._refused(error)
        except self._openai.APIConnectionError as error:  # timeouts are among them
            cause = f": {error.__cause__}" if error.__cause__ else ""
            raise _Passing(self._clean(f"the server cannot be reached: {error}{cause}")) from None
        return self._read(body)

    def _refused(self, error: Any) -> Reply:
        """What an HTTP error means: try again, stop, or this prompt's failure."""
        status = int(error.status_code)
        what = self._clean(f"the server answered {status}: {_said(error)}")
        if status in _PASSING or status >= 500:
            raise _Passing(what, _seconds(error.response.headers.get("retry-after"))) from None
        if status in _HOPELESS:
            remedy = "check judge.model, judge.base_url and the key in the variable that judge.api_key_env names"
            raise UnweaveError(what, where=str(self.settings["base_url"]), remedy=remedy) from None
        return Reply(None, what, of_prompt=status == _TOO_LARGE or _TOO_LONG.search(what) is not None)

    def _read(self, body: bytes) -> Reply:
        try:
            answer = json.loads(body)
            choice = answer["choices"][0]
            text, reason = choice["message"].get("content"), choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError):
            shown = self._clean(body[:100].decode(errors="replace"))
            raise _Passing(f"the server's answer is not a chat completion: {shown!r}") from None
        usage = answer.get("usage")
        prompt, new = (_count(usage, name) for name in ("prompt_tokens", "completion_tokens"))
        if not isinstance(text, str) or not text.strip():
            return Reply(None, f"the reply is empty (finish_reason {self._clean(str(reason))})", prompt, new)
        return Reply(self._clean(text), "", prompt, new, cut=reason == "length")

    def _clean(self, text: str) -> str:
        """The text without the key, should a server have repeated it, and without what no file can hold."""
        text = text.encode("utf-8", "replace").decode("utf-8")
        return text.replace(self._key, "[key]") if self._key else text


def _packages() -> tuple[Any, Any]:
    try:
        import openai
        import stamina
    except ImportError as error:
        raise UnweaveError(
            f"a judge behind an address needs the package {error.name}",
            where="judge.base_url",
            remedy="pip install 'unweave[judge]', or leave base_url out to judge with a model that runs here",
        ) from None
    # It warns about every retry; without a handler of its own, Python would write that across the progress bar.
    log = logging.getLogger("stamina")
    if not log.handlers:
        log.addHandler(logging.NullHandler())
    return openai, stamina


def _seconds(header: str | None) -> float | None:
    """A Retry-After header in seconds, within reason; dates and nonsense count as none."""
    try:
        return min(max(0.0, float(header or "")), _LONGEST_WAIT)
    except ValueError:
        return None


def _said(error: Any) -> str:
    """The server's own words: the message of its JSON body, or the beginning of the body."""
    body = error.body
    if isinstance(body, Mapping):
        inner = body.get("error", body)
        body = inner.get("message", inner) if isinstance(inner, Mapping) else inner
    return " ".join(str(body or error.response.text).split())[:300]


def _count(usage: Any, name: str) -> int:
    value = usage.get(name) if isinstance(usage, Mapping) else None
    return value if isinstance(value, int) and value >= 0 else 0
