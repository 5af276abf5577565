"""Which latents cause a model's behaviour: attribution patching, integrated gradients and exact effects, at any sites.

At a site, every example has a clean state and a patch state, x = decode(f) + e with latents f and error e. A node is
one latent, or the whole error, at one position. Its effect on a metric m is how m changes when the node goes from its
clean to its patch value and the rest stays clean (Marks et al. 2024, eq. 1 to 4):

1. ``states`` encodes the site's value: f = encode(x), e = x - decode(f). Tokens that the SAE's policy excludes
   (padding, special tokens, norm outliers) belong wholly to the error: f = 0 there.
2. The decoder is linear, so one gradient g [B, P, D] of m at the site gives the gradient of every node:
   dm/df = g W_dec^T and dm/de = g. This is what autograd finds through the splice x + (y - stop(y)), y = decode(f) + e,
   without decoding anything.
3. ``node_effects`` takes g on the clean run (attribution patching: one forward and backward pass for all sites), or its
   mean over points x + alpha (x' - x) on the way to the patch state (integrated gradients: each site on its own, the
   others untouched; ``runner`` begins passes at the site and lets sites share batches), and multiplies by (f' - f) and
   (e' - e).
4. The exact effect needs a forward pass per node. ``Interventions.exact`` moves one latent at all positions, skips
   examples in which it does not change, and fills batches with the rest.

Gradients are computed from the site upward only; model and SAE are frozen and nothing is hooked backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from unweave.attribute.options import DEFAULT, AttributionOptions, Rule, fractions, step_lengths
from unweave.attribute.runner import Metric, Path, Runner
from unweave.attribute.states import (
    Patch,
    SAEs,
    State,
    by_site_of,
    change_of,
    line_up,
    moved_positions,
    reads_of,
    take_apart,
    values_of,
)
from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.lm.model import LM, Tokens
from unweave.sae.module import SAE
from unweave.sae.sparse.pattern import Choice
from unweave.sae.sparse.products import dot_rows

_FEW = 1 / 400
"""The share of latents that change up to which one product for each is faster than one dense product (on a CPU)."""


@dataclass(frozen=True)
class SiteEffects:
    """Effects at one site, in units of the metric. ``latents`` [B, P, F], ``error`` [B, P].

    ``gradient`` [B, P, D] is the metric's (mean) gradient at the site that they come from; None for exact effects.
    ``measured`` [B] is how the metric changes when all of the site's nodes move, where that was measured: what
    integrated gradients should add up to.
    """

    latents: Tensor
    error: Tensor
    gradient: Tensor | None
    measured: Tensor | None = None

    @property
    def slots(self) -> Tensor:
        """Effects of latents and errors side by side, [B, P, F + 1]."""
        return torch.cat([self.latents, self.error.unsqueeze(-1)], -1)

    def over_positions(self) -> tuple[Tensor, Tensor]:
        """Effects summed over positions: latents [B, F] and error [B]."""
        return self.latents.sum(1), self.error.sum(1)


class Interventions:
    """Clean and patch states of a batch at some sites, and the metric when nodes of one site move.

    ``patch`` must match ``clean`` token for token in length and padding; None ablates (f' = 0 and e' = 0), and states
    by site, [1, F] and [1, D], ablate to these. ``positions`` (bool [B, P]) limits what is patched; padding never is.
    ``max_tokens`` bounds the tokens of one pass, and so the memory. ``exact``, ``together``, ``alone`` and
    ``endpoints`` are for one SAE. Raises UnweaveError for pairs that do not line up.
    """

    def __init__(
        self,
        lm: LM,
        saes: SAEs,
        clean: Tokens,
        patch: Patch,
        metric: Metric,
        *,
        positions: Tensor | None = None,
        max_tokens: int = 1024,
    ) -> None:
        self.saes = by_site_of(lm, saes)
        self.clean, self.patch, self.fixed = line_up(lm, clean, patch)
        self.run = Runner(lm, self.clean, metric, max_tokens)
        self.moved = moved_positions(self.clean, positions)
        self.reads = {reads_of(sae, site) for site, sae in self.saes.items()}
        for sae in self.saes.values():  # refuses before any pass what cannot be taken apart
            sae.decode(sae.b_enc.new_zeros(0, sae.d_sae))
        self.patched: dict[Site, Tensor] | None = None
        if self.patch is not None:
            self.patched = values_of(lm, {*self.saes, *self.reads}, self.patch, max_tokens=max_tokens)

    @cached_property
    def values(self) -> dict[Site, Tensor]:
        """Clean values [B, P, D] of the sites and of what their SAEs read."""
        return self.run.clean_values(self.saes, self.reads)

    def states(self, site: Site) -> tuple[State, State]:
        """A site's clean state and how patching changes it: the largest tensors there are, so a site at a time."""
        sae = {site: self.saes[site]}
        start = take_apart(sae, self.values, self.clean)[site]
        end = self.fixed.get(site)
        if self.patch is not None and self.patched is not None:
            end = take_apart(sae, self.patched, self.patch)[site]
        return start, change_of(self.saes[site], start, end, self.moved)

    @cached_property
    def _one(self) -> tuple[Site, SAE, State, State]:
        ((site, sae),) = self.saes.items()
        return site, sae, *self.states(site)

    def exact(self, latents: Sequence[int] | Tensor, origin: Literal["clean", "patch"] = "clean") -> Tensor:
        """The change [n, B] of the metric when one latent alone takes its patch value at all positions.

        The site becomes x + (f'_j - f_j) d_j; everything else at it, the error included, stays. Examples in which the
        latent does not change have effect 0 and cost nothing. With ``origin="patch"`` everything else at the site has
        its patch value instead: m(x') - m(x' - (f'_j - f_j) d_j). The two differ by the latent's interactions with the
        others.
        """
        site, sae, start, change = self._one
        chosen = torch.as_tensor(latents, dtype=torch.int64, device=start.x.device)
        moves = change.latents[..., chosen]  # [B, P, n]
        pairs = (moves != 0).any(1).nonzero()  # example, place in `chosen`
        base, sign = (start.x, 1.0) if origin == "clean" else (start.x + change.x, -1.0)
        reference = self.run.values_at(site, base, None)

        def shift(part: slice) -> Tensor:
            example, place = pairs[part].unbind(1)
            return sign * moves[example, :, place].unsqueeze(-1) * sae.W_dec[chosen[place]].unsqueeze(1)

        values = self.run.values_at(site, base, (pairs[:, 0], shift))
        effects = reference.new_zeros(len(chosen), len(self.clean))
        effects[pairs[:, 1], pairs[:, 0]] = sign * (values - reference[pairs[:, 0]])
        return effects

    def together(self, latents: Sequence[int] | Tensor) -> Tensor:
        """The change [2, B] of the metric when all of some latents move together, at all positions: from the clean end,
        and from the patched one, as ``exact`` has them for each alone."""
        site, sae, start, change = self._one
        chosen = torch.as_tensor(latents, dtype=torch.int64, device=start.x.device)
        move, end = change.latents[..., chosen] @ sae.W_dec[chosen], start.x + change.x
        ends = [self.run.values_at(site, x, None) for x in (start.x, start.x + move, end - move, end)]
        return torch.stack([ends[1] - ends[0], ends[3] - ends[2]])

    def alone(self, latents: Sequence[int] | Tensor, steps: int = 32, rule: Rule = "midpoint") -> Tensor:
        """Integrated gradients [n, B] along the path on which one latent moves alone, at all positions, the rest clean.

        With enough steps it equals ``exact``. So where ``node_effects`` by integrated gradients, whose path moves
        everything, differs from exact although this does not, the latents interact.
        """
        site, sae, start, change = self._one
        chosen = torch.as_tensor(latents).tolist()
        effects = start.x.new_zeros(len(chosen), len(self.clean))
        for place, latent in enumerate(chosen):
            moves = change.latents[..., latent]
            rows = (moves != 0).any(1).nonzero()[:, 0]
            shift = moves[rows].unsqueeze(-1) * sae.W_dec[latent]
            paths = [Path(site, start.x[rows], shift, rows)]
            (mean,) = self.run.path_gradients(paths, fractions(steps, rule), step_lengths(steps, rule))
            effects[place, rows] = (mean * shift).sum((1, 2)).to(effects.dtype)
        return effects

    def endpoints(self) -> tuple[Tensor, Tensor]:
        """The metric [B] of the clean run, and of the clean run with the SAE's whole site patched.

        Their difference is what the effects of all latents and the error share out.
        """
        site, _, start, change = self._one
        return self.run.values_at(site, start.x, None), self.run.values_at(site, start.x + change.x, None)


