"""Results: frozen dataclasses of plain values, with one writer and one reader.

A result holds numbers, text, truth values, None, sites, and tuples, dicts and dataclasses of these. A path in it is
relative to the run's folder. Its class has a ``schema`` number, raised when a field changes its meaning or goes; a file
of another number is refused. What a result looks like stands in the ``view`` module beside its class, which needs
neither torch nor a model:

    rows(result) -> [(measure, value, meaning)]     what the terminal shows
    section(result, folder=None) -> Section         its part of a page; ``folder`` is the run's, for arrays beside it
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from unweave.core.errors import UnweaveError
from unweave.core.site import Site

T = TypeVar("T")
Row = tuple[str, Any, str]
"""(measure, value, meaning): a line of the table on the terminal"""


class Result:
    """Base of every result; subclasses are frozen dataclasses."""

    schema: ClassVar[int] = 1

    def rows(self) -> list[Row]:
        """The lines that the terminal shows."""
        return [(str(name), value, str(meaning)) for name, value, meaning in view_of(type(self)).rows(self)]

    def _repr_html_(self) -> str:
        """What a notebook shows: the result's section of a page, with its style."""
        return view_of(type(self)).section(self).embedded()


def to_arrow(rows: Iterable[Any]) -> Any:
    """A pyarrow table of dataclasses of one kind, as results hold them: a column per field, those of inner dataclasses
    under dotted names, sites and paths as text. ``to_arrow(rows).to_pandas()`` is a data frame, where pandas is there.
    """
    import pyarrow

    return pyarrow.Table.from_pylist([dict(_columns(to_plain(row))) for row in rows])


def _columns(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in flat(values):
        if isinstance(value, list) and len(set(map(type, value))) > 1:  # a column has one type
            yield from ((f"{name}[{place}]", part) for place, part in enumerate(value))
        else:
            yield name, value


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Named values, those of inner mappings under dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def view_of(kind: type[Any]) -> Any:
    """The module beside a result's class that shows it."""
    package = kind.__module__.rpartition(".")[0]
    return import_module(f"{package}.view")


def to_plain(value: Any) -> Any:
    """What JSON can hold of a result or a part of one. TypeError for values that a result cannot hold."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (Site, Path)):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    raise TypeError(f"a result cannot hold a {type(value).__name__}")


def from_plain(hint: Any, value: Any, where: str) -> Any:
    """The value of type ``hint`` that ``to_plain`` made plain. UnweaveError, naming the field, where it is not one."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _one_of(args, value, where)
    if origin is typing.Literal:
        return _expect(value in args, value, where, f"one of {', '.join(map(repr, args))}")
    if origin is tuple:
        _expect(isinstance(value, list), value, where, "a list")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(from_plain(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        _expect(len(value) == len(args), value, where, f"a list of {len(args)} values")
        return tuple(
            from_plain(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(args, value, strict=True))
        )
    if origin in (dict, Mapping, typing.get_origin(Mapping[str, int])):
        _expect(isinstance(value, dict), value, where, "named values")
        return {from_plain(args[0], k, where): from_plain(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if hint in (Site, Path):
        _expect(isinstance(value, str), value, where, "text")
        return Site.parse(value) if hint is Site else Path(value)
    if dataclasses.is_dataclass(hint):
        return _dataclass(typing.cast(type, hint), value, where)
    return _scalar(hint, value, where)


def _scalar(hint: type, value: Any, where: str) -> Any:
    if hint is float:
        _expect(isinstance(value, (int, float)) and not isinstance(value, bool), value, where, "a number")
        return float(value)
    _expect(isinstance(value, hint) and (hint is bool or not isinstance(value, bool)), value, where, hint.__name__)
    return value


def _dataclass(kind: type, value: Any, where: str) -> Any:
    _expect(isinstance(value, dict), value, where, "named values")
    hints, names = _hints(kind), {f.name for f in dataclasses.fields(kind)}
    _expect(set(value) == names, sorted(set(value) ^ names), where, f"the fields of {kind.__name__}, and no others")
    return kind(**{name: from_plain(hints[name], item, f"{where}.{name}") for name, item in value.items()})


@lru_cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _one_of(options: Sequence[Any], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    first: UnweaveError | None = None
    for option in options:
        if option is not type(None):
            try:
                return from_plain(option, value, where)
            except UnweaveError as error:
                first = first or error
    raise first or _wrong(value, where, "none")


def _expect(fine: bool, value: Any, where: str, expected: str) -> Any:
    if not fine:
        raise _wrong(value, where, expected)
    return value


def _wrong(value: Any, where: str, expected: str) -> UnweaveError:
    return UnweaveError(
        f"{str(value)[:80]!r} is not {expected}", where=where, remedy="run the command again in another --runs folder"
    )


def as_written(result: Result) -> dict[str, Any]:
    """What result.json holds."""
    return {"result": type(result).__name__, "schema": result.schema, "value": to_plain(result)}


def as_read(kind: type[T], written: Any, where: str) -> T:
    """The result in result.json. UnweaveError for another class's, another schema's, or damaged ones."""
    expected = {"result": kind.__name__, "schema": getattr(kind, "schema", None)}
    about = {name: written.get(name) for name in expected} if isinstance(written, dict) else None
    if about != expected or "value" not in written:
        remedy = "delete the run directory and run the command again with this version"
        raise UnweaveError(f"this is no {kind.__name__} of schema {expected['schema']}", where=where, remedy=remedy)
    return from_plain(kind, written["value"], where)
