"""Options common to stages that use one SAE, or several. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from unweave.core.errors import UnweaveError
from unweave.core.refs import Content
from unweave.core.spec import Spec, operational
from unweave.data.spec import ModelRef

SAERef = Annotated[Path, Content("unweave.inputs.identity:sae")]
"""An SAE, known by the bytes of its files."""
SAERefs = Annotated[tuple[str, ...], Content("unweave.inputs.identity:saes")]
"""Several, each alone or as SITE=NAME."""


@dataclass(frozen=True, kw_only=True)
class OfSAESpec(Spec):
    """A question about a trained SAE."""

    sae: SAERef
    """The SAE's folder, as `train` printed it, or an SAE in any format that can be read: docs/formats.md. Its content,
    not its path, decides which run is reused."""


@dataclass(frozen=True, kw_only=True)
class UseSpec(OfSAESpec):
    """Options of every stage that uses a trained SAE in a model."""

    model: ModelRef | None = None
    """The model to use it in; by default the one it was trained on."""
    device: str | None = operational(None)
    """cpu, cuda, cuda:1...; by default a GPU where there is one."""
    accept_mismatch: str | None = None
    """Use the SAE in a model that it was not trained on, for this reason; the difference measured is recorded."""


@dataclass(frozen=True, kw_only=True)
class OfSAEsSpec(Spec):
    """A question about several SAEs in one model."""

    saes: SAERefs = ()
    """SAEs: folders as `train` writes them (one SAE, or all below sae/), any that can be read (docs/formats.md),
    or SITE=NAME for one whose file names no site. Their content decides which run is reused."""
    neurons: tuple[str, ...] = ()
    """Sites, also by pattern, whose neurons (coordinates) stand for latents, without an error: the baseline."""
    sites: tuple[str, ...] = ()
    """Use only the SAEs at these sites, by pattern; by default all."""
    model: ModelRef | None = None
    """The model; by default the one that the SAEs were trained on."""
    device: str | None = operational(None)
    """cpu, cuda, cuda:1...; by default a GPU where there is one."""
    accept_mismatch: str | None = None
    """Use SAEs in a model that they were not trained on, for this reason; the difference measured is recorded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.saes and not self.neurons:
            raise UnweaveError("there are no sites", where="saes", remedy="give SAEs (saes) or sites (neurons)")
        if not self.saes and (self.sites or self.accept_mismatch):
            raise UnweaveError("sites and accept_mismatch need saes, which are not given", where="saes")
        if self.neurons and not self.saes and self.model is None:
            raise UnweaveError("neurons need a model", where="model", remedy="name it with --model")


def unused(spec: Spec, uses: Mapping[str, bool]) -> None:
    """Raises UnweaveError for a field that is set and would have no effect."""
    for name, used in uses.items():
        if not used and getattr(spec, name) != type(spec).__dataclass_fields__[name].default:
            what = f"{name} = {getattr(spec, name)!r} would have no effect"
            raise UnweaveError(what, where=type(spec).__name__, remedy=f"leave {name} out")
