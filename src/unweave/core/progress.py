"""Progress of long work, shown by whoever wants to: silent in a library, bars in the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Task(Protocol):
    """One piece of long work under way."""

    def advance(self, amount: float = 1) -> None:
        """Adds to what is done."""

    def note(self, text: str) -> None:
        """A short word beside the bar, e.g. the current loss."""

    def close(self, *, stopped: bool = False) -> None:
        """The work has ended: well, even where less than the total was needed; or ``stopped`` by an error or Ctrl-C."""


class _Silent:
    def advance(self, amount: float = 1) -> None:
        del amount

    def note(self, text: str) -> None:
        del text

    def close(self, *, stopped: bool = False) -> None:
        del stopped


Display = Callable[[str, float, str, float], Task]
"""(name, total, unit, done at the start) -> a Task"""


Speak = Callable[[str], None]


def _silent(name: str, total: float, unit: str, done: float) -> Task:
    del name, total, unit, done
    return _Silent()


_display: Display = _silent
_speak: Speak | None = None


def set_display(display: Display | None, speak: Speak | None = None) -> None:
    """Installs who shows progress, and what is said beside it; None silences it."""
    global _display, _speak
    _display, _speak = display or _silent, speak


def say(text: str) -> None:
    """Says a sentence before long work, e.g. what it will cost."""
    if _speak is not None:
        _speak(text)


@contextmanager
def task(name: str, *, total: float, unit: str = "", done: float = 0) -> Iterator[Task]:
    """Announces long work: ``with task("harvest", total=n, unit="tokens") as t: t.advance(k)``.

    Work that leaves the block has ended well, whatever is done of the total; an exception says that it was stopped.
    """
    shown = _display(name, total, unit, done)
    try:
        yield shown
    except GeneratorExit:  # whoever takes what a generator makes has enough
        shown.close()
        raise
    except BaseException:
        shown.close(stopped=True)
        raise
    shown.close()
