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
4. The exact effect needs a forward pass per node. ``exact_effects`` moves one latent at all positions, skips examples
   in which it does not change, and fills batches with the rest.

Gradients are asked for from the site upward only; model and SAE are frozen and nothing is hooked backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from unweave.attribute.options import Method, Rule, fractions, step_lengths
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
    states,
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

    ``gradient`` [B, P, D] is the metric's (mean) gradient at the site that they were made from; None for exact effects.
    ``measured`` [B] is how the metric changes when all of the site's nodes move, where that was asked for: what
    integrated gradients should add up to.
    """

    latents: Tensor
    error: Tensor
    gradient: Tensor | None
    measured: Tensor | None = None

    def over_positions(self) -> tuple[Tensor, Tensor]:
        """Effects summed over positions: latents [B, F] and error [B]."""
        return self.latents.sum(1), self.error.sum(1)


def node_effects(
    lm: LM,
    saes: SAEs,
    clean: Tokens,
    patch: Patch,
    metric: Metric,
    *,
    method: Method = "attribution",
    steps: int = 10,
    rule: Rule = "left",
    positions: Tensor | None = None,
    metric_at: Site | None = None,
    max_tokens: int = 1024,
    measure: bool = False,
) -> dict[Site, SiteEffects]:
    """The effect on the metric of every latent and error at every position of every site.

    ``patch`` must match ``clean`` token for token in length and padding; None ablates (f' = 0 and e' = 0), and states
    by site, [1, F] and [1, D], ablate to these. ``measure`` runs the model once more for each site, with all its nodes
    moved, for ``SiteEffects.measured``.
    ``positions`` (bool [B, P]) limits what is patched; padding never is. ``steps`` and ``rule`` are for integrated
    gradients. ``exact`` runs the model once per changed node and is for small cases only. ``max_tokens`` bounds the
    tokens of one pass, and so the memory.

    Raises UnweaveError for pairs that do not line up, a metric that does not depend on a site, or NaN.
    """
    by_site = by_site_of(lm, saes)
    clean, patch, fixed = line_up(lm, clean, patch)
    run = Runner(lm, clean, metric, metric_at, max_tokens)
    moved = moved_positions(clean, positions)
    reads = {reads_of(sae, site) for site, sae in by_site.items()}
    for sae in by_site.values():
        sae.decode(
            sae.b_enc.new_zeros(0, sae.d_sae)
        )  # refuses now, and not after all passes, what cannot be taken apart
    ends = None if patch is None else values_of(lm, {*by_site, *reads}, patch, max_tokens=max_tokens)
    from_clean = method == "ig" and 0.0 in fractions(steps, rule)
    gradients: dict[Site, Tensor] = {}
    if method == "attribution" or from_clean:  # a path's first point is the clean run: one pass for all sites
        needed = run.needs(by_site) if method == "ig" else set()
        gradients, values = run.gradients(list(by_site), reads | needed)
        run.know({site: values[site] for site in needed})
    else:
        values = run.clean_values(by_site, reads)

    def change(site: Site) -> tuple[State, State]:
        """A site's clean state and how patching changes it: the largest tensors there are, so a site at a time."""
        one = {site: by_site[site]}
        end = fixed.get(site) if ends is None or patch is None else take_apart(one, ends, patch)[site]
        start = take_apart(one, values, clean)[site]
        return start, change_of(by_site[site], start, end, moved)

    effects: dict[Site, SiteEffects] = {}
    if method == "exact":
        effects = {site: _exact_nodes(run, site, sae, *change(site)) for site, sae in by_site.items()}
        return _measured(run, effects, lambda site: _ends_of(*change(site))) if measure else effects
    if method == "ig":
        xs = {site: values[site].to(sae.W_dec.dtype) for site, sae in by_site.items()}
        shifts = {
            site: ((sae.b_dec if ends is None else ends[site].to(sae.W_dec.dtype)) - xs[site]) * moved.unsqueeze(-1)
            if sae.W_skip is None and site not in fixed
            else change(site)[1].x  # without the skip's part, which belongs to no node
            for site, sae in by_site.items()
        }
        gradients = _path_means(run, xs, shifts, (fractions(steps, rule), step_lengths(steps, rule)), gradients)
    _check_gradients(gradients)
    for site, sae in by_site.items():
        effects[site] = effects_of(sae, gradients[site], change(site)[1])
    return _measured(run, effects, lambda site: _ends_of(*change(site))) if measure else effects


