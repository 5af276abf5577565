"""``unweave runs``: what lies in a folder of runs, one run in detail, and removal that breaks nothing."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from unweave.cli.output import JSON, in_words
from unweave.core.errors import UnweaveError
from unweave.core.shown import plain

if TYPE_CHECKING:
    from unweave.core.runs import Entry

HELP = (
    "List runs: what was asked, when, how large, whether they are finished, and what builds on them.\n\n"
    "With names, or beginnings of names, these runs in detail. --remove deletes them after a question (or with --yes); "
    "it refuses runs that others build on, and runs at work. Shared activations are listed too: they can be removed at "
    "any time, and are computed again where they are needed.\n\n"
    "For example:\n\n    unweave runs\n    unweave runs labels-0123\n"
    "    unweave runs activations-0123456789ab train-0123456789ab --remove"
)

_RUNS = Parameter(help="The folder of runs.")
_NAMES = Parameter(help="Runs to look at, by name or its beginning; by default all, in a table.")
_REMOVE = Parameter(help="Delete the runs that are named.", negative=())
_YES = Parameter(help="Delete without asking.", negative=())


def runs(
    *names: Annotated[str, _NAMES],
    runs: Annotated[Path, _RUNS] = Path("runs"),
    remove: Annotated[bool, _REMOVE] = False,
    yes: Annotated[bool, _YES] = False,
    json: Annotated[bool, JSON] = False,
) -> dict[str, Any] | None:
    """Lists the runs of a folder, shows some of them, or deletes these."""
    from unweave.core.runs import chosen, entries

    if remove and not names:
        raise UnweaveError(
            "no run is named", where="--remove", remedy="name the runs to delete; 'unweave runs' lists them"
        )
    if yes and not remove:
        raise UnweaveError("there is nothing to agree to", where="--yes", remedy="give --remove and names too")
    every = entries(runs)
    some = chosen(every, names) if names else every
    if remove:
        return _removed(some, yes, json)
    if json:
        return {"runs": [_plain(entry) for entry in some]}
    if names:
        for entry in some:
            _print_one(entry)
    else:
        _print_all(some, runs)
    return None


def _removed(some: Sequence[Entry], yes: bool, json: bool) -> dict[str, Any] | None:
    from unweave.core.runs import remove

    listed = ", ".join(f"{entry.name} ({_bytes(entry.size)})" for entry in some)
    if not yes:
        if json or not sys.stdin.isatty():
            raise UnweaveError(f"nobody can be asked whether to delete {listed}", where="--remove", remedy="add --yes")
        if input(plain(f"Delete {listed}? [y/N] ")).strip().lower() not in ("y", "yes"):
            print("Nothing was deleted.")
            return None
    freed = remove(some)
    if json:
        return {"removed": [entry.name for entry in some], "bytes": freed}
    print(f"Deleted {len(some)} folders; {_bytes(freed)} are free again.")
    return None


def _asked(entry: Entry) -> dict[str, Any]:
    """What differs from the defaults, with paths into the same folder of runs shortened; nothing where it is shared or
    nobody can read the question any more."""
    from unweave.cli.stages import stages
    from unweave.core.run import Run
    from unweave.core.runs import changes

    if entry.state == "shared":
        return {}
    try:
        question = Run.at(entry.path).asked
        by_name = {command.name: command for command in stages().values()}
        command = by_name.get(question["stage"])
        if command is None:  # a part of a recipe: its defaults are not known here
            asked = {name: value for name, value in question["spec"].items() if isinstance(value, (str, int, float))}
        else:
            asked = changes(command.spec.from_dict(question["spec"]))
    except UnweaveError:
        return {}
    return {name: _short(value, entry.path.parent) for name, value in asked.items()}


def _short(value: Any, root: Path) -> Any:
    from unweave.core.runs import changes
    from unweave.data.corpus import Source

    if isinstance(value, (list, tuple)):
        return [_short(one, root) for one in value]
    if isinstance(value, Source):
        return _short(value.path, root)
    if is_dataclass(value):
        return ", ".join(f"{name} {in_words(one)}" for name, one in changes(value).items())
    if isinstance(value, (str, Path)):
        return str(value).removeprefix(f"{root.resolve()}/")
    return value


def _plain(entry: Entry) -> dict[str, Any]:
    when = datetime.datetime.fromtimestamp(entry.changed).astimezone().isoformat(timespec="seconds")
    return {
        "name": entry.name, "state": entry.state, "changed": when, "bytes": entry.size, "asked": _asked(entry),
        "uses": list(entry.uses), "used_by": list(entry.used_by), "problem": entry.problem,
    }  # fmt: skip


def _print_one(entry: Entry) -> None:
    rows = [("state", entry.state + (f": {entry.problem}" if entry.problem else "")), ("changed", _when(entry)),
            ("size", _bytes(entry.size)), ("builds on", ", ".join(entry.uses) or "no other run"),
            ("used by", ", ".join(entry.used_by) or "no other run")]  # fmt: skip
    rows += [(name, in_words(value)) for name, value in _asked(entry).items()]
    print(plain(str(entry.path)))
    for name, value in rows:
        print(plain(f"  {name}: {value}"))
    for path in sorted(entry.path.glob("*.html")):
        print(plain(f"  page: {path}"))


def _print_all(every: Sequence[Entry], root: Path) -> None:
    """Three lines a run: its name, how it stands, and what was asked, as far as the line goes."""
    from rich.console import Console
    from rich.text import Text

    from unweave.show.pieces import counted

    console = Console(highlight=False)
    for entry in every:
        used = f", used by {counted(len(entry.used_by), 'run')}" if entry.used_by else ""
        asked = ", ".join(f"{name} {in_words(value)}" for name, value in _asked(entry).items())
        console.print(Text(plain(entry.name), style="bold"))
        console.print(f"  {entry.state}, {_when(entry)}, {_bytes(entry.size)}{used}", markup=False)
        if asked:
            console.print(Text(f"  {plain(asked)}", style="dim"), no_wrap=True, overflow="ellipsis", crop=True)
    total = _bytes(sum(entry.size for entry in every))
    print(
        plain(f"{counted(len(every), 'folder')} in {root}, {total}; 'unweave runs NAME' shows one, --remove deletes it")
    )


def _when(entry: Entry) -> str:
    return datetime.datetime.fromtimestamp(entry.changed).strftime("%Y-%m-%d %H:%M")


def _bytes(n: int) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n} bytes"
