"""Specs: what was asked, as frozen dataclasses that are strict about what they accept.

A Spec is made from a dict or a YAML/TOML file; an unknown key is an error with a suggestion, a wrong type is an error
that names the field. Rules stand on the fields (``core/rules.py``). A Spec's digest covers the fields that can change
the result, so that equal questions share a run.

A union of Specs is a base whose field ``kind`` says which of its ``members`` is meant, each with fields of its own:
``{"kind": "jumprelu", "bandwidth": 0.1}``. ``unite`` makes one of a base and its subclasses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

from unweave.core import rules
from unweave.core.errors import UnweaveError
from unweave.core.files import is_text, read_json, read_toml, read_yaml
from unweave.core.refs import content_fields

_TOO_LARGE = 1 << 63
_SHOWN = 200


def operational(default: Any) -> Any:
    """A field that says how to work, not what to find: it cannot change the result and stays out of the digest."""
    return field(default=default, metadata={"result": False})


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Base of every spec. Subclasses are frozen, keyword-only dataclasses with a docstring under each field."""

    shorthands: ClassVar[Mapping[str, tuple[Any, str]]] = {}
    """Names that ``from_dict`` takes beside the fields and that stand for several: each with its type and a text."""
    members: ClassVar[Mapping[str, type[Spec]]] = {}
    """Of a union: the Spec of each kind."""

    def __post_init__(self) -> None:
        """Raises UnweaveError where a field breaks its rules. A subclass that checks more calls this first."""
        if self.members and self.members.get(getattr(self, "kind", "")) is not type(self):
            options = ", ".join(member.__name__ for member in self.members.values())
            remedy = f"make one of {options}, or use from_dict"
            raise UnweaveError(f"{type(self).__name__} cannot be of kind {getattr(self, 'kind', '')!r}", remedy=remedy)
        rules.check(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "", base: Spec | None = None) -> Self:
        """A spec from plain values. Raises UnweaveError for unknown or missing keys and values of a wrong type.

        Fields that ``values`` does not name keep what they are in ``base``, or in the class where there is none.
        """
        if cls.members:
            own = _member(cls, values, base, where)
            if own is not cls:
                return own.from_dict(values, where=where, base=base)  # type: ignore[return-value]
            values = _of_member(own, values, base, where)
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                close = difflib.get_close_matches(str(key), fields, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise UnweaveError(
                    f"{cls.__name__} has no field {key!r}", where=where, remedy=f"{hint}fields: {', '.join(fields)}"
                )
        hints = typing.get_type_hints(cls)
        chosen: dict[str, Any] = {}
        for name, f in fields.items():
            inner = f"{where}.{name}" if where else name
            default = getattr(base, name, f.default)
            if name in values and isinstance(default, Spec) and isinstance(values[name], Mapping):
                chosen[name] = type(default).from_dict(values[name], where=inner, base=default)
            elif name in values:
                chosen[name] = _coerce(values[name], hints[name], inner)
            elif hasattr(base, name):
                chosen[name] = default
            elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise UnweaveError(f"{cls.__name__} needs {name!r}", where=where, remedy=f"give a value for {name!r}")
        try:
            return cls(**chosen)
        except UnweaveError as error:  # which knows the class alone
            if not where or error.where not in ("", cls.__name__):
                raise
            raise UnweaveError(error.what, where=where, remedy=error.remedy) from None

    @classmethod
    def from_file(cls, path: Path | None, overrides: Mapping[str, Any] | None = None) -> Self:
        """A spec from a YAML or TOML file (None: defaults), with overrides by dotted name on top."""
        values = read_mapping(path) if path is not None else {}
        for dotted, value in (overrides or {}).items():
            inner = values
            *parents, last = dotted.split(".")
            for parent in parents:
                inner = inner.setdefault(parent, {})
                if not isinstance(inner, dict):
                    raise UnweaveError(f"{parent!r} is not a group of fields", where=dotted)
            inner[last] = value
        return cls.from_dict(values, where=str(path) if path else "")

    def to_dict(self, *, result_only: bool = False) -> dict[str, Any]:
        """Plain values, ready for JSON; ``from_dict`` of it is equal. ``result_only`` leaves operational fields out."""
        left_out = _uncounted(type(self)) if result_only else frozenset()
        return {
            f.name: _plain(getattr(self, f.name), result_only)
            for f in dataclasses.fields(self)
            if f.name not in left_out
        }

    def digest(self) -> str:
        """Twelve hexadecimal digits over every field that can change the result."""
        return digest({type(self).__name__: self.to_dict(result_only=True)})


@lru_cache
def _uncounted(kind: type[Spec]) -> frozenset[str]:
    """Fields that stay out of the digest: operational ones, and names of what counts by its content alone."""
    named = {name for name, content in content_fields(kind).items() if not content.named}
    return frozenset(f.name for f in dataclasses.fields(kind) if f.name in named or not f.metadata.get("result", True))


def unite(base: type[Spec], members: Sequence[type[Spec]]) -> None:
    """Makes ``base`` a union of subclasses, each named by what its field ``kind`` is by default."""
    base.members = {_default_kind(member): member for member in members}


def _default_kind(spec: type[Spec]) -> str:
    return str(next(f.default for f in dataclasses.fields(spec) if f.name == "kind"))


def _member(cls: type[Spec], values: Mapping[str, Any], base: Spec | None, where: str) -> type[Spec]:
    """Which member of a union is meant: the kind that is given, else that of ``base``, else the default."""
    kind = values.get("kind", _default_kind(cls) if base is None else getattr(base, "kind", None))
    if not isinstance(kind, str) or kind not in cls.members:
        options = "one of " + ", ".join(map(repr, cls.members))
        raise _wrong(kind, options, f"{where}.kind" if where else "kind")
    return cls.members[kind]


def _of_member(own: type[Spec], values: Mapping[str, Any], base: Spec | None, where: str) -> dict[str, Any]:
    """``values``, and ``kind``, without fields of other members. UnweaveError for one that is not its default, given or
    in ``base``: it would have no effect."""
    names = {f.name for f in dataclasses.fields(own)}
    of_base = dataclasses.fields(base) if base is not None else ()
    inherited = {f.name: getattr(base, f.name) for f in of_base if getattr(base, f.name) != f.default}
    foreign = {name: value for name, value in (inherited | dict(values)).items() if name not in names}
    own_values = {name: value for name, value in values.items() if name in names}
    for name, value in foreign.items():
        owners = {k: m for k, m in own.members.items() if name in {f.name for f in dataclasses.fields(m)}}
        if not owners:
            own_values[name] = value  # which is no field at all, and said so
            continue
        other = next(iter(owners.values()))
        inner = f"{where}.{name}" if where else name
        default = next(f.default for f in dataclasses.fields(other) if f.name == name)
        value = _coerce(value, typing.get_type_hints(other)[name], inner)
        if value != default:
            raise rules.no_effect(name, value, rules.only_for("kind", *owners), where or own.__name__)
    return own_values | {"kind": _default_kind(own)}


def digest(value: Any) -> str:
    """Twelve hexadecimal digits of a JSON-able value."""
    text = json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or TOML file. Raises UnweaveError when it is missing or malformed."""
    path = Path(path)
    if not path.is_file():
        raise UnweaveError("no such configuration file", where=str(path), remedy="give the path of a YAML or TOML file")
    if path.suffix == ".toml":
        values = read_toml(path)
    elif path.suffix in (".yaml", ".yml"):
        values = read_yaml(path)
    elif path.suffix == ".json":
        values = read_json(path)
    else:
        raise UnweaveError("unknown configuration format", where=str(path), remedy="use .yaml, .yml, .toml or .json")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UnweaveError("the file does not hold named fields", where=str(path), remedy="write `field: value` lines")
    return values


def _plain(value: Any, result_only: bool) -> Any:
    if isinstance(value, Spec):
        return value.to_dict(result_only=result_only)
    if isinstance(value, (list, tuple)):
        return [_plain(v, result_only) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v, result_only) for k, v in value.items()}
    return str(value) if isinstance(value, Path) else value


def _wrong(value: Any, expected: str, where: str) -> UnweaveError:
    try:
        shown = repr(value)
    except ValueError:  # of more digits than Python writes
        shown = "this number"
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    return UnweaveError(f"{shown} is not {expected}", where=where, remedy=f"give {expected}")


def _number(text: str, hint: type) -> int | float:
    """A number that was typed; whole ones digit by digit, since floats hold only 15 of them."""
    if hint is int:
        with contextlib.suppress(ValueError):
            return int(text)
    return float(text)


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the type ``hint`` asks for; only conversions that lose nothing."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(value, args, where)
    if origin is typing.Literal:
        if value not in args:
            raise _wrong(value, "one of " + ", ".join(map(repr, args)), where)
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            value = [value]  # a single value where a list is asked for
        if not args[1:] or args[1] is not Ellipsis:
            if len(value) != len(args):
                raise _wrong(value, f"a list of {len(args)} values", where)
            return tuple(_coerce(v, a, where) for v, a in zip(value, args, strict=True))
        return tuple(_coerce(v, args[0], f"{where}[{i}]") for i, v in enumerate(value))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise _wrong(value, "a mapping", where)
        return {_coerce(k, args[0], where): _coerce(v, args[1], f"{where}.{k}") for k, v in value.items()}
    if isinstance(hint, type) and issubclass(hint, Spec):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise _wrong(value, "a group of fields", where)
        return hint.from_dict(value, where=where)
    return _coerce_scalar(value, hint, where)


def _writable(text: str, where: str) -> str:
    """Text that can be written to files: what a shell passes on of bytes that are no UTF-8 cannot."""
    if not is_text(text):
        raise _wrong(text, "text in UTF-8", where)
    return text


def _coerce_union(value: Any, options: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in options:
        return None
    named = [
        word for option in options if typing.get_origin(option) is typing.Literal for word in typing.get_args(option)
    ]
    if isinstance(value, str) and value in named:  # where the word none is a value, it is that one
        return value
    if isinstance(value, str) and value.lower() in ("none", "null") and type(None) in options:
        return None
    first: UnweaveError | None = None
    for option in options:
        if option is type(None):
            continue
        try:
            return _coerce(value, option, where)
        except UnweaveError as error:
            first = first or error
    raise first or _wrong(value, "none", where)


def _coerce_scalar(value: Any, hint: Any, where: str) -> Any:
    """Strings from a command line become the number or truth value that the field asks for."""
    if hint is bool:
        if isinstance(value, str) and value.lower() in ("true", "false", "yes", "no"):
            return value.lower() in ("true", "yes")
        if not isinstance(value, bool):
            raise _wrong(value, "true or false", where)
        return value
    if hint in (int, float):
        expected = "a whole number" if hint is int else "a number"
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise _wrong(value, expected, where)
        try:
            number = _number(value.replace("_", ""), hint) if isinstance(value, str) else value
            fine = math.isfinite(number) and (hint is float or (number == int(number) and abs(number) < _TOO_LARGE))
        except (ValueError, OverflowError):
            fine, number = False, 0
        if not fine:
            raise _wrong(value, expected, where)
        return hint(number)
    if hint is str:
        if not isinstance(value, (str, int, float)) or isinstance(value, bool):
            raise _wrong(value, "text", where)
        return _writable(str(value), where)
    if hint is Path:
        if not isinstance(value, (str, Path)):
            raise _wrong(value, "a path", where)
        return Path(_writable(str(value), where))
    raise TypeError(f"{where}: specs do not support the type {hint!r}")
