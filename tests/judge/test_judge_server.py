"""judge/client.py against servers that misbehave: keys in what they say, drips, floods, redirects, counts that lie."""

from __future__ import annotations

import base64
import json
import logging
import random
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from helpers.raw_server import KEY, Raw, completion, http, leaks
from unweave.core.errors import UnweaveError
from unweave.core.shown import plain, plain_json
from unweave.judge.base import Budget, CachedJudge
from unweave.judge.secrets import Secret
from unweave.judge.spec import JudgeSpec


def talk(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture
def raw() -> Iterator[Raw]:
    made = Raw()
    yield made
    made.close()


# -- the key -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 92, 97, 280, 285, 290, 299])
@pytest.mark.parametrize("status", ["500 Oh", "400 No", "401 No", "200 OK", "302 Away"])
def test_no_part_of_a_key_is_left_where_words_are_cut(
    raw: Raw, tmp_path: Path, caplog: pytest.LogCaptureFixture, before: int, status: str
) -> None:
    caplog.set_level(logging.DEBUG)
    body = b"y" * before + KEY.encode() if status[0] == "2" else json.dumps({"error": {"message": "y" * before + KEY}})
    sent = http(
        f"{status} {KEY}", body if isinstance(body, bytes) else body.encode(), f"X-Key: {KEY}", f"Location: {KEY}"
    )
    raw.says = lambda n, sock: sent
    try:
        (reply,) = CachedJudge(raw.connect(attempts=2), tmp_path).ask([talk("q")])
        said = reply.failure
    except UnweaveError as error:
        said = str(error)
    assert said and caplog.text
    assert not leaks(said) and not leaks(caplog.text)


def test_parts_of_a_key_in_any_form_are_taken_out() -> None:
    rng, secret = random.Random(0), Secret(KEY)
    forms: list[Callable[[str], str]] = [
        str,
        lambda part: quote(part, safe=""),
        lambda part: json.dumps(part)[1:-1],
        lambda part: "".join(f"\\u{ord(c):04x}" for c in part),
        lambda part: "\u200b".join(part),
        lambda part: f"Bearer {part}",
    ]
    for _ in range(300):
        start = rng.randrange(len(KEY) - 6)
        part = KEY[start : start + rng.randrange(6, len(KEY))]
        form = rng.choice(forms)
        text = f"told <{form(part)}> twice <{part}>"
        assert secret.clean(text) == text.replace(
            form(part), form(part)[:7] * (form(part)[:7] == "Bearer ") + "[key]"
        ).replace(part, "[key]")
    for name in ("", "u", "me", "user:", "a long name:"):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            packed = encode(f"{name}{KEY}:rest".encode()).decode()
            left = secret.clean(f"<{packed}>").strip("<>").split("[key]")
            assert len(left) == 2
            for piece in left:  # whatever of it is decoded, from any of its letters on
                for at in range(4):
                    tail = piece[at:]
                    assert not leaks(base64.b64decode(tail[: len(tail) // 4 * 4], altchars=b"-_").decode("latin-1"))
    assert secret.clean("a plain sentence of no key, 012345") == "a plain sentence of no key, [key]"
    assert secret.clean("nothing of it") == "nothing of it"
    assert Secret("x").clean("an x, and examples") == "an [key], and examples"
    assert Secret("abcdef").clean("abcdefabcdef abcde") == "[key] abcde"


def test_a_reply_with_parts_of_the_key_is_kept_without_them(raw: Raw, tmp_path: Path) -> None:
    raw.says = lambda n, sock: http("200 OK", completion(f"half is {KEY[:15]} and {KEY[-9:]}, \x1b[31mred"))
    (reply,) = CachedJudge(raw.connect(), tmp_path).ask([talk("q")])
    assert reply.text == "half is [key] and [key], \x1b[31mred"
    (kept,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert not leaks(kept.read_text()) and b"\x1b" not in kept.read_bytes()


@pytest.mark.parametrize("where", ["plain", "quoted", "model"])
def test_a_key_in_another_field_is_refused_before_it_is_written(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setenv("JUDGE_TEST_KEY", KEY)
    url = {"plain": f"https://a/{KEY}/v1", "quoted": f"https://a/{quote(KEY, safe='')}/v1", "model": "https://a/v1"}
    with pytest.raises(UnweaveError, match="holds the key of JUDGE_TEST_KEY") as caught:
        JudgeSpec(base_url=url[where], model=f"m{KEY}" if where == "model" else "m", api_key_env="JUDGE_TEST_KEY")
    assert not leaks(str(caught.value))
    monkeypatch.setenv("JUDGE_TEST_KEY", "ollama")
    JudgeSpec(base_url="http://localhost/ollama/v1", model="ollama/x", api_key_env="JUDGE_TEST_KEY")


@pytest.mark.parametrize(
    "url", [KEY, f"user:{KEY}@a/v1", f"http://[{KEY}/v1", f"http://a:{KEY}/v1", f"http://u:{KEY}@[", f"ftp://u:{KEY}@a"]
)
def test_what_is_no_address_is_not_repeated(url: str) -> None:
    with pytest.raises(UnweaveError) as caught:
        JudgeSpec(base_url=url)
    assert not leaks(str(caught.value))


@pytest.mark.parametrize(
    "url", ["http://[::1/v1", "http://a:99999/v1", "http://a b/v1", "http://a/\udc80", "http://a/\n"]
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(UnweaveError, match="not an http or https address"):
        JudgeSpec(base_url=url)


# -- time, size and place ------------------------------------------------------------------------------------------


def drip(head: bytes, every: float = 0.02) -> Callable[[int, socket.socket], bytes]:
    def says(n: int, sock: socket.socket) -> bytes:
        sock.sendall(head)
        for _ in range(200):  # four seconds, so that a failing test ends too
            sock.sendall(b"x")
            time.sleep(every)
        return b""

    return says


@pytest.mark.parametrize(
    "head",
    [b"", b"HTTP/1.1 200 OK\r\nX-A: ", b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b"HTTP/1.1 500 No\r\n\r\n"],
)
def test_a_dripping_server_has_its_time_once_and_no_more(raw: Raw, head: bytes) -> None:
    raw.says = drip(head)
    started = time.monotonic()
    (reply,) = CachedJudge(raw.connect(timeout=0.4, attempts=6)).ask([talk("q")])
    assert time.monotonic() - started < 1.2
    assert reply.text is None and "timed out" in reply.failure and "(1 try)" in reply.failure
    assert reply.tokens >= 1  # it may have been paid for


def test_tries_share_the_time(raw: Raw) -> None:
    def says(n: int, sock: socket.socket) -> bytes:
        time.sleep(0.3)
        return http("503 Busy", b"{}")

    raw.says = says
    started = time.monotonic()
    (reply,) = CachedJudge(raw.connect(timeout=0.5, attempts=6)).ask([talk("q")])
    assert time.monotonic() - started < 1.0 and len(raw.requests) == 2 and "(2 tries)" in reply.failure


def test_whoever_stops_asking_does_not_wait(raw: Raw) -> None:
    drips = drip(b"HTTP/1.1 200 OK\r\n\r\n")
    raw.says = lambda n, sock: drips(n, sock) if n else http("200 OK", completion())
    answers = raw.connect(timeout=30.0, at_once=2).answer([talk("a"), talk("b"), talk("c")], Budget())
    next(answers)
    started = time.monotonic()
    answers.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 1.0


@pytest.mark.parametrize("status", ["200 OK", "500 No", "400 No"])
def test_floods_are_cut_off(raw: Raw, status: str) -> None:
    sent = []

    def says(n: int, sock: socket.socket) -> bytes:
        sock.sendall(f"HTTP/1.1 {status}\r\n\r\n".encode())
        for _ in range(64):
            sock.sendall(b" " * (1 << 20))
            sent.append(1)
        return b""

    raw.says = says
    (reply,) = CachedJudge(raw.connect()).ask([talk("q")])
    assert reply.text is None and "has more than 2,097,152 bytes" in reply.failure
    assert len(sent) < 32 and len(raw.requests) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_prompts_and_key_stay_with_the_address_that_was_given(raw: Raw, status: int) -> None:
    other = Raw()
    try:
        for place in (
            f"{other.url}/chat/completions",
            raw.url.replace("http:", "https:"),
            "//127.0.0.2/v1",
            "http://[",
            "",
        ):
            raw.says = lambda n, sock, place=place: http(f"{status} Away", b"", f"Location: {place}")
            with pytest.raises(UnweaveError, match=rf"sends on to another address \({status}\)"):
                CachedJudge(raw.connect()).ask([talk("q")])
        assert len(raw.requests) == 5 and not other.requests
    finally:
        other.close()


def test_a_redirect_on_the_same_server_is_followed(raw: Raw) -> None:
    raw.says = lambda n, sock: http("200 OK", completion()) if n else http("307 There", b"", "Location: /v2/chat")
    assert CachedJudge(raw.connect()).ask([talk("q")])[0].text == "fine"
    assert raw.requests[1].startswith(b"POST /v2/chat ") and b'"q"' in raw.requests[1]
    raw.says = lambda n, sock: http("307 There", b"", f"Location: /v{n}/chat")
    (reply,) = CachedJudge(raw.connect(attempts=1)).ask([talk("q")])
    assert reply.text is None and len(raw.requests) < 40


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\0\xff" * 99,
        b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n\x1f\x8bnothing",
        b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000,
        b"HTTP/1.1 200 OK\r\n\r\n" + b'{"a":' * 100_000,
        b'HTTP/1.1 500 No\r\n\r\n{"error": ' + b"[" * 900 + b"]" * 900 + b"}",
        b"HTTP/1.1 500 No\r\n\r\n" + b"[" * 100_000,
        b"HTTP/1.1 99999 No\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 50_000,
    ],
)
def test_nonsense_is_a_failure_with_words(raw: Raw, sent: bytes) -> None:
    raw.says = lambda n, sock: sent
    (reply,) = CachedJudge(raw.connect(attempts=2)).ask([talk("q")])
    assert reply.text is None and reply.failure and len(reply.failure) < 500
    assert plain(reply.failure) == reply.failure


def test_what_a_server_says_cannot_paint_the_terminal(raw: Raw) -> None:
    raw.says = lambda n, sock: http(
        "401 No", json.dumps({"message": "\x1b]0;title\x07\x9b31m\u202egnp.exe\r\nok"}).encode()
    )
    with pytest.raises(UnweaveError) as caught:
        CachedJudge(raw.connect()).ask([talk("q")])
    assert caught.value.what == "the server answered 401: \\x1b]0;title\\x07\\x9b31m\\u202egnp.exe ok"
    odd = "".join(map(chr, range(0xA0))) + "a\u202e\u2066\u200f\ud800é\u200d\U0001f600"
    assert json.loads(plain_json(json.dumps(odd, ensure_ascii=False))) == odd
    assert plain(odd).isprintable() is False and plain("\t\né\u200d\U0001f600") == "\t\né\u200d\U0001f600"
    assert not set(plain(odd)) & set(
        map(chr, [*range(9), *range(11, 32), *range(127, 160), 0x202E, 0x2066, 0x200F, 0xD800])
    )


def test_no_other_services_names_are_sent(raw: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-of-mine")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "project-of-mine")
    CachedJudge(raw.connect()).ask([talk("q")])
    assert b"of-mine" not in raw.requests[0]


def test_what_is_for_this_machine_goes_to_no_proxy(raw: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Raw()
    try:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url.removesuffix("/v1"))
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        assert CachedJudge(raw.connect()).ask([talk("q")])[0].text == "fine"
        assert len(raw.requests) == 1 and not proxy.requests
    finally:
        proxy.close()


# -- what it costs -------------------------------------------------------------------------------------------------


USAGES: list[Any] = [
    None,
    {},
    [],
    "many",
    {"prompt_tokens": 0, "completion_tokens": 0},
    {"prompt_tokens": -5, "completion_tokens": -(10**30)},
    {"prompt_tokens": "7", "completion_tokens": None},
    {"prompt_tokens": True, "completion_tokens": True},
    {"prompt_tokens": 10**40, "completion_tokens": 10**12},
    {"prompt_tokens": 1.5, "completion_tokens": [3]},
]


@pytest.mark.parametrize("usage", USAGES)
def test_a_budget_of_tokens_holds_whatever_the_server_counts(raw: Raw, tmp_path: Path, usage: Any) -> None:
    """A prompt of 400 and a reply of 200 letters are no more than 600 tokens; they are counted as half of that."""
    raw.says = lambda n, sock: http("200 OK", completion("b" * 200, usage=usage))
    asked = [talk(f"{i}" * 400) for i in range(9)]
    budget = Budget(max_tokens=1000)
    with pytest.raises(UnweaveError, match=r"budget is spent .* with 4 of 9 replies"):
        CachedJudge(raw.connect(at_once=1), tmp_path, budget).ask(asked)
    assert len(raw.requests) == 4 and budget.tokens == 4 * (200 + 100 + 16)


def test_tries_that_came_to_nothing_are_counted_too(raw: Raw) -> None:
    raw.says = lambda n, sock: http("200 OK", b"{}")
    budget = Budget(max_tokens=500)
    with pytest.raises(UnweaveError, match=r"budget is spent .* with 0 of 9 replies"):
        CachedJudge(raw.connect(at_once=1), budget=budget).ask([talk(f"{i}" * 400) for i in range(9)])
    assert len(raw.requests) == 3 and budget.tokens == 3 * 208


def test_failures_are_no_replies_that_are_there(raw: Raw, tmp_path: Path) -> None:
    raw.says = lambda n, sock: http("400 No", b"{}") if n % 2 else http("200 OK", completion())
    with pytest.raises(UnweaveError, match="with 2 of 9 replies"):
        CachedJudge(raw.connect(at_once=1), tmp_path, Budget(max_requests=4)).ask([talk(str(i)) for i in range(9)])


@pytest.mark.parametrize(
    "damage", [b"[" * 9999, b"\xff", b'{"reply": {"text": "a", "prompt_tokens": "x", "new_tokens": 1, "cut": false}}']
)
def test_damaged_kept_replies_are_asked_again(raw: Raw, tmp_path: Path, damage: bytes) -> None:
    CachedJudge(raw.connect(), tmp_path).ask([talk("q")])
    (kept,) = (path for path in tmp_path.rglob("*") if path.is_file())
    kept.write_bytes(damage)
    assert CachedJudge(raw.connect(), tmp_path).ask([talk("q")])[0].text == "fine" and len(raw.requests) == 2
