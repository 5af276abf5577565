"""A server of the steered model in OpenAI's form, for this machine alone: /v1/models, /v1/chat/completions and
/v1/completions, whole or as a stream.

1. One worker thread owns the model and its tokenizer and answers one request after the other; an answer that nobody
   waits for ends.
2. A request may bring edits of its own (``"unweave": {"edits": [...]}``), which join the server's.
3. Only requests that name this machine as their host are answered, and none that a page sends from elsewhere: a name
   that was made to point here, or a form, reaches nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.lm.chat import has_template
from unweave.lm.decoding import decode
from unweave.lm.model import LM, Tokens
from unweave.methods.steer.changes import OpenedEdit, open_edits
from unweave.methods.steer.protocol import Question, Refused, pieces_until, read_question
from unweave.methods.steer.spec import EditSpec
from unweave.sae.edits import Edit, together
from unweave.sae.module import SAE

_HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?", re.IGNORECASE)
MOST_BYTES = 1 << 20
MOST_WAITING = 16
USUAL_TOKENS = 256


@dataclass
class Steered:
    """A model, SAEs of it by site, and the edits that are always in force.

    ``maximum(site, latent)`` is a latent's largest activation, for strengths; None: edits need values. ``name`` is what
    clients call the model. Raises UnweaveError for SAEs of another model and edits that cannot be made.
    """

    lm: LM
    saes: Mapping[Site, SAE]
    edits: tuple[EditSpec, ...] = ()
    maximum: Callable[[Site, int], float] | None = None
    persist: bool = True
    name: str = ""
    waiting: int = 0
    worker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "model"))

    def __post_init__(self) -> None:
        self.name = self.name or self.lm.name
        for sae in self.saes.values():
            sae.verify(self.lm)  # here, for later the model is the worker's
        self.opened(())

    def opened(self, edits: tuple[EditSpec, ...]) -> list[OpenedEdit]:
        """The server's edits and these. Raises UnweaveError for those that are none."""

        def unknown(site: Site, latent: int) -> float:
            raise UnweaveError(
                f"the largest activation of {site}/{latent} is not known", remedy="give a value in place of a strength"
            )

        return open_edits(self.lm, (*self.edits, *edits), self.saes, self.maximum or unknown)


@dataclass(frozen=True)
class _Job:
    """A question that was found good."""

    question: Question
    tokens: Tokens
    edits: list[Edit]
    new: int
    chat: bool
    id: str
    created: int
    cancelled: threading.Event
    persist: bool


def app(steered: Steered) -> Starlette:
    """The ASGI application."""

    async def models(request: Request) -> Response:
        _check_origin(request)
        card = {"id": steered.name, "object": "model", "created": 0, "owned_by": "unweave"}
        return JSONResponse({"object": "list", "data": [card]})

    async def answer(request: Request) -> Response:
        chat = request.url.path.endswith("/chat/completions")
        _check_origin(request)
        question = read_question(await _body(request), chat=chat)
        if steered.waiting >= MOST_WAITING:
            raise Refused("too many requests are waiting", status=429, code="rate_limit_exceeded")
        steered.waiting += 1
        try:
            job = await asyncio.get_running_loop().run_in_executor(steered.worker, _job, steered, question, chat)
        finally:
            steered.waiting -= 1
        events = _events(steered, job)
        if job.question.stream:
            return StreamingResponse(_stream(steered, job, events), media_type="text/event-stream")
        pieces: list[Any] = []
        async for event in events:
            if await request.is_disconnected():
                await events.aclose()
                return Response(status_code=499)  # nobody reads it
            pieces.append(event)
        reason, n = pieces.pop()
        return JSONResponse(_whole(steered, job, "".join(pieces), reason, n))

    async def refused(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = Refused(f"{error.detail}: {request.method} {request.url.path}", status=error.status_code)
        refusal = _refusal(error)
        return JSONResponse(refusal.body, status_code=refusal.status)

    paths = {"/v1/chat/completions": answer, "/v1/completions": answer}
    server = Starlette(
        routes=[
            Route("/v1/models", models, methods=["GET"]),
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in paths.items()),
        ],
        exception_handlers=dict.fromkeys((Refused, UnweaveError, HTTPException, Exception), refused),
    )
    server.router.redirect_slashes = False
    return server


def _refusal(error: Exception, param: str | None = None, code: str | None = None) -> Refused:
    """What clients are told of an error; of one that is ours, nothing."""
    if isinstance(error, UnweaveError):
        return Refused(": ".join(filter(None, [error.what, error.remedy])), param=param, code=code)
    return error if isinstance(error, Refused) else Refused("this is our fault, not yours", status=500)


def _check_origin(request: Request) -> None:
    """Refuses requests by another name than this machine's, and those that a browser sends for another origin."""
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    for header, value, good in (("host", host, _HOST.fullmatch(host)), ("origin", origin, origin == f"http://{host}")):
        if value is not None and not good:
            raise Refused(f"requests for the {header} {value!r} are not answered", status=403, code="forbidden_host")


async def _body(request: Request) -> bytes:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused("the content type must be application/json", status=415)
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise Refused(f"the request is larger than {MOST_BYTES:,} bytes", status=413)
    return bytes(body)


