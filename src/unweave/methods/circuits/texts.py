"""The examples that a circuit is found or measured on: a task's pairs, a file's, or single inputs."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from unweave.attribute.runner import Batch
from unweave.circuits.about import Example
from unweave.core.errors import UnweaveError
from unweave.core.run import Run
from unweave.lm.model import LM
from unweave.methods.circuits.result import Accuracy, LeftOut, Used
from unweave.methods.circuits.spec import CircuitFindSpec
from unweave.tasks import agreement, answers

_T = TypeVar("_T", agreement.Pair, answers.Input)
PAIRS, INPUTS = "pairs.jsonl", "inputs.jsonl"
_ROWS, _PADDED_ROWS = 256, 32
"""examples in a batch at most; the search splits them further. Padded ones hold few, so that lengths are alike."""


@dataclass(frozen=True)
class Examples:
    """Batches of examples, their texts, and their description for results."""

    batches: list[Batch]
    texts: list[agreement.Pair] | list[answers.Input]
    used: Used

    def save(self, folder: Path) -> None:
        """Writes the texts as JSON lines, from which they can be read again."""
        if isinstance(self.texts[0], agreement.Pair):
            agreement.save(folder / PAIRS, self.texts)  # type: ignore[arg-type]
        else:
            answers.save(folder / INPUTS, self.texts)  # type: ignore[arg-type]


def examples_of(lm: LM, spec: CircuitFindSpec, *, known: Collection[str] = (), width: int | None = None) -> Examples:
    """What a spec asks for, as batches. Texts in ``known`` are left out, and those of another ``width`` in tokens.

    Raises UnweaveError where nothing is left, naming the reasons.
    """
    skipped: dict[str, int] = {}
    if spec.inputs is not None:
        usable, skipped = answers.usable(lm, answers.load(spec.inputs))
        inputs = _drawn(usable, skipped, known, spec, str(spec.inputs))
        pad = not spec.keeps_positions
        rows = _PADDED_ROWS if pad else _ROWS
        batches = _of_width(answers.batches(lm, inputs, metric=spec.metric, pad=pad, max_rows=rows), width, skipped)
        first = (Example("alone", inputs[0].context[-200:], inputs[0].answer),)
        return Examples(batches, inputs, _used(batches, skipped, first, None))
    if spec.pairs is not None:
        usable, skipped = agreement.usable(lm, agreement.load(spec.pairs))
        pairs = _drawn(usable, skipped, known, spec, str(spec.pairs))
    else:
        pairs = agreement.pairs(lm, spec.task or "across_pp", spec.examples, seed=spec.seed, split=spec.split)
    batches = _of_width(agreement.batches(lm, pairs, max_rows=_ROWS), width, skipped)
    right = agreement.accuracy(lm, pairs)
    first = (
        Example("clean", pairs[0].clean_prefix, pairs[0].clean_answer),
        Example("patch", pairs[0].patch_prefix, pairs[0].patch_answer),
    )
    return Examples(batches, pairs, _used(batches, skipped, first, Accuracy(right.clean, right.patch, right.problem)))


def texts_in(run: Run[Any]) -> set[str]:
    """The texts that ``Examples.save`` wrote."""
    if (run.path / INPUTS).exists():
        return {text for example in answers.load(run.file(INPUTS)) for text in _texts(example)}
    return {text for pair in agreement.load(run.file(PAIRS)) for text in _texts(pair)}


def _texts(example: agreement.Pair | answers.Input) -> tuple[str, ...]:
    return (example.context,) if isinstance(example, answers.Input) else (example.clean_prefix, example.patch_prefix)


def _used(
    batches: Sequence[Batch], skipped: dict[str, int], first: tuple[Example, ...], accuracy: Accuracy | None
) -> Used:
    left_out = tuple(LeftOut(reason, count) for reason, count in skipped.items())
    return Used(sum(len(batch[0]) for batch in batches), left_out, accuracy, first)


def _of_width(batches: Sequence[Batch], width: int | None, skipped: dict[str, int]) -> list[Batch]:
    """The batches of ``width`` tokens (None: all); examples of the others are counted in ``skipped``."""
    chosen = [batch for batch in batches if width in (None, batch[0].ids.shape[1])]
    others = sum(len(batch[0]) for batch in batches) - sum(len(batch[0]) for batch in chosen)
    if others:
        skipped[f"not of {width} tokens, as the circuit's texts"] = others
    _some(chosen, skipped, f"texts of {width} tokens")
    return chosen


def _drawn(
    usable: Sequence[_T], skipped: dict[str, int], known: Collection[str], spec: CircuitFindSpec, where: str
) -> list[_T]:
    """As many as the spec says, in an order by the seed, without texts in ``known``, which ``skipped`` counts."""
    new = [example for example in usable if not set(_texts(example)) & set(known)]
    if len(new) < len(usable):
        skipped["the circuit was found on the same text"] = len(usable) - len(new)
    random.Random(spec.seed).shuffle(new)
    _some(new, skipped, where)
    return new[: spec.examples]


def _some(left: Sequence[Any], skipped: dict[str, int], where: str) -> None:
    if not left:
        reasons = "; ".join(f"{count}: {reason}" for reason, count in skipped.items())
        raise UnweaveError(
            "no example is left", where=f"{where} ({reasons})" if reasons else where, remedy="give others"
        )
