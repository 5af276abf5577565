"""The examples that a circuit is found or measured on: a task's pairs, a file's, or single inputs."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from unweave.attribute.runner import Batch
from unweave.core.contents import content_of
from unweave.core.errors import UnweaveError
from unweave.lm.model import LM
from unweave.methods.circuits.spec import CircuitFindSpec
from unweave.tasks import agreement, answers

_T = TypeVar("_T")
PAIRS, INPUTS = "pairs.jsonl", "inputs.jsonl"
_ROWS, _PADDED_ROWS = 256, 32
"""examples in a batch at most; the search splits them further. Padded ones hold few, so that lengths are alike."""


@dataclass(frozen=True)
class Examples:
    """``about`` says how many there are, what was left out for which reason, and how well the model does."""

    batches: list[Batch]
    texts: list[agreement.Pair] | list[answers.Input]
    about: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Writes them as JSON lines, from which they can be read again."""
        if isinstance(self.texts[0], agreement.Pair):
            agreement.save(folder / PAIRS, self.texts)  # type: ignore[arg-type]
        else:
            answers.save(folder / INPUTS, self.texts)  # type: ignore[arg-type]


def accuracy_row(about: dict[str, Any]) -> list[list[str]]:
    """The row of a summary that says how well the model does the task; none for single texts."""
    if "accuracy" not in about:
        return []
    clean, patch = about["accuracy"].values()
    return [
        ["right answers", f"{clean:.0%} / {patch:.0%}", about["problem"] or "on clean and patch texts; chance: 50%"]
    ]


def file_digests(*paths: Path | None) -> dict[str, str]:
    """The content of the files of examples, for a run's identity. Raises UnweaveError for one that is missing."""
    found = {}
    for path in paths:
        if path is not None:
            found["examples"] = content_of(path)
    return found


def examples_of(lm: LM, spec: CircuitFindSpec, *, known: Collection[str] = (), width: int | None = None) -> Examples:
    """What a spec asks for, as batches. Texts in ``known`` are left out, and those of another ``width`` in tokens.

    Raises UnweaveError where nothing is left, naming the reasons.
    """
    if spec.inputs is not None:
        return _inputs(lm, spec, known, width)
    if spec.pairs is not None:
        found, skipped = agreement.usable(lm, agreement.load(spec.pairs))
        chosen = _drawn(_new(found, skipped, known, lambda pair: (pair.clean_prefix, pair.patch_prefix)), spec)
        _some(chosen, skipped, str(spec.pairs))
    else:
        skipped = {}
        chosen = agreement.pairs(lm, spec.task or "across_pp", spec.examples, seed=spec.seed, split=spec.split)
    batches = agreement.batches(lm, chosen, max_rows=_ROWS)
    batches = _of_width(batches, width, skipped)
    right = agreement.accuracy(lm, chosen)
    about = {
        "examples": sum(len(batch[0]) for batch in batches),
        "skipped": skipped,
        "accuracy": {"clean": right.clean, "patch": right.patch},
        "problem": right.problem,
        "example": [
            ["clean", f"{chosen[0].clean_prefix} →{chosen[0].clean_answer}"],
            ["patch", f"{chosen[0].patch_prefix} →{chosen[0].patch_answer}"],
        ],
    }
    return Examples(batches, chosen, about)


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
    found, skipped = answers.usable(lm, answers.load(spec.inputs))
    chosen = _drawn(_new(found, skipped, known, lambda given: (given.context,)), spec)
    _some(chosen, skipped, str(spec.inputs))
    pad = not spec.keeps_positions
    rows = _PADDED_ROWS if pad else _ROWS
    batches = _of_width(answers.batches(lm, chosen, metric=spec.metric, pad=pad, max_rows=rows), width, skipped)
    about = {
        "examples": sum(len(batch[0]) for batch in batches),
        "skipped": skipped,
        "example": [["input", f"{chosen[0].context[-200:]} →{chosen[0].answer}"]],
    }
    return Examples(batches, chosen, about)


def _new(
    found: Sequence[_T], skipped: dict[str, int], known: Collection[str], texts: Callable[[_T], tuple[str, ...]]
) -> list[_T]:
    """What is not known yet; the rest is counted in ``skipped``."""
    kept = [given for given in found if not set(texts(given)) & set(known)]
    if len(kept) < len(found):
        skipped["the circuit was found on the same text"] = len(found) - len(kept)
    return kept


def _drawn(found: list[_T], spec: CircuitFindSpec) -> list[_T]:
    """As many as are asked for, in an order by the seed."""
    random.Random(spec.seed).shuffle(found)
    return found[: spec.examples]


def _some(found: Sequence[Any], skipped: dict[str, int], where: str) -> None:
    if not found:
        reasons = "; ".join(f"{count}: {reason}" for reason, count in skipped.items())
        raise UnweaveError(
            "no example is left", where=f"{where} ({reasons})" if reasons else where, remedy="give others"
        )
