"""A judge behind an OpenAI-compatible address: OpenAI itself, vLLM, llama.cpp, Ollama and others.

1. The key comes from the environment variable that the spec names, goes to the server, and nowhere else: whatever the
   server says is searched for it, and for parts of it, before it is cut, kept or shown.
2. So many requests are in flight at a time; replies are passed on as they come.
3. What may pass is tried again, waiting longer each time or as long as the server asks; what will not (no key, no such
   model, another address) stops everything; what concerns one prompt is that prompt's failure.
4. A server gets so much time for a reply, all tries together, and so many bytes; beyond, the reply is a failure.
5. Tokens are as the server says; where it does not, or says what cannot be, they are estimated, rather too many.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import aclosing
from dataclasses import replace
from datetime import timedelta
from typing import Any, NamedTuple, Self

from unweave.core.errors import UnweaveError
from unweave.core.shown import plain
from unweave.judge.base import Budget, Conversation, Reply
from unweave.judge.numbers import placed
from unweave.judge.secrets import Secret, keep_out_of_logs
from unweave.judge.spec import JudgeSpec, is_this_machine

_LONGEST_WAIT = 60.0
_PASSING = (408, 409, 425, 429)
_HOPELESS = (401, 402, 403, 404)
_SAME_REQUEST = (307, 308)
"""Redirects that keep a request as it is; after the others it would be another one."""
_NO_KEY = "none"
_TOO_LARGE = 413
_TOO_LONG = re.compile(r"context[ _](?:length|size|window)|too long", re.IGNORECASE)
"""How OpenAI, vLLM and llama.cpp say that a prompt does not fit, besides answering 400."""
_MOST_BYTES = 1 << 21
"""of an answer; replies are some kilobytes"""
_READ = 1 << 16
"""characters of an error that are looked at, many more than are shown: a key cut here is not among those"""
_MOST_TOKENS = 10_000_000
_ALTERNATIVES = 20
"""the most that OpenAI's own servers give"""
_MESSAGE_TOKENS = 8
"""what templates put around a message, at most"""


class _Passing(Exception):
    """Something that may be better the next time; ``after`` seconds where the server gives a time."""

    def __init__(self, what: str, after: float | None = None, *, answered: bool = False) -> None:
        super().__init__(what)
        self.after, self.answered = after, answered


