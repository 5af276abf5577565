"""judge/form.py and log-probabilities: what replies say, what is a failure, and expected ratings against softmaxes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.raw_server import KEY, Raw, http, leaks
from unweave.core.errors import UnweaveError
from unweave.judge.base import CachedJudge, Reply
from unweave.judge.form import Answer, Form, expectation, rate, rating_form
from unweave.judge.local import LocalModel
from unweave.judge.scripted import Scripted
from unweave.judge.spec import JudgeSpec

FORM: Form[str] = rating_form("test", 1, lambda case: [{"role": "user", "content": case}], (0, 1, 2))


@pytest.mark.parametrize(
    ("reply", "value", "failure"),
    [
        ("It is there. Rating: [[2]]", 2.0, ""),
        ("rating: [[0]] or rather RATING:  [[ 1 ]] it is", 1.0, ""),
        ("Rating: [[1]], no: Rating: [[7]]", math.nan, "the rating is no whole number from 0 to 2"),
        ("Rating: [[1.5]]", math.nan, "the rating is no whole number from 0 to 2"),
        ("Rating: [[01]]", math.nan, "the rating is no whole number from 0 to 2"),
        ("Rating: [[²]]", math.nan, "the rating is no whole number from 0 to 2"),
        ("Rating: [[]]", math.nan, "the rating is no whole number from 0 to 2"),
        ("Rating: [1]", 1.0, ""),
        ("Rating: [[1]", 1.0, ""),
        ("Rating: [1", math.nan, "no rating of the form asked for"),
        ("Rating: **[1]**", math.nan, "no rating of the form asked for"),
        ("Rating: 2", math.nan, "no rating of the form asked for"),
        ("[[2]]", math.nan, "no rating of the form asked for"),
        (None, math.nan, "scripted failure"),
    ],
)
def test_a_reply_is_read_exactly_or_fails(reply: str | None, value: float, failure: str) -> None:
    ratings = rate(Scripted([reply]), FORM, ["q"])
    np.testing.assert_array_equal(ratings.values, [value])
    np.testing.assert_array_equal(ratings.best, [value])  # a script gives no log-probabilities
    assert ratings.failures == ({failure: 1} if failure else {}) and ratings.form == "test-1"
    assert {len(column) for column in ratings.columns().values()} == {1}


def test_expected_ratings_are_those_computed_by_hand() -> None:
    logs = {"0": math.log(0.1), "1": math.log(0.2), "2": math.log(0.3), "9": math.log(0.4)}
    assert expectation(logs, (0, 1, 2), 2) == pytest.approx((0.2 + 0.6) / 0.6)
    assert expectation(logs, (0, 1, 2), 5) is None  # not what stands there
    assert expectation({"1": math.log(0.24)}, (0, 1, 2), 1) is None  # too little of the probability
    assert expectation({"8": -0.1, "5": -3.0}, range(101), 8) is None  # digits of a longer number
    assert expectation({"85": math.log(0.5), "8": math.log(0.25)}, range(101), 85) == pytest.approx((85 * 2 + 8) / 3)
    assert expectation({}, (0, 1)) is None


def test_replies_without_a_known_place_have_no_expected_rating() -> None:
    class Certain(Scripted):
        def ask(self, conversations: Any, until: str = "") -> list[Reply]:
            assert until == FORM.until
            return [Reply("so. Rating: [[1]]", numbers={at: {"1": -0.7, "2": -0.7}}) for at in (14, 13)]

    ratings = rate(Certain([]), FORM, ["a", "b"])
    np.testing.assert_array_equal(ratings.values, [1, 1])
    np.testing.assert_allclose(ratings.best, [1.5, 1.0])


# -- log-probabilities of a model that runs here ---------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gpt2"])
def test_a_local_models_numbers_are_softmaxes_of_whole_passes(
    tiny_lm: Callable[..., Any], family: str, tmp_path: Path
) -> None:
    lm = tiny_lm(family, seed=2)
    digits = {i: token for token, i in lm.tokenizer.get_vocab().items() if token in "0123456789"}
    with torch.no_grad():  # so that digits are likely
        lm.model.get_output_embeddings().weight[list(digits)] *= 3.0
    conversations = [[{"role": "user", "content": "the same words " + "ab" * n}] for n in range(4)]
    judge = CachedJudge(LocalModel(lm, max_new_tokens=10, at_once=3), tmp_path)
    places = 0
    for conversation, reply in zip(conversations, judge.ask(conversations), strict=True):
        assert reply.text is not None
        prompt = lm.chat([conversation], add_generation_prompt=True)
        row = lm.generate_ids(prompt, max_new_tokens=10)[0]
        whole = torch.cat([prompt.ids[0].cpu(), row.cpu()])[None]
        logits = lm.model(input_ids=whole).logits[0, prompt.n_tokens - 1 :].log_softmax(-1)
        assert sorted(reply.numbers) == [at for at, char in enumerate(reply.text) if char in "0123456789"]
        text = ""
        for step, token in enumerate(row[: reply.new_tokens].tolist()):
            if token in digits:
                places += 1
                expected = {digits[i]: float(logits[step, i]) for i in digits if logits[step, i] > -16}
                assert reply.numbers[len(text)] == pytest.approx(expected, abs=2e-4)
            text = lm.decode(row[: step + 1])
    assert places > 3
    again = CachedJudge(LocalModel(lm, max_new_tokens=10), tmp_path).ask(conversations)
    assert [r.numbers for r in again] == [r.numbers for r in judge.ask(conversations)] and all(r.kept for r in again)


def test_a_local_reply_ends_where_the_answer_is_complete(tiny_lm: Callable[..., Any]) -> None:
    lm = tiny_lm("llama", seed=1)
    conversations = [[{"role": "user", "content": "the same words" + "a" * n}] for n in range(5)]
    backend = LocalModel(lm, max_new_tokens=12, at_once=5)
    whole = CachedJudge(backend).ask(conversations)
    second = whole[0].text[1]  # type: ignore[index]
    cut = CachedJudge(backend).ask(conversations, f".{second}")
    for short, long in zip(cut, whole, strict=True):
        assert long.text is not None
        at = long.text.find(second, 1)
        assert short.text == (long.text if at < 0 else long.text[: at + 1])
        assert at < 0 or (not short.cut and short.new_tokens < long.new_tokens)


# -- log-probabilities of a server -----------------------------------------------------------------------------------


def token(text: str, top: dict[str, float] | None = None, **more: Any) -> dict[str, Any]:
    others = [{"token": name, "logprob": p} for name, p in (top or {}).items()]
    return {"token": text, "logprob": (top or {}).get(text, -0.5), "top_logprobs": others, **more}


def answered(text: str, tokens: Any) -> bytes:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop", "logprobs": tokens}
    return http("200 OK", json.dumps({"choices": [choice]}).encode())


def test_a_server_is_asked_for_log_probabilities_and_they_are_placed(tmp_path: Path) -> None:
    raw = Raw()
    try:
        half = [token("\\xc3", bytes=[0xC3]), token("\\xa4", bytes=[0xA4])]  # a character of two tokens
        tops = {"2": math.log(0.6), " 2": math.log(0.1), "1": math.log(0.2), "x": math.log(0.1)}
        content = [token("N"), *half, token(": "), token("Rating: [["), token("2", tops), token("]]")]
        raw.says = lambda n, sock: answered("Nä: Rating: [[2]]", {"content": content})
        ratings = rate(CachedJudge(raw.connect(logprobs=True), tmp_path), FORM, ["q"])
        np.testing.assert_allclose(ratings.best, [(0.7 * 2 + 0.2) / 0.9])
        sent = json.loads(raw.requests[0].split(b"\r\n\r\n", 1)[1])
        assert sent["logprobs"] is True and sent["top_logprobs"] == 20
        kept = rate(CachedJudge(raw.connect(logprobs=True), tmp_path), FORM, ["q"])
        np.testing.assert_array_equal(kept.best, ratings.best)
        assert len(raw.requests) == 1
    finally:
        raw.close()


@pytest.mark.parametrize(
    "tokens",
    [
        None,
        [],
        {"content": None},
        {"content": [3]},
        {"content": [token("Rating: [["), token("2", {"2": 3.0}), token("]]")]},
        {"content": [token("Rating: [["), token("2", {"2": "0"}), token("]]")]},  # type: ignore[dict-item]
        {"content": [token("other words "), token("2", {"2": -0.1})]},
        {"content": [token("Rating: [["), token("2", {"2": -0.1})]},
        {"content": [token("Rating: [[", bytes=[999]), token("2", {"2": -0.1}), token("]]")]},
    ],
)
def test_invalid_log_probabilities_are_none_and_the_reply_stays(tokens: Any) -> None:
    raw = Raw()
    try:
        raw.says = lambda n, sock: answered("Rating: [[2]]", tokens)
        (reply,) = CachedJudge(raw.connect(logprobs=True)).ask([[{"role": "user", "content": "q"}]])
        assert (reply.text, reply.numbers) == ("Rating: [[2]]", {})
    finally:
        raw.close()


def test_no_key_is_left_in_what_is_kept_of_log_probabilities(tmp_path: Path) -> None:
    raw = Raw()
    try:
        digits = KEY[16:26]  # "0123456789", in tokens of three digits that are numbers
        pieces = [KEY[:16], digits[:3], digits[3:6], digits[6:9], digits[9:] + KEY[26:]]
        content = [token(piece, {piece: -0.1, KEY: -3.0}) for piece in pieces]
        raw.says = lambda n, sock: answered(KEY, {"content": content})
        (reply,) = CachedJudge(raw.connect(logprobs=True), tmp_path).ask([[{"role": "user", "content": "q"}]])
        assert reply.text == "[key]" and reply.numbers == {}
        for path in tmp_path.rglob("*.json"):
            assert not leaks(path.read_text())
        raw.says = lambda n, sock: http("400 No", json.dumps({"error": {"message": f"no logprobs for {KEY}"}}).encode())
        (refused,) = CachedJudge(raw.connect(logprobs=True)).ask([[{"role": "user", "content": "r"}]])
        assert "no logprobs for [key]" in refused.failure
    finally:
        raw.close()


def test_log_probabilities_are_a_servers_option() -> None:
    with pytest.raises(UnweaveError, match="logprobs does not apply to a model that runs here"):
        JudgeSpec(logprobs=True)
    with_them = JudgeSpec(base_url="http://localhost/v1", model="m", logprobs=True)
    assert with_them.digest() != JudgeSpec(base_url="http://localhost/v1", model="m").digest()


def test_a_form_says_which_it_is() -> None:
    other = Form("test", 2, FORM.messages, lambda text, case: Answer(words=text))
    ratings = rate(Scripted(["words"]), other, ["q"])
    assert (ratings.form, ratings.rows[0].answer) == ("test-2", Answer(words="words"))
    assert math.isnan(ratings.rows[0].value)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mistral"])
def test_reading_inside_a_given_reply_is_one_pass_of_the_model(
    tiny_lm: Callable[..., Any], family: str, tmp_path: Path
) -> None:
    lm = tiny_lm(family, seed=3)
    talks = [
        [{"role": "user", "content": "the same words" + "x" * n}, {"role": "assistant", "content": "ab\tcd\te"}]
        for n in (0, 3, 1)
    ]
    places = [[3, 6], [3, 6], [6]]
    judge = CachedJudge(LocalModel(lm, max_new_tokens=1, at_once=2), tmp_path)
    digits = {token: i for token, i in lm.tokenizer.get_vocab().items() if token in "0123456789"}
    for conversation, each, reply in zip(talks, places, judge.read(talks, places), strict=True):
        assert list(reply.numbers) == each and reply.text == "ab\tcd\te"
        for place in each:
            prompt = lm.chat([conversation[:1]], add_generation_prompt=True).ids[0].tolist()
            given = lm.tokenizer("ab\tcd\te"[:place], add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = lm.model(input_ids=torch.tensor([prompt + given])).logits[0, -1].log_softmax(-1)
            assert reply.numbers[place] == pytest.approx({d: float(logits[i]) for d, i in digits.items()}, abs=2e-4)
    assert all(reply.kept for reply in judge.read(talks, places))
    assert not judge.read(talks[:1], [[2]])[0].kept
    with pytest.raises(UnweaveError, match="does not score given text"):
        CachedJudge(Scripted([])).read(talks, places)
