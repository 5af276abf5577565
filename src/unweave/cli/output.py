"""What a command prints: a table and the run directory for people, one JSON object for machines."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from cyclopts import Parameter

from unweave.core.result import Result, to_plain
from unweave.core.shown import plain, plain_json


class Outcome(Protocol):
    """What a stage returns: a finished run, or anything with these two."""

    @property
    def path(self) -> Path: ...

    @property
    def result(self) -> Result: ...


JSON = Parameter(help="Print one JSON object for machines.", negative=(), show_default=False)
LONG_LIST = 6
"""Lists of more values than this are counted in the table, not shown; they are in result.json."""


def for_machines(outcome: Outcome) -> dict[str, Any]:
    """Where the run is, whether it was there already, and what it found."""
    return {"run": str(outcome.path), "reused": was_reused(outcome), "result": to_plain(outcome.result)}


def show_outcome(stage: str, outcome: Outcome) -> None:
    """A table of what was found, then the run directory, and the report where there is one."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False)
    result = outcome.result
    console.print(_table(stage, [(name, in_words(value), meaning) for name, value, meaning in result.rows()]))
    # Paths are printed plainly, so that they are never wrapped and can be copied.
    print(plain(f"run directory ({'reused' if was_reused(outcome) else 'made'}): {outcome.path}"))
    if not was_reused(outcome) and (seconds := float(getattr(outcome, "seconds", 0.0))):
        print(f"time: {seconds:.1f} s" if seconds < 60 else f"time: {seconds / 60:.1f} min")
    report = getattr(result, "report", None)
    if isinstance(report, Path):
        print(plain(f"report: {os.path.normpath(Path(outcome.path, report))}"))


def was_reused(outcome: Outcome) -> bool:
    """Whether the run had finished before it was asked for."""
    return bool(getattr(outcome, "reused", False))


def in_words(value: Any) -> str:
    """A value as a person reads it: 1,234 and 0.1235, yes and no, short lists in full."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1e4 else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        if len(value) > LONG_LIST or any(isinstance(v, (list, tuple, dict)) for v in value):
            return f"{len(value):,} values"
        return ", ".join(in_words(v) for v in value) or "none"
    return str(value)


def print_json(value: Any) -> None:
    """One line of JSON on standard output."""
    sys.stdout.write(plain_json(json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)) + "\n")
    sys.stdout.flush()


@contextlib.contextmanager
def nothing_on_stdout() -> Iterator[None]:
    """Inside, whatever is printed goes to standard error, by libraries and by child processes alike."""
    sys.stdout.flush()
    with contextlib.redirect_stdout(sys.stderr):
        try:
            original = os.dup(1)
        except OSError:  # standard output is closed: there is nothing to keep clean
            yield
            return
        os.dup2(2, 1)
        try:
            yield
        finally:
            os.dup2(original, 1)
            os.close(original)


def _table(stage: str, rows: Sequence[tuple[str, str, str]]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"unweave {stage}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("measure", no_wrap=False)
    numbers = sum(value[:1].isdigit() or value[:1] == "-" for _, value, _ in rows)
    table.add_column("value", justify="right" if numbers > len(rows) / 2 else "left", overflow="fold")
    meanings = any(meaning for _, _, meaning in rows)
    if meanings:
        table.add_column("meaning", style="dim")
    for name, value, meaning in rows:
        table.add_row(*(Text(plain(cell)) for cell in (name, value, *([meaning] if meanings else []))))
    return table
