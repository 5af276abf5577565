"""Going through latents one after the other and writing down what they are, by the form of Marks et al. 2024, app. F.

Each latent is shown, then five things are asked: what it is, how interpretable and how complex that is (0 to 100),
whether it belongs to the task, and notes. Every answer is written the moment it is given, so that nothing is lost when
the work is left; the next time, latents with answers are passed over. Who shows and who asks is up to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unweave.circuits.graph import Node
from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.latents import annotations as notes
from unweave.latents.annotations import SCALE, Annotation
from unweave.latents.records import LatentRecord

COMMANDS = {
    ":back": "the latent before",
    ":skip": "leave this one",
    ":quit": "stop here; everything is written already",
    ":help": "what is asked, and these commands",
}
"""What can be typed in place of any answer; the first letter is enough."""
_NONE = "-"
"""Typed to take an earlier answer back."""

Ask = Callable[[str], str]
"""Shows a question and returns a line; raises EOFError when there are no more."""


@dataclass(frozen=True)
class Question:
    """One latent to be asked about."""

    name: str
    """``resid_post.24/3036``"""
    sae: str
    """``SAE.digest()`` of its SAE."""
    record: LatentRecord
    effects: tuple[tuple[int | None, float], ...] = ()
    """(position or None for their sum, mean effect on the metric); empty outside a circuit."""

    @property
    def effect(self) -> float | None:
        """The effect of largest size."""
        return max((value for _, value in self.effects), key=abs, default=None)


@dataclass(frozen=True)
class Tally:
    """How it went: latents with an answer from this time, passed over because they had one, and still without."""

    annotated: int
    known: int
    left: int


@dataclass(frozen=True)
class _Field:
    name: str
    prompt: str
    read: Callable[[str], Any]


def _rating(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not SCALE[0] <= value <= SCALE[1]:
        raise UnweaveError(f"please give a number from {SCALE[0]} to {SCALE[1]}, or just Enter")
    return int(value) if value == int(value) else value


def _yes_or_no(text: str) -> bool:
    if text.lower() in ("y", "yes"):
        return True
    if text.lower() in ("n", "no"):
        return False
    raise UnweaveError("please answer y or n, or just Enter")


FIELDS = (
    _Field("annotation", "What does it stand for?", str),
    _Field("interpretability", f"How interpretable is it, {SCALE[0]} (not at all) to {SCALE[1]}?", _rating),
    _Field("complexity", f"How complex is its meaning, {SCALE[0]} (a single token) to {SCALE[1]}?", _rating),
    _Field("relevant", "Does it belong to the task (y/n)?", _yes_or_no),
    _Field("notes", "Notes?", str),
)
"""What is asked of each latent, in this order."""

HELP = (
    "Enter leaves a question open, or keeps the answer in brackets; a lone - takes that answer back. In place of any "
    "answer: " + ", ".join(f"{name} ({meaning})" for name, meaning in COMMANDS.items()) + "; one letter is enough."
)


class _Left(Exception):
    """The form was left by a command."""

    def __init__(self, command: str) -> None:
        self.command = command


def in_circuit(nodes: Sequence[Node]) -> dict[tuple[Site, int], list[tuple[int | None, float]]]:
    """The latents among a circuit's nodes, strongest first, each once with its effect at every position."""
    found: dict[tuple[Site, int], list[tuple[int | None, float]]] = {}
    for node in sorted(nodes, key=lambda node: -abs(node.effect)):
        if not node.is_error:
            found.setdefault((node.site, node.slot), []).append((node.position, node.effect))
    return found


def walk(
    questions: Sequence[Question],
    path: Path,
    ask: Ask,
    show: Callable[[Question, int, int, Annotation | None], None],
    tell: Callable[[str], None],
    *,
    known: int = 0,
) -> Tally:
    """Goes through the questions in their order until the last, ``:quit``, or the end of the answers.

    ``show(question, number from 1, how many, earlier answer)`` presents a latent, ``ask`` asks, ``tell`` says what was
    wrong. Answers are appended to ``path``, each at once. ``known`` were passed over before, for the tally.
    UnweaveError where the file already holds answers about a latent of another SAE (trap 41).
    """
    said = notes.load(path) if Path(path).exists() else {}
    notes.refuse_strangers(said, {Site.parse(q.name.rpartition("/")[0]): q.sae for q in questions}, str(path))
    answered: set[str] = set()
    place = 0
    try:
        while place < len(questions):
            question = questions[place]
            show(question, place + 1, len(questions), said.get(question.name))
            try:
                for annotation in _form(question, said.get(question.name), ask, tell):
                    notes.append(path, annotation)
                    said[question.name] = annotation
                    answered.add(question.name)
                place += 1
            except _Left as left:
                if left.command == ":quit":
                    break
                place = max(0, place - 1) if left.command == ":back" else place + 1
    except EOFError:
        pass
    return Tally(len(answered), known, len([q for q in questions if q.name not in said]))


def _form(question: Question, before: Annotation | None, ask: Ask, tell: Callable[[str], None]) -> Iterator[Annotation]:
    """The latent's annotation after each answer that changes it."""
    now = before or Annotation(question.name)
    now = replace(now, sae=question.sae)
    for field in FIELDS:
        value = getattr(now, field.name)
        answer = _answer(field, value, ask, tell)
        if answer != value:
            now = replace(now, **{field.name: answer})
            yield now


def _answer(field: _Field, value: Any, ask: Ask, tell: Callable[[str], None]) -> Any:
    """The answer to one question: what was typed, the earlier one on Enter. Raises _Left on a command."""
    kept = {True: "y", False: "n"}.get(value, value) if isinstance(value, bool) else value
    brackets = f" [{kept}]" if kept not in (None, "") else ""
    while True:
        typed = ask(f"{field.prompt}{brackets} ").strip()
        if typed == "":
            return value
        if typed == _NONE:
            return "" if field.read is str else None
        command = next((c for c in COMMANDS if typed.lower() in (c, c[:2])), None)
        if command == ":help":
            tell(HELP)
        elif command is not None:
            raise _Left(command)
        elif typed.startswith(":"):
            tell(f"there is no command {typed}. {HELP}")
        else:
            try:
                return field.read(typed)
            except UnweaveError as error:
                tell(error.what)
