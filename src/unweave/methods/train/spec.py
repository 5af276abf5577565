"""What training can be asked. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from unweave.core.command import Command
from unweave.core.errors import UnweaveError
from unweave.core.refs import Content
from unweave.core.rules import above, not_empty
from unweave.core.spec import Spec, operational
from unweave.data.spec import DEFAULT_MODEL, DEFAULT_SOURCES, DataSpec, ModelRef, StreamSpec
from unweave.methods.train.kinds import SAESpec, TopKSpec
from unweave.methods.train.result import Checkup, Training


@dataclass(frozen=True, kw_only=True)
class TrainSpec(Spec):
    """Training sparse autoencoders (SAEs): every variant at every site, on one stream of activations."""

    model: ModelRef = DEFAULT_MODEL
    """A catalogue name, a hub id, a folder or a GGUF file; see `unweave models`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the model computes in. The SAE is always trained in float32."""
    device: str | None = operational(None)
    """cpu, cuda, cuda:1...; by default a GPU where there is one."""
    sites: Annotated[tuple[str, ...], not_empty()] = ("resid_post.9",)
    """Where to read activations, also by pattern: resid_post.*, mlp_add.{4,9,14}; mlp_in.*->mlp_add.* for transcoders.
    All sites share every forward pass."""
    data: DataSpec = DataSpec(sources=DEFAULT_SOURCES)
    """Which text, and how it becomes tokens."""
    stream: StreamSpec = StreamSpec()
    """Which tokens count, and how activations are mixed."""
    sae: SAESpec = TopKSpec()
    """The SAE and its training."""
    variants: tuple[dict[str, Any], ...] = ()
    """Several SAEs per site: fields of sae to change; a list of values stands for one variant each, as in
    {kind: [relu, jumprelu], seed: [0, 1, 2]}."""
    objective: Literal["reconstruction", "end-to-end"] = "reconstruction"
    """Learn to reconstruct activations, or to leave the model's predictions as they are (KL divergence)."""
    start: Annotated[Path, Content("unweave.methods.train.start:content", named=True)] | None = None
    """Go on training this SAE (any that can be read: docs/formats.md), or those of this training run's sae/
    folder, site by site."""
    accept_mismatch: str | None = field(default=None, metadata={"result": False})
    """Go on training an SAE of another model, for this reason; what was measured is recorded."""
    epochs: Annotated[float, above(0)] = 4.0
    """How often each distinct token may be trained on at most; a larger sae.tokens is refused."""
    seed: int = 0
    """Order of activations. Initial weights have a seed of their own, sae.seed."""
    checkpoint_seconds: float = operational(30.0)
    """How often to write a checkpoint, from which training goes on exactly."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accept_mismatch is not None and self.start is None:
            raise UnweaveError(
                "accept_mismatch has nothing to accept", where=type(self).__name__, remedy="it goes with start"
            )


@dataclass(frozen=True, kw_only=True)
class DoctorSpec(TrainSpec):
    """What a training run will cost, before it is started, and what is wrong with it."""


COMMANDS = (
    Command(
        words="train",
        spec=TrainSpec,
        result=Training,
        stage="unweave.methods.train.stage:run",
        summary="Train sparse autoencoders (SAEs) on a model's activations, at many sites and in many settings.",
        about="Reads text or dialogues, runs the model up to the last site, and trains on what it finds there. Each "
        "SAE is saved as a SAELens folder together with what it was trained on. Interrupted training resumes "
        "exactly. torchrun -m unweave train divides the work between processes.",
        examples=(
            "unweave train --model smollm2-135m-instruct --sites resid_post.9",
            "unweave train my.yaml --sae.k 64 --data.sources wiki notes.txt",
            "unweave train --sites 'resid_post.{4,9}' --variants '{kind: [relu, jumprelu], seed: [0, 1]}'",
        ),
        in_several=True,
    ),
    Command(
        words="doctor",
        spec=DoctorSpec,
        result=Checkup,
        stage="unweave.methods.train.doctor:run",
        summary="Say what a run will cost before it is started, and what is wrong with it.",
        about="Takes the same fields as train. Looks at the model, the site, the data and the machine, and tells "
        "tokens, memory, disk and time, and every problem it can find without doing the work.",
        examples=("unweave doctor my.yaml", "unweave doctor --model smollm2-135m-instruct --sites resid_post.9 --json"),
    ),
)