def _job(steered: Steered, question: Question, chat: bool) -> _Job:
    """In the worker's thread. Raises Refused for another model, for prompts that it cannot read, and for edits that it
    cannot make."""
    lm = steered.lm
    if question.model not in ("", steered.name):
        raise Refused(
            f"the model {question.model!r} is not here; {steered.name!r} is",
            status=404,
            param="model",
            code="model_not_found",
        )
    try:
        edits = together([[edit.change() for edit in steered.opened(question.edits)]])
    except UnweaveError as error:
        raise _refusal(error, "unweave.edits", "invalid_edit") from None
    param = "messages" if chat else "prompt"
    if chat and not has_template(lm.tokenizer):
        raise Refused("this model has no chat template: use /v1/completions", param=param)
    try:
        if chat:
            tokens = lm.chat([question.messages or []], side="left", add_generation_prompt=True)
        else:
            tokens = lm.tokenize([question.prompt], side="left")
    except UnweaveError as error:
        raise _refusal(error, param) from None
    n, limit = tokens.ids.shape[1], int(getattr(lm.model.config, "max_position_embeddings", 0) or 1 << 40)
    new = question.max_tokens or min(USUAL_TOKENS, max(1, limit - n))
    if n + new > limit:
        raise Refused(
            f"the model has {limit:,} positions; the prompt has {n:,} tokens, and {new:,} more are asked for",
            param=param,
            code="context_length_exceeded",
        )
    persist = steered.persist if question.persist is None else question.persist
    kind = "chatcmpl" if chat else "cmpl"
    name = f"{kind}-{uuid.uuid4().hex}"
    return _Job(question, tokens, edits, new, chat, name, int(time.time()), threading.Event(), persist)


async def _events(steered: Steered, job: _Job) -> AsyncGenerator[Any]:
    """The pieces of the answer as they are written, and last (why it ended, how many tokens it has)."""
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()

    def put(piece: str) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, piece)

    def written(work: asyncio.Future[tuple[str, int]]) -> None:
        steered.waiting -= 1
        queue.put_nowait(work.exception() or work.result())

    steered.waiting += 1
    loop.run_in_executor(steered.worker, _write, steered.lm, job, put).add_done_callback(written)
    try:
        while True:
            event = await queue.get()
            if isinstance(event, BaseException):
                raise event
            yield event
            if isinstance(event, tuple):
                return
    finally:
        job.cancelled.set()


def _write(lm: LM, job: _Job, put: Callable[[str], None]) -> tuple[str, int]:
    """Writes the answer, piece by piece, in the worker's thread. Why it ended, and how many tokens it has."""
    ids: list[int] = []
    ended = "stop"

    def texts() -> Generator[str]:
        nonlocal ended
        asked = job.question
        new = decode(
            lm,
            job.tokens,
            job.edits,
            max_new_tokens=job.new,
            temperature=asked.temperature,
            seed=[asked.seed],
            persist=job.persist,
        )
        with contextlib.closing(new):
            for one in new:
                if job.cancelled.is_set() or int(one[0]) in lm.end_ids:
                    return
                ids.append(int(one[0]))
                yield lm.decode(ids)
        ended = "length"

    with contextlib.closing(texts()) as growing:
        for piece in pieces_until(growing, job.question.stop):
            put(piece)
    return ended, len(ids)


async def _stream(steered: Steered, job: _Job, events: AsyncIterator[Any]) -> AsyncIterator[str]:
    """The answer as server-sent events."""

    def event(content: Mapping[str, Any]) -> str:
        return f"data: {json.dumps(content)}\n\n"

    try:
        if job.chat:
            yield event(_object(steered, job, {"delta": {"role": "assistant", "content": ""}}, None))
        async for one in events:
            if isinstance(one, str):
                yield event(_object(steered, job, {"delta": {"content": one}} if job.chat else {"text": one}, None))
                continue
            yield event(_object(steered, job, {"delta": {}} if job.chat else {"text": ""}, one[0]))
            if job.question.with_usage:
                yield event(_object(steered, job, None, None) | {"usage": _usage(job, one[1])})
    except Exception as error:
        yield event(_refusal(error).body)
    yield "data: [DONE]\n\n"


def _object(steered: Steered, job: _Job, choice: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
    """What OpenAI's clients read, with one choice or none; a part of a stream where that is asked for."""
    kind = ("chat.completion.chunk" if job.question.stream else "chat.completion") if job.chat else "text_completion"
    choices = [] if choice is None else [{"index": 0, **choice, "logprobs": None, "finish_reason": reason}]
    about = {"id": job.id, "object": kind, "created": job.created, "model": steered.name}
    return {**about, "choices": choices, "unweave": {"seed": job.question.seed}}


def _whole(steered: Steered, job: _Job, text: str, reason: str, n: int) -> dict[str, Any]:
    choice = {"message": {"role": "assistant", "content": text}} if job.chat else {"text": text}
    return _object(steered, job, choice, reason) | {"usage": _usage(job, n)}


def _usage(job: _Job, n: int) -> dict[str, int]:
    prompt = job.tokens.n_tokens
    return {"prompt_tokens": prompt, "completion_tokens": n, "total_tokens": prompt + n}
