"""docs/traps.md has every trap that code and tests cite by number, and names only tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from helpers.paths import SOURCE, TESTS

PAGE = SOURCE.parent.parent / "docs" / "traps.md"
LIST = r"\d+(?:(?:, | and |_and_|_)\d+)*"


def entries(page: str) -> dict[int, str]:
    """The page's sections by their numbers, in its order."""
    parts = re.split(r"^### (\d+)\. ", page, flags=re.M)
    return {int(number): text for number, text in zip(parts[1::2], parts[2::2], strict=True)}


def cited(text: str) -> set[int]:
    """The numbers in "trap 12", "traps 19 and 21", ``test_trap_20_21_folding`` and the like."""
    lists = re.findall(rf"\btraps? ({LIST})", text, re.I) + re.findall(rf"_traps?_({LIST})(?=_)", text)
    return {int(number) for found in lists for number in re.findall(r"\d+", found)}


def names_in(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


def test_every_number_that_is_cited_is_on_the_page() -> None:
    there = entries(PAGE.read_text(encoding="utf-8"))
    assert list(there) == list(range(1, len(there) + 1))
    files = [*SOURCE.rglob("*.py"), *(path for path in TESTS.rglob("*.py") if path != Path(__file__))]
    missing = {path.name: absent for path in files if (absent := cited(path.read_text("utf-8")) - set(there))}
    assert missing == {}


def test_every_test_that_the_page_names_exists() -> None:
    files = {path.name: path for path in TESTS.rglob("test_*.py")}
    for number, text in entries(PAGE.read_text(encoding="utf-8")).items():
        named = re.findall(r"`(test_\w+\.py)::(\w+)`", text)
        assert named, f"trap {number} names no test"
        for file, name in named:
            assert file in files and name in names_in(files[file]), f"trap {number}: {file}::{name}"


def test_every_entry_says_what_goes_wrong_and_what_is_done() -> None:
    for number, text in entries(PAGE.read_text(encoding="utf-8")).items():
        _, wrong, done = (part.strip() for part in re.split(r"\n\n", text, maxsplit=2))
        assert len(wrong) > 40 and done.startswith("**Unweave**") and "**Held by**" in done, number


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("a comment (trap 12)", {12}),
        ("Traps 12, 14, 25: other models", {12, 14, 25}),
        ("def test_trap_20_21_folding(): ...", {20, 21}),
        ("def test_traps_19_and_21_bare_tensors(): ...", {19, 21}),
        ("def test_trap_33_trap_01_split(): ...", {33, 1}),
        ("def test_a_trap_for_nobody(): ...", set()),
        ("no number: a trap", set()),
    ],
)
def test_citations_are_read(text: str, numbers: set[int]) -> None:
    assert cited(text) == numbers
