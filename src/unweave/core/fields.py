"""One typed reader for the fields of a configuration that somebody else wrote.

A boolean is true or false: "false" is text, and would count as true. A boolean is not a number; 5.0 is a whole number,
5.9 is not. Numbers are finite and of reasonable size. A field that is absent or null is its default, but a null
where true or false belongs is refused, for it says neither. Every failure is an UnweaveError that names the file, the
field and the rule.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from unweave.core.errors import UnweaveError

LARGEST = 1e30
"""no number in a configuration is larger: float32 holds it, and products of a few stay finite"""
_MOST = 1 << 40


class Fields:
    """The named values of a mapping, each read by its type. ``at`` is the field that holds the mapping."""

    def __init__(self, values: Any, where: str, at: str = "") -> None:
        self.where, self._at = where, at
        if not isinstance(values, Mapping):
            what = f"{at} is {_shown(values)}, which holds no named fields" if at else _NO_FIELDS
            raise UnweaveError(what, where=where, remedy="restore the file")
        self.values: Mapping[str, Any] = values

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def __bool__(self) -> bool:
        return bool(self.values)

    def holds(self, name: str, kind: type | tuple[type, ...]) -> bool:
        """Whether a field that may be of several types is of this one."""
        return isinstance(self.values.get(name), kind)

    def boolean(self, name: str, default: bool | None = None) -> bool | None:
        """True or false; with a default, null is neither."""
        value = self.values.get(name, default)
        if isinstance(value, bool) or (value is None and default is None):
            return value
        raise self.wrong(name, "true or false, without quotes")

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false, ``default`` where the field is absent."""
        return bool(self.boolean(name, default))

    def integer(self, name: str, *, least: int = 0, most: int = _MOST) -> int | None:
        """A whole number of ``least`` to ``most``."""
        value = self.values.get(name)
        if value is None:
            return None
        expected = f"a whole number from {least:,} to {most:,}"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(name, expected)
        if not least <= value <= most or value != int(value):
            raise self.wrong(name, expected)
        return int(value)

    def number(self, name: str, *, above: float = -math.inf, most: float = LARGEST) -> float | None:
        """A finite number above ``above``, of at most ``most`` in size."""
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= most:
            raise self.wrong(name, f"a number of at most {most:g} in size")
        if not value > above:
            raise self.wrong(name, f"a number above {above:g}")
        return float(value)

    def text(self, name: str) -> str | None:
        """Text; null where it is absent."""
        value = self.values.get(name)
        if value is None or isinstance(value, str):
            return value
        raise self.wrong(name, "text")

    def choice(self, name: str, options: Sequence[str], default: str) -> str:
        """One of several words."""
        value = self.text(name)
        value = default if value is None else value
        if value not in options:
            raise self.wrong(name, f"one of {', '.join(options)}")
        return value

    def mapping(self, name: str) -> Fields:
        """The fields inside a field; none where it is absent."""
        value = self.values.get(name)
        return Fields({} if value is None else value, self.where, f"{self._at}.{name}" if self._at else name)

    def sequence(self, name: str) -> list[Fields]:
        """A list of mappings; empty where it is absent."""
        return [Fields(value, self.where, f"{self._named(name)}[{i}]") for i, value in enumerate(self._list(name))]

    def integers(self, name: str, *, least: int = 0, most: int = _MOST) -> tuple[int, ...]:
        """A list of whole numbers; empty where it is absent."""
        inner = self._inside(name)
        return tuple(number for key in inner if (number := inner.integer(key, least=least, most=most)) is not None)

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of finite numbers; empty where it is absent."""
        inner = self._inside(name)
        return tuple(number for key in inner if (number := inner.number(key)) is not None)

    def error(self, what: str, remedy: str) -> UnweaveError:
        """The error for something wrong with this file."""
        return UnweaveError(what, where=self.where, remedy=remedy)

    def wrong(self, name: str, expected: str) -> UnweaveError:
        """The error for a field of another type or size."""
        shown = _shown(self.values.get(name))
        return self.error(f"{self._named(name)} is {shown}, not {expected}", "restore the file, or correct this field")

    def _named(self, name: str) -> str:
        return f"{self._at}.{name}" if self._at else str(name)

    def _list(self, name: str) -> list[Any]:
        value = self.values.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.wrong(name, "a list")
        return value

    def _inside(self, name: str) -> Fields:
        """A list's values as fields called [0], [1], ...; a null among them is refused."""
        values = self._list(name)
        if None in values:
            raise self.wrong(name, "a list of numbers alone")
        return Fields({f"[{i}]": value for i, value in enumerate(values)}, self.where, self._named(name))


_NO_FIELDS = "the configuration does not hold named fields"


def _shown(value: Any) -> str:
    """A value as JSON has it, cut short; a number of thousands of digits is not written out."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**40:
        return f"a number of about {value.bit_length() * 30103 // 100000} digits"
    if isinstance(value, str):
        return f'the text "{value[:40]}"' + ("..." if len(value) > 40 else "")
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return f"a group of {len(value)} fields"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)[:60]