def node_effects(
    lm: LM,
    saes: SAEs,
    clean: Tokens,
    patch: Patch,
    metric: Metric,
    options: AttributionOptions = DEFAULT,
    *,
    positions: Tensor | None = None,
    measure: bool = False,
) -> dict[Site, SiteEffects]:
    """The effect on the metric of every latent and error at every position of every site.

    ``clean``, ``patch`` and ``positions`` are as for ``Interventions``. ``measure`` runs the model once more for each
    site, with all its nodes moved, for ``SiteEffects.measured``.

    Raises UnweaveError for pairs that do not line up, a metric that does not depend on a site, or NaN.
    """
    within = Interventions(lm, saes, clean, patch, metric, positions=positions, max_tokens=options.max_tokens)
    if options.method == "exact":
        effects = {site: _exact_nodes(within, site) for site in within.saes}
    else:
        gradients = _gradients(within, options)
        _check_gradients(gradients)
        effects = {site: effects_of(sae, gradients[site], within.states(site)[1]) for site, sae in within.saes.items()}
    return _measured(within, effects) if measure else effects


class EffectsAgain(Mapping[Site, SiteEffects]):
    """Node effects recomputed from gradients [B, P, D], one site at a time, on access.

    Gradients are [B, P, D] a site; latents [B, P, F] and effects of all sites would be many times that.
    """

    def __init__(self, within: Interventions, gradients: Mapping[Site, Tensor]) -> None:
        self.within, self.gradients = within, gradients

    def __getitem__(self, site: Site) -> SiteEffects:
        gradient = self.gradients[site].to(self.within.moved.device)
        return effects_of(self.within.saes[site], gradient, self.within.states(site)[1])

    def __iter__(self) -> Iterator[Site]:
        return iter(self.within.saes)

    def __len__(self) -> int:
        return len(self.within.saes)


