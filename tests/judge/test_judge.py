"""judge/: kept replies and budgets on a script, the client against a server of our own, a local judge on a tiny LM."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from unweave.core.errors import UnweaveError
from unweave.judge.base import Budget, CachedJudge, Conversation, Reply, check_judge, open_judge
from unweave.judge.client import ChatServer, Patience
from unweave.judge.local import LocalModel, weights_digest
from unweave.judge.scripted import Scripted
from unweave.judge.spec import JudgeSpec

KEY = "sk-very-secret-0123456789"


def talk(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def talks(n: int) -> list[list[dict[str, str]]]:
    return [talk(f"question {i}") for i in range(n)]


def echo(conversation: Conversation) -> str:
    return f"re: {conversation[-1]['content']}"


def files_under(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# -- kept replies and budgets --------------------------------------------------------------------------------------


def test_replies_come_in_order_and_are_asked_once(tmp_path: Path) -> None:
    script = Scripted(echo)
    judge = CachedJudge(script, tmp_path)
    asked = [*talks(3), talk("question 1")]
    assert [r.text for r in judge.ask(asked)] == [f"re: question {i}" for i in (0, 1, 2, 1)]
    assert len(script.asked) == 3
    again = CachedJudge(Scripted(lambda _: pytest.fail("asked again")), tmp_path).ask(asked)
    assert [(r.text, r.kept, r.prompt_tokens) for r in again] == [(f"re: question {i}", True, 2) for i in (0, 1, 2, 1)]


def test_other_models_settings_and_messages_have_replies_of_their_own(tmp_path: Path) -> None:
    CachedJudge(Scripted(["first"]), tmp_path).ask([talk("q")])
    for script in (Scripted(["other model"], name="other"), Scripted(["other settings"])):
        if script.name == "scripted":
            script.settings = {"kind": "scripted", "temperature": 1}
        (reply,) = CachedJudge(script, tmp_path).ask([talk("q")])
        assert reply.text is not None and reply.text.startswith("other")
    system = [{"role": "system", "content": "q"}]
    assert CachedJudge(Scripted(["as system"]), tmp_path).ask([system])[0].text == "as system"
    assert CachedJudge(Scripted([]), tmp_path).ask([talk("q")])[0].text == "first"


def test_a_kept_reply_is_a_readable_file_and_a_damaged_one_is_asked_again(tmp_path: Path) -> None:
    CachedJudge(Scripted(["näive"]), tmp_path).ask([talk("q")])
    (path,) = files_under(tmp_path)
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["model"] == "scripted" and content["messages"] == talk("q")
    assert content["reply"] == {"text": "näive", "prompt_tokens": 1, "new_tokens": 1, "cut": False}
    for damage in ("{", "[]", '{"reply": {"text": 3, "prompt_tokens": 1, "new_tokens": 1, "cut": false}}'):
        path.write_text(damage)
        assert CachedJudge(Scripted(["again"]), tmp_path).ask([talk("q")])[0].text == "again"


def test_failures_are_returned_but_not_kept(tmp_path: Path) -> None:
    replies = CachedJudge(Scripted(["a", None, "c"]), tmp_path).ask(talks(3))
    assert [r.text for r in replies] == ["a", None, "c"] and replies[1].failure == "scripted failure"
    retried = CachedJudge(Scripted(["b"]), tmp_path).ask(talks(3))
    assert [r.text for r in retried] == ["a", "b", "c"]


def test_failing_one_after_the_other_stops_and_keeps_what_came(tmp_path: Path) -> None:
    with pytest.raises(UnweaveError, match="5 times in a row: scripted failure"):
        CachedJudge(Scripted(["a", *[None] * 9]), tmp_path).ask(talks(10))
    assert len(files_under(tmp_path)) == 1
    mixed = [None, None, None, None, "ok"] * 2
    assert sum(r.text is None for r in CachedJudge(Scripted(mixed), None).ask(talks(10))) == 8


def test_prompts_that_are_too_long_do_not_stop_the_others(tmp_path: Path) -> None:
    class Short(Scripted):
        """No room for six prompts in a row; the ones it does not answer besides are failures of its own."""

        def answer(self, conversations: Any, budget: Budget, until: str = "") -> Iterator[tuple[int, Reply]]:
            for i, reply in super().answer(conversations, budget):
                long = 2 <= i < 8
                yield i, Reply(None, "too long", of_prompt=True) if long else reply

    replies = CachedJudge(Short(echo), tmp_path).ask(talks(10))
    assert [r.text is None for r in replies] == [False] * 2 + [True] * 6 + [False] * 2
    with pytest.raises(UnweaveError, match="5 times in a row: scripted failure"):  # two before, three after
        CachedJudge(Short([None] * 11), None).ask(talks(11))


def test_the_budget_of_requests_stops_and_asking_again_goes_on(tmp_path: Path, shown_tasks: list[Any]) -> None:
    script = Scripted(echo)
    for have in (2, 4):
        with pytest.raises(UnweaveError, match=rf"budget is spent \(2 prompts .*\) with {have} of 5 replies"):
            CachedJudge(script, tmp_path, Budget(max_requests=2)).ask(talks(5))
    assert all(r.text for r in CachedJudge(script, tmp_path, Budget(max_requests=2)).ask(talks(5)))
    assert len(script.asked) == 5
    assert [task.end for task in shown_tasks] == ["stopped", "stopped", "done"]


def test_the_budget_of_tokens_counts_prompts_and_replies(tmp_path: Path) -> None:
    script = Scripted(echo)  # 2 words in, 3 out
    with pytest.raises(UnweaveError, match="budget is spent"):
        CachedJudge(script, tmp_path, Budget(max_tokens=11)).ask(talks(5))
    assert len(script.asked) == 3  # 5, 10, 15
    assert CachedJudge(script, tmp_path, Budget(max_tokens=10)).ask(talks(5))[4].text == "re: question 4"


# -- the spec ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"api_key_env": "OPENAI_API_KEY"}, "api_key_env does not apply to a model that runs here"),
        ({"timeout": 3.0}, "timeout does not apply to a model that runs here"),
        ({"base_url": "http://a/v1", "dtype": "bfloat16"}, "dtype does not apply to a server"),
        ({"base_url": "a/v1"}, "not an http or https address"),
        ({"base_url": "http://user:pass@a/v1"}, "without user, password"),
        ({"base_url": "http://a/v1?key=1"}, "without user, password"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"budget_tokens": 0}, "budget_tokens must be at least 1"),
        ({"at_once": 0}, "at_once must be at least 1"),
    ],
)
def test_options_that_would_mean_nothing_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnweaveError, match=message):
        JudgeSpec(**fields)


@pytest.mark.parametrize("host", ["a", "localhost.example.org", "10.0.0.7", "[2001:db8::1]", "0.0.0.0"])
def test_a_key_never_leaves_this_machine_unencrypted(host: str) -> None:
    with pytest.raises(UnweaveError, match="unencrypted"):
        JudgeSpec(base_url=f"http://{host}/v1", api_key_env="K")
    JudgeSpec(base_url=f"http://{host}/v1")
    for url in (f"https://{host}/v1", "http://localhost:8000/v1", "HTTP://127.0.0.3/v1", "http://[::1]:80/v1"):
        assert JudgeSpec(base_url=url, api_key_env="K").base_url == url


def test_a_key_in_place_of_its_variable_is_refused_and_not_repeated() -> None:
    with pytest.raises(UnweaveError, match="name of an environment variable") as caught:
        JudgeSpec(base_url="http://a/v1", api_key_env=KEY)
    assert KEY not in str(caught.value)


def test_budgets_do_not_change_which_question_it_is() -> None:
    one = JudgeSpec(base_url="https://a/v1", api_key_env="A_KEY")
    other = replace(one, budget_requests=3, budget_tokens=9, at_once=1, timeout=5.0)
    assert one.digest() == other.digest() != replace(one, model="other").digest()


# -- the client ----------------------------------------------------------------------------------------------------


def completion(text: str | None, reason: str = "stop") -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}


class Server:
    """A chat server on this machine. ``answer(n, body)`` gives status, headers and body of the n-th request, from 0."""

    def __init__(self) -> None:
        self.answer: Callable[[int, Any], tuple[int, dict[str, str], Any]] = lambda n, body: (
            200,
            {},
            completion(echo(body["messages"])),
        )
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.running = self.most = 0
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    n = len(server.requests)
                    server.requests.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                    server.running += 1
                    server.most = max(server.most, server.running)
                status, headers, answer = server.answer(n, body)
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                with lock:
                    server.running -= 1
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                del format, args

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def connect(self, **options: Any) -> ChatServer:
        waits = {name: options.pop(name) for name in Patience._fields if name in options}
        patience = Patience(**{"attempts": 4, "first_wait": 0.01, **waits})
        return ChatServer("m", self.url, **{"key": KEY, "patience": patience, **options})


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.thread.join()
    made.http.server_close()


def test_the_client_asks_as_it_should_and_reads_the_answer(server: Server, tmp_path: Path) -> None:
    judge = CachedJudge(server.connect(max_new_tokens=11), tmp_path)
    conversation = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "q"}]
    assert judge.ask([conversation]) == [Reply("re: q", "", 7, 3)]
    ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions" and headers["authorization"] == f"Bearer {KEY}"
    assert body == {"model": "m", "messages": conversation, "temperature": 0, "max_tokens": 11}
    judge.ask([conversation])
    assert len(server.requests) == 1


def test_many_requests_keep_their_order_and_no_more_are_in_flight_than_allowed(server: Server) -> None:
    def slowly(n: int, body: Any) -> tuple[int, dict[str, str], Any]:
        time.sleep(0.03 if n % 2 else 0.01)
        return 200, {}, completion(echo(body["messages"]))

    server.answer = slowly
    replies = CachedJudge(server.connect(at_once=3)).ask(talks(9))
    assert [r.text for r in replies] == [f"re: question {i}" for i in range(9)]
    assert server.most == 3


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_what_may_pass_is_tried_again(server: Server, status: int) -> None:
    server.answer = lambda n, body: (
        (status, {}, {"error": {"message": "busy"}}) if n < 2 else (200, {}, completion("x"))
    )
    assert CachedJudge(server.connect()).ask([talk("q")])[0].text == "x"
    assert len(server.requests) == 3


def test_the_server_says_how_long_to_wait(server: Server) -> None:
    server.answer = lambda n, body: (429, {"Retry-After": "0.3"}, {}) if n == 0 else (200, {}, completion("x"))
    started = time.monotonic()
    assert CachedJudge(server.connect(first_wait=0.001)).ask([talk("q")])[0].text == "x"
    assert time.monotonic() - started > 0.3


def test_what_never_passes_is_that_prompts_failure(server: Server, tmp_path: Path) -> None:
    def answer(n: int, body: Any) -> tuple[int, dict[str, str], Any]:
        bad = body["messages"][0]["content"] == "question 1"
        return (500, {}, {"error": {"message": f"broken {KEY}"}}) if bad else (200, {}, completion("x"))

    server.answer = answer
    replies = CachedJudge(server.connect(), tmp_path).ask(talks(3))
    assert [r.text for r in replies] == ["x", None, "x"]
    assert replies[1].failure == "the server answered 500: broken [key] (4 tries)"
    assert len(server.requests) == 6 and len(files_under(tmp_path)) == 2


def test_a_refused_prompt_is_not_tried_again(server: Server) -> None:
    server.answer = lambda n, body: (400, {}, {"error": {"message": "too long"}})
    (reply,) = CachedJudge(server.connect()).ask([talk("q")])
    assert (reply.text, reply.failure) == (None, "the server answered 400: too long")
    assert len(server.requests) == 1
    says = "This model's maximum context length is 64 tokens."
    server.answer = lambda n, body: (400, {}, {"error": {"message": says}}) if n < 8 else (200, {}, completion("x"))
    replies = CachedJudge(server.connect(at_once=1)).ask(talks(8))  # seven too long, and one that fits
    assert [r.text for r in replies] == [None] * 7 + ["x"]
    server.answer = lambda n, body: (400, {}, {"error": {"message": "unknown field"}})
    with pytest.raises(UnweaveError, match="5 times in a row"):
        CachedJudge(server.connect(at_once=1)).ask(talks(8))


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_stops_everything_and_keeps_what_came(server: Server, tmp_path: Path, status: int) -> None:
    server.answer = lambda n, body: (200, {}, completion("x")) if n < 2 else (status, {}, {"message": f"no: {KEY}"})
    with pytest.raises(UnweaveError, match=rf"the server answered {status}: no: \[key\]") as caught:
        CachedJudge(server.connect(at_once=1), tmp_path).ask(talks(9))
    assert "api_key_env" in caught.value.remedy and len(server.requests) == 3
    assert len(files_under(tmp_path)) == 2


@pytest.mark.parametrize(
    "body", [b"{not json", b"[]", b'{"choices": []}', b'{"choices": [{"message": null}]}', b"\xff"]
)
def test_malformed_answers_are_tried_again_and_then_failures(server: Server, body: bytes) -> None:
    server.answer = lambda n, asked: (200, {}, body)
    (reply,) = CachedJudge(server.connect(attempts=2)).ask([talk("q")])
    assert reply.text is None and "is not a chat completion" in reply.failure
    assert len(server.requests) == 2


def test_empty_and_cut_replies_are_told_apart(server: Server) -> None:
    answers = [completion(None, "content_filter"), completion("half a", "length"), completion("\ud800!")]
    server.answer = lambda n, body: (200, {}, answers[n])
    replies = CachedJudge(server.connect(at_once=1)).ask(talks(3))
    assert (replies[0].text, replies[0].failure) == (None, "the reply is empty (finish_reason content_filter)")
    assert replies[0].tokens == 10
    assert (replies[1].text, replies[1].cut) == ("half a", True)
    assert (replies[2].text, replies[2].cut) == ("?!", False)


def test_a_server_that_is_not_there_is_a_failure(server: Server) -> None:
    server.http.server_close()
    (reply,) = CachedJudge(server.connect(attempts=2)).ask([talk("q")])
    assert reply.text is None and "cannot be reached" in reply.failure and "(2 tries)" in reply.failure


def test_a_server_that_does_not_answer_in_time_is_a_failure(server: Server) -> None:
    server.answer = lambda n, body: (time.sleep(0.4), (200, {}, completion("late")))[1]
    (reply,) = CachedJudge(server.connect(attempts=1, timeout=0.1)).ask([talk("q")])
    assert reply.text is None and "timed out" in reply.failure.lower()


def test_budgets_hold_for_servers(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UnweaveError, match="3 of 8 replies"):
        CachedJudge(server.connect(at_once=2), tmp_path, Budget(max_requests=3)).ask(talks(8))
    assert len(server.requests) == 3
    with pytest.raises(UnweaveError, match="budget is spent"):
        CachedJudge(server.connect(at_once=1), tmp_path, Budget(max_tokens=15)).ask(talks(8))
    assert len(server.requests) == 5 and len(files_under(tmp_path)) == 5


def test_the_key_is_in_no_file_error_or_log(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_TEST_KEY", KEY)
    spec = JudgeSpec(model="m", base_url=server.url, api_key_env="JUDGE_TEST_KEY")
    server.answer = lambda n, body: (200, {}, completion(f"your key is {KEY}")) if n else (429, {}, {"message": KEY})
    backend = ChatServer.connect(spec)
    monkeypatch.setattr(backend, "_patience", Patience(first_wait=0.01))
    (reply,) = CachedJudge(backend, tmp_path).ask([talk("q")])
    assert reply.text == "your key is [key]"
    assert server.requests[0][1]["authorization"] == f"Bearer {KEY}"
    (kept,) = files_under(tmp_path)
    spoken = [kept.read_text(encoding="utf-8"), caplog.text, json.dumps(spec.to_dict()), repr(backend.settings)]
    assert caplog.text and not any(KEY in text for text in spoken)


def test_no_other_services_key_is_sent(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    open_judge(JudgeSpec(model="m", base_url=server.url), tmp_path).ask([talk("q")])
    assert KEY not in str(server.requests)


def test_what_is_missing_is_said_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_TEST_KEY", raising=False)
    spec = JudgeSpec(model="m", base_url="http://127.0.0.1:9/v1", api_key_env="JUDGE_TEST_KEY")
    with pytest.raises(UnweaveError, match="JUDGE_TEST_KEY is not set"):
        check_judge(spec)
    monkeypatch.setenv("JUDGE_TEST_KEY", KEY)
    check_judge(spec)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UnweaveError, match="needs the package openai") as caught:
        check_judge(spec)
    assert "unweave[judge]" in caught.value.remedy
    with pytest.raises(UnweaveError, match=r"no model 'qwen2\.5-coder-1\.5b'"):
        check_judge(JudgeSpec(model="qwen2.5-coder-1.5b"))


# -- the local model -----------------------------------------------------------------------------------------------


def alone(lm: Any, conversation: Conversation, n: int) -> tuple[str, int, bool]:
    """One conversation's reply by itself: text, tokens, and whether it was cut."""
    tokens = lm.chat([conversation], side="left", add_generation_prompt=True)
    row = lm.generate_ids(tokens, max_new_tokens=n)[0].tolist()
    own = lm.model.generation_config.eos_token_id
    ends = [i for i, token in enumerate(row) if token in (own if isinstance(own, list) else [own])]
    row = row[: ends[0] + 1] if ends else row
    return lm.decode(row), len(row), not ends


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2", "gemma2", "mistral", "gpt_neox"])
def test_a_local_judge_answers_each_as_if_alone(tiny_lm: Callable[..., Any], family: str, tmp_path: Path) -> None:
    """In batches, and whether prompts share a beginning, end tokens come early or late, as ``generate_ids`` does."""
    lm = tiny_lm(family, seed=1)
    lm.model.generation_config.eos_token_id = [1, *range(20, 32)]  # so that some replies end by themselves
    asked = [talk("the same words" + "a" * n + "?") for n in (3, 9, 1, 8, 6)] + [talk("the same words")]
    judge = CachedJudge(LocalModel(lm, max_new_tokens=12, at_once=4), tmp_path)
    replies = judge.ask(asked)
    for conversation, reply in zip(asked, replies, strict=True):
        assert (reply.text, reply.new_tokens, reply.cut) == alone(lm, conversation, 12)
        assert reply.prompt_tokens == lm.chat([conversation], add_generation_prompt=True).n_tokens
    assert len({reply.new_tokens for reply in replies}) > 1 or family != "qwen2"
    again = CachedJudge(LocalModel(lm, max_new_tokens=12), tmp_path).ask(asked)
    assert [r.text for r in again] == [r.text for r in replies] and all(r.kept for r in again)


