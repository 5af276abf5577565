"""Which latents support a classifier's labels, and the model without some of them (Marks et al. 2024, sec. 4).

1. ``logit_effects`` finds, for every example, what each latent of the model does to the classifier's logit: integrated
   gradients with ablation to zero, summed over the tokens that the classifier averages over.
2. ``support`` turns that into how much each latent supports the labels given, averaged over examples.
3. ``ablation`` sets latents to 0 wherever the model runs, keeping every SAE's error; ``mean_ablation`` sets
   neurons to their mean; ``random_latents`` draws as many others that are active.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unweave.attribute.attribution import node_effects
from unweave.attribute.completeness import Completeness
from unweave.attribute.options import AttributionOptions
from unweave.attribute.states import beyond_first, values_of
from unweave.circuits.about import Supporting, by_site
from unweave.core.errors import UnweaveError
from unweave.core.progress import task
from unweave.core.site import Site
from unweave.lm.model import LM, Tokens
from unweave.lm.taps import At
from unweave.methods.shift.probe import Edit, Pooled, Probe, pool
from unweave.methods.shift.result import Verdict
from unweave.methods.shift.spec import SupportOptions
from unweave.sae.edits import Where
from unweave.sae.module import SAE

_EFFECT_TOKENS = 512
"""tokens per batch of examples whose effects [token, latent] are held for all sites at a time"""


@dataclass(frozen=True)
class ProbeLogit:
    """The metric: a probe's logit of pooled activations at its site."""

    probe: Probe
    site: Site
    examples: Tokens
    skip_first: int

    def __call__(self, out: Tensor, rows: Tensor) -> Tensor:
        """Logits [R] of activations [R, P, D] of the examples ``rows`` [R]."""
        whole = self.examples
        here = rows.to(whole.mask.device)
        batch = Tokens(whole.ids[here], whole.mask[here], whole.roles[here]).to(out.device)
        weighted = Probe(self.probe.weight.to(out.device), self.probe.bias.to(out.device))
        return weighted(pool(out, batch, self.skip_first))


def logit_effects(
    lm: LM,
    saes: Mapping[Site, SAE],
    texts: Pooled,
    rows: Sequence[int],
    probe: Probe,
    *,
    options: SupportOptions | None = None,
    name: str = "effects",
    complete: Completeness | None = None,
) -> dict[Site, Tensor]:
    """How the logit of each text of ``rows`` would change if a latent (slots 0 to F-1) or error (slot F) were 0.

    {site: [n, F + 1]}, on the CPU, summed over the tokens that are averaged over. Only sites up to the probe's.
    ``complete`` learns what ablating all nodes of a site really changes, which costs a pass more a site.
    """
    o = options or SupportOptions()
    how = AttributionOptions(method=o.method, steps=o.steps, rule=o.rule, max_tokens=texts.batch_tokens)
    used = before(saes, texts.site)
    place = {row: i for i, row in enumerate(rows)}
    effects_of = {site: torch.zeros(len(rows), sae.d_sae + 1) for site, sae in used.items()}
    with task(name, total=len(rows), unit="texts") as shown:
        # however large the texts' own batches are
        for group in texts.batches(rows, max(1, texts.batch_tokens // _EFFECT_TOKENS)):
            tokens = texts.tokens(group)
            metric = ProbeLogit(probe, texts.site, tokens, texts.skip_first)
            positions = beyond_first(tokens.mask, texts.skip_first)
            effects = node_effects(
                lm, used, tokens, None, metric, how, positions=positions, measure=complete is not None
            )
            places = [place[row] for row in group]
            for site, here in effects.items():
                if complete is not None:
                    complete.add(site, here)
                effects_of[site][places] = here.slots.sum(1).float().cpu()
            shown.advance(len(group))
    return effects_of


def before(saes: Mapping[Site, SAE], site: Site) -> dict[Site, SAE]:
    """The SAEs at or before the classifier's site. UnweaveError without one."""
    used = {place: sae for place, sae in saes.items() if place <= site}
    if not used:
        raise UnweaveError(f"no SAE lies at or before {site}", where="classifier.site", remedy="name a later site")
    return used


def support(effects: Mapping[Site, Tensor], labels: Sequence[int]) -> dict[Site, Tensor]:
    """How much each slot supports the examples' labels, {site: [F + 1]}: the mean over examples of the change that
    ablating it makes to the logit of the other label. Positive: the classifier says the label because of it.

    The metric is the logit for label 0 and its negative for label 1, as in the released code.
    """
    sign = 1.0 - 2.0 * torch.tensor(list(labels), dtype=torch.float32)
    return {site: (sign.unsqueeze(1) * values).mean(0) for site, values in effects.items()}


def random_latents(
    mean: Mapping[Site, Tensor], chosen: Sequence[Supporting | Verdict], seed: int
) -> list[tuple[Site, int]]:
    """As many latents at each site as ``chosen`` has there, drawn from the others that are active in the examples.

    Fewer where a site has fewer. A latent is active where its effect {site: [F + 1]} is not exactly 0.
    """
    taken = by_site((latent.site, latent.latent) for latent in chosen)
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for site in sorted(taken):
        active = mean[site][:-1].nonzero()[:, 0].tolist()
        others = sorted(set(active) - set(taken[site]))
        order = torch.randperm(len(others), generator=generator)[: len(taken[site])]
        drawn += [(site, others[i]) for i in sorted(order.tolist())]
    return drawn


def ablation(saes: Mapping[Site, SAE], latents: Sequence[tuple[Site, int]], where: Where = "all") -> list[Edit]:
    """Edits that set latents to 0 and keep every error: x - sum_j f_j(x) d_j at each site."""
    return [saes[site].ablate(sorted(chosen), where=where) for site, chosen in sorted(by_site(latents).items())]


@dataclass(frozen=True)
class MeanAblation:
    """Sets some coordinates [S] of a site to fixed means [S], at every token of a text but its first ``skip_first``."""

    site: Site
    coordinates: Tensor
    means: Tensor
    skip_first: int

    @property
    def needs(self) -> tuple[Site, ...]:
        return ()

    def verify(self, lm: LM) -> None:
        """Refuses a model without the site."""
        lm.site(self.site)

    def __call__(self, x: Tensor, at: At) -> Tensor:
        new = x.clone()
        new[..., self.coordinates.to(x.device)] = self.means.to(x)
        counted = beyond_first(at.mask, self.skip_first)
        return torch.where(counted.unsqueeze(-1), new, x)


def mean_ablation(lm: LM, texts: Pooled, rows: Sequence[int], neurons: Sequence[tuple[Site, int]]) -> list[Edit]:
    """Edits that set neurons to their mean over the tokens of the texts ``rows`` (each text counting the same)."""
    coordinates = by_site(neurons)
    if not coordinates:
        return []
    sites = sorted(coordinates)
    sums = {site: torch.zeros(len(coordinates[site]), dtype=torch.float64) for site in sites}
    for group in texts.batches(rows):
        tokens = texts.tokens(group).to(lm.device)
        values = values_of(lm, sites, tokens, max_tokens=texts.batch_tokens)
        for site in sites:
            means = pool(values[site], tokens, texts.skip_first)[:, coordinates[site]]
            sums[site] += means.double().sum(0).cpu()
    means = {site: total / len(rows) for site, total in sums.items()}
    return [MeanAblation(site, torch.tensor(coordinates[site]), means[site], texts.skip_first) for site in sites]