class _Refused(Exception):
    """An HTTP error status. Raised where it arrives: the package would read all of it, however long it is."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        super().__init__(f"status {status}")
        self.status, self.headers, self.body = status, headers, body


class _TooMuch(Exception):
    """An answer of more bytes than any reply needs."""


class Patience(NamedTuple):
    """How long a server may take for one prompt: ``timeout`` seconds, all tries together and waiting aside;
    ``attempts`` tries at most; ``first_wait`` seconds before the second."""

    timeout: float = 120.0
    attempts: int = 6
    first_wait: float = 1.0


class ChatServer:
    """A backend that asks ``{base_url}/chat/completions`` at temperature 0."""

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        key: str | None = None,
        max_new_tokens: int = 160,
        logprobs: bool = False,
        at_once: int = 8,
        patience: Patience | None = None,
    ) -> None:
        self._openai, self._stamina, self._portal = _packages()
        self.name, self.note = model, f"asked at {base_url}"
        self.settings: Mapping[str, Any] = {
            "kind": "chat completions",
            "base_url": base_url,
            "max_tokens": max_new_tokens,
            "temperature": 0,
        } | ({"logprobs": True, "top_logprobs": _ALTERNATIVES} if logprobs else {})
        self._key, self._secret = key, Secret(key) if key else None
        if key and self._secret:
            keep_out_of_logs(key, self._secret)
        self._at_once, self._patience = at_once, patience or Patience()

    @classmethod
    def connect(cls, spec: JudgeSpec) -> Self:
        """The server of a spec with a base_url. UnweaveError when the key's variable is not set."""
        assert spec.base_url is not None
        key = None
        if spec.api_key_env is not None:
            key = os.environ.get(spec.api_key_env, "").strip()
            if not key:
                what = f"the environment variable {spec.api_key_env} is not set"
                raise UnweaveError(what, where="judge.api_key_env", remedy=f"set it: export {spec.api_key_env}=...")
            if not key.isascii() or not key.isprintable():
                what = f"the environment variable {spec.api_key_env} holds characters that no key has"
                remedy = "a key has printable ASCII characters only: copy it again"
                raise UnweaveError(what, where="judge.api_key_env", remedy=remedy)
        return cls(
            spec.model,
            spec.base_url,
            key=key,
            max_new_tokens=spec.max_new_tokens,
            logprobs=bool(spec.logprobs),
            at_once=spec.at_once,
            patience=Patience(spec.timeout) if spec.timeout else None,
        )

    def answer(
        self, conversations: Sequence[Conversation], budget: Budget, until: str = ""
    ) -> Iterator[tuple[int, Reply]]:
        """Replies as they come, each whole: servers leave out what they are told to stop at.

        Raises UnweaveError for failures that every prompt would meet; replies under way are yielded first.

        Whoever stops asking for replies ends the requests that are under way.
        """
        running: dict[Future[Reply], int] = {}
        waiting = iter(range(len(conversations)))
        stopped: UnweaveError | None = None
        with self._portal() as portal, portal.wrap_async_context_manager(self._open()) as client:
            try:
                while True:
                    while stopped is None and len(running) < self._at_once:
                        i = next(waiting, None)
                        if i is None or not budget.take():
                            break
                        running[portal.start_task_soon(self._one, client, conversations[i])] = i
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
                for future in running:
                    future.cancel()
        if stopped is not None:
            raise stopped

    def _open(self) -> Any:
        """A client of the package's. It does not follow to other addresses, retry, or look for the time: we do."""
        url = str(self.settings["base_url"])

        async def before(request: Any) -> None:
            for name in ("OpenAI-Organization", "OpenAI-Project"):  # another service's, from the environment
                request.headers.pop(name, None)

        async def arrived(response: Any) -> None:
            status = response.status_code
            if status in _SAME_REQUEST and _same_place(response):
                return
            if not 200 <= status < 300:
                raise _Refused(status, response.headers, await _body(response))

        # What is for this machine goes to no proxy that the environment names: it would see prompts and key.
        here = is_this_machine(url)
        http = self._openai.DefaultAsyncHttpxClient(
            base_url=url, timeout=None, trust_env=not here, event_hooks={"request": [before], "response": [arrived]}
        )
        # Always a key of our own: without one the package takes another service's from the environment.
        return self._openai.AsyncOpenAI(
            api_key=self._key or _NO_KEY,
            base_url=url,
            timeout=None,
            max_retries=0,
            http_client=http,
            default_headers={"Accept-Encoding": "identity"},  # what is packed small may be large
        )

    async def _one(self, client: Any, conversation: Conversation) -> Reply:
        """One prompt's reply, after as many tries as it takes and the time allows."""
        left, tries, lost = self._patience.timeout, 0, 0

        def when_again(error: Exception) -> bool | timedelta:
            if not isinstance(error, _Passing) or left <= 0:
                return False
            return True if error.after is None else timedelta(seconds=error.after)

        try:
            async for attempt in self._stamina.retry_context(
                on=when_again,
                attempts=self._patience.attempts,
                timeout=None,
                wait_initial=self._patience.first_wait,
                wait_max=_LONGEST_WAIT,
                wait_jitter=self._patience.first_wait,
            ):
                with attempt:
                    tries, started = tries + 1, time.monotonic()
                    try:
                        reply = await self._within(left, client, conversation)
                    except _Passing as error:
                        lost += _estimate(conversation) if error.answered else 0
                        raise
                    finally:
                        left -= time.monotonic() - started
                    return replace(reply, prompt_tokens=reply.prompt_tokens + lost)
        except _Passing as error:
            return Reply(None, f"{error} ({tries} {'try' if tries == 1 else 'tries'})", lost)
        raise AssertionError("a retry ends with a reply or an error")

    async def _within(self, seconds: float, client: Any, conversation: Conversation) -> Reply:
        """One try. The time is for all of it: a server may send a byte now and then for ever."""
        try:
            async with asyncio.timeout(seconds):
                return await self._request(client, conversation)
        except TimeoutError:
            what = f"the request timed out: no whole reply in {self._patience.timeout:g} seconds"
            raise _Passing(what, answered=True) from None

    async def _request(self, client: Any, conversation: Conversation) -> Reply:
        try:
            async with client.chat.completions.with_streaming_response.create(
                model=self.name,
                messages=[{"role": m["role"], "content": m["content"]} for m in conversation],
                **{name: value for name, value in self.settings.items() if name not in ("kind", "base_url")},
            ) as answer:
                return self._read(await _body(answer.http_response), conversation)
        except _Refused as error:
            return self._refused(error)
        except _TooMuch:
            return self._too_much(conversation)
        except self._openai.APIConnectionError as error:
            if isinstance(error.__cause__, _Refused):  # older versions of the package wrap whatever a hook raises
                return self._refused(error.__cause__)
            if isinstance(error.__cause__, _TooMuch):
                return self._too_much(conversation)
            cause = f": {error.__cause__}" if error.__cause__ else ""
            raise _Passing(self._shortened(f"the server cannot be reached: {error}{cause}")) from None
        except (OSError, self._openai.OpenAIError) as error:
            raise _Passing(self._shortened(f"the server cannot be reached: {error}")) from None
        except _carrier(self._openai) as error:  # the connection broke in the middle of the answer
            raise _Passing(self._shortened(f"the server's answer broke off: {error}"), answered=True) from None

    def _too_much(self, conversation: Conversation) -> Reply:
        what = f"the server's answer has more than {_MOST_BYTES:,} bytes"
        return Reply(None, what, _estimate(conversation), int(self.settings["max_tokens"]))

    def _refused(self, error: _Refused) -> Reply:
        """What an HTTP error means: try again, stop, or this prompt's failure."""
        status, url = error.status, str(self.settings["base_url"])
        if 300 <= status < 400:
            raise UnweaveError(
                self._shortened(f"the server sends on to another address ({status}): {error.headers.get('location')}"),
                where=url,
                remedy="prompts and key go to judge.base_url alone; if you trust that address, give it there",
            ) from None
        what = self._shortened(f"the server answered {status}: {_message(error.body)}")
        if status in _PASSING or status >= 500:
            raise _Passing(what, _seconds(error.headers.get("retry-after"))) from None
        if status in _HOPELESS:
            remedy = "check judge.model, judge.base_url and the key in the variable that judge.api_key_env names"
            raise UnweaveError(what, where=url, remedy=remedy) from None
        return Reply(None, what, of_prompt=status == _TOO_LARGE or _TOO_LONG.search(what) is not None)

    def _read(self, body: bytes, conversation: Conversation) -> Reply:
        try:
            answer = json.loads(body)
            choice = answer["choices"][0]
            text, reason = choice["message"].get("content"), choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            shown = self._shortened(body.decode(errors="replace"), 100)
            raise _Passing(f"the server's answer is not a chat completion: {shown!r}", answered=True) from None
        usage = answer.get("usage")
        content = text if isinstance(text, str) else ""
        prompt = _count(usage, "prompt_tokens", _estimate(conversation))
        new = _count(usage, "completion_tokens", _estimate([{"content": content}]) if content else 0)
        if not content.strip():
            reason = self._shortened(reason, 40) if isinstance(reason, str) else "is missing"
            return Reply(None, f"the reply is empty (finish_reason {reason})", prompt, new)
        text = self._clean(content)
        numbers = placed(choice.get("logprobs"), text) if text == content else {}
        return Reply(text, "", prompt, new, cut=reason == "length", numbers=numbers)

    def _clean(self, text: str) -> str:
        """The text without the key, should a server have repeated it, and without what no file can hold."""
        text = text.encode("utf-8", "replace").decode("utf-8")
        return self._secret.clean(text) if self._secret else text

    def _shortened(self, text: str, at_most: int = 300) -> str:
        """A server's words as they may be shown: in one line, without the key first of all, and then not too long."""
        return plain(" ".join(self._clean(text[:_READ]).split()))[:at_most]


