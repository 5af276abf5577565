"""Node effects made again from the gradients that are kept of them, one site at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from unweave.attribute.attribution import SiteEffects, effects_of
from unweave.attribute.states import Patch, State, change_of, line_up, moved_positions, reads_of, take_apart, values_of
from unweave.core.site import Site
from unweave.lm.model import LM, Tokens
from unweave.sae.module import SAE


class EffectsAgain(Mapping[Site, SiteEffects]):
    """Node effects from gradients [B, P, D], and the values of two forward passes: a site's are made when asked for.

    What is kept is [B, P, D] a site; latents [B, P, F] and effects of all sites would be many times that.
    """

    def __init__(
        self,
        lm: LM,
        saes: Mapping[Site, SAE],
        clean: Tokens,
        patch: Patch,
        gradients: Mapping[Site, Tensor],
        positions: Tensor | None,
        max_tokens: int,
    ) -> None:
        self.saes, self.gradients = saes, gradients
        self.clean, self.patch, self.fixed = line_up(lm, clean, patch)
        self.moved = moved_positions(self.clean, positions)
        sites = {*saes, *(reads_of(sae, site) for site, sae in saes.items())}
        self.start = values_of(lm, sites, self.clean, max_tokens=max_tokens)
        self.end = None if self.patch is None else values_of(lm, sites, self.patch, max_tokens=max_tokens)

    def __getitem__(self, site: Site) -> SiteEffects:
        return effects_of(self.saes[site], self.gradients[site].to(self.moved.device), self._change(site))

    def _change(self, site: Site) -> State:
        one = {site: self.saes[site]}
        start = take_apart(one, self.start, self.clean)[site]
        end = self.fixed.get(site)
        if self.end is not None and self.patch is not None:
            end = take_apart(one, self.end, self.patch)[site]
        return change_of(self.saes[site], start, end, self.moved)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.saes)

    def __len__(self) -> int:
        return len(self.saes)
