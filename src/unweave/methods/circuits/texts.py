"""The examples that a circuit is found or measured on: a task's pairs, a file's, or single inputs."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from unweave.attribute.runner import Batch
from unweave.circuits.about import Example
from unweave.core.errors import UnweaveError
from unweave.lm.model import LM
from unweave.methods.circuits.result import Accuracy, LeftOut, Used
from unweave.methods.circuits.spec import CircuitFindSpec
from unweave.tasks import agreement, answers

_T = TypeVar("_T")
PAIRS, INPUTS = "pairs.jsonl", "inputs.jsonl"
_ROWS, _PADDED_ROWS = 256, 32
"""examples in a batch at most; the search splits them further. Padded ones hold few, so that lengths are alike."""


@dataclass(frozen=True)
class Examples:
    """Batches of examples, the texts that they were made from, and what results say of them."""

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
    if spec.inputs is not None:
        return _inputs(lm, spec, known, width)
    if spec.pairs is not None:
        usable, skipped = agreement.usable(lm, agreement.load(spec.pairs))
        chosen = _drawn(_new(usable, skipped, known, lambda pair: (pair.clean_prefix, pair.patch_prefix)), spec)
        _some(chosen, skipped, str(spec.pairs))
    else:
        skipped = {}
        chosen = agreement.pairs(lm, spec.task or "across_pp", spec.examples, seed=spec.seed, split=spec.split)
    batches = _of_width(agreement.batches(lm, chosen, max_rows=_ROWS), width, skipped)
    right = agreement.accuracy(lm, chosen)
    first = (
        Example("clean", chosen[0].clean_prefix, chosen[0].clean_answer),
        Example("patch", chosen[0].patch_prefix, chosen[0].patch_answer),
    )
    return Examples(batches, chosen, _used(batches, skipped, first, Accuracy(right.clean, right.patch, right.problem)))


def _used(
    batches: Sequence[Batch], skipped: dict[str, int], first: tuple[Example, ...], accuracy: Accuracy | None
) -> Used:
    left_out = tuple(LeftOut(reason, count) for reason, count in skipped.items())
    return Used(sum(len(batch[0]) for batch in batches), left_out, accuracy, first)


def _of_width(batches: Sequence[Batch], width: int | None, skipped: dict[str, int]) -> list[Batch]:
    """The batches of ``width`` tokens (None: all); examples of the others are counted in ``skipped``."""
    kept = [batch for batch in batches if width in (None, batch[0].ids.shape[1])]
    others = sum(len(batch[0]) for batch in batches) - sum(len(batch[0]) for batch in kept)
    if others:
        skipped[f"not of {width} tokens, as the circuit's texts"] = others
    _some(kept, skipped, f"texts of {width} tokens")
    return kept


def _inputs(lm: LM, spec: CircuitFindSpec, known: Collection[str], width: int | None) -> Examples:
    assert spec.inputs is not None
    usable, skipped = answers.usable(lm, answers.load(spec.inputs))
    chosen = _drawn(_new(usable, skipped, known, lambda given: (given.context,)), spec)
    _some(chosen, skipped, str(spec.inputs))
    pad = not spec.keeps_positions
    rows = _PADDED_ROWS if pad else _ROWS
    batches = _of_width(answers.batches(lm, chosen, metric=spec.metric, pad=pad, max_rows=rows), width, skipped)
    first = (Example("alone", chosen[0].context[-200:], chosen[0].answer),)
    return Examples(batches, chosen, _used(batches, skipped, first, None))


def _new(
    usable: Sequence[_T], skipped: dict[str, int], known: Collection[str], texts: Callable[[_T], tuple[str, ...]]
) -> list[_T]:
    """What is not known yet; the rest is counted in ``skipped``."""
    kept = [given for given in usable if not set(texts(given)) & set(known)]
    if len(kept) < len(usable):
        skipped["the circuit was found on the same text"] = len(usable) - len(kept)
    return kept


def _drawn(usable: list[_T], spec: CircuitFindSpec) -> list[_T]:
    """As many as are asked for, in an order by the seed."""
    random.Random(spec.seed).shuffle(usable)
    return usable[: spec.examples]


def _some(left: Sequence[Any], skipped: dict[str, int], where: str) -> None:
    if not left:
        reasons = "; ".join(f"{count}: {reason}" for reason, count in skipped.items())
        raise UnweaveError(
            "no example is left", where=f"{where} ({reasons})" if reasons else where, remedy="give others"
        )
