"""SHIFT: taking out of a classifier what it should not rely on (Marks et al. 2024, sec. 4).

1. ``logit_effects`` finds, for every example, what each latent of the model does to the classifier's logit: integrated
   gradients with ablation to zero, summed over the tokens that the classifier averages over.
2. ``support`` turns that into how much each latent supports the labels given, averaged over examples; ``strongest``
   takes the latents above a threshold. These are the circuit.
3. Somebody says which of them are irrelevant (``methods/shift/relevance.py``).
4. ``ablation`` sets those to 0 wherever the model runs, keeping every autoencoder's error. The same classifier on the
   ablated model is SHIFT; one trained anew on the ablated model's activations is SHIFT + retrain.

Controls and skylines: ``random_latents`` draws as many others that are active; the same functions with labels of gender
on balanced examples give the feature skyline, and with neurons, set to their mean (``mean_ablation``), the neuron one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from unweave.attribute.attribution import Rule, node_effects
from unweave.attribute.completeness import Completeness
from unweave.circuits.support import Strong
from unweave.core.errors import UnweaveError
from unweave.core.progress import task
from unweave.core.site import Site
from unweave.lm.model import LM, Tokens
from unweave.lm.taps import At
from unweave.methods.shift.pooled import Edit, Pooled, pool, pooled_positions
from unweave.methods.shift.probe import Probe
from unweave.sae.edits import Where
from unweave.sae.module import SAE

if TYPE_CHECKING:
    from unweave.methods.shift.relevance import Verdict

_EFFECT_TOKENS = 512
"""tokens per batch of examples whose effects [token, latent] are held for all sites at a time"""


@dataclass(frozen=True)
class ProbeLogit:
    """The metric: a probe's logit of pooled activations. For ``node_effects`` with ``metric_at`` the probe's site."""

    probe: Probe
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
    method: Literal["attribution", "ig"] = "ig",
    steps: int = 10,
    rule: Rule = "midpoint",
    max_tokens: int = 2048,
    name: str = "effects",
    complete: Completeness | None = None,
) -> dict[Site, Tensor]:
    """How the logit of each text of ``rows`` would change if a latent (slots 0 to F-1) or error (slot F) were 0.

    {site: [n, F + 1]}, on the CPU, summed over the tokens that are averaged over. Only sites up to the probe's.
    ``complete`` learns what ablating all nodes of a site really changes, which costs a pass more a site.
    """
    used = {site: sae for site, sae in saes.items() if site <= texts.site}
    if not used:
        raise UnweaveError(
            f"no autoencoder lies at or before {texts.site}",
            where="the classifier's site",
            remedy="read the classifier's activations at a later site",
        )
    place = {row: i for i, row in enumerate(rows)}
    found = {site: torch.zeros(len(rows), sae.d_sae + 1) for site, sae in used.items()}
    with task(name, total=len(rows), unit="texts") as shown:
        for group in _groups(texts, rows):
            tokens = texts.tokens(group)
            effects = node_effects(
                lm,
                used,
                tokens,
                None,
                ProbeLogit(probe, tokens, texts.skip_first),
                method=method,
                steps=steps,
                rule=rule,
                positions=pooled_positions(tokens, texts.skip_first),
                metric_at=texts.site,
                max_tokens=max_tokens,
                measure=complete is not None,
            )
            places = [place[row] for row in group]
            for site, here in effects.items():
                if complete is not None:
                    complete.add(site, here)
                latents, error = here.over_positions()
                found[site][places] = torch.cat([latents, error.unsqueeze(-1)], -1).float().cpu()
            shown.advance(len(group))
    return found


def _groups(texts: Pooled, rows: Sequence[int]) -> list[list[int]]:
    """Batches of similar length with at most ``_EFFECT_TOKENS`` tokens each, however large the texts' own are."""
    copies = max(1, texts.batch_tokens // _EFFECT_TOKENS)
    return list(texts.batches(rows, copies))


def support(effects: Mapping[Site, Tensor], labels: Sequence[int]) -> dict[Site, Tensor]:
    """How much each slot supports the examples' labels, {site: [F + 1]}: the mean over examples of the change that
    ablating it makes to the logit of the other label. Positive: the classifier says the label because of it.

    The metric is the logit for label 0 and its negative for label 1, as in the released code.
    """
    sign = 1.0 - 2.0 * torch.tensor(list(labels), dtype=torch.float32)
    return {site: (sign.unsqueeze(1) * values).mean(0) for site, values in effects.items()}


def random_latents(
    mean: Mapping[Site, Tensor], chosen: Sequence[Strong | Verdict], seed: int
) -> list[tuple[Site, int]]:
    """As many latents at each site as ``chosen`` has there, drawn from the others that are active in the examples.

    Fewer where a site has fewer. A latent is active where its effect {site: [F + 1]} is not exactly 0.
    """
    taken: dict[Site, set[int]] = {}
    for each in chosen:
        taken.setdefault(each.site, set()).add(each.latent)
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for site in sorted(taken):
        active = mean[site][:-1].nonzero()[:, 0].tolist()
        others = sorted(set(active) - taken[site])
        order = torch.randperm(len(others), generator=generator)[: len(taken[site])]
        drawn += [(site, others[i]) for i in sorted(order.tolist())]
    return drawn


def ablation(saes: Mapping[Site, SAE], latents: Sequence[tuple[Site, int]], where: Where = "all") -> list[Edit]:
    """Edits that set latents to 0 and keep every error: x - sum_j f_j(x) d_j at each site."""
    by_site: dict[Site, list[int]] = {}
    for site, latent in latents:
        by_site.setdefault(site, []).append(latent)
    return [saes[site].ablate(sorted(chosen), where=where) for site, chosen in sorted(by_site.items())]


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
        counted = at.mask & (at.mask.cumsum(1) > self.skip_first)
        return torch.where(counted.unsqueeze(-1), new, x)


def mean_ablation(lm: LM, texts: Pooled, rows: Sequence[int], neurons: Sequence[tuple[Site, int]]) -> list[Edit]:
    """Edits that set neurons to their mean over the tokens of the texts ``rows`` (each text counting the same)."""
    by_site: dict[Site, list[int]] = {}
    for site, neuron in neurons:
        by_site.setdefault(site, []).append(neuron)
    if not by_site:
        return []
    sites = sorted(by_site)
    sums = {site: torch.zeros(len(by_site[site]), dtype=torch.float64) for site in sites}
    for group in texts.batches(rows):
        tokens = texts.tokens(group).to(lm.device)
        with lm.taps(read=sites, stop=sites[-1]) as seen:
            lm(tokens)
        for site in sites:
            means = pool(seen[site], tokens, texts.skip_first)[:, by_site[site]]
            sums[site] += means.double().sum(0).cpu()
    return [MeanAblation(site, torch.tensor(by_site[site]), sums[site] / len(rows), texts.skip_first) for site in sites]


LEAST_GAP = 0.2
"""between the original's and the oracle's worst group; a smaller one is made up of the test set's chance"""


def recovered(original: float, shifted: float, oracle: float) -> float | None:
    """What share of the way from the original's to the oracle's worst group is made up; None where that is short."""
    gap = oracle - original
    return None if gap < LEAST_GAP else (shifted - original) / gap
