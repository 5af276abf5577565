"""Simulation (Bills et al. 2023): the activations that an explanation lets a chat model expect, token by token.

1. A judge that runs here reads all tokens at once: its reply is given, with ``token<TAB>unknown`` a line, and what it
   would write after each tab is read off: the expected digit under its probabilities of 0 to 9, renormalised; 0 where
   no digit is likely at all.
2. Another judge writes the lines itself. Every line must be there, with a digit; the expected digit is used where it
   gives log-probabilities.
3. True activations are whole ninths of the latent's largest, rounded down: int(9 a / max). The score is Pearson's
   correlation over all tokens of all contexts, and per context where the truth varies; a constant expectation has
   correlation 0, and a text whose simulation failed counts nowhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unweave.judge.base import Conversation, Judge, Reply
from unweave.judge.form import Answer, Form, Rating, Ratings, expectation, rate
from unweave.methods.explain.forms import PROMPTS, turns

DIGITS = range(10)
_LINE = re.compile(r".*\t *([0-9]) *")


@dataclass(frozen=True)
class Simulated:
    """A case: an explanation and a text's tokens."""

    explanation: str
    tokens: tuple[str, ...]


def _messages(case: Simulated) -> Conversation:
    return turns("simulation", "\n".join([f"Description: {case.explanation}", "Tokens:", *case.tokens]))


def _digits(text: str, case: Simulated) -> Answer:
    lines = text.strip("\n").split("\n")
    if len(lines) != len(case.tokens):
        raise ValueError("not one line for each token")
    values, places, at = [], [], len(text) - len(text.lstrip("\n"))
    for line in lines:
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError("a line without a strength from 0 to 9")
        values.append(int(match[1]))
        places.append(at + match.start(1))
        at += len(line) + 1
    return Answer(tuple(values), tuple(places))


SIMULATION: Form[Simulated] = Form("simulation", PROMPTS["simulation"]["version"], _messages, _digits, tuple(DIGITS))


def simulate(judge: Judge, cases: Sequence[Simulated]) -> Ratings[Simulated]:
    """Every case's activations, in order, with the expected ones; errors as in ``judge.ask``."""
    if not getattr(judge, "reads", False):
        return rate(judge, SIMULATION, cases)
    prompts, places = [], []
    for case in cases:
        given = [f"{token}\tunknown\n" for token in case.tokens]
        ends = np.cumsum([len(line) for line in given]) - len("unknown\n")
        prompts.append([*_messages(case), {"role": "assistant", "content": "".join(given)}])
        places.append(ends.tolist())
    reader: Any = judge
    rows = tuple(
        Rating(case, prompt, reply, None if reply.text is None else Answer(), reply.failure, _read(reply, each))
        for case, prompt, each, reply in zip(cases, prompts, places, reader.read(prompts, places), strict=True)
    )
    return Ratings(SIMULATION.id, judge.name, judge.note, rows)


def _read(reply: Reply, places: Sequence[int]) -> tuple[float, ...]:
    return tuple(expectation(reply.numbers.get(at, {}), DIGITS, enough=0.0) or 0.0 for at in places)


def activations(row: Rating[Simulated]) -> np.ndarray[Any, Any] | None:
    """Expected activations [tokens] of a case, or the digits where these are not known; None for a failure."""
    if row.answer is None:
        return None
    values = row.answer.values or row.expected
    return np.array([v if e is None else e for v, e in zip(values, row.expected, strict=True)], dtype=np.float64)


def correlation(expected: Any, true: Any) -> float | None:
    """Pearson's correlation of two [n]; 0 where the expectation is constant, None where the truth is."""
    a, b = (np.asarray(values, dtype=np.float64) for values in (expected, true))
    if not len(b) or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) > 0 else 0.0
