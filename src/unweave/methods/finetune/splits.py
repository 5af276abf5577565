"""The rows of every split, from a task or from conversations, and what is measured on them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from unweave.core.dist import SOLO, Group
from unweave.core.errors import UnweaveError, UnweaveWarning
from unweave.core.site import Site
from unweave.data.spec import DataSpec
from unweave.inputs.inputs import token_store
from unweave.lm.model import LM, Tokens
from unweave.lm.taps import Edits
from unweave.methods.finetune.conditions import Condition
from unweave.methods.finetune.evaluate import evaluate
from unweave.methods.finetune.result import Score
from unweave.methods.finetune.rows import ChatRows, ChoiceRows, Rows
from unweave.methods.finetune.spec import FinetuneSpec
from unweave.methods.finetune.starts import Starts
from unweave.show.pieces import counted
from unweave.tasks.choices.choices import open_choices
from unweave.tasks.choices.encode import encode_choices
from unweave.tasks.choices.items import Choices

WATCHED = ("validation", "ood", "heldout")
"""the splits that are measured while the model learns; projections are of the first that is there"""
_SKYLINE = "skyline"
_BATCH = 32


@dataclass(frozen=True)
class Data:
    """What is learned from, and the other splits."""

    words: str
    train: Rows
    others: dict[str, Rows]
    skipped: dict[str, int]

    def texts(self, most: int | None = None) -> Iterator[Tokens]:
        """The training rows, or the first ``most`` of them, as batches of tokens."""
        n = len(self.train.lengths[:most])
        return (self.train.batch(range(i, min(i + _BATCH, n)))[0] for i in range(0, n, _BATCH))


def choices_of(spec: FinetuneSpec) -> Choices | None:
    """The items of the task. Raises UnweaveError where there are none to learn from; warns of what cannot be measured.
    Needs no model."""
    if spec.data is not None:
        return None
    choices = open_choices(spec.task)
    if not choices.splits.get(spec.split):
        raise UnweaveError(
            f"there are no items to learn from: the task has no split {spec.split}", where=choices.name,
            remedy=f"it has {', '.join(choices.splits) or 'none'}",
        )  # fmt: skip
    for name, lost in (("validation", "whether it learns"), ("ood", "what it learns where the cue misleads")):
        if not choices.splits.get(name):
            text = f"{choices.name} has no split {name}: {lost} is not measured"
            warnings.warn(text, UnweaveWarning, stacklevel=2)
    return choices


def open_data(spec: FinetuneSpec, choices: Choices | None, lm: LM, runs: Path) -> Data:
    """The rows of every split; items that the tokenizer does not suit are left out and counted."""
    if choices is None:
        assert spec.data is not None
        return _conversations(spec.data, spec.model, lm, runs)
    prompt, skipped = Condition(spec.condition).prompt, Counter(choices.left_out)
    splits: dict[str, Rows] = {}
    for name, items in choices.splits.items():
        own = [replace(item, prompt=prompt(item.prompt)) for item in items] if name == spec.split else list(items)
        if not own or (name != spec.split and name in ("train", _SKYLINE)):
            continue
        try:
            encoded = encode_choices(lm, own, skip=True)
        except UnweaveError as error:
            if name == spec.split:
                raise
            skipped[f"{name}: {error.what}"] += len(own)
            continue
        splits[name] = ChoiceRows(encoded)
        skipped.update({f"{name}: {reason}": count for reason, count in encoded.skipped.items()})
    train = splits.pop(spec.split)
    words = f"{counted(len(train.lengths), 'item')} of {choices.name}" + (
        ", the skyline" if spec.split == _SKYLINE else ""
    )
    return Data(words, train, splits, dict(skipped))


def _conversations(data: DataSpec, model: str, lm: LM, runs: Path) -> Data:
    splits, skipped = {}, {}
    for side in ("train", "heldout"):
        rows = splits[side] = ChatRows(token_store(lm, model, data, side, None, runs)[0], lm.pad_id)
        n = len(rows.lengths)
        if rows.silent == n:
            raise UnweaveError(
                f"none of {counted(n, 'row')} has an assistant's answer", where=f"data, {side}",
                remedy="give conversations with answers, or longer rows: data.pack.context",
            )  # fmt: skip
        skipped |= {f"{side}: no assistant's answer": rows.silent} if rows.silent else {}
    return Data(
        f"{counted(len(splits['train'].lengths), 'row')} of conversations", splits.pop("train"), splits, skipped
    )


@dataclass(frozen=True)
class Setting:
    """A model and the splits that it is measured on, wherever its passes begin."""

    lm: LM
    data: Data
    starts: Mapping[str, Starts]
    directions: Mapping[Site, Tensor]
    """unit rows [C, D] to project on"""
    most: int
    """items of a split while the model learns"""
    group: Group = SOLO

    def all(self, edit: Edits | None = None) -> dict[str, Score]:
        """The score on every split but the training items."""
        return {
            name: evaluate(self.lm, rows, edit, starts=self.starts.get(name), group=self.group)[0]
            for name, rows in self.data.others.items()
        }

    def watched(self) -> tuple[dict[str, Score], dict[Site, float]]:
        """Scores and projections while the model learns, without any edit."""
        scores: dict[str, Score] = {}
        projections: dict[Site, float] = {}
        for name in (name for name in WATCHED if name in self.data.others):
            directions = {} if scores else self.directions
            scores[name], own = evaluate(
                self.lm, self.data.others[name], starts=self.starts.get(name), directions=directions, most=self.most,
                group=self.group,
            )  # fmt: skip
            projections |= own
        return scores, projections