def _measured(within: Interventions, effects: Mapping[Site, SiteEffects]) -> dict[Site, SiteEffects]:
    """The same effects with what moving all of a site's nodes does to the metric, one more pass a site."""
    run = within.run
    if unknown := [site for site in effects if run.needs([site]) - run.known]:
        run.clean_values(unknown, [])
    before: Tensor | None = None
    measured = {}
    for site, of_site in effects.items():
        start, change = within.states(site)
        before = run.values_at(site, start.x, None) if before is None else before
        measured[site] = replace(of_site, measured=run.values_at(site, start.x + change.x, None) - before)
    return measured


def _gradients(within: Interventions, options: AttributionOptions) -> dict[Site, Tensor]:
    """The metric's gradients [B, P, D] on the clean run, or their means on each site's way from clean to patch."""
    run, sites, gradients = within.run, list(within.saes), {}
    if options.method == "attribution":
        gradients, within.values = run.gradients(sites, within.reads)
        return gradients
    alphas, lengths = fractions(options.steps, options.rule), step_lengths(options.steps, options.rule)
    from_clean = 0.0 in alphas
    if from_clean:  # a path's first point is the clean run: one pass for all sites
        needed = run.needs(sites)
        gradients, within.values = run.gradients(sites, within.reads | needed)
        run.know({site: within.values[site] for site in needed})
    xs = {site: within.values[site].to(sae.W_dec.dtype) for site, sae in within.saes.items()}
    means = {site: torch.zeros_like(x) for site, x in xs.items()}
    if len(alphas) > from_clean:
        paths = [Path(site, x, _shift(within, site, x), run.all_rows) for site, x in xs.items()]
        means = dict(zip(xs, run.path_gradients(paths, alphas[from_clean:], lengths[from_clean:]), strict=True))
    return {site: mean + lengths[0] * gradients[site] if from_clean else mean for site, mean in means.items()}


