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
   mean over points x + alpha (x' - x) on the way to the patch state (integrated gradients: site by site, the other
   sites untouched), and multiplies by (f' - f) and (e' - e).
4. The exact effect needs a forward pass per node. ``exact_effects`` moves one latent at all positions, skips examples
   in which it does not change, and fills batches with the rest.

Gradients are asked for from the site upward only; model and SAE are frozen and nothing is hooked backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.lm.model import LM, Tokens
from unweave.lm.taps import At, EditFn
from unweave.sae.module import SAE
from unweave.sae.states import (
    SAEs,
    State,
    by_site_of,
    change_of,
    chunks,
    line_up,
    moved_positions,
    reads_of,
    states,
    take_apart,
)

Method = Literal["attribution", "ig", "exact"]
Rule = Literal["left", "midpoint", "right"]
"""Where in each of the equal steps from clean to patch a gradient is taken. The paper's eq. 4 has the right end, its
released code the left end; both err in first order of the step, the midpoint in second order."""

Metric = Callable[[Tensor, Tensor], Tensor]
"""``metric(out [R, V], rows int64 [R]) -> [R]``: one number per row from the logits at its last token. ``rows`` says
which example of the batch each row is: methods run examples several times and in other groups. With ``metric_at``
given, ``out`` is that site's value [R, P, D] instead."""


@dataclass(frozen=True)
class SiteEffects:
    """Effects at one site, in units of the metric. ``latents`` [B, P, F], ``error`` [B, P].

    ``gradient`` [B, P, D] is the metric's (mean) gradient at the site that they were made from; None for exact effects.
    """

    latents: Tensor
    error: Tensor
    gradient: Tensor | None

    def over_positions(self) -> tuple[Tensor, Tensor]:
        """Effects summed over positions: latents [B, F] and error [B]."""
        return self.latents.sum(1), self.error.sum(1)

    def mean(self) -> tuple[Tensor, Tensor]:
        """Effects summed over positions, then averaged over examples: latents [F] and error, a scalar."""
        latents, error = self.over_positions()
        return latents.mean(0), error.mean(0)


def node_effects(
    lm: LM,
    saes: SAEs,
    clean: Tokens,
    patch: Tokens | None,
    metric: Metric,
    *,
    method: Method = "attribution",
    steps: int = 10,
    rule: Rule = "left",
    positions: Tensor | None = None,
    metric_at: Site | None = None,
    max_tokens: int = 1024,
) -> dict[Site, SiteEffects]:
    """The effect on the metric of every latent and error at every position of every site.

    ``patch`` must match ``clean`` token for token in length and padding; None ablates (f' = 0 and e' = 0).
    ``positions`` (bool [B, P]) limits what is patched; padding never is. ``steps`` and ``rule`` are for integrated
    gradients. ``exact`` runs the model once per changed node and is for small cases only. ``max_tokens`` bounds the
    tokens of one pass, and so the memory.

    Raises UnweaveError for pairs that do not line up, a metric that does not depend on a site, or NaN.
    """
    by_site = by_site_of(lm, saes)
    clean, patch = line_up(lm, clean, patch)
    run = Runner(lm, clean, metric, metric_at, max_tokens)
    moved = moved_positions(clean, positions)
    patch_states = states(lm, by_site, patch, max_tokens=max_tokens) if patch is not None else None
    gradients: dict[Site, Tensor] = {}
    if method == "attribution":
        gradients, values = run.gradients(by_site)
        clean_states = take_apart(by_site, values, clean)
    else:
        clean_states = states(lm, by_site, clean, max_tokens=max_tokens)
    effects = {}
    for site, sae in by_site.items():
        start = clean_states[site]
        change = change_of(sae, start, None if patch_states is None else patch_states[site], moved)
        if method == "exact":
            effects[site] = _exact_nodes(run, site, sae, start, change)
            continue
        if method == "ig":
            gradients[site] = run.path_gradient(site, start.x, change.x, fractions(steps, rule))
        g = gradients[site].to(sae.W_dec.dtype)
        if not bool(torch.isfinite(g).all()):
            raise UnweaveError(
                "the metric's gradient holds NaN or infinity", where=str(site), remedy="check the metric"
            )
        effects[site] = SiteEffects((g @ sae.W_dec.T) * change.latents, (g * change.error).sum(-1), g)
    return effects


