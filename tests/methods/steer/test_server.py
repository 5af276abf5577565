"""The server of the steered model: OpenAI's form, streams, edits by request, and everything it refuses."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from unweave.core.site import Site
from unweave.lm.model import LM
from unweave.methods.steer import server
from unweave.methods.steer.protocol import pieces_until
from unweave.methods.steer.server import Steered, app
from unweave.methods.steer.spec import EditSpec
from unweave.sae.activations import ReLU
from unweave.sae.edits import together
from unweave.sae.module import SAE

LOW, HIGH = Site("resid_post", 0), Site("resid_post", 1)
TALK = [{"role": "user", "content": "Hi"}]
EDIT = {"latent": "resid_post.1/4", "mode": "add", "value": 9.0}


def _saes() -> dict[Site, SAE]:
    g = torch.Generator().manual_seed(0)
    shapes = ((32, 24), (24,), (24, 32), (32,))
    return {s: SAE(*(torch.randn(*n, generator=g) * 0.3 for n in shapes), ReLU(), read=s) for s in (LOW, HIGH)}


@pytest.fixture
def steered(tiny_lm: Callable[..., LM]) -> Steered:
    return Steered(
        tiny_lm(), _saes(), (EditSpec(latent="resid_post.0/3", value=2.0),), lambda site, latent: 3.0, name="tiny"
    )


@pytest.fixture
def client(steered: Steered) -> Iterator[TestClient]:
    with TestClient(app(steered), base_url="http://127.0.0.1:8000", raise_server_exceptions=False) as one:
        yield one


def ask(client: TestClient, path: str = "/v1/chat/completions", **fields: Any) -> Any:
    about = {"messages": TALK} if "chat" in path else {"prompt": "Hi"}
    return client.post(path, json={"model": "tiny", "temperature": 0, "max_tokens": 8, **about, **fields})


def expected(steered: Steered, edits: list[Any], chat: bool = True, **options: Any) -> tuple[str, int]:
    lm = steered.lm
    tokens = lm.chat([TALK], side="left", add_generation_prompt=True) if chat else lm.tokenize(["Hi"], side="left")
    ids = lm.generate_ids(tokens, edits, **{"max_new_tokens": 8, **options})[0].tolist()
    n = next((place for place, one in enumerate(ids) if one in lm.end_ids), len(ids))
    return lm.decode(ids[:n]), n


def _edits(steered: Steered, own: bool) -> list[Any]:
    low, high = steered.saes[LOW], steered.saes[HIGH]
    return [low.clamp({3: 2.0}), *([high.add({4: 9.0})] if own else [])]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_answers_are_the_librarys(client: TestClient, steered: Steered, chat: bool, own: bool) -> None:
    path = "/v1/chat/completions" if chat else "/v1/completions"
    extra = {"unweave": {"edits": [EDIT]}} if own else {}
    text, n = expected(steered, _edits(steered, own), chat)
    answer = ask(client, path, **extra).json()
    choice = answer["choices"][0]
    assert (choice["message"]["content"] if chat else choice["text"]) == text
    assert choice["finish_reason"] == ("length" if n == 8 else "stop")
    assert (
        answer["usage"]["completion_tokens"] == n and answer["object"] == ("chat." if chat else "text_") + "completion"
    )
    assert text != expected(steered, [], chat)[0]
    lines = ask(client, path, stream=True, stream_options={"include_usage": True}, **extra).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    parts = [e["choices"][0] for e in events[:-1]]
    assert "".join(p["delta"].get("content", "") if chat else p["text"] for p in parts) == text
    assert parts[-1]["finish_reason"] == choice["finish_reason"] and events[-1]["usage"] == answer["usage"]
    assert len({e["id"] for e in events}) == 1 and len(parts) > 3


def test_strengths_persistence_seeds_and_stops_are_honoured(client: TestClient, steered: Steered) -> None:
    edits = [*_edits(steered, False), steered.saes[HIGH].clamp({4: 6.0}, when=steered.saes[LOW].fires(2, 0.1))]
    own = {"edits": [{"latent": "resid_post.1/4", "strength": 2, "when": "resid_post.0/2>0.1"}], "persist": False}
    content = ask(client, unweave=own, temperature=1, seed=5).json()
    text, _ = expected(steered, edits, persist=False, temperature=1.0, seed=[5])
    assert content["choices"][0]["message"]["content"] == text and content["unweave"] == {"seed": 5}
    first, second = (ask(client, temperature=1).json()["unweave"]["seed"] for _ in range(2))
    assert first != second
    whole = ask(client).json()["choices"][0]["message"]["content"]
    stopped = ask(client, stop=[whole[2:4], "never there"]).json()["choices"][0]
    assert stopped["message"]["content"] == whole[: whole.index(whole[2:4])] and stopped["finish_reason"] == "stop"
    assert not steered.lm.sessions and steered.waiting == 0


def test_models_and_neutral_fields(client: TestClient) -> None:
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["tiny"]
    neutral = {
        "response_format": {"type": "text"},
        "n": 1,
        "top_p": 1.0,
        "presence_penalty": 0,
        "logprobs": False,
        "user": "me",
        "tools": None,
    }
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert ask(client, messages=parts, **neutral).json()["choices"] == ask(client).json()["choices"]


@pytest.mark.parametrize(
    ("fields", "status", "param", "message"),
    [
        ({"unweave": {"edits": [{"latent": "resid_post.1/99"}]}}, 400, "unweave.edits", "latent 99 does not exist"),
        ({"unweave": {"edits": [{"latent": "resid_post.2/9"}]}}, 400, "unweave.edits", "no SAE is at resid_post.2"),
        ({"unweave": {"edits": [{"latent": "resid_post.0/3"}]}}, 400, "unweave.edits", "set twice"),
        ({"unweave": {"edits": [{"latnet": "resid_post.0/3"}]}}, 400, "unweave", "latnet"),
        ({"unweave": {"edits": [{"latent": "3", "mode": "x"}]}}, 400, "unweave", "mode"),
        ({"unweave": {"edits": ["3"]}}, 400, "unweave", "an object with a latent"),
        ({"unweave": {"edits": "3"}}, 400, "unweave", "edits"),
        ({"unweave": {"edit": []}}, 400, "unweave", "no field 'edit'"),
        ({"unweave": {"persist": "no"}}, 400, "unweave", "persist"),
        ({"unweave": 3}, 400, "unweave", "unweave"),
        ({"unweave": {"edits": [{"latent": "resid_post.1/3"}] * 257}}, 400, "unweave", "more than 256"),
        ({"unweave": {"edits": [{"latent": "resid_post.1/3", "value": 1e39}]}}, 400, "unweave.edits", "[1e+39]: give"),
        ({"top_k": 5}, 400, "top_k", "unknown field 'top_k'"),
        ({"top_p": 0.5}, 400, "top_p", "not supported"),
        ({"n": True}, 400, "n", "not supported"),
        ({"max_tokens": 100}, 400, "messages", "64 positions"),
        ({"max_completion_tokens": 9}, 400, "max_tokens", "differ"),
        ({"max_tokens": 0}, 400, "max_tokens", "max_tokens"),
        ({"temperature": -1}, 400, "temperature", "temperature"),
        ({"temperature": -1e-10}, 400, "temperature", "temperature"),
        ({"temperature": "hot"}, 400, "temperature", "temperature"),
        ({"seed": 1.5}, 400, "seed", "seed"),
        ({"stop": ["a", ""]}, 400, "stop", "stop"),
        ({"stream": "yes"}, 400, "stream", "stream"),
        ({"stream": True, "stream_options": {"chunks": 3}}, 400, "stream_options", "include_usage"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "of a stream"),
        ({"messages": [{"role": "user"}]}, 400, "messages", "a role and a content"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "messages", "content is 3"),
        ({"messages": [{"role": "user", "content": "Hi", "name": "me"}]}, 400, "messages", "'name'"),
        ({"messages": []}, 400, "messages", "must be given"),
        ({"messages": "Hi"}, 400, "messages", "messages"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, 400, "messages", "robot"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", "type text"),
        ({"messages": [{"role": "user", "content": "x" * 90}]}, 400, "messages", "64 positions"),
        ({"model": 4}, 400, "model", "not text"),
        ({"model": "gpt-4"}, 404, "model", "'gpt-4' is not here"),
    ],
)
def test_requests_that_cannot_be_answered(
    client: TestClient, fields: dict[str, Any], status: int, param: str, message: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(server, "decode", None)  # nothing is generated
    answer = ask(client, **fields)
    error = answer.json()["error"]
    assert answer.status_code == status and error["param"] == param and message in error["message"]
    assert error["type"] == "invalid_request_error"


def test_bodies_paths_hosts_and_origins(client: TestClient, monkeypatch: Any) -> None:
    monkeypatch.setattr(server, "MOST_BYTES", 1000)
    path, kind = "/v1/chat/completions", {"content-type": "application/json"}
    asked = json.dumps({"messages": TALK, "max_tokens": 1})
    rebinding, origin = kind | {"host": "evil.example:8000"}, kind | {"origin": "http://evil.example"}
    for answer, status, message in (
        (client.post(path, content="{", headers=kind), 400, "not valid JSON"),
        (client.post(path, content="[1]", headers=kind), 400, "the request"),
        (client.post(path, content=b"\xff", headers=kind), 400, "UTF-8"),
        (client.post(path, content="[" * 900, headers=kind), 400, "the request"),
        (client.post(path, content="x" * 1001, headers=kind), 413, "larger than 1,000 bytes"),
        (client.post(path, content=asked), 415, "application/json"),
        (client.post(path, content=asked, headers=rebinding), 403, "evil.example"),
        (client.post(path, content=asked, headers=origin), 403, "evil.example"),
        (client.get("/v1/models", headers={"host": "127.0.0.1.evil.example"}), 403, "evil.example"),
        (client.get("/v1/models", headers={"host": ""}), 403, "host"),
        (client.get("/v1/models", headers={"host": "evil.example@localhost"}), 403, "evil.example"),
        (client.get("/v1/models", headers={"origin": "http://127.0.0.1:3000"}), 403, "origin"),
        (client.get("/v1/models", headers={"origin": "null"}), 403, "origin"),
        (client.get("/v1/models/", follow_redirects=False), 404, "/v1/models/"),
        (client.get("/v2"), 404, "/v2"),
        (client.get(path), 405, path),
    ):
        error = answer.json()["error"]
        assert answer.status_code == status and message in error["message"], answer.text
    for host in ("localhost:8000", "[::1]:8000", "127.0.0.1"):
        assert client.post(path, content=asked, headers=kind | {"host": host}).status_code == 200


def test_faults_of_ours_show_nothing_of_the_inside(client: TestClient, steered: Steered, monkeypatch: Any) -> None:
    def broken(*args: Any, **options: Any) -> Iterator[Any]:
        raise RuntimeError("secret path")

    monkeypatch.setattr(server, "decode", broken)
    answer = ask(client)
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    stream = ask(client, stream=True).text
    assert "our fault" in stream and "secret" not in stream + answer.text and stream.endswith("data: [DONE]\n\n")
    monkeypatch.setattr(server, "MOST_WAITING", 0)
    assert ask(client).status_code == 429


def test_edits_of_a_server_that_cannot_be_made_are_refused_at_the_start(tiny_lm: Callable[..., LM]) -> None:
    from unweave.core.errors import UnweaveError

    for edit, message in (
        ({"latent": "resid_post.1/99"}, "99 does not exist"),
        ({"latent": "resid_post.1/9"}, "value"),
    ):
        with pytest.raises(UnweaveError, match=message):
            Steered(tiny_lm(), _saes(), (EditSpec.from_dict(edit),))


def test_a_stream_that_is_left_frees_the_model(steered: Steered) -> None:
    cancelled = threading.Event()
    cancelled.set()
    puts: list[Any] = []
    question = server.read_question(json.dumps({"messages": TALK, "max_tokens": 8}).encode(), chat=True)
    tokens = steered.lm.chat([TALK], side="left", add_generation_prompt=True)
    job = server._Job(question, tokens, together([]), 8, True, "x", 0, cancelled, True)
    assert server._write(steered.lm, job, puts.append) == ("stop", 0)
    assert puts == [] and not steered.lm.sessions


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_the_model_and_its_tokenizer_are_the_workers_alone(
    client: TestClient, steered: Steered, monkeypatch: Any, path: str
) -> None:
    where: list[str] = []

    def watched(function: Any) -> Any:
        return lambda *args, **options: (where.append(threading.current_thread().name), function(*args, **options))[1]

    for name in ("chat", "tokenize", "decode"):
        monkeypatch.setattr(steered.lm, name, watched(getattr(steered.lm, name)))
    monkeypatch.setattr(server, "together", watched(together))
    assert ask(client, path, unweave={"edits": [EDIT]}).status_code == 200
    assert ask(client, path, model="other").status_code == 404 and steered.waiting == 0
    assert len(where) > 3 and {name.rpartition("_")[0] for name in where} == {"model"}


def test_an_answer_that_nobody_waits_for_ends(client: TestClient, steered: Steered, monkeypatch: Any) -> None:
    written: list[int] = []

    def slow(*args: Any, **options: Any) -> Iterator[torch.Tensor]:
        for step in range(10_000):
            written.append(step)
            time.sleep(0.001)
            yield torch.tensor([40 + step % 9])

    async def gone(request: Any) -> bool:
        return len(written) > 5

    monkeypatch.setattr(server, "decode", slow)
    monkeypatch.setattr("starlette.requests.Request.is_disconnected", gone)
    assert ask(client).status_code == 499
    steered.worker.submit(int).result()  # the worker is free
    assert len(written) < 10_000


def test_edits_that_break_the_model_are_refused_by_name(client: TestClient) -> None:
    many = [EDIT | {"latent": f"resid_post.1/{j}", "value": 3e38, "where": "all"} for j in range(20)]  # their sum
    broken = {"unweave": {"edits": many}}
    answer = ask(client, **broken)
    assert answer.status_code == 400 and "not finite" in answer.json()["error"]["message"]
    assert "not finite" in ask(client, stream=True, **broken).text


@pytest.mark.parametrize(
    ("texts", "stop", "pieces"),
    [
        (["a", "ab", "abc"], [], ["a", "b", "c"]),
        (["a", "aE", "aEN", "aEND", "aENDx"], ["END"], ["a"]),
        (["a", "aE", "aEN", "aENx"], ["END"], ["a", "ENx"]),
        (["a", "aE"], ["END"], ["a", "E"]),
        (["a\ufffd", "aé", "aéb"], [], ["a", "é", "b"]),
        (["aENDb", "aENDbc"], ["b", "END"], ["a"]),
    ],
)
def test_what_may_become_a_stop_waits(texts: list[str], stop: list[str], pieces: list[str]) -> None:
    assert list(pieces_until(iter(texts), stop)) == pieces


def test_openais_client_talks_to_it(steered: Steered) -> None:
    """Over loopback, with the real client and the real server."""
    import socket

    import uvicorn
    from openai import BadRequestError, OpenAI

    listening = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(app(steered), log_level="warning"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        with OpenAI(base_url=url, api_key="none", max_retries=0) as remote:
            options: Any = {"model": "tiny", "messages": TALK, "temperature": 0, "max_tokens": 8}
            options["extra_body"] = {"unweave": {"edits": [EDIT]}}
            text, _ = expected(steered, _edits(steered, True))
            assert remote.models.list().data[0].id == "tiny"
            assert remote.chat.completions.create(**options).choices[0].message.content == text
            parts = [
                part.choices[0].delta.content or "" for part in remote.chat.completions.create(**options, stream=True)
            ]
            assert "".join(parts) == text and len(parts) > 3
            options["extra_body"] = {"unweave": {"edits": [{"latent": "resid_post.1/99"}]}}
            with pytest.raises(BadRequestError, match="does not exist"):
                remote.chat.completions.create(**options)
    finally:
        running.should_exit = True
        thread.join(10)
        listening.close()
