"""What compression did. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unweave.core.result import Result
from unweave.core.site import Site
from unweave.inputs.subject import Subject
from unweave.sae.measure.result import Metrics


@dataclass(frozen=True)
class TensorChange:
    """One weight tensor, before and after."""

    layer: int | None
    """the block; None in an SAE"""
    name: str
    """within the block or SAE; the experts of a mixture are one tensor"""
    shape: tuple[int, ...]
    """[out, in], or [expert, out, in]"""
    zeros: float
    """the share of weights that are 0 afterwards, counted"""
    zeros_before: float
    change: float
    """||W' - W|| / ||W||"""
    bits: float | None
    """bits a weight takes, scales included; None where nothing was rounded"""
    rank: int | None
    """None where the rank was not bounded"""


@dataclass(frozen=True)
class Loss:
    """Next-token loss on held-out text, before and after; both on the same tokens."""

    tokens: int
    """predicted tokens"""
    before: float
    """mean cross-entropy in nats; perplexity is its exponential"""
    after: float
    low: float | None
    high: float | None
    """95 % interval of the difference, over ``rows`` of text; None for a single one"""
    rows: int


@dataclass(frozen=True)
class SAEChange:
    """An SAE before and after."""

    site: Site
    tensors: tuple[TensorChange, ...]
    silenced: int
    """latents whose encoder or decoder weights are all 0 afterwards, and were not"""
    before: Metrics
    """on the held-out text, as ``unweave eval`` has them"""
    after: Metrics
    loss: Loss
    """of the model with the reconstruction in place"""
    folder: Path


@dataclass(frozen=True)
class Compressed(Result):
    """A compressed model, or compressed SAEs."""

    subject: Subject
    method: str
    """in words, as "wanda, 50 %" """
    calibration: int
    """tokens of calibration; 0 where the method needs none"""
    tensors: tuple[TensorChange, ...]
    """of the model"""
    parameters: int
    """all of the model's, embeddings included"""
    loss: Loss | None
    """of the model; None where SAEs were compressed"""
    saes: tuple[SAEChange, ...]
    folder: Path | None
    """the model's folder"""
