"""Taking a key out of foreign text before the text is cut, kept, shown or logged.

1. A key is found in full and in part: any six of its characters in a row, also as base64, URL-encoded and JSON-escaped.
2. Characters that nobody sees do not hide it: control and format characters are looked through.
3. A key shorter than that is taken out where it stands by itself; as part of other words it could be chance.
"""

from __future__ import annotations

import json
import logging
import re
import unicodedata
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Iterator
from urllib.parse import quote, unquote

_PART = 6
_SECRET = 12
"""letters of the shortest key that could not be guessed"""
_INSTEAD = "[key]"
_LOGGERS = (
    *("openai._base_client", "openai._response", "openai._legacy_response", "httpx", "httpx2"),
    *(f"{core}.{part}" for core in ("httpcore", "httpcore2") for part in ("connection", "http11", "http2", "proxy")),
)
"""Who logs what servers send. A logger's filters do not see what the loggers below it say, so all are named."""


class Secret:
    """A key that must not be seen: ``clean`` is a text without it."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._parts: dict[int, set[str]] = {}
        for part in _parts(key) if len(key) >= _PART else ():
            self._parts.setdefault(len(part), set()).add(part)
        self._alone = re.compile(rf"(?<!\w){re.escape(key)}(?!\w)")

    def clean(self, text: str) -> str:
        """The text with ``[key]`` wherever the key stood, or six characters of it or more."""
        if len(self._key) < _PART:
            return self._alone.sub(_INSTEAD, text)
        seen = [i for i, character in enumerate(text) if unicodedata.category(character) not in ("Cc", "Cf")]
        bare = "".join(text[i] for i in seen)
        spans = sorted(
            (seen[i], seen[i + length - 1] + 1)
            for length, parts in self._parts.items()
            for i in range(len(bare) - length + 1)
            if bare[i : i + length] in parts
        )
        out, at, until = [], 0, -1
        for start, end in spans:
            if start > until:  # one mark for what overlaps or touches
                out += [text[max(at, until) : start], _INSTEAD]
            at = until = max(until, end)
        return "".join(out) + text[at:]

    def is_whole_in(self, text: str) -> bool:
        """Whether all of the key stands in a text, as it is or URL-encoded. Words such as "ollama", which some servers
        take for a key, do not count as secrets."""
        return len(self._key) >= _SECRET and self._key in (text + "\n" + unquote(text))


def _parts(key: str) -> Iterator[str]:
    """All stretches of six characters of a key, in every form that it may be written in."""
    forms = [
        list(key),
        [quote(c, safe="") for c in key],
        [quote(c, safe="").lower() for c in key],
        ["".join(f"%{byte:02X}" for byte in c.encode()) for c in key],
        [json.dumps(c)[1:-1] for c in key],
        [f"\\u{ord(c):04x}" for c in key],
    ]
    for shift in range(3):  # where the key begins among the groups of three bytes that base64 writes as four letters
        for encode in (b64encode, urlsafe_b64encode):
            letters = encode(b"\0" * shift + key.encode()).decode().rstrip("=")
            sure = 0 if shift == 0 else shift + 1
            forms.append(list(letters[sure:-1]))
    for units in forms:
        for i in range(len(units) - _PART + 1):
            yield "".join(units[i : i + _PART])


class _WithoutSecrets(logging.Filter):
    """Takes keys out of what the packages that carry requests log."""

    def __init__(self) -> None:
        super().__init__()
        self.secrets: dict[str, Secret] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        for secret in self.secrets.values():
            message = secret.clean(message)
        record.msg, record.args = message, ()
        return True


_filter = _WithoutSecrets()


def keep_out_of_logs(key: str, secret: Secret) -> None:
    """From now on the key is in no line that the packages below us log."""
    _filter.secrets[key] = secret
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_filter)  # adding it twice is adding it once