def _shift(within: Interventions, site: Site, x: Tensor) -> Tensor:
    """How a site's value changes from clean to patch, without a skip's part, which belongs to no node."""
    sae = within.saes[site]
    if sae.W_skip is not None or site in within.fixed:
        return within.states(site)[1].x
    end = sae.b_dec if within.patched is None else within.patched[site].to(sae.W_dec.dtype)
    return (end - x) * within.moved.unsqueeze(-1)


def effects_of(sae: SAE, gradient: Tensor, change: State) -> SiteEffects:
    """Effects at one site: the metric's gradient there [B, P, D], times how every latent and the error change.

    Raises UnweaveError where they are NaN or infinite.
    """
    g = gradient.to(sae.W_dec.dtype)
    rows, columns = change.latents.flatten(0, 1).nonzero(as_tuple=True)
    if len(rows) < _FEW * change.latents.numel():
        ends = torch.bincount(rows, minlength=g.shape[0] * g.shape[1]).cumsum(0)
        choice = Choice(columns, torch.cat([ends.new_zeros(1), ends]), sae.d_sae)
        latents = torch.zeros_like(change.latents)
        moves = change.latents.flatten(0, 1)[rows, columns]
        latents.flatten(0, 1)[rows, columns] = dot_rows(g.flatten(0, 1), choice, sae.W_dec) * moves
    else:
        latents = (g @ sae.W_dec.T) * change.latents
    error = (g * change.error).sum(-1)
    if not bool(torch.isfinite(latents.sum() + error.sum())):
        raise UnweaveError("effects are NaN or infinite", where=str(sae.write), remedy="check the SAE and the model")
    return SiteEffects(latents, error, g)


def _check_gradients(gradients: Mapping[Site, Tensor]) -> None:
    for site, g in gradients.items():
        if not bool(torch.isfinite(g).all()):
            raise UnweaveError(
                "the metric's gradient holds NaN or infinity", where=str(site), remedy="check the metric"
            )
    if not any(bool(g.any()) for g in gradients.values()):
        raise UnweaveError(
            "the metric's gradient is zero at every site: it is constant", remedy="check the answers that it compares"
        )


def _exact_nodes(within: Interventions, site: Site) -> SiteEffects:
    """The change of the metric when one latent, or the error, at one position takes its patch value."""
    run, sae = within.run, within.saes[site]
    start, change = within.states(site)
    reference = run.values_at(site, start.x, None)

    def moved(nodes: Tensor, vectors: Callable[[Tensor], Tensor]) -> Tensor:
        def shift(part: slice) -> Tensor:
            here = nodes[part]
            delta = start.x.new_zeros(len(here), *start.x.shape[1:])
            delta[torch.arange(len(here), device=delta.device), here[:, 1]] = vectors(here)
            return delta

        return run.values_at(site, start.x, (nodes[:, 0], shift)) - reference[nodes[:, 0]]

    latents, error = torch.zeros_like(change.latents), torch.zeros_like(change.error[..., 0])
    nodes = change.latents.nonzero()
    latents[nodes.unbind(1)] = moved(nodes, lambda n: change.latents[n.unbind(1)].unsqueeze(-1) * sae.W_dec[n[:, 2]])
    nodes = change.error.any(-1).nonzero()
    error[nodes.unbind(1)] = moved(nodes, lambda n: change.error[n.unbind(1)])
    return SiteEffects(latents, error, None)
