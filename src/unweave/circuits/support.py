"""Circuits of a classifier: which latents support its label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from unweave.circuits.graph import Circuit
from unweave.core.site import Site
from unweave.latents.annotations import name_of


@dataclass(frozen=True)
class Strong:
    """A latent and how much it supports the labels, in logits."""

    site: Site
    latent: int
    effect: float

    @property
    def name(self) -> str:
        return name_of(self.site, self.latent)


def strongest(mean: Mapping[Site, Tensor], *, threshold: float = 0.0, top: int | None = None) -> list[Strong]:
    """Latents (never errors) whose support is above ``threshold``, largest first; the ``top`` largest of them."""
    strong = []
    for site, values in mean.items():
        for latent in (values[:-1] > threshold).nonzero()[:, 0].tolist():
            strong.append(Strong(site, latent, float(values[latent])))
    strong.sort(key=lambda s: (-s.effect, s.site, s.latent))
    return strong if top is None else strong[:top]


def means(circuit: Circuit) -> dict[Site, Tensor]:
    """A circuit's support by slot, {site: [F + 1]}."""
    return {site: values[0] for site, values in circuit.nodes.items()}
