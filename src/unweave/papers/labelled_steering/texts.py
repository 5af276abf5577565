"""Tagged texts of several sources as one file of rows, and those of them that SAEs may be trained on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unweave.core.errors import UnweaveError
from unweave.core.stage import Context, stage
from unweave.core.writing import write_file
from unweave.papers.labelled_steering.result import MixResult
from unweave.papers.labelled_steering.spec import MixSpec
from unweave.tasks.tagged.spec import TaggedSpec
from unweave.tasks.tagged.texts import open_tagged

TAGGED, TRAIN = "tagged.jsonl", "train.jsonl"


class Mixed(NamedTuple):
    """A text with its labels, and the source that it is from."""

    text: str
    labels: list[str]
    source: str


@stage("labelled-steering-texts", version=1)
def run(spec: MixSpec, ctx: Context) -> MixResult:
    """Writes ``tagged.jsonl``, which ``unweave labels`` divides as it divides any, and ``train.jsonl``, the texts that
    it does not hold out. Raises UnweaveError where two sources share a label, or nothing is left."""
    texts = list(mixed(spec))
    origin: dict[str, str] = {}
    for one in texts:
        for label in one.labels:
            if origin.setdefault(label, one.source) != one.source:
                raise UnweaveError(f"{label!r} is a label of {origin[label]} and of {one.source}", where="sources")
    rows = [json.dumps({"text": one.text, "tags": one.labels}, ensure_ascii=False) for one in texts]
    write_file(ctx.path / TAGGED, "\n".join(rows) + "\n")
    tagged = open_tagged(TaggedSpec(source=str(ctx.path / TAGGED)))
    train = [tagged.text(int(i)) for i in np.flatnonzero(~tagged.heldout)]
    write_file(ctx.path / TRAIN, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in train))
    return MixResult(len(tagged), len(train), origin)


def mixed(spec: MixSpec) -> Iterator[Mixed]:
    """Texts of each source in random order, one of each group of near duplicates, taken while one of their labels has
    too few, and cut off at a word."""
    for source in spec.sources:
        texts = open_tagged(source)
        order = np.random.default_rng(source.seed).permutation(len(texts))
        order = order[np.sort(np.unique(texts.groups[order], return_index=True)[1])]
        enough = texts.support(order) >= spec.support
        wanted = [
            many and (name.startswith(spec.facets) or "::" not in name)
            for name, many in zip(texts.names, enough.tolist(), strict=True)
        ]
        taken: Counter[int] = Counter()
        for i in order.tolist():
            labels = [label for label in texts.labels(i) if wanted[label]]
            if any(taken[label] < spec.per_label for label in labels):
                taken.update(labels)
                text = texts.text(i).strip()
                if len(text) > spec.characters:
                    text = text[: spec.characters].rpartition(" ")[0] or text[: spec.characters]
                yield Mixed(text, [texts.names[label] for label in labels], Path(source.source).stem)
