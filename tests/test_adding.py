"""The examples of docs/adding.md: each is put where its first line says, named where the page says, and run."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from helpers.pages import fenced
from helpers.paths import ROOT
from unweave import methods
from unweave.cli.stages import stages
from unweave.core.spec import unite
from unweave.methods.train.kinds import KINDS, SAESpec
from unweave.sae.formats import registry

PAGE = ROOT / "docs" / "adding.md"
PLACE = re.compile(r"# ((?:src/unweave|tests)/[\w/]+\.py)\n")


def examples() -> dict[str, str]:
    """The page's code blocks by the place that their first line names."""
    blocks = fenced(PAGE, "python")
    places = [PLACE.match(code) for code in blocks]
    return {match[1] if match else "": code for match, code in zip(places, blocks, strict=True)}


EXAMPLES = examples()
MODULES = [place for place in EXAMPLES if place.startswith("src/")]
TESTS = [place for place in EXAMPLES if place.startswith("tests/")]


def forget() -> None:
    """Commands are looked up anew."""
    for cached in (methods.commands, stages):
        cached.cache_clear()


@pytest.fixture
def added(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every example in its place, as far as imports can tell, and named where the page says."""
    folder = tmp_path_factory.mktemp("added")
    packages = set()
    for place in MODULES:
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(EXAMPLES[place], encoding="utf-8")
        packages.add(Path(place).parent if (ROOT / place).parent.is_dir() else Path(place).parent.parent)
    for place in packages:
        package = import_module(".".join(place.parts[1:]))
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder / place)])
    before = set(sys.modules)
    plain = import_module("unweave.sae.formats.plain")
    monkeypatch.setattr(registry, "FORMATS", (plain, *registry.FORMATS))
    monkeypatch.setitem(registry.WRITERS, plain.NAME, plain.save)
    monkeypatch.setattr(methods, "METHODS", (*methods.METHODS, "methods.twins"))
    forget()
    penalty = import_module("unweave.methods.train.kinds.log_penalty")
    monkeypatch.setattr(SAESpec, "members", SAESpec.members)  # put back what unite changes
    unite(SAESpec, (*KINDS, penalty.LogPenaltySpec))
    yield
    forget()
    for name in set(sys.modules) - before:
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_every_example_has_its_place_and_its_test() -> None:
    assert "" not in EXAMPLES, "the first line of every block says where the file goes"
    assert not [place for place in EXAMPLES if (ROOT / place).exists()]
    tried = {Path(place).stem.removeprefix("test_") for place in TESTS}
    assert [place for place in MODULES if not tried & {Path(place).stem, Path(place).parent.name}] == []


@pytest.mark.usefixtures("added")
@pytest.mark.parametrize("place", TESTS)
def test_examples_pass_their_tests(place: str, request: pytest.FixtureRequest) -> None:
    namespace: dict[str, Any] = {"__name__": Path(place).stem}
    exec(compile(EXAMPLES[place], place, "exec"), namespace)
    (test,) = (value for name, value in namespace.items() if name.startswith("test_"))
    names = test.__code__.co_varnames[: test.__code__.co_argcount]
    test(**{name: request.getfixturevalue(name) for name in names})
