"""From a stage's Spec to a command: file and options in, a run directory and its result out.

1. Every field of the Spec becomes an option under its dotted name; only options that were given are overrides.
2. The Spec is made from the file with the overrides on top, as strictly as in the library.
3. The stage runs under ``--runs``; what it found is printed as a table, or as JSON with ``--json``.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter

from unweave.cli.fields import MISSING, Leaf, leaves
from unweave.cli.output import for_machines, show_outcome
from unweave.cli.progress import show_progress
from unweave.core.command import Command
from unweave.core.errors import UnweaveError
from unweave.core.files import parse_yaml
from unweave.core.place import usable

_CONFIGS = (".yaml", ".yml", ".toml", ".json")
_OPTIONAL = inspect.Parameter.KEYWORD_ONLY
_COMMAND_GROUP = Group("Where and how", sort_key=0)
_FIELD_GROUP = Group("Fields", sort_key=1)


def stage_command(stage: Command) -> Callable[..., Any]:
    """The command of a stage, with a signature and help made from its Spec."""
    fields = list(leaves(stage.spec))
    groups: dict[str, Group] = {"": _FIELD_GROUP}
    for leaf in fields:
        if leaf.group not in groups:
            groups[leaf.group] = Group(leaf.group, help=leaf.group_doc, sort_key=len(groups) + 1)
    names = {_identifier(leaf): leaf for leaf in fields}

    def command(*args: Any, **given: Any) -> Any:
        words = [str(word) for word in (*args, given.pop("config", None)) if word is not None]
        config = next((word for word in words if not stage.positional or Path(word).suffix in _CONFIGS), None)
        runs, machine = given.pop("runs", None) or "runs", given.pop("json", None) or False
        overrides = {names[key].name: _value(names[key], value) for key, value in given.items()}
        if stage.positional and (named := [word for word in words if word != config]):
            overrides[stage.positional] = [*named, *overrides.get(stage.positional, [])]
        return execute(stage, Path(config) if config else None, overrides, Path(runs), machine)

    command.__doc__ = stage.help
    parameters = [*_common(stage), *(_parameter(leaf, groups[leaf.group]) for leaf in fields)]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def execute(stage: Command, config: Path | None, overrides: dict[str, Any], runs: Path, machine: bool) -> Any:
    """Makes the Spec, runs the stage, and shows the outcome to people or returns it for machines."""
    spec = stage.spec.from_file(config, overrides)
    usable(runs)
    processes = int(os.environ.get("WORLD_SIZE") or 1)
    if processes > 1 and not stage.in_several:
        what = f"{stage.words} does not divide its work between processes"
        remedy = "start it without torchrun; train can be started with it"
        raise UnweaveError(what, where=f"{processes} processes", remedy=remedy)
    if processes > 1 and os.environ.get("RANK") not in (None, "", "0"):  # the first process speaks for all
        stage.run(spec, runs)
        return None
    with show_progress(machine):
        outcome = stage.run(spec, runs)
    if machine:
        return for_machines(outcome)
    show_outcome(stage.words, outcome)
    return None


def _common(stage: Command) -> list[inspect.Parameter]:
    def option(name: str, hint: Any, text: str, kind: Any = _OPTIONAL, default: str | bool = False) -> Any:
        about = Parameter(help=text, group=_COMMAND_GROUP, show_default=default, negative=())
        return inspect.Parameter(name, kind, default=None, annotation=Annotated[hint, about])

    if stage.positional:
        text = "What to show. A YAML or TOML file among them holds any of the fields below."
        about = Parameter(help=text, group=_COMMAND_GROUP)
        words = inspect.Parameter("words", inspect.Parameter.VAR_POSITIONAL, annotation=Annotated[str, about])
        first = [words]
    else:
        text = "A YAML or TOML file with any of the fields below."
        first = [option("config", Path | None, text, inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    return [
        *first,
        option("runs", Path | None, "Where run directories are made and found again.", default="runs"),
        option("json", bool | None, "Print one JSON object for machines, and nothing else, to standard output."),
    ]


def _identifier(leaf: Leaf) -> str:
    return leaf.name.replace(".", "__")


def _parameter(leaf: Leaf, group: Group) -> inspect.Parameter:
    hint: Any = bool | None if leaf.is_flag else list[str] | None if leaf.is_list else str | None
    notes = [f"[one of: {leaf.choices}]"] if leaf.choices else []
    notes += [f"[{leaf.rule}]"] if leaf.rule else []
    notes += ["[must be given]"] if leaf.default is MISSING else []
    about = Parameter(
        name=f"--{leaf.name}",
        help=" ".join([leaf.doc, *notes]),
        group=group,
        metavar=None if leaf.is_flag else leaf.metavar,
        negative=None if leaf.is_flag else (),
        show_default=leaf.shown_default or False,
        consume_multiple=True if leaf.is_list else None,
    )
    return inspect.Parameter(_identifier(leaf), _OPTIONAL, default=None, annotation=Annotated[hint, about])


def _value(leaf: Leaf, given: Any) -> Any:
    """What was typed, as plain values; the Spec converts and checks them."""
    if not leaf.is_list:
        return given
    if not given:
        raise UnweaveError("an option without its value", where=f"--{leaf.name}", remedy=f"give {leaf.metavar}")
    values = [_word(leaf, word) for word in given]
    return values[0] if len(values) == 1 and isinstance(values[0], (list, dict)) else values


def _word(leaf: Leaf, word: str) -> Any:
    """One word of a list. Where the list holds groups of fields, ``[...]`` and ``{...}`` are read as YAML and any
    other word stands for a group's first field; elsewhere words are taken as they are, brackets and all."""
    if not leaf.holds_groups:
        return word
    if word[:1] not in ("[", "{"):
        return {leaf.short_form: word} if leaf.short_form else word
    try:
        return parse_yaml(word, f"--{leaf.name}")
    except UnweaveError as error:
        remedy = "write a YAML list or mapping, in quotes: '[{path: a.txt}, {path: b.txt}]'"
        raise UnweaveError(f"cannot read {word!r}: {error.what}", where=error.where, remedy=remedy) from None
