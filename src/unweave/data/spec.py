"""Which text is read, how it becomes rows of tokens, and which of their activations count. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from unweave.core.errors import UnweaveError
from unweave.core.refs import Content
from unweave.core.rules import above, at_least, below, not_empty, rule
from unweave.core.spec import Spec, operational
from unweave.data.corpus import Source
from unweave.data.pack import PackSpec

ModelRef = Annotated[str, Content("unweave.core.contents:tree_of", named=True)]
"""A model: its name, and where that is a folder or file, its bytes."""
DEFAULT_MODEL = "smollm2-135m-instruct"


DEFAULT_SOURCES = (Source(path="chitchat", weight=4.0), Source(path="alpaca"), Source(path="wiki"), Source(path="c4"))


PAPER_CONTEXT = {"documents": 8192, "blocks": 2048}
"""How long rows are in the FAST paper."""
_PART = rule("two shares from 0 to 1, the first below the second", lambda part: 0 <= part[0] < part[1] <= 1)


@dataclass(frozen=True, kw_only=True)
class DataSpec(Spec):
    """Which text becomes tokens, and how."""

    shorthands = {
        "packing": (
            Literal["documents", "blocks"] | None,
            "The FAST paper's rows: documents, each on its own and cut off at 8,192 tokens, or blocks of 2,048; fields "
            "of pack replace them.",
        )
    }

    sources: Annotated[tuple[Source, ...], not_empty()]
    """Where the text comes from: catalogue names, files, folders, or `hub:org/name`; mixed by weight."""
    pack: PackSpec = PackSpec()
    """How documents become rows of tokens."""
    tokens: Annotated[int, at_least(1)] = 320_000
    """How many distinct tokens to train on. Less text than that is refused."""
    heldout: Annotated[float, above(0), below(1)] = 0.1
    """The share of documents that is never trained on, chosen by a hash of their content."""
    heldout_tokens: Annotated[int, at_least(1)] = 22_000
    """How many tokens of those documents to measure on."""
    heldout_documents: Annotated[int | None, at_least(1)] = None
    """How many of those documents to measure on, in place of heldout_tokens."""
    heldout_part: Annotated[tuple[float, float], _PART] = (0.0, 1.0)
    """Which of those documents to measure on, as shares from and up to: parts that do not overlap share no document."""
    seed: int = 0
    """Order of the documents and choice of the held-out ones."""
    dedup: Annotated[int, at_least(0)] = 0
    """Drop documents that share this many words in a row with an earlier one: 20 in the FAST paper, 0 to keep all."""
    dedup_memory_mb: Annotated[int, at_least(1)] = operational(512)
    """Memory for the n-grams of earlier documents; the rest goes to disk meanwhile, 8 bytes a word."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "", base: Spec | None = None) -> Self:
        """As ``Spec.from_dict``; ``packing`` stands for the fields of ``pack`` as the FAST paper sets them."""
        if "packing" not in values:
            return super().from_dict(values, where=where, base=base)
        rest = {name: value for name, value in values.items() if name != "packing"}
        if values["packing"] not in PAPER_CONTEXT:
            what = f"{values['packing']!r} is not a known packing"
            remedy = f"use {' or '.join(PAPER_CONTEXT)}"
            raise UnweaveError(what, where=f"{where}.packing" if where else "packing", remedy=remedy)
        overrides = rest.get("pack", {})
        pack = {"packing": values["packing"], "context": PAPER_CONTEXT[values["packing"]]}
        rest["pack"] = pack | (overrides.to_dict() if isinstance(overrides, Spec) else dict(overrides))
        return super().from_dict(rest, where=where, base=base)


@dataclass(frozen=True, kw_only=True)
class StreamSpec(Spec):
    """How activations are harvested and mixed."""

    special_tokens: Literal["exclude", "include"] = "exclude"
    """Whether the tokenizer's special tokens count. Padding never does."""
    max_norm_ratio: Annotated[float | None, above(1)] = 10.0
    """Tokens whose activation is longer than this many medians are outliers (attention sinks) and do not count."""
    chunk_tokens: Annotated[int, at_least(1)] = 16_384
    """Tokens per chunk of activations, about."""
    buffer_tokens: Annotated[int, at_least(1)] = 131_072
    """Tokens that are mixed at a time."""
    batch_tokens: Annotated[int, at_least(1)] = operational(2048)
    """Tokens that go through the model at once; changes speed and memory, not the result beyond rounding."""
    nonfinite: Literal["stop", "drop"] = "stop"
    """What to do about tokens whose activations are NaN or infinite: stop and name the document, or drop and count."""
    cache: bool = operational(True)
    """Keep activations on disk, so that later epochs and runs need not compute them again."""
