"""A Spec's fields as the command line shows them: dotted names, types in words, defaults and docstrings."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unweave.core import rules
from unweave.core.spec import Spec

MISSING = dataclasses.MISSING


@dataclass(frozen=True)
class Leaf:
    """One value that can be set: ``data.context``. ``default`` is MISSING where one must be given."""

    name: str
    hint: Any
    default: Any
    doc: str
    group: str
    group_doc: str
    rule: str = ""
    """what the value must be, and when it has an effect, in words"""

    @property
    def is_flag(self) -> bool:
        return _without_none(self.hint) is bool

    @property
    def is_list(self) -> bool:
        return typing.get_origin(_without_none(self.hint)) in (tuple, dict)

    @property
    def holds_groups(self) -> bool:
        """Whether it is a mapping or a list of Specs, which need more than bare words."""
        return self.short_form is not None or typing.get_origin(_without_none(self.hint)) is dict

    @property
    def short_form(self) -> str | None:
        """In a list of Specs, the field that a bare word stands for: the first, as ``path`` of a source."""
        args = typing.get_args(_without_none(self.hint))
        if self.is_list and isinstance(args[0], type) and issubclass(args[0], Spec):
            return dataclasses.fields(args[0])[0].name
        return None

    @property
    def metavar(self) -> str:
        """The type in a word; of long lists of choices only that it is one of ``choices``."""
        return "CHOICE" if self.choices else _words(self.hint)

    @property
    def choices(self) -> str:
        """Choices that are too many to stand behind the option."""
        hint = _without_none(self.hint)
        listed = ", ".join(map(str, typing.get_args(hint))) if typing.get_origin(hint) is typing.Literal else ""
        return listed if len(listed) > 20 else ""

    @property
    def shown_default(self) -> str:
        """Empty where there is none, or where the docstring says what happens without a value."""
        return "" if self.default is MISSING or self.default is None else _shown(self.default)


def leaves(spec: type[Spec], prefix: str = "", group_doc: str = "", default: Spec | None = None) -> Iterator[Leaf]:
    """Every field of a Spec and of the Specs inside it, in the order they are written, shorthands before them."""
    for short, (hint, doc) in spec.shorthands.items():
        yield Leaf(f"{prefix}.{short}" if prefix else short, hint, None, doc, prefix, group_doc)
    for owner, kinds, field in _fields(spec):
        name = f"{prefix}.{field.name}" if prefix else field.name
        hint, doc = typing.get_type_hints(owner)[field.name], field_docs(owner).get(field.name, "")
        if spec.members and field.name == "kind":
            hint, doc = Literal[*spec.members], f"{doc}: {_kinds(spec)}"
        doc = f"{', '.join(kinds)}: {doc}" if kinds else doc
        value = getattr(default, field.name, _default(field))
        inner = _without_none(hint)
        if isinstance(inner, type) and issubclass(inner, Spec):
            yield from leaves(inner, name, doc or _first_line(inner), value if isinstance(value, Spec) else None)
        else:
            rule = rules.stated(rules.rules_of(owner).get(field.name, ()))
            yield Leaf(name, hint, value, doc, prefix, group_doc, rule)


def _fields(spec: type[Spec]) -> Iterator[tuple[type[Spec], list[str], dataclasses.Field[Any]]]:
    """Every field with the Spec that has it and, in a union, the kinds that do where not all have it."""
    shared = {field.name for field in dataclasses.fields(spec)}
    first = "kind" if spec.members else ""
    yield from ((spec, [], field) for field in sorted(dataclasses.fields(spec), key=lambda field: field.name != first))
    others: dict[str, tuple[type[Spec], list[str], dataclasses.Field[Any]]] = {}
    for kind, member in spec.members.items():
        for field in (field for field in dataclasses.fields(member) if field.name not in shared):
            others.setdefault(field.name, (member, [], field))[1].append(kind)
    yield from others.values()


def _kinds(spec: type[Spec]) -> str:
    return "; ".join(f"{kind}: {_first_line(member)}" for kind, member in spec.members.items())


def field_docs(spec: type[Spec]) -> dict[str, str]:
    """The docstring under each field, inherited ones included; empty where the source is not at hand."""
    docs: dict[str, str] = {}
    for cls in reversed(spec.__mro__):
        if not (issubclass(cls, Spec) and cls is not Spec):
            continue
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        except (OSError, TypeError, SyntaxError):
            continue
        assert isinstance(body, ast.ClassDef)
        for statement, after in zip(body.body, body.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                match after:
                    case ast.Expr(value=ast.Constant(value=str(text))):
                        docs[statement.target.id] = " ".join(text.replace("`", "").split())
    return docs


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _first_line(cls: type) -> str:
    return (inspect.getdoc(cls) or "").split("\n")[0].replace("`", "")


def _without_none(hint: Any) -> Any:
    """``X`` of ``X | None``; any other hint as it is."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        rest = [a for a in typing.get_args(hint) if a is not type(None)]
        return rest[0] if len(rest) == 1 else hint
    return hint


def _words(hint: Any) -> str:
    """A type as it stands behind an option: INT, PATH, topk|relu, TEXT..."""
    hint = _without_none(hint)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "|".join(str(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return "|".join(dict.fromkeys(_words(a) for a in args if a is not type(None)))
    if origin is tuple:
        return f"{_words(args[0])}..." if args[-1] is Ellipsis else " ".join(_words(a) for a in args)
    if origin is dict:
        return "{KEY: VALUE}"
    if isinstance(hint, type) and issubclass(hint, Spec):
        return dataclasses.fields(hint)[0].name.upper()
    return {int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH"}.get(hint, "VALUE")


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Spec):
        changed = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        defaults = {f.name: _default(f) for f in dataclasses.fields(value)}
        return "{" + ", ".join(f"{k}: {_shown(v)}" for k, v in changed.items() if v != defaults[k]) + "}"
    if isinstance(value, tuple):
        return " ".join(_shown(v) for v in value) if value else "nothing"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)
