"""Results: what is written is read again, anything else is refused, and rows become tables."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.report import full
from unweave.core.errors import UnweaveError
from unweave.core.result import Result, as_read, as_written, to_arrow, to_plain
from unweave.core.site import Site
from unweave.methods import commands
from unweave.methods.trace.result import Trace


@dataclass(frozen=True)
class Inner:
    value: float
    site: Site | None = None


@dataclass(frozen=True)
class Outer(Result):
    name: str
    n: int
    kind: Literal["a", "b"]
    fine: bool
    inner: Inner
    many: tuple[Inner, ...]
    pair: tuple[int, str]
    by_name: dict[str, float]
    place: Path


def outer(**changes: Any) -> Outer:
    base = Outer(
        "x", 3, "a", True, Inner(0.5, Site("embed")), (Inner(1.0),), (1, "two"), {"c": 0.1}, Path("sae/weights")
    )
    return replace(base, **changes)


@pytest.mark.parametrize("result", [outer(), *full().values()], ids=lambda result: type(result).__name__)
def test_what_is_written_is_read_again(result: Result) -> None:
    text = json.dumps(as_written(result), allow_nan=False)
    assert as_read(type(result), json.loads(text), "here") == result


@given(
    st.builds(
        Outer, st.text(st.characters(exclude_categories=["Cs"])), st.integers(), st.sampled_from("ab"), st.booleans(),
        st.builds(Inner, st.floats(allow_nan=False, allow_infinity=False), st.none()),
        st.lists(st.builds(Inner, st.floats(allow_nan=False, allow_infinity=False))).map(tuple),
        st.tuples(st.integers(), st.text(st.characters(exclude_categories=["Cs"]))),
        st.dictionaries(st.text("abc"), st.floats(allow_nan=False, allow_infinity=False)),
        st.just(Path("a/b")),
    )
)  # fmt: skip
def test_any_values_come_back(result: Outer) -> None:
    assert as_read(Outer, json.loads(json.dumps(as_written(result))), "here") == result


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("name",), 3, "name"),
        (("n",), 1.5, "n"),
        (("n",), True, "n"),
        (("kind",), "c", "kind"),
        (("fine",), 1, "fine"),
        (("inner",), None, "inner"),
        (("inner", "value"), "0.5", "value"),
        (("inner", "site"), "nowhere.x", ""),
        (("many",), {}, "many"),
        (("many",), [[]], "many[0]"),
        (("pair",), [1], "pair"),
        (("by_name",), {"c": "d"}, "by_name.c"),
        (("by_name",), [], "by_name"),
        (("more",), 1, ""),
    ],
)
def test_other_values_are_refused_by_name(path: tuple[str, ...], value: Any, named: str) -> None:
    written = as_written(outer())
    place: Any = written["value"]
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    with pytest.raises(UnweaveError) as raised:
        as_read(Outer, written, "result.json")
    assert named in raised.value.where


def test_missing_fields_and_other_schemas_are_refused() -> None:
    written = as_written(outer())
    for wrong in (
        written | {"schema": 2},
        written | {"result": "Inner"},
        {name: value for name, value in written.items() if name != "value"},
        written | {"value": {name: value for name, value in written["value"].items() if name != "n"}},
        [],
        None,
    ):
        with pytest.raises(UnweaveError):
            as_read(Outer, wrong, "result.json")


def test_what_json_cannot_hold_is_refused_when_it_is_written() -> None:
    with pytest.raises(TypeError, match="complex"):
        to_plain({"x": 1j})
    with pytest.raises(ValueError):
        json.dumps(as_written(outer(inner=Inner(math.nan))), allow_nan=False)


def test_rows_become_a_table_in_one_call() -> None:
    trace = full()["trace"]
    assert isinstance(trace, Trace)
    table = to_arrow(trace.effects)
    assert table.column_names == ["latent", "chosen", "ig", "attribution", "exact", "exact_patch"]
    assert table.num_rows == len(trace.effects) and table.schema.field("ig").type == pa.float64()
    nested = to_arrow([outer()])
    assert nested["pair[0]"].to_pylist() == [1] and nested["pair[1]"].to_pylist() == ["two"]
    assert nested["inner.site"].to_pylist() == ["embed"] and nested["place"].to_pylist() == ["sae/weights"]


def test_every_command_has_a_result_and_a_view_that_need_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys\n"
        "from unweave.methods import commands\n"
        "from unweave.core.result import view_of\n"
        "for command in commands():\n"
        "    view = view_of(command.result)\n"
        "    assert callable(view.rows) and callable(view.section), command.words\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(commands()) >= 8
