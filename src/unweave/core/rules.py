"""Rules of a Spec's fields, stated once on the field: what is refused, what the error says, and what ``--help`` says.

    k: Annotated[int, at_least(1)] = 32
    lr_end: Annotated[float | None, at_least(0), at_most("lr"), only_for("schedule", "cosine")] = None

A ``Rule`` is about the value: "k must be at least 1; 0 was given". None passes it. A ``Use`` says when the field has an
effect; where it has none, any value but the default is refused. Both are checked whenever a Spec is made, in the order
of its fields. A bound may be another field's name, also of a nested Spec: ``below("contexts.min_context")``.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from unweave.core.errors import UnweaveError

_SHOWN = 200


@dataclass(frozen=True)
class Rule:
    """What a value must be, in words that follow "must be", and whether it is: ``holds(value, spec)``."""

    words: str
    holds: Callable[[Any, Any], bool]
    bound: str | None = None
    """the field that the value is compared with, where it is one"""


@dataclass(frozen=True)
class Use:
    """When a field has an effect, in words that follow "it is", whether it has: ``holds(spec)``; and how to get it."""

    words: str
    holds: Callable[[Any], bool]
    remedy: str


def rule(words: str, holds: Callable[[Any], bool]) -> Rule:
    """A rule of one value alone: ``rule("a power of 2", lambda n: n & (n - 1) == 0)``."""
    return Rule(words, lambda value, spec: holds(value))


def at_least(bound: float | str) -> Rule:
    return _bounded("at least", bound, operator.ge)


def above(bound: float | str) -> Rule:
    return _bounded("above", bound, operator.gt)


def at_most(bound: float | str) -> Rule:
    return _bounded("at most", bound, operator.le)


def below(bound: float | str) -> Rule:
    return _bounded("below", bound, operator.lt)


def share() -> Rule:
    """A part of a whole."""
    return rule("from 0 to 1", lambda value: 0 <= value <= 1)


def multiple_of(unit: int) -> Rule:
    return rule(f"a multiple of {unit}", lambda value: value % unit == 0)


def not_empty() -> Rule:
    """Of lists and of text."""
    return rule("not empty", lambda value: len(value) > 0)


def only_for(name: str, *values: Any) -> Use:
    """The field has an effect only where the field ``name`` is one of ``values``."""
    options = " or ".join(map(str, values))
    return Use(f"only for {name} {options}", lambda spec: getattr(spec, name) in values, f"set {name} to {options}")


def only_where(words: str, holds: Callable[[Any], bool], remedy: str) -> Use:
    """The field has an effect only where ``holds(spec)``: ``words`` follow "only where", ``remedy`` gets there."""
    return Use(f"only where {words}", holds, remedy)


def check(spec: Any) -> None:
    """Raises UnweaveError for the first field of a Spec that breaks a rule, saying the rule and the remedy."""
    where = type(spec).__name__
    fields = {f.name: f for f in dataclasses.fields(spec)}
    for name, choices in _choices(type(spec)).items():
        if (value := getattr(spec, name)) not in choices:
            what = f"{name} must be one of {', '.join(map(str, choices))}; {_shown(value)} was given"
            raise UnweaveError(what, where=where, remedy="choose one of these")
    for name, rules in rules_of(type(spec)).items():
        value = getattr(spec, name)
        for condition in rules:
            if isinstance(condition, Use):
                if value != fields[name].default and not condition.holds(spec):
                    raise no_effect(name, value, condition, where)
            elif value is not None and not condition.holds(value, spec):
                raise _refused(fields[name], value, rules, spec)


def no_effect(name: str, value: Any, use: Use, where: str) -> UnweaveError:
    """The error for a field that was given and has no effect."""
    what = f"{name} = {_shown(value)} would have no effect: it is {use.words}"
    return UnweaveError(what, where=where, remedy=f"leave {name} out, or {use.remedy}")


def _refused(field: dataclasses.Field[Any], value: Any, rules: tuple[Rule | Use, ...], spec: Any) -> UnweaveError:
    words = " and ".join(_with_bound(condition, spec) for condition in rules if isinstance(condition, Rule))
    plain = field.default is not dataclasses.MISSING and field.default is not None and value != field.default
    instead = f", or leave {field.name} out: its default is {_shown(field.default)}" if plain else ""
    return UnweaveError(
        f"{field.name} must be {words}; {_shown(value)} was given", where=type(spec).__name__,
        remedy=f"choose one that is {words}{instead}",
    )  # fmt: skip


def stated(rules: tuple[Rule | Use, ...]) -> str:
    """The rules of a field in words: "at least 0 and at most lr; only for schedule cosine"."""
    values = " and ".join(condition.words for condition in rules if isinstance(condition, Rule))
    return "; ".join(filter(None, [values, *(condition.words for condition in rules if isinstance(condition, Use))]))


@functools.cache
def rules_of(cls: type) -> dict[str, tuple[Rule | Use, ...]]:
    """The rules of every field that has some, by name."""
    hints = typing.get_type_hints(cls, include_extras=True)
    rules = {f.name: _of_hint(hints[f.name]) for f in dataclasses.fields(cls)}
    return {name: own for name, own in rules.items() if own}


@functools.cache
def _choices(cls: type) -> dict[str, tuple[Any, ...]]:
    """What fields of a ``Literal`` type may be; others may be None too."""
    hints = typing.get_type_hints(cls)
    choices: dict[str, tuple[Any, ...]] = {}
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        arms = typing.get_args(hint) if union else (hint,)
        if all(arm is type(None) or typing.get_origin(arm) is typing.Literal for arm in arms):
            none = (None,) if type(None) in arms else ()
            choices[f.name] = (*(value for arm in arms for value in typing.get_args(arm)), *none)
    return choices


def _of_hint(hint: Any) -> tuple[Rule | Use, ...]:
    metadata = typing.get_args(hint)[1:] if typing.get_origin(hint) is typing.Annotated else ()
    return tuple(condition for condition in metadata if isinstance(condition, (Rule, Use)))


def _bounded(relation: str, bound: float | str, holds: Callable[[Any, Any], bool]) -> Rule:
    """A rule that compares with a number, or with another field; where that is none, the rule holds."""
    if isinstance(bound, str):
        return Rule(
            f"{relation} {bound}", lambda value, spec: _holds_to(holds, value, operator.attrgetter(bound)(spec)), bound
        )
    return Rule(f"{relation} {bound:,}", lambda value, spec: holds(value, bound))


def _holds_to(holds: Callable[[Any, Any], bool], value: Any, other: Any) -> bool:
    return other is None or holds(value, other)


def _with_bound(condition: Rule, spec: Any) -> str:
    if condition.bound is None:
        return condition.words
    return f"{condition.words} ({_shown(operator.attrgetter(condition.bound)(spec))})"


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
