"""The entry point: parses, calls the command, and turns what went wrong into a clear word and an exit status.

0 well; 2 something the user can mend (what, where, remedy); 1 our own fault (the traceback is saved to a file);
130 interrupted: the same command goes on where it was.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from cyclopts import App, CycloptsError

import unweave
from unweave.cli.annotate import HELP as ANNOTATE_HELP
from unweave.cli.annotate import annotate
from unweave.cli.convert import HELP as CONVERT_HELP
from unweave.cli.convert import convert
from unweave.cli.dedup import HELP as DEDUP_HELP
from unweave.cli.dedup import dedup
from unweave.cli.models import HELP as MODELS_HELP
from unweave.cli.models import models
from unweave.cli.output import nothing_on_stdout, print_json
from unweave.cli.runs import HELP as RUNS_HELP
from unweave.cli.runs import runs
from unweave.cli.serve import HELP as SERVE_HELP
from unweave.cli.serve import serve
from unweave.cli.stages import GROUPS, stages
from unweave.core.errors import UnweaveError, UnweaveWarning
from unweave.core.memory import out_of_memory
from unweave.core.shown import plain, plain_json

OUR_FAULT, USERS_MISTAKE, INTERRUPTED = 1, 2, 130

_AFTER = 100
"""where commands that are no stages stand in the help"""

_HELP = (
    "Takes a language model apart into features, and puts it back together changed.\n\n"
    "Start with 'unweave demo': ten minutes from a real model to a report. The other commands are its steps, for "
    "your own model, data and site; 'unweave COMMAND --help' explains each."
)


def build_app() -> App:
    """The command line's parser. Commands are made only when they are asked for."""
    app = App(name="unweave", help=_HELP, help_format="plaintext", version=unweave.__version__)
    groups = {
        name: App(name=name, help=text, help_format="plaintext", sort_key=_AFTER) for name, text in GROUPS.items()
    }
    for i, stage in enumerate(stages().values()):
        home = f"unweave.cli.stages:command_{stage.words.replace(' ', '_').replace('-', '_')}"
        words = f"[{stage.positional.upper()}]... [OPTIONS]" if stage.positional else "[CONFIG] [OPTIONS]"
        usage, leaf = f"Usage: unweave {stage.words} {words}", stage.words.rpartition(" ")[2]
        groups.get(stage.group, app).command(home, name=leaf, help=stage.help, usage=usage, sort_key=i)
    for commands in groups.values():
        app.command(commands)
    app.command(models, name="models", help=MODELS_HELP, sort_key=_AFTER)
    app.command(dedup, name="dedup", help=DEDUP_HELP, sort_key=_AFTER + 1)
    app.command(convert, name="convert", help=CONVERT_HELP, sort_key=_AFTER + 2)
    app.command(runs, name="runs", help=RUNS_HELP, sort_key=_AFTER)
    app.command(annotate, name="annotate", help=ANNOTATE_HELP, sort_key=_AFTER)
    app.command(serve, name="serve", help=SERVE_HELP, sort_key=_AFTER)
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit status."""
    tokens = list(sys.argv[1:] if argv is None else argv)
    machine = "--json" in tokens
    wait_passively()
    quieten()
    try:
        with nothing_on_stdout() if machine else contextlib.nullcontext():
            answer = _dispatch(tokens)
        if answer is not None:
            print_json(answer)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has had enough, as in `unweave models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except KeyboardInterrupt:
        again = shlex.join(["unweave", *tokens])
        _report(machine, "interrupted", "", f"the same command goes on where it was: {again}", INTERRUPTED)
        return INTERRUPTED
    except Exception as error:
        known = as_user_error(error, tokens)
        if known is None:
            return _our_fault(error, tokens, machine)
        _report(machine, known.what, known.where, known.remedy, USERS_MISTAKE)
        return USERS_MISTAKE
    return 0


def _dispatch(tokens: list[str]) -> Any:
    """Runs the command; what it returns is for machines."""
    command, bound, _ = build_app().parse_args(tokens, print_error=False, exit_on_error=False)
    return command(*bound.args, **bound.kwargs)


def as_user_error(error: Exception, tokens: Sequence[str]) -> UnweaveError | None:
    """The error as something the user can mend, or None if it is not."""
    if isinstance(error, UnweaveError):
        return error
    if isinstance(error, CycloptsError):
        command = _command_of(tokens)
        return UnweaveError(str(error), where=command, remedy=f"'{command} --help' lists what there is")
    if isinstance(error, OSError) and error.errno in _SYSTEM_REMEDIES:
        what, remedy = _SYSTEM_REMEDIES[error.errno]
        return UnweaveError(what, where=str(error.filename or ""), remedy=remedy)
    if out_of_memory(error):
        return UnweaveError(
            f"not enough memory: {str(error).splitlines()[0] if str(error) else 'an allocation failed'}",
            remedy="ask 'unweave doctor' with the same fields what the run needs; make batches smaller",
        )
    return None


def _command_of(tokens: Sequence[str]) -> str:
    """The command that a command line names, as far as there is one: ``unweave circuit find``."""
    first, second, *_ = [*tokens, "", ""]
    known = (*stages(), *GROUPS, "models", "runs", "dedup", "convert", "annotate", "serve")
    return next((f"unweave {words}" for words in (f"{first} {second}", first) if words in known), "unweave")


_SYSTEM_REMEDIES = {
    errno.ENOSPC: ("the disk is full", "free some space or choose another --runs folder; what is finished is kept"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose another --runs folder"),
    errno.EACCES: ("permission denied", "make it readable and writable, or choose another --runs folder"),
    errno.EPERM: ("permission denied", "make it readable and writable, or choose another --runs folder"),
    errno.EROFS: ("the file system is read-only", "choose another --runs folder"),
}


def _our_fault(error: Exception, tokens: Sequence[str], machine: bool) -> int:
    trace = "".join(traceback.format_exception(error))
    if os.environ.get("UNWEAVE_DEBUG") == "1":
        sys.stderr.write(trace)
    remedy = "please report it with that file, or set UNWEAVE_DEBUG=1 to see it here"
    try:
        handle, path = tempfile.mkstemp(prefix="unweave-error-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as out:
            versions = f"unweave {unweave.__version__}, Python {sys.version.split()[0]}"
            out.write(f"{versions}\n{shlex.join(tokens)}\n\n{trace}")
    except OSError:
        path, remedy = "", "set UNWEAVE_DEBUG=1 to see where it happened"
    what = f"this is our fault, not yours: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    _report(machine, what.rstrip(": "), path, remedy, OUR_FAULT)
    return OUR_FAULT


def _report(machine: bool, what: str, where: str, remedy: str, status: int) -> None:
    """On standard error, in words or as one JSON object."""
    if machine:
        import json

        content = {"error": {"what": what, "where": where, "remedy": remedy, "status": status}}
        print(plain_json(json.dumps(content, ensure_ascii=False)), file=sys.stderr)
    elif status == INTERRUPTED:
        print(plain(f"{what}: {remedy}"), file=sys.stderr)
    else:
        print(plain(f"error: {UnweaveError(what, where=where, remedy=remedy)}"), file=sys.stderr)


_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def wait_passively() -> None:
    """Lets PyTorch's threads sleep while they wait for each other, unless the user has said how they wait.

    Otherwise they spin, and on cores that are shared they take the time from those that they wait for. PyTorch's OpenMP
    reads this once, when it is loaded: torch must not be imported before.
    """
    if not any(name in os.environ for name in _WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def quieten() -> None:
    """Our warnings in one line; the libraries' own chatter only where it was asked for by their variables."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.showwarning = _show_warning


_python_shows = warnings.showwarning


def _show_warning(message: Any, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
    if issubclass(category, UnweaveWarning):
        print(plain(f"warning: {message}"), file=sys.stderr)
    else:
        _python_shows(message, category, filename, lineno, *rest)
