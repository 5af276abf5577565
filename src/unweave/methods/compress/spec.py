"""What compression can be asked. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from unweave.core.command import Command
from unweave.core.errors import UnweaveError
from unweave.core.rules import above, at_least, at_most, below, not_empty, only_for, only_where, rule
from unweave.core.spec import Spec, operational
from unweave.data.pack import PackSpec
from unweave.data.spec import DEFAULT_SOURCES, DataSpec, ModelRef
from unweave.inputs.spec import SAERefs
from unweave.methods.compress.result import Compressed

_OF_SAES = only_where("SAEs are compressed", lambda spec: bool(spec.saes), "give saes")
_OF_MODEL = only_where("a model is compressed", lambda spec: not spec.saes, "leave out saes")
_NO_PATTERN = only_where("there is no pattern", lambda spec: spec.pattern is None, "leave out pattern")
_PATTERN = rule("n:m, as 2:4", lambda written: written.count(":") == 1)


@dataclass(frozen=True, kw_only=True)
class CompressSpec(Spec):
    """What every kind of compression can be asked."""

    model: ModelRef | None = None
    """The model; by default smollm2-135m-instruct, or the one that the SAEs were trained on."""
    saes: SAERefs = ()
    """Compress these SAEs and not the model: folders as `train` writes them, any that can be read (docs/formats.md), or
    SITE=NAME for one whose file names no site."""
    accept_mismatch: Annotated[str | None, _OF_SAES] = None
    """Use SAEs in a model that they were not trained on, for this reason; the difference measured is recorded."""
    projections: Annotated[tuple[str, ...], not_empty(), _OF_MODEL] = ("*",)
    """Which projections of the blocks, by pattern: `mlp.*`, `*.q_proj`, `3.mlp.down_proj` for one block's."""
    data: DataSpec = DataSpec(
        sources=DEFAULT_SOURCES,
        pack=PackSpec(packing="blocks", context=512),
        tokens=65_536,
        heldout_tokens=16_384,
    )
    """The text: `tokens` of it to calibrate on, `heldout_tokens` of other documents for losses before and after."""
    device: str | None = operational(None)
    """cpu, cuda, cuda:1...; by default a GPU where there is one."""
    batch_tokens: Annotated[int, at_least(1)] = operational(2048)
    """Tokens that go through the model at once."""


@dataclass(frozen=True, kw_only=True)
class PruneSpec(CompressSpec):
    """Setting weights to zero."""

    method: Literal["wanda", "magnitude", "sparsegpt"] = "wanda"
    """WANDA: the smallest |weight| x input norm of each output's row. Magnitude: the smallest weights of each matrix.
    SparseGPT: second-order, and the weights that stay are mended (models only)."""
    sparsity: Annotated[float, at_least(0), below(1), _NO_PATTERN] = 0.5
    """The share of weights that become zero."""
    pattern: Annotated[str | None, _PATTERN] = None
    """n:m, as 2:4: of every m consecutive inputs of a row n become zero, in place of a share."""
    order: Annotated[Literal["blocks", "one-pass"], _OF_MODEL] = "blocks"
    """Calibrate block by block, so that later blocks see what pruned ones give, or in one pass of the dense model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.saes and self.method == "sparsegpt":
            raise UnweaveError(
                "SparseGPT is for models: a decoder's inputs are all latents, too many for their products",
                where="method",
                remedy="use wanda or magnitude",
            )
        if self.method == "magnitude" and self.order != "blocks":
            raise UnweaveError("magnitude needs no calibration: order would have no effect", where="order",
                               remedy="leave order out")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class QuantiseSpec(CompressSpec):
    """Rounding weights to few bits."""

    bits: Annotated[int, at_least(3), at_most(8)] = 8
    """Of every weight; SAEs are stored in 8 or 4."""
    group: Annotated[int, at_least(0)] = 64
    """Consecutive weights of a row that share a scale; 0: the whole row."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.saes and self.bits not in (4, 8):
            raise UnweaveError(f"SAEs are stored in 8 or 4 bits, not {self.bits}", where="bits", remedy="choose one")


@dataclass(frozen=True, kw_only=True)
class LowRankSpec(CompressSpec):
    """Replacing matrices by ones of low rank."""

    share: Annotated[float, above(0), below(1)] = 0.5
    """How many numbers the two factors of a matrix hold, as a share of the matrix's; the rank follows."""
    method: Literal["activations", "weights"] = "activations"
    """Nearest in what the matrix makes of its inputs, or in its weights."""
    order: Annotated[Literal["blocks", "one-pass"], only_for("method", "activations")] = "blocks"
    """Calibrate block by block, or all in one pass of the full model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.saes:
            raise UnweaveError("low rank is for models", where="saes", remedy="leave out saes, or prune them")


_EXAMPLE = "--saes runs/train-0123456789ab/sae"
_ABOUT = (
    "A model is written as an ordinary Hugging Face folder, with its loss on held-out text before and after; SAEs with "
    "unexplained variance, L0, and the loss of the model with each in place."
)
PRUNE = Command(
    words="compress prune",
    spec=PruneSpec,
    result=Compressed,
    stage="unweave.methods.compress.stage:prune",
    summary="Prune a model or SAEs: WANDA, magnitude, SparseGPT, n:m.",
    about=_ABOUT,
    examples=(
        "unweave compress prune --sparsity 0.5",
        "unweave compress prune --method sparsegpt --pattern 2:4 --projections mlp.*",
        f"unweave compress prune {_EXAMPLE} --sparsity 0.25",
    ),
)
QUANTISE = replace(
    PRUNE,
    words="compress quantise",
    spec=QuantiseSpec,
    stage="unweave.methods.compress.stage:quantise",
    summary="Round the weights of a model (8 to 3 bits) or of SAEs (8 or 4) to nearest.",
    examples=("unweave compress quantise --bits 4", f"unweave compress quantise {_EXAMPLE} --bits 4 --group 0"),
)
LOW_RANK = replace(
    PRUNE,
    words="compress lowrank",
    spec=LowRankSpec,
    stage="unweave.methods.compress.stage:low_rank",
    summary="Replace a model's matrices by ones of low rank, nearest in their outputs.",
    examples=("unweave compress lowrank --share 0.5",),
)
COMMANDS = (PRUNE, QUANTISE, LOW_RANK)