def exact_effects(
    lm: LM,
    sae: SAE,
    clean: Tokens,
    patch: Tokens | None,
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


def alone_effects(
    lm: LM,
    sae: SAE,
    clean: Tokens,
    patch: Tokens | None,
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
        mean = run.path_gradient(site, start.x[rows], shift, fractions(steps, rule), rows)
        effects[place, rows] = (mean * shift).sum((1, 2)).to(effects.dtype)
    return effects


def endpoints(
    lm: LM,
    sae: SAE,
    clean: Tokens,
    patch: Tokens | None,
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
    return run.values_at(site, start.x, None), run.values_at(site, start.x + change.x, None)


def fractions(steps: int, rule: Rule) -> list[float]:
    """The points alpha of a path at which gradients are taken: one in each of ``steps`` equal parts of [0, 1]."""
    if steps < 1 or rule not in ("left", "midpoint", "right"):
        raise UnweaveError(
            f"integrated gradients cannot take {steps} steps by the rule {rule!r}", remedy="try 10 and midpoint"
        )
    return [(k + {"left": 0.0, "midpoint": 0.5, "right": 1.0}[rule]) / steps for k in range(steps)]


class Runner:
    """Runs one batch of examples with a site set to given values, and evaluates the metric, within ``max_tokens``."""

    def __init__(self, lm: LM, tokens: Tokens, metric: Metric, metric_at: Site | None, max_tokens: int) -> None:
        self.lm, self.tokens, self.metric, self.max_tokens = lm, tokens, metric, max_tokens
        self.metric_at = None if metric_at is None else lm.site(metric_at)

    def chunks(self, n_rows: int) -> Iterator[slice]:
        return chunks(n_rows, self.tokens.ids.shape[1], self.max_tokens)

    def metric_of(self, rows: Tensor, edits: Mapping[Site, EditFn], grad: bool) -> Tensor:
        """The metric [R] of the examples ``rows`` [R] with edits in place."""
        lm, whole = self.lm, self.tokens
        batch = Tokens(whole.ids[rows], whole.mask[rows], whole.roles[rows])
        with torch.set_grad_enabled(grad):
            if self.metric_at is not None:
                with lm.taps(read=[self.metric_at], edit=edits, stop=self.metric_at, grad=grad) as seen:
                    lm(batch)
                out = seen[self.metric_at]
            else:
                width = batch.ids.shape[1]
                last = width - 1 - batch.mask.flip(1).int().argmax(1)
                keep = width - int(last.min())
                with lm.taps(edit=edits, grad=grad):
                    logits = lm(batch, keep_logits=keep)
                assert logits is not None
                out = logits[torch.arange(len(rows), device=logits.device), last - (width - keep)]
            value = self.metric(out.float() if out.dtype in (torch.bfloat16, torch.float16) else out, rows)
        if value.shape != rows.shape:
            raise UnweaveError(
                f"the metric gave shape {list(value.shape)} for {len(rows)} rows",
                remedy="return one number per row: metric(out [R, V], rows [R]) -> [R]",
            )
        return value

    def gradients(self, by_site: Mapping[Site, SAE]) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
        """The metric's gradients [B, P, D] at the SAEs' sites from one pass, and the values of all sites they need."""
        sites = list(by_site)
        reads = {reads_of(sae, site) for site, sae in by_site.items()} - set(sites)
        gradients: dict[Site, list[Tensor]] = {site: [] for site in sites}
        values: dict[Site, list[Tensor]] = {site: [] for site in (*sites, *reads)}
        for part in self.chunks(len(self.tokens)):
            found: dict[Site, Tensor] = {}

            def probe(x: Tensor, at: At, found: dict[Site, Tensor] = found) -> Tensor:
                # A node of its own, since the model may use the same tensor elsewhere too (the residual stream is also
                # the MLP's input in post-norm families); at the first site it is the leaf where the graph begins.
                found[at.site] = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
                return found[at.site]

            def look(x: Tensor, at: At, found: dict[Site, Tensor] = found) -> None:
                found[at.site] = x

            rows = torch.arange(len(self.tokens), device=self.lm.device)[part]
            value = self.metric_of(rows, dict.fromkeys(reads, look) | dict.fromkeys(sites, probe), grad=True)
            for site, g in zip(sites, self._grad(value, [found.get(s) for s in sites], sites), strict=True):
                gradients[site].append(g)
            for site in values:
                values[site].append(found[site].detach())
        return _cat(gradients), _cat(values)

    def path_gradient(
        self, site: Site, start: Tensor, shift: Tensor, alphas: Sequence[float], rows: Tensor | None = None
    ) -> Tensor:
        """The mean over ``alphas`` of the metric's gradient at ``start + alpha shift`` [N, P, D], of examples ``rows``.

        Points of the path fill the batches beside the examples; only one mean gradient per example is kept.
        """
        rows = torch.arange(len(self.tokens), device=self.lm.device) if rows is None else rows
        mean = torch.zeros_like(start)
        points = torch.tensor(alphas, dtype=start.dtype, device=start.device).repeat_interleave(len(rows))
        index = torch.arange(len(rows), device=start.device).repeat(len(alphas))
        for part in self.chunks(len(points)):
            here = index[part]
            leaf = (start[here] + points[part, None, None] * shift[here]).requires_grad_()
            value = self.metric_of(rows[here], {site: lambda x, _at, leaf=leaf: leaf.to(x.dtype)}, grad=True)
            mean.index_add_(0, here, self._grad(value, [leaf], [site])[0])
        return mean / len(alphas)

    def values_at(self, site: Site, base: Tensor, changed: tuple[Tensor, Callable[[slice], Tensor]] | None) -> Tensor:
        """The metric [N] with the site at ``base`` [B, P, D]; or at ``base[rows] + shift(slice of rows)``, N rows."""
        rows = torch.arange(len(base), device=base.device) if changed is None else changed[0]
        found = [base.new_zeros(0)]
        for part in self.chunks(len(rows)):
            value = base[rows[part]] if changed is None else base[rows[part]] + changed[1](part)
            found.append(
                self.metric_of(rows[part], {site: lambda x, _at, value=value: value.to(x.dtype)}, False).to(base.dtype)
            )
        return torch.cat(found)

    def _grad(self, value: Tensor, at: Sequence[Tensor | None], sites: Sequence[Site]) -> list[Tensor]:
        reached = [x for x in at if x is not None]
        found: Sequence[Tensor | None] = []
        if len(reached) == len(at) and value.requires_grad:
            found = torch.autograd.grad(value.sum(), reached, allow_unused=True)
        gradients = [g for g in found if g is not None]
        if len(gradients) < len(at):
            missing = [str(s) for s, g in zip(sites, found or [None] * len(at), strict=True) if g is None]
            raise UnweaveError(
                f"the metric does not depend on {', '.join(missing)}", remedy="use sites that lie before what it reads"
            )
        return gradients


def _one_site(
    lm: LM,
    sae: SAE,
    clean: Tokens,
    patch: Tokens | None,
    metric: Metric,
    positions: Tensor | None,
    metric_at: Site | None,
    max_tokens: int,
) -> tuple[Runner, Site, State, State]:
    """What the methods for one SAE begin with: a runner, the site, its clean state, and how patching changes it."""
    by_site = by_site_of(lm, sae)
    (site,) = by_site
    clean, patch = line_up(lm, clean, patch)
    start = states(lm, by_site, clean, max_tokens=max_tokens)[site]
    end = None if patch is None else states(lm, by_site, patch, max_tokens=max_tokens)[site]
    run = Runner(lm, clean, metric, metric_at, max_tokens)
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


def _cat(parts: Mapping[Site, list[Tensor]]) -> dict[Site, Tensor]:
    return {site: torch.cat(found) for site, found in parts.items()}
