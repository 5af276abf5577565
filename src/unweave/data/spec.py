"""Which text is read, how it becomes rows of tokens, and which of their activations count. Knows no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from unweave.core.errors import UnweaveError
from unweave.core.refs import Content
from unweave.core.spec import Spec, operational, require
from unweave.data.corpus import Source
from unweave.data.pack import PackSpec

ModelRef = Annotated[str, Content("unweave.core.contents:tree_of", named=True)]
"""A model: its name, and where that is a folder or file, its bytes."""
DEFAULT_MODEL = "smollm2-135m-instruct"


DEFAULT_SOURCES = (
    Source(path="chitchat", weight=4.0),
    Source(path="alpaca"),
    Source(path="wiki"),
    Source(path="c4"),
)


PAPER_CONTEXT = {"documents": 8192, "blocks": 2048}
"""How long rows are in the FAST paper."""


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

    sources: tuple[Source, ...]
    """Where the text comes from: catalogue names, files, folders, or `hub:org/name`; mixed by weight."""
    pack: PackSpec = PackSpec()
    """How documents become rows of tokens."""
    tokens: int = 320_000
    """How many distinct tokens to train on. Less text than that is refused."""
    heldout: float = 0.1
    """The share of documents that is never trained on, chosen by a hash of their content."""
    heldout_tokens: int = 22_000
    """How many tokens of those documents to measure on."""
    heldout_documents: int | None = None
    """How many of those documents to measure on, in place of heldout_tokens."""
    heldout_part: tuple[float, float] = (0.0, 1.0)
    """Which of those documents to measure on, as shares from and up to: parts that do not overlap share none."""
    seed: int = 0
    """Order of the documents and choice of the held-out ones."""
    dedup: int = 0
    """Drop documents that share this many words in a row with an earlier one: 20 in the FAST paper, 0 to keep all."""
    dedup_memory_mb: int = operational(512)
    """Memory for what earlier documents said; the rest lies on disk meanwhile, 8 bytes a word."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "", base: Spec | None = None) -> Self:
        """As ``Spec.from_dict``; ``packing`` stands for the fields of ``pack`` as the FAST paper sets them."""
        if "packing" not in values:
            return super().from_dict(values, where=where, base=base)
        rest = {name: value for name, value in values.items() if name != "packing"}
        if values["packing"] not in PAPER_CONTEXT:
            raise UnweaveError(
                f"{values['packing']!r} is no way to pack",
                where=f"{where}.packing" if where else "packing",
                remedy=f"use {' or '.join(PAPER_CONTEXT)}",
            )
        given = rest.get("pack", {})
        pack = {"packing": values["packing"], "context": PAPER_CONTEXT[values["packing"]]}
        rest["pack"] = pack | (given.to_dict() if isinstance(given, Spec) else dict(given))
        return super().from_dict(rest, where=where, base=base)

    def __post_init__(self) -> None:
        require(
            self,
            {
                "sources": len(self.sources) > 0,
                "dedup": self.dedup >= 0,
                "dedup_memory_mb": self.dedup_memory_mb > 0,
                "tokens": self.tokens > 0,
                "heldout": 0 < self.heldout < 1,
                "heldout_tokens": self.heldout_tokens > 0,
                "heldout_documents": self.heldout_documents is None or self.heldout_documents > 0,
                "heldout_part": 0 <= self.heldout_part[0] < self.heldout_part[1] <= 1,
            },
        )


@dataclass(frozen=True, kw_only=True)
class StreamSpec(Spec):
    """How activations are harvested and mixed."""

    special_tokens: Literal["exclude", "include"] = "exclude"
    """Whether the tokenizer's special tokens count. Padding never does."""
    max_norm_ratio: float | None = 10.0
    """Tokens whose activation is longer than this many medians are outliers (attention sinks) and do not count."""
    chunk_tokens: int = 16_384
    """Tokens per chunk of activations, about."""
    buffer_tokens: int = 131_072
    """Tokens that are mixed at a time."""
    batch_tokens: int = operational(2048)
    """Tokens that go through the model at once; changes speed and memory, not the result beyond rounding."""
    nonfinite: Literal["stop", "drop"] = "stop"
    """What to do about tokens whose activations are NaN or infinite: stop and name the document, or drop and count."""
    cache: bool = operational(True)
    """Keep activations on disk, so that later epochs and runs need not compute them again."""

    def __post_init__(self) -> None:
        sizes = ("chunk_tokens", "buffer_tokens", "batch_tokens")
        ratio = self.max_norm_ratio
        require(
            self, {name: getattr(self, name) > 0 for name in sizes} | {"max_norm_ratio": ratio is None or ratio > 1}
        )