def test_what_prompts_share_is_read_once_except_under_windows(
    tiny_lm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [talk("a long beginning" + end) for end in ("", " of one", " x")]
    for family, shared in (("llama", True), ("mistral", False), ("gemma3_text", False)):
        lm, widths = tiny_lm(family), []
        forward = lm.model.forward
        monkeypatch.setattr(
            lm.model, "forward", lambda *a, f=forward, w=widths, **o: (w.append(o["input_ids"].shape), f(*a, **o))[1]
        )
        CachedJudge(LocalModel(lm, max_new_tokens=1)).ask(asked)
        beginning = 1 + len("user\na long beginning")
        rest = 1 + len("\n") + 1 + len("assistant\n") + len(" of one")
        assert widths == ([(1, beginning), (3, rest)] if shared else [(3, beginning + rest)])


def test_one_prompt_or_equal_ones_are_answered_too(tiny_lm: Callable[..., Any]) -> None:
    lm = tiny_lm()
    (reply,) = CachedJudge(LocalModel(lm, max_new_tokens=5)).ask([talk("just one question")])
    assert (reply.text, reply.new_tokens, reply.cut) == alone(lm, talk("just one question"), 5)
    backend = LocalModel(lm, max_new_tokens=5)
    twice = dict(backend.answer([talk("just one question")] * 2, Budget()))
    assert twice[0].text == twice[1].text == reply.text
    assert list(backend.answer([], Budget())) == []


def test_kept_replies_belong_to_the_weights(tiny_lm: Callable[..., Any]) -> None:
    one, same, other = tiny_lm(seed=0), tiny_lm(seed=0), tiny_lm(seed=1)
    assert weights_digest(one) == weights_digest(same) != weights_digest(other)
    with torch.no_grad():
        next(iter(same.model.parameters())).mul_(1.001)
    assert weights_digest(one) != weights_digest(same)
    assert LocalModel(one).settings != LocalModel(one, max_new_tokens=7).settings


def test_text_that_looks_like_a_special_token_stays_text(
    tiny_lm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, seen = tiny_lm(), []
    forward = lm.model.forward
    monkeypatch.setattr(lm.model, "forward", lambda *a, **o: (seen.append(o["input_ids"]), forward(*a, **o))[1])
    CachedJudge(LocalModel(lm, max_new_tokens=1)).ask([talk("a<|im_end|>b<pad>")])
    ids = seen[0][0].tolist()
    assert (ids.count(0), ids.count(1), ids.count(2)) == (2, 1, 0)  # only the template's own
    assert "a< |im_end|>b" in lm.decode(ids)


def test_what_does_not_fit_is_a_failure_and_the_rest_is_answered(tiny_lm: Callable[..., Any]) -> None:
    judge = CachedJudge(LocalModel(tiny_lm(), max_new_tokens=4, at_once=2))
    replies = judge.ask([talk("a"), talk("b" * 80), talk("c")])
    assert replies[0].text is not None and replies[2].text is not None
    assert "the model has 64 positions" in replies[1].failure
    many = [talk("b" * (80 + n)) for n in range(7)]  # the longest come first
    small = CachedJudge(LocalModel(tiny_lm(), max_new_tokens=4, at_once=2), budget=Budget(max_requests=2))
    replies = small.ask([*many, talk("a"), talk("c")])
    assert [r.text is None for r in replies] == [True] * 7 + [False] * 2
    assert all("64 positions" in r.failure for r in replies[:7])


def test_a_local_judge_stays_within_its_budget(tiny_lm: Callable[..., Any], tmp_path: Path) -> None:
    judge = CachedJudge(LocalModel(tiny_lm(), max_new_tokens=2, at_once=2), tmp_path, Budget(max_requests=3))
    with pytest.raises(UnweaveError, match="3 of 5 replies"):
        judge.ask(talks(5))
    assert len(files_under(tmp_path)) == 3


def test_a_model_that_cannot_chat_is_no_judge(tiny_lm: Callable[..., Any]) -> None:
    lm = tiny_lm()
    lm.tokenizer.chat_template = None
    with pytest.raises(UnweaveError, match="no chat template"):
        LocalModel(lm)
