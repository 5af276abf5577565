"""Foreign text as it may be shown: what would move a terminal's cursor, change its colours or turn text around is
written out instead, as ``\\x1b``."""

from __future__ import annotations

import re

_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and line feed, other ends of lines, marks that turn text around, halves of pairs."""


def plain(text: str) -> str:
    """The text with such characters written as escapes; it can always be encoded."""
    return _UNSEEN.sub(lambda match: _escape(match[0]), text)


def plain_json(text: str) -> str:
    """The same for JSON text, whose value stays what it is: there they can only stand in strings."""
    return _UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _escape(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"
