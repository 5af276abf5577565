"""Files, functions and questions stay small enough to read. Exceptions are named, each with its reason, and only go."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

import pytest

from helpers.paths import SOURCE

LINES, LONGEST, MOST_PARAMETERS, MOST_FIELDS = 400, 60, 8, 15

_ONE_CALL = "one call of the library; keyword-only options, each a setting of the method"
_KERNEL = "a kernel's pointers and strides, which Triton takes one by one"
_SPLIT = "to be split into groups of fields"
EXCEPTIONS: dict[str, str] = {
    "cli/annotate.py annotate: parameters": "the options of a command",
    "data/stream.py __init__: parameters": _ONE_CALL,
    "sae/module.py __init__: parameters": "the parts of an SAE",
    "sae/sparse/triton_kernels.py _weighted_rows: parameters": _KERNEL,
    "sae/sparse/triton_kernels.py _dot_rows: parameters": _KERNEL,
    "sae/steered.py sweep: parameters": _ONE_CALL,
}


def too_large(text: str, name: str) -> Iterator[str]:
    """What of a module is over a limit."""
    if len(text.splitlines()) > LINES:
        yield f"{name}: lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if (node.end_lineno or node.lineno) - node.lineno + 1 > LONGEST:
                yield f"{name} {node.name}: lines"
            given = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            if sum(one.arg not in ("self", "cls") for one in given) > MOST_PARAMETERS:
                yield f"{name} {node.name}: parameters"
        elif isinstance(node, ast.ClassDef):
            of_spec = any("Spec" in ast.unparse(base) for base in node.bases)
            if of_spec and sum(isinstance(part, ast.AnnAssign) for part in node.body) > MOST_FIELDS:
                yield f"{name} {node.name}: fields"


def everything() -> set[str]:
    names = {path: path.relative_to(SOURCE).as_posix() for path in sorted(SOURCE.rglob("*.py"))}
    return {one for path, name in names.items() for one in too_large(path.read_text(encoding="utf-8"), name)}


def test_nothing_is_larger_than_one_can_read_but_for_what_is_listed() -> None:
    assert sorted(everything() - set(EXCEPTIONS)) == []


def test_exceptions_that_are_none_any_more_are_taken_off_the_list() -> None:
    assert sorted(set(EXCEPTIONS) - everything()) == []


@pytest.mark.parametrize(
    ("code", "what"),
    [
        (lambda: "x = 1\n" * (LINES + 1), "m.py: lines"),
        (lambda: "def f():\n" + "    x = 1\n" * LONGEST, "m.py f: lines"),
        (lambda: f"def f(self, {', '.join(f'a{i}' for i in range(9))}): ...", "m.py f: parameters"),
        (lambda: "class A(Spec):\n" + "".join(f"    a{i}: int\n" for i in range(16)), "m.py A: fields"),
    ],
)
def test_what_is_too_large_is_found(code: Callable[[], str], what: str) -> None:
    assert list(too_large(code(), "m.py")) == [what]


def test_what_is_just_small_enough_passes() -> None:
    parameters = ", ".join(f"a{i}" for i in range(MOST_PARAMETERS))
    body = "    x = 1\n" * (LONGEST - 1)
    assert list(too_large(f"def f(self, {parameters}):\n{body}", "m.py")) == []
