"""Progress on standard error: bars with rate and time left on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.progress import Task as RichTask
from rich.text import Text

from unweave.core import progress
from unweave.core.shown import plain

PLAIN_INTERVAL = 15.0
"""Seconds between the lines of a long task where standard error is no terminal."""
SHORT = 2.0
"""Seconds of work that nobody needs to be told of."""


@contextlib.contextmanager
def show_progress(silent: bool) -> Iterator[None]:
    """Shows the library's progress while inside; not at all if ``silent``."""
    if silent:
        yield
        return
    console = Console(stderr=True, highlight=False)
    try:
        if not console.is_terminal:
            progress.set_display(PlainTask, lambda text: print(plain(text), file=sys.stderr, flush=True))
            yield
            return
        name, note = (TextColumn(f"{{task.{what}}}", markup=False) for what in ("description", "fields[note]"))
        with Progress(name, BarColumn(bar_width=10), _Amount(), _Times(), note, console=console) as bars:
            progress.set_display(
                lambda name, total, unit, done: _BarTask(bars, name, total, unit, done),
                lambda text: console.print(plain(text), markup=False),
            )
            yield
    finally:
        progress.set_display(None)


class _BarTask:
    def __init__(self, bars: Progress, name: str, total: float, unit: str, done: float) -> None:
        self._bars = bars
        self._id = bars.add_task(
            plain(name), total=total or None, completed=int(done), unit=unit, note="", start_at=done, stopped=False
        )

    def advance(self, amount: float = 1) -> None:
        self._bars.advance(self._id, amount)

    def note(self, text: str) -> None:
        self._bars.update(self._id, note=plain(text))

    def close(self, *, stopped: bool = False) -> None:
        self._bars.update(self._id, stopped=stopped)
        self._bars.stop_task(self._id)


class _Amount(ProgressColumn):
    """`45% 135k/300k tokens 2510/s`"""

    def render(self, task: RichTask) -> Text:
        total, share = (f"/{short(task.total)}", f"{task.percentage:3.0f}% ") if task.total else ("", "")
        unit = f" {task.fields['unit']}" if task.fields["unit"] else ""
        rate = _rate(task)
        if not task.total and not task.fields["unit"]:
            return Text("")
        return Text(f"{share}{short(task.completed)}{total}{unit}{f' {short(rate)}/s' if rate else ''}", no_wrap=True)


class _Times(ProgressColumn):
    """`1:05, 0:34 left`"""

    def render(self, task: RichTask) -> Text:
        text = clock(task.elapsed or 0.0)
        left = time_left(task.total or 0, task.completed, _rate(task))
        if task.finished or task.stop_time is not None:
            text += " stopped" if task.fields["stopped"] else " done"
        elif left is not None:
            text += f", {clock(left)} left"
        return Text(text, no_wrap=True, style="cyan")


def short(number: float) -> str:
    """Three digits are enough to follow by: 2510, 300k, 1.2M."""
    for least, size, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if number >= least:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}" if number >= 10 or number == int(number) else f"{number:.2g}"


def clock(seconds: float) -> str:
    """`1:05`, `2:03:04`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def _rate(task: RichTask) -> float:
    return pace(task.total or 0, task.completed - task.fields["start_at"], task.elapsed or 0.0)


def pace(total: float, done: float, seconds: float) -> float:
    """Items per second where it can be known, else 0: two are done, or one of several. A part of one says nothing.

    ``done`` counts since this process began the task: what an earlier one did is no work of ours.
    """
    known = done >= 2 or (done >= 1 and total >= 2)
    return done / seconds if known and seconds > 0 else 0.0


def time_left(total: float, done: float, rate: float) -> float | None:
    """Seconds, or None while nothing is known."""
    return max(total - done, 0.0) / rate if rate > 0 and total else None


def in_time(seconds: float) -> str:
    """`8 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@dataclass
class PlainTask:
    """A line when a task ends, and one every 15 seconds while it goes on; one of unknown length says that it begins.

    Of work without parts (no total and no unit) only what took ``SHORT`` seconds or longer is worth a line.
    """

    name: str
    total: float
    unit: str
    done: float
    clock: Callable[[], float] = time.monotonic
    _note: str = ""
    _from: float = field(init=False)
    _began: float = field(init=False)
    _spoke: float = field(init=False)

    def __post_init__(self) -> None:
        self._from = self.done
        self._began = self._spoke = self.clock()
        if not self.total and self.unit:
            self._say("begun")

    def advance(self, amount: float = 1) -> None:
        self.done += amount
        now = self.clock()
        if now - self._spoke >= PLAIN_INTERVAL:
            self._spoke = now
            rate = pace(self.total, self.done - self._from, now - self._began)
            left = time_left(self.total, self.done, rate)
            ahead = f", about {in_time(left)} left" if left is not None else ""
            share = f"{100 * self.done / self.total:.0f}%, " if self.total else ""
            speed = f", {short(rate)}/s" if rate else ""
            self._say(f"{share}{self._amount()}{speed}{ahead}")

    def note(self, text: str) -> None:
        self._note = text

    def close(self, *, stopped: bool = False) -> None:
        seconds = self.clock() - self._began
        end = "stopped after " if stopped else "done after " if self._short else ""
        if self.total or self.unit:
            self._say(f"{end}{self._amount()} in {in_time(seconds)}")
        elif seconds >= SHORT:
            self._say(f"{end}{in_time(seconds)}")

    @property
    def _short(self) -> bool:
        """Whether something of the total is missing, beyond rounding."""
        return self.done < self.total * (1 - 1e-9)

    def _amount(self) -> str:
        total = f" of {self.total:,.0f}" if self._short else ""
        return f"{self.done:,.0f}{total} {self.unit}".strip()

    def _say(self, text: str) -> None:
        note = f"  ({self._note})" if self._note else ""
        print(plain(f"{self.name}: {text}{note}"), file=sys.stderr, flush=True)
