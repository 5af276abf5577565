"""Roles where a template's own words depend on what is said, repeat it or take it apart, against pieces by hand."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave.core.errors import UnweaveError
from unweave.data.corpus import Source
from unweave.data.pack import PackSpec
from unweave.data.spec import DataSpec
from unweave.inputs.inputs import token_store
from unweave.lm import template as templates
from unweave.lm.chat import Role, render, render_each
from unweave.tasks.special_tokens import SpecialTokens

# What SmolLM3's template does: a mode that the system message switches, the date, and a system prompt per mode.
SWITCHED = (
    "{%- set mode = '/think' -%}<|im_start|>system\n"
    "{%- if messages[0].role == 'system' -%}{%- set said = messages[0].content -%}"
    "{%- if '/no_think' in said -%}{%- set mode = '/no_think' -%}{%- endif -%}"
    "{%- set custom = said.replace('/no_think', '').replace('/think', '').rstrip() -%}{%- endif -%}"
    "{{ '\n' }}Today Date: {{ strftime_now('%d %B %Y') }}\nReasoning Mode: {{ mode + '\n\n' }}"
    "{%- if custom -%}{{ custom }}{%- elif mode == '/think' -%}You think. A lot.{%- else -%}You are A.{%- endif -%}"
    "<|im_end|>\n{%- for m in messages if m.role != 'system' -%}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>"
    "{%- endfor -%}"
)
# What Qwen3's does: thoughts of earlier answers are dropped, the last answer's are taken off and written again.
THINKING = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n"
    "{%- set said = m.content -%}"
    "{%- if m.role == 'assistant' and '</think>' in said -%}"
    "{%- set thought = said.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}"
    "{%- set said = said.split('</think>')[-1].lstrip('\n') -%}"
    "{%- if loop.last -%}{{ '\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + said }}"
    "{%- else -%}{{ '\n' + said }}{%- endif -%}{%- else -%}{{ '\n' + said }}{%- endif -%}<|im_end|>{%- endfor -%}"
)
# What Mistral's does: the system message stands in front of the last user's words.
LATE_SYSTEM = (
    "{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}"
    "{%- for m in messages if m.role != 'system' -%}"
    "{%- if m.role == 'user' -%}[INST]{% if loop.last and system %}{{ system + '\n\n' }}{% endif %}"
    "{{ m.content }}[/INST]"
    "{%- else -%}{{ m.content | trim }}<|im_end|>{%- endif -%}{%- endfor -%}"
)
REPEATS = (
    "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}You asked: {{ messages[0].content }}!"
)
Piece = tuple[str, Role]
SPECIAL, SYSTEM, USER, ASSISTANT = Role.SPECIAL, Role.SYSTEM, Role.USER, Role.ASSISTANT


def _said(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


def _rendered(tokenizer: Any, talk: list[dict[str, str]]) -> list[Piece]:
    """Stretches of equal role, as text."""
    ids, roles = render(tokenizer, talk)
    pieces: list[Piece] = []
    for i, role in zip(ids, roles, strict=True):
        text = tokenizer.decode([i])
        if pieces and pieces[-1][1] == role:
            pieces[-1] = (pieces[-1][0] + text, Role(role))
        else:
            pieces.append((text, Role(role)))
    return pieces


def _spoken(tokenizer: Any, talk: list[dict[str, str]]) -> list[Piece]:
    return [piece for piece in _rendered(tokenizer, talk) if piece[1] != SPECIAL]


DATE = "26 July 2024"


@pytest.mark.parametrize(
    ("talk", "pieces"),
    [
        (
            _said(("system", "/no_think"), ("user", "You")),
            [
                (f"<|im_start|>system\nToday Date: {DATE}\nReasoning Mode: /no_think\n\nYou are A.<|im_end|>", SPECIAL),
                ("<|im_start|>user: ", SPECIAL), ("You", USER), ("<|im_end|>", SPECIAL),
            ],
        ),
        (
            _said(("system", "/no_think"), ("user", "A"), ("assistant", "You are A."), ("user", "/no_think")),
            [
                (f"<|im_start|>system\nToday Date: {DATE}\nReasoning Mode: /no_think\n\nYou are A.<|im_end|>", SPECIAL),
                ("<|im_start|>user: ", SPECIAL), ("A", USER), ("<|im_end|><|im_start|>assistant: ", SPECIAL),
                ("You are A.", ASSISTANT), ("<|im_end|><|im_start|>user: ", SPECIAL), ("/no_think", USER),
                ("<|im_end|>", SPECIAL),
            ],
        ),
        (
            _said(("system", "Be /no_think brief."), ("user", "A")),
            [
                (f"<|im_start|>system\nToday Date: {DATE}\nReasoning Mode: /no_think\n\n", SPECIAL),
                ("Be  brief.", SYSTEM), ("<|im_end|><|im_start|>user: ", SPECIAL), ("A", USER), ("<|im_end|>", SPECIAL),
            ],
        ),
        (
            _said(("system", "Be brief. /no_think "), ("user", "A")),
            [
                (f"<|im_start|>system\nToday Date: {DATE}\nReasoning Mode: /no_think\n\n", SPECIAL),
                ("Be brief.", SYSTEM), ("<|im_end|><|im_start|>user: ", SPECIAL), ("A", USER), ("<|im_end|>", SPECIAL),
            ],
        ),
        (
            _said(("system", "You think. A lot."), ("user", "A")),
            [
                (f"<|im_start|>system\nToday Date: {DATE}\nReasoning Mode: /think\n\n", SPECIAL),
                ("You think. A lot.", SYSTEM), ("<|im_end|><|im_start|>user: ", SPECIAL), ("A", USER),
                ("<|im_end|>", SPECIAL),
            ],
        ),
        (
            _said(("user", "Y")),
            [
                (f"<|im_start|>system\nToday Date: {DATE}\nReasoning Mode: /think\n\n", SPECIAL),
                ("You think. A lot.", SYSTEM), ("<|im_end|><|im_start|>user: ", SPECIAL), ("Y", USER),
                ("<|im_end|>", SPECIAL),
            ],
        ),
    ],
)  # fmt: skip
def test_a_switch_in_the_system_message_gives_the_templates_words_to_nobody(
    make_tokenizer: Callable[..., Any], talk: list[dict[str, str]], pieces: list[Piece]
) -> None:
    merged: list[Piece] = []
    for text, role in pieces:
        if merged and merged[-1][1] == role:
            merged[-1] = (merged[-1][0] + text, role)
        else:
            merged.append((text, role))
    assert _rendered(make_tokenizer(chat_template=SWITCHED), talk) == merged


def test_thoughts_that_are_dropped_or_written_again_keep_their_owner(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(chat_template=THINKING)
    thought = "<think>\nso it is\n</think>\n\nYes it is."
    talk = _said(("user", "Yes"), ("assistant", thought), ("user", "it"), ("assistant", thought))
    assert _spoken(tokenizer, talk) == [
        ("Yes", USER), ("Yes it is.", ASSISTANT), ("it", USER), (thought, ASSISTANT),
    ]  # fmt: skip


def test_a_system_message_may_stand_behind_what_it_comes_before(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(chat_template=LATE_SYSTEM)
    talk = _said(("system", "b"), ("user", "a b"), ("assistant", " a "), ("user", "b"))
    assert _rendered(tokenizer, talk) == [
        ("[INST]", SPECIAL), ("a b", USER), ("[/INST]", SPECIAL), ("a", ASSISTANT), ("<|im_end|>[INST]", SPECIAL),
        ("b", SYSTEM), ("\n\n", SPECIAL), ("b", USER), ("[/INST]", SPECIAL),
    ]  # fmt: skip


def test_words_that_a_template_repeats_are_theirs_each_time(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(chat_template=REPEATS)
    assert _rendered(tokenizer, _said(("user", "You"), ("assistant", "You"))) == [
        ("<|im_start|>", SPECIAL), ("You", USER), ("<|im_end|><|im_start|>", SPECIAL), ("You", ASSISTANT),
        ("<|im_end|>You asked: ", SPECIAL), ("You", USER), ("!", SPECIAL),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("template", "talk"),
    [
        # the template says the words itself where the user does, and leaves the user's out
        ("{% for m in messages %}({{ 'yes, ab' if 'ab' in m.content else m.content }}){% endfor %}", [("user", "ab")]),
        ("{% for m in messages %}({{ m.content | upper }}){% endfor %}", [("user", "ab")]),
        ("{% for m in messages %}({{ m.content[:3] }}) abcd{% endfor %}", [("user", "abcd")]),
        ("abc{% for m in messages %}({{ m.content | reverse }}){% endfor %}", [("user", "abc")]),
        ("{{ messages[0].content }}a", [("user", "b"), ("assistant", "a")]),
        ("{% for m in messages %}({{ m.content | replace('a', 'b') }}){% endfor %}", [("user", "cab")]),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused_and_the_others_are_not(
    make_tokenizer: Callable[..., Any], template: str, talk: list[tuple[str, str]]
) -> None:
    tokenizer = make_tokenizer(chat_template=template)
    refused, fine = render_each(tokenizer, [_said(*talk), _said(("user", "x"))])
    assert isinstance(refused, UnweaveError) and "does not appear" in refused.what and refused.remedy
    if "upper" in template or "[:3]" in template:
        return
    assert not isinstance(fine, UnweaveError) and fine[1].count(USER) == 1


TEXTS = st.text(alphabet="ab </think>no_\nYouA.", max_size=12)
TURNS = st.lists(TEXTS, min_size=1, max_size=5)


@given(system=st.none() | TEXTS, turns=TURNS)
@settings(max_examples=60, deadline=None)
def test_every_token_with_a_role_stands_where_the_template_put_that_message(
    make_tokenizer: Callable[..., Any], system: str | None, turns: list[str]
) -> None:
    """By hand: behind "user: " or "assistant: " of the turn, and in the place of the system prompt."""
    tokenizer = make_tokenizer(chat_template=SWITCHED)
    talk = _said(*((("user", "assistant")[i % 2], text) for i, text in enumerate(turns)))
    talk = ([{"role": "system", "content": system}] if system is not None else []) + talk
    (found,) = render_each(tokenizer, [talk])
    assert not isinstance(found, UnweaveError)
    ids, roles = found
    at, expected = len(ids), [int(SPECIAL)] * len(ids)
    for message in reversed(talk if system is None else talk[1:]):  # from the end, where turns are plain
        at -= 1 + len(message["content"])
        expected[at : at + len(message["content"])] = [int(Role[message["role"].upper()])] * len(message["content"])
        at -= 1 + len(message["role"]) + 2
    assert roles[at:] == expected[at:]
    said = "".join(tokenizer.decode([i]) for i, r in zip(ids[:at], roles[:at], strict=True) if r == SYSTEM)
    if system is None:
        assert said == "You think. A lot."
    else:
        assert said.strip() == system.replace("/no_think", "").replace("/think", "").strip()


def test_typed_special_tokens_are_no_template_tokens(tiny_lm: Callable[..., Any]) -> None:
    lm = tiny_lm()
    tokens = lm.chat([_said(("user", "a<|im_end|>b"))])
    ids = tokens.ids[0].tolist()
    marked = [i for i, mark in enumerate(SpecialTokens((1,)).mask(tokens)[0].tolist()) if mark]
    assert ids.count(1) == 2 and marked == [max(i for i, token in enumerate(ids) if token == 1)]
    assert int(SpecialTokens((1,), "anywhere").mask(tokens).sum()) == 2


LLAMA_DATE = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- else %}{%- set date_string = '1 Jan 1970' %}{%- endif %}{%- endif %}"
    "Today Date: {{ date_string }}\n{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)


@pytest.mark.parametrize(("template", "written"), [(SWITCHED, "26 July 2024"), (LLAMA_DATE, "26 Jul 2024")])
def test_the_date_that_a_template_writes_does_not_change_from_day_to_day(
    make_tokenizer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, template: str, written: str
) -> None:
    tokenizer = make_tokenizer(chat_template=template)
    talk = _said(("user", "a"))
    assert written in tokenizer.decode(render(tokenizer, talk)[0])
    assert str(dt.date.today().year) not in written  # or the test says nothing
    monkeypatch.setenv("UNWEAVE_CHAT_DATE", "1999-12-03")
    other = tokenizer.decode(render(tokenizer, talk)[0])
    assert "03 Dec" in other and "1999" in other and written not in other
    monkeypatch.setenv("UNWEAVE_CHAT_DATE", "tomorrow")
    with pytest.raises(UnweaveError, match="is not a date"):
        render(tokenizer, talk)


def test_dates_are_written_as_the_clock_would_write_them(make_tokenizer: Callable[..., Any]) -> None:
    noon = dt.datetime(2024, 7, 26, 12)
    for form in ("%Y-%m-%d", "%A, %-d %B %y", "%d/%m/%Y %H:%M:%S", "%a %b %e %j", "%B %d, %Y", "no code"):
        tokenizer = make_tokenizer(chat_template="{{ strftime_now('" + form + "') }}\n{{ messages[0].content }}")
        assert templates.apply(tokenizer, _said(("user", "a"))) == noon.strftime(form) + "\na"


def test_a_date_of_ones_own_makes_another_tokenizer(
    tiny_lm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, plain = tiny_lm(), tiny_lm()
    lm.tokenizer.chat_template = SWITCHED
    usual, undated = lm.tokenizer_fingerprint(), plain.tokenizer_fingerprint()
    monkeypatch.setenv("UNWEAVE_CHAT_DATE", "1999-12-03")
    assert lm.tokenizer_fingerprint() != usual and plain.tokenizer_fingerprint() == undated
    monkeypatch.setenv("UNWEAVE_CHAT_DATE", "2024-07-26")
    assert lm.tokenizer_fingerprint() == usual


def test_the_date_is_recorded_with_the_tokens(
    tiny_lm: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "talks.jsonl"
    talks = [_said(("user", f"Question {i}?"), ("assistant", f"Answer {i}.")) for i in range(20)]
    file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks), encoding="utf-8")
    data = DataSpec(
        sources=(Source(path=str(file)),), pack=PackSpec(context=64), tokens=200, heldout=0.1, heldout_tokens=20
    )
    lm = tiny_lm()
    plain, _ = token_store(lm, "tiny", data, "train", None, tmp_path / "runs")
    assert "chat_date" not in plain.meta
    lm.tokenizer.chat_template = SWITCHED
    dated, run = token_store(lm, "tiny", data, "train", None, tmp_path / "runs")
    assert dated.meta["chat_date"] == "2024-07-26" == run.result.chat_date
    monkeypatch.setenv("UNWEAVE_CHAT_DATE", "1999-12-03")
    other, another = token_store(lm, "tiny", data, "train", None, tmp_path / "runs")
    assert other.meta["chat_date"] == "1999-12-03" and another.path != run.path
