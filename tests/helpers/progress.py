"""Long work as a display is told of it."""

from __future__ import annotations


class ShownTask:
    """What a piece of long work says of itself: its name, total and unit, how far it got, and how it ended."""

    def __init__(self, name: str, total: float, unit: str, done: float) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, done
        self.end = ""

    def advance(self, amount: float = 1) -> None:
        self.done += amount

    def note(self, text: str) -> None: ...

    def close(self, *, stopped: bool = False) -> None:
        self.end = "stopped" if stopped else "done"
