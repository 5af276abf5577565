"""OpenAI's form of questions and answers, read strictly: a field that would have no effect here is refused by name."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unweave.core.errors import UnweaveError
from unweave.core.fields import Fields
from unweave.core.files import parse_json
from unweave.methods.steer.spec import EditSpec

_COMMON = ("model", "max_tokens", "temperature", "seed", "stop", "stream", "stream_options", "unweave")
_KNOWN = {True: (*_COMMON, "messages", "max_completion_tokens"), False: (*_COMMON, "prompt")}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "top_p": (1,), "presence_penalty": (0,), "frequency_penalty": (0,),
    "logprobs": (False,), "echo": (False,), "store": (False,), "logit_bias": ({},), "tools": ([],),
    "response_format": ({"type": "text"},),
}  # fmt: skip
"""fields of OpenAI's that change nothing at these values, which clients like to send"""
_MOST_STOPS = 4
_MOST_EDITS = 256


class Refused(Exception):
    """An answer in place of an answer: HTTP status and OpenAI's error object."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Question:
    """One request. ``messages`` of a chat, or a ``prompt`` to continue."""

    model: str
    messages: list[dict[str, str]] | None
    prompt: str
    max_tokens: int | None
    temperature: float
    seed: int
    stop: tuple[str, ...]
    stream: bool
    with_usage: bool
    """whether a stream ends with the counts of tokens"""
    edits: tuple[EditSpec, ...]
    persist: bool | None


def read_question(body: bytes, *, chat: bool) -> Question:
    """Raises Refused for invalid JSON, unknown fields and values that this server cannot honour."""
    param: str | None = None
    try:
        fields = Fields(parse_json(body.decode("utf-8"), "the request"), "the request")
        for param in fields:
            _check_known(param, fields.values[param], chat)
        param = "unweave"
        own = fields.mapping("unweave")
        if unknown := [name for name in own if name not in ("edits", "persist")]:
            raise Refused(f"unweave has no field {unknown[0]!r}; it has edits and persist", param="unweave")
        asked = own.values.get("edits") or ()
        if len(asked) > _MOST_EDITS:
            raise Refused(f"{len(asked)} edits are more than {_MOST_EDITS}", param="unweave")
        edits = tuple(_edit(one, f"unweave.edits[{i}]") for i, one in enumerate(asked))
        persist = own.boolean("persist")
        param = "messages" if chat else "prompt"
        messages = [_message(one) for one in fields.sequence("messages")] if chat else None
        prompt = "" if chat else fields.text("prompt")
        if not messages and not prompt:
            raise Refused(f"{param} must be given, and not be empty", param=param)
        param = "max_tokens"
        limits = {fields.integer(name, least=1) for name in ("max_tokens", "max_completion_tokens")} - {None}
        if len(limits) > 1:
            raise Refused("max_tokens and max_completion_tokens differ", param=param)
        param = "temperature"
        temperature = fields.number("temperature", most=2)
        if temperature is not None and temperature < 0:
            raise Refused("temperature must be 0 to 2", param=param)
        param = "seed"
        seed = fields.integer("seed", least=-(1 << 63), most=1 << 63)
        param = "stop"
        stop = _stops(fields)
        param = "model"
        model = fields.text("model") or ""
        param = "stream"
        stream = fields.flag("stream")
        param = "stream_options"
        options = fields.mapping(param)
        if set(options) - {"include_usage"} or (options and not stream):
            raise Refused("stream_options hold include_usage alone, of a stream", param=param)
        return Question(
            model=model,
            messages=messages,
            prompt=prompt or "",
            max_tokens=next(iter(limits), None),
            temperature=1.0 if temperature is None else temperature,
            seed=secrets.randbits(31) if seed is None else seed,
            stop=stop,
            stream=stream,
            with_usage=options.flag("include_usage"),
            edits=edits,
            persist=persist,
        )
    except UnicodeDecodeError:
        raise Refused("the request is not UTF-8") from None
    except UnweaveError as error:
        raise Refused(f"{error.what} ({error.where})" if error.where else error.what, param=param) from None


def _check_known(name: str, value: Any, chat: bool) -> None:
    if name in _KNOWN[chat] or value is None or (name == "user" and isinstance(value, str)):
        return
    if name not in _NEUTRAL:
        raise Refused(f"unknown field {name!r}", param=name, code="unknown_parameter")
    if value not in _NEUTRAL[name] or isinstance(value, bool) != isinstance(_NEUTRAL[name][0], bool):
        raise Refused(f"{name} other than {_NEUTRAL[name][0]!r} is not supported", param=name)


def _edit(value: Any, where: str) -> EditSpec:
    if not isinstance(value, Mapping):
        raise Refused(f"{where} must be an object with a latent", param="unweave")
    return EditSpec.from_dict(value, where=where)


def _message(message: Fields) -> dict[str, str]:
    """A message whose content is text, or parts of text."""
    if unknown := [name for name in message if name not in ("role", "content") and name in message]:
        raise Refused(f"a message's {unknown[0]!r} is not supported", param="messages")
    if "role" not in message or "content" not in message:
        raise Refused("a message has a role and a content", param="messages")
    content = message.values["content"]
    if isinstance(content, list):
        parts = message.sequence("content")
        if any(part.text("type") != "text" for part in parts):
            raise Refused("only parts of type text are supported", param="messages")
        content = "".join(part.text("text") or "" for part in parts)
    elif not isinstance(content, str):
        raise message.wrong("content", "text")
    return {"role": message.text("role") or "", "content": content}


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.values.get("stop")
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or len(stops) > _MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise Refused(f"stop must be text, or a list of at most {_MOST_STOPS} texts, none empty", param="stop")
    return tuple(stops)


def pieces_until(texts: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """What grows in ``texts``, each the whole text so far, up to the first of ``stop``; what may become one, or is half
    a character, waits. Ends as soon as one stands there."""
    sent, text = 0, ""
    for text in texts:
        places = [place for place in (text.find(one) for one in stop) if place >= 0]
        if places:
            if min(places) > sent:
                yield text[sent : min(places)]
            return
        held = max((_begun(text, one) for one in stop), default=0)
        until = len(text) - max(held, len(text) - len(text.rstrip("\ufffd")))
        if until > sent:
            yield text[sent:until]
            sent = until
    if len(text) > sent:
        yield text[sent:]


def _begun(text: str, stop: str) -> int:
    """How many characters at a text's end are the beginning of ``stop``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