def _ends_of(start: State, change: State) -> tuple[Tensor, Tensor]:
    return start.x, start.x + change.x


def _measured(
    run: Runner, effects: Mapping[Site, SiteEffects], ends: Callable[[Site], tuple[Tensor, Tensor]]
) -> dict[Site, SiteEffects]:
    """The same effects with what moving all of a site's nodes does to the metric, one more pass a site."""
    unknown = [site for site in effects if run.needs([site]) - run.known]
    if unknown:
        run.clean_values(unknown, [])
    before: Tensor | None = None
    measured = {}
    for site, one in effects.items():
        start, end = ends(site)
        before = run.values_at(site, start, None) if before is None else before
        measured[site] = replace(one, measured=run.values_at(site, end, None) - before)
    return measured


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


def _path_means(
    run: Runner,
    xs: Mapping[Site, Tensor],
    shifts: Mapping[Site, Tensor],
    points: tuple[Sequence[float], Sequence[float]],
    at_clean: Mapping[Site, Tensor],
) -> dict[Site, Tensor]:
    """The gradients' means over ``points`` (alphas, and how much each counts) on each site's way from clean to patch;
    ``at_clean`` is that at the first of them, where it is known."""
    first = 1 if at_clean else 0
    alphas, lengths = points[0][first:], points[1][first:]
    means = {site: torch.zeros_like(x) for site, x in xs.items()}
    if alphas:
        paths = [Path(site, x, shifts[site], run.all_rows) for site, x in xs.items()]
        means = dict(zip(xs, run.path_gradients(paths, alphas, lengths), strict=True))
    return {site: mean + points[1][0] * at_clean[site] if at_clean else mean for site, mean in means.items()}


def _check_gradients(gradients: Mapping[Site, Tensor]) -> None:
    for site, g in gradients.items():
        if not bool(torch.isfinite(g).all()):
            raise UnweaveError(
                "the metric's gradient holds NaN or infinity", where=str(site), remedy="check the metric"
            )
    if not any(bool(g.any()) for g in gradients.values()):
        raise UnweaveError(
            "the metric's gradient is zero at every site: it is constant",
            remedy="check the answers that it compares",
        )


def exact_effects(
    lm: LM,
    sae: SAE,
    clean: Tokens,
    patch: Patch,
    metric: Metric,
    latents: Sequence[int] | Tensor,
    *,
    origin: Literal["clean", "patch"] = "clean",
    positions: Tensor | None = None,
    metric_at: Site | None = None,
    max_tokens: int = 1024,
) -> Tensor:
    """The change [n, B] of the metric when one latent alone takes its patch value at all positions.

    The site becomes x + (f'_j - f_j) d_j; everything else at it, the error included, stays. Examples in which the
    latent does not change have effect 0 and cost nothing. With ``origin="patch"`` everything else at the site has its
    patch value instead: m(x') - m(x' - (f'_j - f_j) d_j). The two differ by the latent's interactions with the others.
    """
    run, site, start, change = _one_site(lm, sae, clean, patch, metric, positions, metric_at, max_tokens)
    chosen = torch.as_tensor(latents, dtype=torch.int64, device=lm.device)
    moves = change.latents[..., chosen]  # [B, P, n]
    pairs = (moves != 0).any(1).nonzero()  # example, place in `chosen`
    base = start.x if origin == "clean" else start.x + change.x
    reference = run.values_at(site, base, None)
    sign = 1.0 if origin == "clean" else -1.0

    def shift(part: slice) -> Tensor:
        example, place = pairs[part].unbind(1)
        return sign * moves[example, :, place].unsqueeze(-1) * sae.W_dec[chosen[place]].unsqueeze(1)

    values = run.values_at(site, base, (pairs[:, 0], shift))
    effects = reference.new_zeros(len(chosen), len(clean))
    effects[pairs[:, 1], pairs[:, 0]] = sign * (values - reference[pairs[:, 0]])
    return effects


