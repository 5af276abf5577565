"""What a task of choices holds: items in splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import cycle
from random import Random
from typing import Literal, TypeVar

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")
_SHARES = (0.7, 0.15, 0.15)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Item:
    """A prompt and its two answers, written without the space that may stand before them.

    ``cue`` is the answer that the unintended signal gives; None where it is unknown, or where there is none.
    """

    prompt: str
    correct: str
    incorrect: str
    cue: str | None = None


@dataclass(frozen=True)
class Choices:
    """Items by split. Every task has ``train``; the names below mean the same everywhere.

    train, validation   the cue agrees with the right answer
    ambiguous           held out, the cue agrees
    ood                 the same held-out questions, the cue contradicts
    plain               the same again, in a form unlike the training prompts
    alone               of double multiple choice: the intended question by itself
    skyline             the questions of train, the cue contradicts: what the intended behaviour is learnt from
    """

    name: str
    splits: Mapping[str, tuple[Item, ...]]
    left_out: Mapping[str, int] = field(default_factory=dict)
    """how many rows of a file were not used, for which reason"""

    def __repr__(self) -> str:
        return "\n".join(
            [f"Choices({self.name})"]
            + [f"  {name}: {len(items):,}, e.g. {_line(items[0])}" for name, items in self.splits.items()]
            + [f"  left out {count:,}: {reason}" for reason, count in self.left_out.items()]
        )

    def _repr_html_(self) -> str:
        head = "<tr><th>split</th><th>items</th><th>cue agrees</th><th>example</th><th>correct</th><th>cue</th></tr>"
        rows = []
        for name, items in self.splits.items():
            known = [item for item in items if item.cue is not None]
            agrees = f"{sum(item.cue == item.correct for item in known) / len(known):.0%}" if known else "–"
            cells = (name, f"{len(items):,}", agrees, items[0].prompt, items[0].correct, items[0].cue or "–")
            rows.append("<tr>" + "".join(f"<td style='white-space:pre-wrap'>{escape(c)}</td>" for c in cells) + "</tr>")
        notes = "".join(f"<p>Left out {count:,}: {escape(why)}</p>" for why, count in self.left_out.items())
        return f"<h4>{escape(self.name)}</h4><table>{head}{''.join(rows)}</table>{notes}"


def _line(item: Item) -> str:
    prompt = item.prompt if len(item.prompt) <= 160 else f"{item.prompt[:100]}...{item.prompt[-50:]}"
    return f"{prompt!r} -> {item.correct!r}, not {item.incorrect!r}, cue {item.cue!r}"


def divided(values: Sequence[_T], rng: Random) -> dict[Part, list[_T]]:
    """The values, shuffled, in three parts of 70, 15 and 15 %."""
    shuffled = list(values)
    rng.shuffle(shuffled)
    first = round(_SHARES[0] * len(shuffled))
    second = first + round(_SHARES[1] * len(shuffled))
    return {"train": shuffled[:first], "validation": shuffled[first:second], "test": shuffled[second:]}


def balanced(values: Sequence[_T], n: int, rng: Random) -> list[_T]:
    """``n`` values in a random order, each as often as any other, or once more."""
    drawn = [value for _, value in zip(range(n), cycle(rng.sample(values, len(values))), strict=False)]
    rng.shuffle(drawn)
    return drawn