async def _body(response: Any) -> bytes:
    """All of an answer, or _TooMuch."""
    body = bytearray()
    async with aclosing(response.aiter_raw()) as chunks:
        async for chunk in chunks:
            body += chunk
            if len(body) > _MOST_BYTES:
                raise _TooMuch
    return bytes(body)


def _same_place(response: Any) -> bool:
    """Whether a redirect stays with the server that was asked."""
    origin, location = response.request.url, response.headers.get("location")
    if not location:
        return False
    try:
        to = origin.join(location)
    except Exception:  # whatever the package raises for an invalid address
        return False
    return (to.scheme, to.host, to.port) == (origin.scheme, origin.host, origin.port) and not to.userinfo


def _carrier(openai: Any) -> type[Exception]:
    """The errors of the package that carries the requests, which has changed its name."""
    import importlib

    home = next(c.__module__ for c in openai.DefaultAsyncHttpxClient.__mro__ if c.__module__.startswith("httpx"))
    return importlib.import_module(home.split(".")[0]).RequestError


def _packages() -> tuple[Any, Any, Any]:
    try:
        import openai
        import stamina
        from anyio.from_thread import start_blocking_portal
    except ImportError as error:
        what = f"a judge behind an address needs the package {error.name}"
        remedy = "pip install 'unweave[judge]', or leave base_url out to judge with a model that runs here"
        raise UnweaveError(what, where="judge.base_url", remedy=remedy) from None
    # It warns about every retry; without a handler of its own, Python would write that across the progress bar.
    log = logging.getLogger("stamina")
    if not log.handlers:
        log.addHandler(logging.NullHandler())
    return openai, stamina, start_blocking_portal


def _seconds(header: str | None) -> float | None:
    """A Retry-After header in seconds, within reason; None for dates and invalid values."""
    try:
        seconds = float(header or "")
    except ValueError:
        return None
    return min(max(0.0, seconds), _LONGEST_WAIT) if seconds == seconds else None


def _message(body: bytes) -> str:
    """The server's own words: the message of its JSON body, or the body."""
    text = body.decode(errors="replace")
    try:
        value = json.loads(text)
        inner = value.get("error", value) if isinstance(value, Mapping) else value
        message = inner.get("message") if isinstance(inner, Mapping) else inner
    except (ValueError, RecursionError):
        message = None
    return message if isinstance(message, str) else text


def _count(usage: Any, name: str, estimate: int) -> int:
    """What a server says that it counted, where that is a number of tokens; else the estimate."""
    value = usage.get(name) if isinstance(usage, Mapping) else None
    if isinstance(value, int) and not isinstance(value, bool) and min(estimate, 1) <= value <= _MOST_TOKENS:
        return value
    return estimate


def _estimate(messages: Sequence[Mapping[str, str]]) -> int:
    """Tokens of messages, rather too many: one for every two bytes, and what is put around each."""
    return sum(_MESSAGE_TOKENS + (len(m["content"].encode("utf-8", "replace")) + 1) // 2 for m in messages)
