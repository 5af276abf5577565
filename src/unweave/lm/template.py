"""A tokenizer's chat template: conversations as text, the same on every day.

Some templates write today's date (SmolLM3's, Llama 3's); then the same conversation would be other tokens tomorrow.
Here they get ``chat_date()``: 26 July 2024, which Llama 3's own template falls back on, or what the environment
variable ``UNWEAVE_CHAT_DATE`` says.
"""

from __future__ import annotations

import json
import os
import string
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from functools import lru_cache
from typing import Any

from unweave.core.errors import UnweaveError

Message = Mapping[str, Any]
"""``{"role": "system" | "user" | "assistant", "content": text}``"""

USUAL_DATE = date(2024, 7, 26)
_VARIABLE = "UNWEAVE_CHAT_DATE"
_ASKS = "strftime_now"


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer can render conversations."""
    return bool(getattr(tokenizer, "chat_template", None))


def asks_for_date(tokenizer: Any) -> bool:
    """Whether the chat template writes the day's date."""
    return _ASKS in str(getattr(tokenizer, "chat_template", None) or "")


def identity(tokenizer: Any) -> list[str]:
    """The template's text, with the date given to it where it asks for one and this is not the usual one."""
    text = str(tokenizer.chat_template or "")
    return [text, str(chat_date())] if asks_for_date(tokenizer) and chat_date() != USUAL_DATE else [text]


def chat_date() -> date:
    """The date given to chat templates. UnweaveError where the environment variable does not hold one."""
    text = os.environ.get(_VARIABLE, "").strip()
    try:
        return date.fromisoformat(text) if text else USUAL_DATE
    except ValueError as error:
        raise UnweaveError(
            f"{text!r} is not a date", where=_VARIABLE, remedy="write it as 2024-07-26, or unset it"
        ) from error


def apply(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    """A conversation as text. UnweaveError where the template refuses it."""
    from jinja2 import TemplateError

    day = chat_date()
    try:
        dated = {}
        if asks_for_date(tokenizer):
            dated["chat_template"] = _dated(tokenizer.get_chat_template(), day)
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **dated,
        )
    except (TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
        roles = ", ".join(str(message.get("role")) for message in messages[:6]) + (", ..." if messages[6:] else "")
        what = f"the chat template refuses a conversation with the roles {roles}: {error}"
        remedy = "start with a user message and let user and assistant take turns; some templates take no system"
        raise UnweaveError(what, remedy=remedy) from error


@lru_cache(maxsize=8)
def _dated(template: str, day: date) -> str:
    """The template with a ``strftime_now`` of its own, which hides the one that reads the clock.

    A macro, since templates are given data alone, no functions; it writes noon of the day for every code of a format.
    """
    noon = datetime.combine(day, time(12))
    codes = {"%" + flag + letter for flag in ("-", "") for letter in string.ascii_letters}
    texts = {code: noon.strftime(code) for code in sorted(codes, key=lambda code: (-len(code), code))}
    usable = {code: text for code, text in texts.items() if "%" not in text}
    return (
        "{%- macro " + _ASKS + "(format) -%}{%- set now = namespace(text=format) -%}"
        "{%- for code, said in "
        + json.dumps(usable)
        + ".items() -%}{%- set now.text = now.text.replace(code, said) -%}"
        "{%- endfor -%}{{- now.text -}}{%- endmacro +%}" + template
    )