def together_effects(
    lm: LM,
    sae: SAE,
    clean: Tokens,
    patch: Patch,
    metric: Metric,
    latents: Sequence[int] | Tensor,
    *,
    positions: Tensor | None = None,
    metric_at: Site | None = None,
    max_tokens: int = 1024,
) -> Tensor:
    """The change [2, B] of the metric when all of some latents move together, at all positions: from the clean end, and
    from the patched one, as ``exact_effects`` has them for each alone."""
    run, site, start, change = _one_site(lm, sae, clean, patch, metric, positions, metric_at, max_tokens)
    chosen = torch.as_tensor(latents, dtype=torch.int64, device=lm.device)
    move = change.latents[..., chosen] @ sae.W_dec[chosen]
    ends = [
        run.values_at(site, x, None) for x in (start.x, start.x + move, start.x + change.x - move, start.x + change.x)
    ]
    return torch.stack([ends[1] - ends[0], ends[3] - ends[2]])


def alone_effects(
    lm: LM,
    sae: SAE,
    clean: Tokens,
    patch: Patch,
    metric: Metric,
    latents: Sequence[int] | Tensor,
    *,
    steps: int = 32,
    rule: Rule = "midpoint",
    positions: Tensor | None = None,
    metric_at: Site | None = None,
    max_tokens: int = 1024,
) -> Tensor:
    """Integrated gradients [n, B] along the path on which one latent moves alone, at all positions, the rest clean.

    With enough steps it equals ``exact_effects``. So where ``node_effects(method="ig")``, whose path moves everything,
    differs from exact although this does not, the latents interact.
    """
    run, site, start, change = _one_site(lm, sae, clean, patch, metric, positions, metric_at, max_tokens)
    chosen = torch.as_tensor(latents, dtype=torch.int64, device=lm.device)
    effects = torch.zeros(len(chosen), len(clean), dtype=start.x.dtype, device=lm.device)
    for place, latent in enumerate(chosen.tolist()):
        moves = change.latents[..., latent]
        rows = (moves != 0).any(1).nonzero()[:, 0]
        shift = moves[rows].unsqueeze(-1) * sae.W_dec[latent]
        paths = [Path(site, start.x[rows], shift, rows)]
        (mean,) = run.path_gradients(paths, fractions(steps, rule), step_lengths(steps, rule))
        effects[place, rows] = (mean * shift).sum((1, 2)).to(effects.dtype)
    return effects


def endpoints(
    lm: LM,
    sae: SAE,
    clean: Tokens,
    patch: Patch,
    metric: Metric,
    *,
    positions: Tensor | None = None,
    metric_at: Site | None = None,
    max_tokens: int = 1024,
) -> tuple[Tensor, Tensor]:
    """The metric [B] of the clean run, and of the clean run with the SAE's whole site patched.

    Their difference is what the effects of all latents and the error share out.
    """
    run, site, start, change = _one_site(lm, sae, clean, patch, metric, positions, metric_at, max_tokens)
    before, after = _ends_of(start, change)
    return run.values_at(site, before, None), run.values_at(site, after, None)


def _one_site(
    lm: LM,
    sae: SAE,
    clean: Tokens,
    patch: Patch,
    metric: Metric,
    positions: Tensor | None,
    metric_at: Site | None,
    max_tokens: int,
) -> tuple[Runner, Site, State, State]:
    """What the methods for one SAE begin with: a runner, the site, its clean state, and how patching changes it."""
    by_site = by_site_of(lm, sae)
    (site,) = by_site
    clean, patch, fixed = line_up(lm, clean, patch)
    run = Runner(lm, clean, metric, metric_at, max_tokens)
    start = take_apart(by_site, run.clean_values(by_site, [reads_of(sae, site)]), clean)[site]
    end = fixed.get(site) if patch is None else states(lm, by_site, patch, max_tokens=max_tokens)[site]
    return run, site, start, change_of(sae, start, end, moved_positions(clean, positions))


def _exact_nodes(run: Runner, site: Site, sae: SAE, start: State, change: State) -> SiteEffects:
    """The change of the metric when one latent, or the error, at one position takes its patch value."""
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
