"""What the study of SAEs on compressed models can be asked. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from unweave.core.command import Command
from unweave.core.errors import UnweaveError
from unweave.core.refs import Content, FileRef
from unweave.core.rules import at_least, not_empty, rule
from unweave.core.spec import Spec, operational
from unweave.data.spec import DataSpec, ModelRef
from unweave.inputs.spec import SAERefs
from unweave.methods.compress.transfer.result import Transfer
from unweave.tasks.tagged.spec import TaggedSpec

_SHARES = rule(
    "ascending shares from above 0 to below 1",
    lambda values: all(a < b < 1 for a, b in zip((0, *values), values, strict=False)),
)


@dataclass(frozen=True, kw_only=True)
class SAEPruningSpec(Spec):
    """How the original SAEs are pruned, as `compress prune --saes` does it in the compressed model."""

    method: Literal["wanda", "magnitude"] = "wanda"
    """The score of a weight."""
    shares: Annotated[tuple[float, ...], _SHARES] = (0.25, 0.5)
    """Shares of encoder and decoder weights; such SAEs are measured in both models, latent by latent."""
    sweep: Annotated[tuple[float, ...], _SHARES] = (0.75, 0.9, 0.95, 0.99)
    """Further shares, at which fit and loss in the compressed model are measured."""
    tokens: Annotated[int, at_least(1)] = 16_384
    """Tokens of the training text that WANDA's norms are taken on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if twice := set(self.shares) & set(self.sweep):
            raise UnweaveError(
                f"{min(twice):g} is among shares and in the sweep", where="pruning", remedy="name it once"
            )


@dataclass(frozen=True, kw_only=True)
class ToldSpec(Spec):
    """Whether latents still tell their labels."""

    labels: FileRef
    """labels.jsonl of `unweave labels` on the original SAEs in the original model."""
    texts: TaggedSpec = TaggedSpec()
    """The same texts; those held out are read."""
    context: Annotated[int, at_least(2)] = 128
    """Texts are cut off at so many tokens."""


@dataclass(frozen=True, kw_only=True)
class TransferSpec(Spec):
    """SAEs of a model in its compressed forms."""

    saes: Annotated[SAERefs, not_empty()]
    """SAEs of the original model, one a site: folders as `train` writes them, or SITE=NAME."""
    compressed: Annotated[tuple[str, ...], not_empty(), Content("unweave.inputs.identity:models", named=True)]
    """Compressed models, as `compress` writes them. The first is studied in full; with the others go the loss, fit and
    survival of the original SAEs, to compare methods, bit widths and sparsities."""
    retrained: SAERefs = ()
    """SAEs that were trained on the first compressed model, at the same sites."""
    model: ModelRef | None = None
    """The original model; by default the one that the SAEs were trained on."""
    pruning: SAEPruningSpec = SAEPruningSpec()
    """How the original SAEs are pruned."""
    data: DataSpec | None = None
    """Other text; by default that of the first SAE's training, of which held-out documents are measured on."""
    tokens: Annotated[int, at_least(2)] = 16_384
    """How many tokens latents are compared on, special tokens included."""
    loss_tokens: Annotated[int, at_least(2)] = 4096
    """How many of these the model's losses, with and without SAEs, are measured on."""
    told: ToldSpec | None = None
    """Compare how well labels are told before and after."""
    steer: Annotated[int, at_least(0)] = 16
    """For how many latents of each site, drawn at random, to compare what adding their direction does; 0: for none."""
    device: str | None = operational(None)
    """cpu, cuda, cuda:1...; by default a GPU where there is one."""
    batch_tokens: Annotated[int, at_least(1)] = operational(2048)
    """Tokens that go through the model at once."""
    seed: int = 0
    """Which latents are steered, random directions, and folds of the predictor."""


COMMAND = Command(
    words="compress transfer",
    spec=TransferSpec,
    result=Transfer,
    stage="unweave.methods.compress.transfer.stage:run",
    summary="What becomes of SAEs when their model is compressed: as they are, pruned, or trained anew.",
    about=(
        "Measures original, pruned and retrained SAEs in the original and the compressed model: fit, losses, and which "
        "latents survive, by how often they fire; whether labels are still told and steering still does the same; how "
        "fit falls with the SAE's sparsity; which latents several ways of compression damage, and whether that can be "
        "predicted. survival.parquet has every latent."
    ),
    examples=(
        "unweave compress transfer --saes runs/train-0123456789ab/sae --compressed runs/compress-prune-*/model",
        "unweave compress transfer --saes first/sae --retrained second/sae --compressed pruned/model rounded/model",
    ),
)
