"""What training can be asked. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from unweave.core.errors import UnweaveError
from unweave.core.spec import Spec, operational, require
from unweave.data.spec import DEFAULT_MODEL, DEFAULT_SOURCES, DataSpec, StreamSpec
from unweave.methods.train.sae_spec import SAESpec


@dataclass(frozen=True, kw_only=True)
class TrainSpec(Spec):
    """Training sparse autoencoders: every variant at every site, on one stream of activations."""

    model: str = DEFAULT_MODEL
    """A catalogue name, a hub id, a folder or a GGUF file; see `unweave models`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the model computes in. The autoencoder is always trained in float32."""
    device: str | None = operational(None)
    """cpu, cuda, cuda:1...; by default a GPU where there is one."""
    sites: tuple[str, ...] = ("resid_post.9",)
    """Where to read activations, also by pattern: resid_post.*, mlp_add.{4,9,14}; mlp_in.*->mlp_add.* for transcoders.
    All sites share every forward pass."""
    data: DataSpec = DataSpec(sources=DEFAULT_SOURCES)
    """Which text, and how it becomes tokens."""
    stream: StreamSpec = StreamSpec()
    """Which tokens count, and how activations are mixed."""
    sae: SAESpec = SAESpec()
    """The autoencoder and its training."""
    variants: tuple[dict[str, Any], ...] = ()
    """Several autoencoders per site: fields of sae to change; a list of values stands for one variant each, as in
    {kind: [relu, jumprelu], seed: [0, 1, 2]}."""
    objective: Literal["reconstruction", "end-to-end"] = "reconstruction"
    """Learn to reconstruct activations, or to leave the model's predictions as they are (KL divergence)."""
    start: Path | None = None
    """Go on training this autoencoder (any that can be read: docs/formats.md), or those of this training run's sae/
    folder, site by site."""
    accept_mismatch: str | None = field(default=None, metadata={"result": False})
    """Go on training an autoencoder of another model, for this reason; what was measured is recorded."""
    epochs: float = 4.0
    """How often each distinct token may be trained on at most; a larger sae.tokens is refused."""
    seed: int = 0
    """Order of activations. Initial weights have a seed of their own, sae.seed."""
    checkpoint_seconds: float = operational(30.0)
    """How often to write a checkpoint, from which training goes on exactly."""

    def __post_init__(self) -> None:
        require(self, {"sites": len(self.sites) > 0, "epochs": self.epochs > 0})
        if self.accept_mismatch is not None and self.start is None:
            raise UnweaveError(
                "accept_mismatch has nothing to accept", where=type(self).__name__, remedy="it goes with start"
            )


@dataclass(frozen=True, kw_only=True)
class DoctorSpec(TrainSpec):
    """What a training run will cost, before it is started, and what is wrong with it."""
