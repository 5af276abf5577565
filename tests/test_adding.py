"""The examples of docs/adding.md: each is put where its first line says, named where the page says, and run."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from test_example_scripts import ROOT
from test_examples import fenced
from unweave.sae.formats import registry

PAGE = ROOT / "docs" / "adding.md"
PLACE = re.compile(r"# (src/unweave|tests)/([\w/]+)\.py\n")


def examples() -> dict[str, str]:
    """The page's code blocks by the place that their first line names."""
    found = {}
    for code in fenced(PAGE, "python"):
        match = PLACE.match(code)
        assert match is not None, f"the first line says where the file goes: {code[:60]}"
        found[f"{match[1]}/{match[2]}.py"] = code
    return found


EXAMPLES = examples()
MODULES = [place for place in EXAMPLES if place.startswith("src/")]
TESTS = [place for place in EXAMPLES if place.startswith("tests/")]


def module_of(place: str) -> ModuleType:
    """An example as the module that it would be."""
    name = place.removeprefix("src/").removesuffix(".py").replace("/", ".")
    module = ModuleType(name)
    sys.modules[name] = module
    exec(compile(EXAMPLES[place], place, "exec"), module.__dict__)
    return module


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """Every example in its place, and named where the page's table says."""
    before = set(sys.modules)
    found = {place: module_of(place) for place in MODULES}
    for place, module in found.items():
        if "/sae/formats/" in place:
            monkeypatch.setattr(registry, "FORMATS", (module, *registry.FORMATS))
            monkeypatch.setitem(registry.WRITERS, module.NAME, module.save)
    yield found
    for name in set(sys.modules) - before:
        if name.startswith("unweave.") and sys.modules[name] in found.values():
            del sys.modules[name]


def test_every_example_has_its_test() -> None:
    names = {Path(place).stem for place in MODULES}
    assert len(MODULES) >= 3 and {f"test_{name}" for name in names} == {Path(place).stem for place in TESTS}
    assert not [place for place in EXAMPLES if (ROOT / place).exists()]


@pytest.mark.parametrize("place", TESTS)
def test_examples_pass_their_tests(place: str, added: dict[str, ModuleType], request: pytest.FixtureRequest) -> None:
    namespace: dict[str, Any] = {"__name__": Path(place).stem}
    exec(compile(EXAMPLES[place], place, "exec"), namespace)
    (test,) = (value for name, value in namespace.items() if name.startswith("test_"))
    names = test.__code__.co_varnames[: test.__code__.co_argcount]
    test(**{name: request.getfixturevalue(name) for name in names})
