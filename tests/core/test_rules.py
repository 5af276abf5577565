"""Rules of fields, and unions of Specs: what is refused, what the error says, what help shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from unweave.cli.fields import leaves
from unweave.core.errors import UnweaveError
from unweave.core.rules import (
    above,
    at_least,
    at_most,
    below,
    multiple_of,
    not_empty,
    only_for,
    only_where,
    rule,
    rules_of,
    share,
    stated,
)
from unweave.core.spec import Spec, operational, unite


@dataclass(frozen=True, kw_only=True)
class Ruled(Spec):
    """A field of every rule."""

    count: Annotated[int, at_least(1)] = 8
    """How many."""
    rate: Annotated[float, above(0), at_most(1_000)] = 0.5
    """How fast."""
    end: Annotated[float | None, at_least(0), at_most("rate"), only_for("shape", "curve")] = None
    """Where it ends."""
    shape: Literal["line", "curve"] = "line"
    """How it falls."""
    part: Annotated[float, share()] = 0.0
    """How much of it."""
    memory: Annotated[float, below(1)] = 0.9
    """How long it lasts."""
    width: Annotated[int, multiple_of(4)] = 4
    """How wide."""
    names: Annotated[tuple[str, ...], not_empty()] = ("a",)
    """Which."""
    size: Annotated[int, rule("a power of 2", lambda n: n > 0 and n & (n - 1) == 0)] = operational(2)
    """At a time."""
    extra: Annotated[int, only_where("part is above 0", lambda spec: spec.part > 0, "raise part")] = 3
    """Only with a part."""


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    (
        {"count": 0},
        "count must be at least 1; 0 was given",
        "choose one that is at least 1, or leave count out: its default is 8",
    ),
    ({"rate": 0.0}, "rate must be above 0 and at most 1,000; 0.0 was given", "choose one that is above 0"),
    ({"rate": 2000.0}, "rate must be above 0 and at most 1,000; 2000.0 was given", "its default is 0.5"),
    ({"end": 0.6, "shape": "curve"}, "end must be at least 0 and at most rate \\(0.5\\); 0.6 was given", "choose one"),
    (
        {"end": 0.1},
        "end = 0.1 would have no effect: it is only for shape curve",
        "leave end out, or set shape to curve",
    ),
    ({"part": 1.5}, "part must be from 0 to 1; 1.5 was given", "from 0 to 1"),
    ({"memory": 1.0}, "memory must be below 1; 1.0 was given", "below 1"),
    ({"width": 6}, "width must be a multiple of 4; 6 was given", "a multiple of 4"),
    ({"names": []}, r"names must be not empty; \(\) was given", "its default is"),
    ({"size": 3}, "size must be a power of 2; 3 was given", "a power of 2"),
    (
        {"extra": 4},
        "extra = 4 would have no effect: it is only where part is above 0",
        "leave extra out, or raise part",
    ),
]


@pytest.mark.parametrize(("values", "says", "remedy"), REFUSED)
def test_a_refused_value_states_its_rule_and_a_remedy(values: dict[str, Any], says: str, remedy: str) -> None:
    with pytest.raises(UnweaveError, match=says) as caught:
        Ruled.from_dict(values, where="my.yaml")
    assert remedy in caught.value.remedy and caught.value.where == "my.yaml"
    with pytest.raises(UnweaveError, match=says) as caught:
        Ruled(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    assert caught.value.where == "Ruled"


def test_what_keeps_the_rules_is_taken() -> None:
    spec = Ruled(count=1, rate=1_000.0, end=0.0, shape="curve", part=1.0, memory=0.0, width=8, extra=4)
    assert (spec.end, Ruled().end) == (0.0, None)  # none passes rules of value


def test_help_states_the_rules() -> None:
    found = {leaf.name: leaf.rule for leaf in leaves(Ruled)}
    assert found["count"] == "at least 1" and found["shape"] == ""
    assert found["end"] == "at least 0 and at most rate; only for shape curve"
    assert {name for name, text in found.items() if text} == set(rules_of(Ruled))
    assert stated(()) == ""


@dataclass(frozen=True, kw_only=True)
class Animal(Spec):
    """One of several."""

    kind: str = "bird"
    """what it is"""
    legs: Annotated[int, at_least(2)] = 2
    """how many legs"""


@dataclass(frozen=True, kw_only=True)
class Bird(Animal):
    """it flies"""

    kind: Literal["bird"] = "bird"
    wings: Annotated[int, at_least(1)] = 2
    """how many wings"""


@dataclass(frozen=True, kw_only=True)
class Bat(Animal):
    """it flies at night"""

    kind: Literal["bat"] = "bat"
    wings: Annotated[int, at_least(1)] = 2
    """how many wings"""
    range: float = 30.0
    """how far it hears"""


@dataclass(frozen=True, kw_only=True)
class Fish(Animal):
    """it swims"""

    kind: Literal["fish"] = "fish"


unite(Animal, (Bird, Bat, Fish))


@dataclass(frozen=True, kw_only=True)
class Zoo(Spec):
    """Holds one."""

    animal: Animal = Bird(legs=3)
    """Which animal."""


def test_kind_decides_which_member_is_made() -> None:
    assert Animal.from_dict({}) == Bird() and Animal.from_dict({"kind": "bat", "range": 3}) == Bat(range=3.0)
    assert Bat.from_dict({"range": 3}) == Bat(range=3.0) and Bird.from_dict({"kind": "fish"}) == Fish()
    assert Animal.from_dict(Bat(range=3.0).to_dict()) == Bat(range=3.0)
    assert Bird().to_dict() == {"kind": "bird", "legs": 2, "wings": 2}
    assert len({spec.digest() for spec in (Bird(), Bat(), Fish())}) == 3
    with pytest.raises(UnweaveError, match=r"'cow' is not one of 'bird', 'bat', 'fish'[\s\S]*where: zoo.kind"):
        Animal.from_dict({"kind": "cow"}, where="zoo")


def test_a_field_stays_what_it_was_where_another_member_has_it_too() -> None:
    assert Zoo.from_dict({"animal": {"kind": "bat"}}).animal == Bat(legs=3)
    assert Zoo.from_dict({"animal": {"wings": 4}}).animal == Bird(legs=3, wings=4)
    assert Animal.from_dict({"kind": "bat"}, base=Bird(wings=4)) == Bat(wings=4)


def test_a_field_of_another_member_is_refused_unless_it_is_its_default() -> None:
    for values in ({"kind": "fish", "wings": 3}, {"wings": 3, "kind": "fish", "legs": 4}):
        with pytest.raises(UnweaveError, match="wings = 3 would have no effect: it is only for kind bird or bat") as e:
            Zoo.from_dict({"animal": values})
        assert e.value.where == "animal" and e.value.remedy == "leave wings out, or set kind to bird or bat"
    with pytest.raises(UnweaveError, match="wings = 4 would have no effect"):
        Animal.from_dict({"kind": "fish"}, base=Bird(wings=4))  # said before, and not taken back
    assert Animal.from_dict({"kind": "fish", "wings": "2"}) == Fish()
    with pytest.raises(UnweaveError, match=r"Fish has no field 'fins'"):
        Animal.from_dict({"kind": "fish", "fins": 3})
    with pytest.raises(UnweaveError, match="not a whole number"):
        Animal.from_dict({"kind": "fish", "wings": "many"})


def test_a_member_is_of_its_own_kind() -> None:
    for make in (lambda: Bird(kind="fish"), Animal):  # type: ignore[arg-type]
        with pytest.raises(UnweaveError, match="make one of Bird, Bat, Fish"):
            make()


def test_help_shows_the_fields_of_all_members_and_whose_they_are() -> None:
    found = {leaf.name: leaf for leaf in leaves(Zoo)}
    assert list(found) == ["animal.kind", "animal.legs", "animal.wings", "animal.range"]
    assert found["animal.kind"].metavar == "bird|bat|fish" and found["animal.kind"].shown_default == "bird"
    assert found["animal.kind"].doc == "what it is: bird: it flies; bat: it flies at night; fish: it swims"
    assert found["animal.wings"].doc == "bird, bat: how many wings" and found["animal.wings"].rule == "at least 1"
    assert found["animal.range"].doc == "bat: how far it hears" and found["animal.legs"].shown_default == "3"


def specs() -> list[type[Spec]]:
    """Every Spec of the package."""
    import pkgutil
    from importlib import import_module

    import unweave

    for module in pkgutil.walk_packages(unweave.__path__, "unweave."):
        if module.name.rpartition(".")[2] in ("spec", "pack", "corpus") or ".kinds." in module.name:
            import_module(module.name)
    found, left = [], [Spec]
    while left:
        inner = left.pop().__subclasses__()
        found += inner
        left += inner
    return [one for one in found if one.__module__.startswith("unweave.")]


def test_checks_of_a_spec_of_its_own_do_not_replace_its_rules() -> None:
    """A ``__post_init__`` that forgets the one it overrides would switch every rule off."""
    import inspect

    assert len(specs()) > 20
    for one in specs():
        if "__post_init__" in one.__dict__:
            body = inspect.getsource(one.__post_init__)
            assert "super().__post_init__()" in body or "Spec.__post_init__(self)" in body, one.__name__
