"""What the stages of ``unweave circuit`` can be asked. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from unweave.core.errors import UnweaveError
from unweave.core.spec import Spec, operational


@dataclass(frozen=True, kw_only=True)
class OfSAEsSpec(Spec):
    """A question about several autoencoders in one model."""

    saes: tuple[str, ...] = field(default=(), metadata={"result": False})
    """Autoencoders: folders as `train` makes them (one SAE, or all below sae/), any that can be read (docs/formats.md),
    or SITE=NAME for one whose file names no site. Their content decides which run is reused."""
    neurons: tuple[str, ...] = ()
    """Sites, also by pattern, whose neurons (coordinates) stand for latents, without an error: the baseline."""
    sites: tuple[str, ...] = ()
    """Use only the autoencoders at these sites, by pattern; by default all."""
    model: str | None = None
    """The model; by default the one that the autoencoders were trained on."""
    device: str | None = operational(None)
    """cpu, cuda, cuda:1...; by default a GPU where there is one."""
    accept_mismatch: str | None = None
    """Use autoencoders in a model that they were not trained on, for this reason; what was measured is recorded."""

    def __post_init__(self) -> None:
        if not self.saes and not self.neurons:
            raise UnweaveError("there are no sites", where="saes", remedy="name autoencoders (saes) or sites (neurons)")
        if not self.saes and (self.sites or self.accept_mismatch):
            raise UnweaveError("sites and accept_mismatch say something about saes, and there are none", where="saes")
        if self.neurons and not self.saes and self.model is None:
            raise UnweaveError("neurons alone do not say of which model", where="model", remedy="name it with --model")
