"""``unweave annotate``: latents one after the other in the terminal, and what a person says about each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from unweave.cli.output import JSON
from unweave.core.shown import plain

if TYPE_CHECKING:
    from rich.text import Text

    from unweave.latents.annotations import Annotation
    from unweave.latents.records import Context
    from unweave.methods.annotate.annotating import Question

HELP = (
    "Look at latents one after the other and write down what they are.\n\n"
    "For a circuit's run, its latents come strongest first; otherwise name SAEs and latents. Each one is shown "
    "with the texts on which it fires, how often it does, and the tokens that it makes likelier and less likely. Then "
    "five things are asked: what it stands for, how interpretable and how complex that is (0 to 100, the feature "
    "circuits paper's scales), whether it belongs to the task, and notes. Enter leaves a question open.\n\n"
    "In place of any answer, :back shows the latent before, :skip leaves this one, :quit stops, :help says all this. "
    "Every answer is written at once as a line of JSON; the next time, latents with answers are passed over. "
    "'unweave circuit draw --annotations FILE' labels a picture with them, 'unweave circuit shift --judge file "
    "--annotations FILE' ablates what was judged not to belong to the task. Of a classifier's circuit that "
    "'unweave circuit shift' found, the latents come that it judges: those that support the label, up to the run's own "
    "top. Answers can be piped in, one a line.\n\n"
    "For example:\n\n    unweave annotate runs/circuit-find-0123456789ab --top 30\n"
    "    unweave annotate runs/circuit-shift-0123456789ab/circuit-0.safetensors\n"
    "    unweave annotate --saes runs/train-0123456789ab/sae/resid_post.24 --latents 12 3036 --out mine.jsonl"
)

_CIRCUIT = Parameter(
    help="A run of 'unweave circuit find', or a file of a circuit: circuit.safetensors, or circuit-0.safetensors of "
    "'unweave circuit shift'."
)
_LIST = Parameter(negative=(), consume_multiple=True, show_default=False)
_SAES = Parameter(help="SAEs, where no circuit is named, or where a circuit's have moved to.")
_LATENTS = Parameter(help="Latents: numbers, or names such as resid_post.24/3036 where there are several SAEs.")
_OUT = Parameter(help="The file of answers.")
_THRESHOLD = Parameter(help="Ask about a circuit's latents with a larger effect; by default about 60 nodes pass.")
_TOP = Parameter(help="Ask about this many at most.")
_TOKENS = Parameter(help="How many tokens contexts are taken from; by default 200,000, or all there are.")
_AGAIN = Parameter(help="Ask about latents with answers too; Enter keeps an answer.", negative=())
_MODEL = Parameter(help="The model; by default the one that the SAEs were trained on.")
_DEVICE = Parameter(help="cpu, cuda, cuda:1...; by default a GPU where there is one.")
_RUNS = Parameter(help="Where contexts that were collected are kept and found again.")


def annotate(
    circuit: Annotated[Path | None, _CIRCUIT] = None,
    *,
    saes: Annotated[list[str] | None, _LIST, _SAES] = None,
    latents: Annotated[list[str] | None, _LIST, _LATENTS] = None,
    out: Annotated[Path, _OUT] = Path("annotations.jsonl"),
    threshold: Annotated[float | None, _THRESHOLD] = None,
    top: Annotated[int | None, _TOP] = None,
    tokens: Annotated[int | None, _TOKENS] = None,
    again: Annotated[bool, _AGAIN] = False,
    model: Annotated[str | None, _MODEL] = None,
    device: Annotated[str | None, _DEVICE] = None,
    runs: Annotated[Path, _RUNS] = Path("runs"),
    json: Annotated[bool, JSON] = False,
) -> dict[str, Any] | None:
    """Asks about latents and writes the answers; says how many there are."""
    from rich.console import Console

    from unweave.cli.progress import show_progress
    from unweave.core.place import usable
    from unweave.methods.annotate.annotating import HELP as COMMANDS
    from unweave.methods.annotate.annotating import walk
    from unweave.methods.annotate.stage import Asked, questions

    _require_positive(top, tokens)
    usable(runs)
    ask = _asker()
    choice = Asked(circuit, tuple(saes or ()), tuple(latents or ()), threshold, top, tokens, model, device, again)
    with show_progress(json):
        to_ask, known = questions(choice, out, runs)
    console = Console(highlight=False)
    if to_ask:
        console.print(f"{len(to_ask):,} latents to look at, {known:,} have answers already. {COMMANDS}", markup=False)
    tally = walk(
        to_ask, out, ask, lambda *shown: _show(console, *shown), lambda text: print(plain(f"  {text}")), known=known
    )
    if json:
        return {"out": str(out), **asdict(tally)}
    print(f"\n{tally.annotated:,} latents annotated, {tally.known:,} had answers already, {tally.left:,} are left")
    print(plain(f"answers: {out}"))
    return None


def _require_positive(top: int | None, tokens: int | None) -> None:
    from unweave.core.errors import UnweaveError

    for name, value in (("--top", top), ("--tokens", tokens)):
        if value is not None and value < 1:
            what, remedy = f"{name} must be at least 1; {value} was given", f"leave {name} out, or give at least 1"
            raise UnweaveError(what, where="unweave annotate", remedy=remedy)


def _asker() -> Callable[[str], str]:
    """How to get a line: from a person, or from what was piped in, which must not be empty."""
    from unweave.core.errors import UnweaveError

    if sys.stdin is not None and sys.stdin.isatty():
        return input
    lines = [] if sys.stdin is None else _piped()
    if not lines:
        what = "there is no terminal to ask in, and no answers are piped in"
        remedy = "start it in a terminal, or pipe in a file with one answer a line"
        raise UnweaveError(what, where="unweave annotate", remedy=remedy)
    rest = iter(lines)

    def ask(prompt: str) -> str:
        line = next(rest, None)
        if line is None:
            raise EOFError
        print(plain(f"{prompt}{line}"))
        return line

    return ask


def _piped() -> list[str]:
    """The lines of standard input, which end at line feeds alone."""
    from unweave.core.errors import UnweaveError

    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UnweaveError(f"the answers are no text: {error}", where="standard input", remedy="give UTF-8") from None
    lines = [line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n")]
    return lines if lines[-1] else lines[:-1]


def _show(console: Any, question: Question, number: int, n: int, before: Annotation | None) -> None:
    """One latent: name and place, effects, firing, tokens, contexts."""
    from rich.rule import Rule
    from rich.text import Text

    record = question.record
    console.print()
    console.print(Rule(Text(f"{question.name}   {number} of {n}", style="bold"), align="left", style="dim"))
    if question.effects:
        parts = [f"{value:+.3g}" + ("" if at is None else f" at position {at}") for at, value in question.effects]
        console.print(Text(f"effect on the metric: {', '.join(parts)}"))
    rate = f"fires on {record.rate:.3%} of tokens, at most {record.maximum:.3g}" if record.count else "never fired"
    console.print(Text(rate, style="dim"))
    for name, pairs in (("raises", record.promoted), ("lowers", record.suppressed)):
        if pairs:
            words = " ".join(repr(text) for text, _ in pairs)
            console.print(Text(f"{name}  ", style="dim").append(words, style="none"))
    for heading, contexts in (("where it fires most", record.top), ("across its range", record.quantile)):
        if contexts:
            console.print(Text(heading, style="bold dim"))
        for context in contexts:
            console.print(_line(context, record.maximum))
    if before is not None and before.annotation:
        console.print(Text(plain(f"so far: {before.annotation}"), style="italic"))


def _line(context: Context, largest: float) -> Text:
    """A context on one or more lines; the stronger a token's activation, the stronger its colour."""
    from rich.text import Text

    from unweave.show.pieces import visible

    styles = ("", "yellow", "black on yellow", "bold black on bright_yellow")
    line = Text(f"{context.value:7.3g}  ", style="dim")
    for token, value, _, focus in context.shown():
        share = value / largest if largest > 0 else 0.0
        step = 0 if value <= 0 else 1 + (share > 1 / 3) + (share > 2 / 3)
        style = styles[step] + (" underline" if focus else "")
        blank = token.startswith(" ") and token.strip(" ") != ""
        line.append(" " if blank else "", style="none").append(
            plain(visible(token[1:] if blank else token)), style.strip()
        )
    return line
