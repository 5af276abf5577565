"""Edges of a circuit: how much of a node's effect comes from each node before it (Marks et al. 2024, sec. 3.1).

The weight of an edge from u_i to d_j is

    dm/dd_j . dd_j/du_i . (u_i' - u_i)

with the metric's (mean) gradient at d_j, the Jacobian along paths that touch no other node, and the change of u_i from
clean to patch. It is what a backward pass from d_j finds where every node is a leaf, a pass per node d_j. Here these
passes are taken apart:

1. A node's gradient with respect to its SAE's input is known without any pass: for a latent that is active on the clean
   input dm/dd_j W_enc[:, j], for the error g - sum over active k of (g . W_dec[k]) W_enc[:, k], with g the metric's
   gradient at the site (and - W_skip g where a transcoder has a skip). A latent that is not active has none, and so no
   edges from below.
2. These vectors go down as ``paths`` says, many at a time, through the parts of blocks that lie between and no others.
3. Where one arrives as c at an upstream site, its edges are c . W_dec[i] (f_i' - f_i) and c . (e' - e). Most latents do
   not change, so products are made with the decoder rows of those that do.

Tokens that an SAE's policy excludes belong wholly to the error, which is there the activation up to a constant.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unweave.attribute.attribution import SiteEffects
from unweave.attribute.states import Patch, State, by_site_of, line_up, moved_positions, reads_of, values_of
from unweave.circuits.about import Options, Summed
from unweave.circuits.arrivals import Arrivals, Changes, changes_of
from unweave.circuits.graph import ByPair, Edges
from unweave.circuits.paths import Emit, Paths, Plan, Rows, where
from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.lm.model import LM, Tokens
from unweave.sae.activations import Identity
from unweave.sae.module import SAE

DEFAULT = Options()
_BUFFER = 1 << 25
"""how many sums one block of downstream nodes may need at one upstream site (128 MB in float32)"""
_MOST = 100_000_000
"""how many edges one batch may have"""


def edge_effects(
    lm: LM,
    saes: Mapping[Site, SAE],
    clean: Tokens,
    patch: Patch,
    effects: Mapping[Site, SiteEffects],
    options: Options = DEFAULT,
    *,
    positions: Tensor | None = None,
    upstream: Mapping[Site, Tensor] | None = None,
) -> ByPair:
    """Weights of all edges into nodes with |effect| > ``node_threshold``, added up over the batch's examples.

    ``clean``, ``patch``, ``positions`` and ``effects`` are what ``node_effects`` took and returned (attribution or
    integrated gradients); effects are read one site after another, each once. Of the ``options``, ``node_threshold``
    holds for every example and position alone, ``summed="positions"`` adds up over the positions of both ends as well,
    and ``max_tokens`` bounds the tokens of one pass. ``upstream`` (bool [P or 1, F + 1] by site) limits the upstream
    ends. Sites not in it are not limited.

    The edges to the metric, ``(site, None)``, are the node effects of the last site in the residual stream, beyond
    which there is no other way. Attention and MLP sites above it (or all sites, without one) have such edges too:
    these, and then the last one's, are total effects, and what a site does through a later one counts at both. Edges
    with a weight of exactly 0 are left out, and so are pairs of sites without edges.

    Raises UnweaveError for sites and SAEs whose edges are not defined, effects without gradients, NaN, and more edges
    than memory should hold.
    """
    by_site = by_site_of(lm, saes)
    plan = Plan(lm, by_site)
    clean, patch, fixed = line_up(lm, clean, patch)
    upstream, threshold, max_tokens = upstream or {}, options.node_threshold, options.max_tokens
    _check(by_site, effects, clean, upstream)
    with torch.no_grad():
        paths = Paths(lm, plan, by_site, clean, max_tokens)
        patched = None if patch is None else values_of(lm, paths.sites, patch, max_tokens=max_tokens)
        moved = moved_positions(clean, positions).flatten()
        changes: dict[Site, Changes] = {}
        retained: dict[Site, _Retained] = {}
        to_metric: ByPair = {}

        def take(site: Site, sae: SAE) -> None:
            """Keeps what edges need of a site: its effects and latents are gone before the next one's are there."""
            of = effects[site]
            _check_effects(site, sae, of, clean)
            strong = _strong(of, threshold) if where(site) != ("stream", -1) else None
            state = _State.of(paths, sae, site, patch, patched, fixed.get(site), moved, strong)
            changes[site] = state.changes(upstream.get(site))
            if strong is not None:
                retained[site] = state.retained(of, strong)
            if site in plan.ends:
                to_metric[site, None] = _to_metric(of, options.summed, upstream.get(site))

        for site, sae in by_site.items():
            take(site, sae)
        inner = _into_all(retained, paths, changes, max_tokens, options.summed)
    return {pair: edges for pair, edges in (inner | to_metric).items() if len(edges)}


def merge(batches: Sequence[ByPair]) -> ByPair:
    """Edges of several batches as one: equal entries are added. Entries that add up to exactly 0 stay."""
    merged: ByPair = {}
    for pair in dict.fromkeys(pair for batch in batches for pair in batch):
        edges_here = [batch[pair] for batch in batches if pair in batch]
        merged[pair] = all_edges = _joined(edges_here)
        if len(edges_here) > 1:
            ends, place = torch.cat([all_edges.up, all_edges.down], 1).unique(dim=0, return_inverse=True)
            weight = all_edges.weight.new_zeros(len(ends)).index_add_(0, place, all_edges.weight)
            merged[pair] = Edges(ends[:, :2].contiguous(), ends[:, 2:].contiguous(), weight)
    return merged


def _check(
    by_site: Mapping[Site, SAE], effects: Mapping[Site, SiteEffects], clean: Tokens, upstream: Mapping[Site, Tensor]
) -> None:
    missing = [str(site) for site in sorted(set(by_site) - set(effects))]
    if missing:
        raise UnweaveError("there are no node effects", where=", ".join(missing), remedy="find the nodes of all sites")
    for site, slots in upstream.items():
        widths = (1, clean.ids.shape[1])
        sae = by_site.get(site)
        if sae is None or slots.dtype != torch.bool or slots.ndim != 2 or slots.shape[0] not in widths:
            raise UnweaveError(
                "upstream slots are bool [positions or 1, latents + 1] of sites with SAEs", where=str(site)
            )
        if slots.shape[1] != sae.d_sae + 1:
            raise UnweaveError(f"{slots.shape[1]} upstream slots, not {sae.d_sae + 1}", where=str(site))


def _check_effects(site: Site, sae: SAE, effects: SiteEffects, clean: Tokens) -> None:
    gradient, latents = effects.gradient, effects.latents
    if gradient is None:
        remedy = "find the nodes by attribution or ig"
        raise UnweaveError("edges start from gradients, and exact effects have none", where=str(site), remedy=remedy)
    wanted = (*clean.ids.shape, sae.d_sae)
    if tuple(latents.shape) != wanted or tuple(gradient.shape) != (*clean.ids.shape, sae.d_out):
        what = f"node effects {list(latents.shape)} do not belong to these inputs and SAE ({list(wanted)})"
        raise UnweaveError(what, where=str(site), remedy="give the effects of the same batch")
    ends = [*gradient.aminmax(), *latents.aminmax(), *effects.error.aminmax()]  # these pass NaN on
    if not bool(torch.isfinite(torch.stack(ends)).all()):
        raise UnweaveError("node effects hold NaN or infinity", where=str(site), remedy="check the metric")


# -- downstream nodes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Retained:
    """Downstream nodes of one site whose gradient is not 0, n of them, and what their gradients are made of.

    ``token`` (of all examples' tokens), ``position``, ``slot`` int64 [n]. ``gradient`` [T, D] is the metric's at the
    site. ``through`` [E, d_in] is the errors' gradient through the encoder, ``which`` [n] says whose, -1 for latents.
    """

    sae: SAE
    read: Site
    token: Tensor
    position: Tensor
    slot: Tensor
    gradient: Tensor
    through: Tensor
    which: Tensor

    def cotangents(self, write: Site, rows: Tensor) -> dict[Site, Tensor]:
        """Gradients [n, 1, D] of some of the nodes, by the site where they begin: where the SAE reads, and writes."""
        slot, which = self.slot[rows], self.which[rows]
        g = self.gradient[self.token[rows]]
        is_error = (which >= 0).unsqueeze(1)
        latent = slot.clamp(max=self.sae.d_sae - 1)
        left = (g * self.sae.W_dec[latent]).sum(-1, keepdim=True)
        read = left * self.sae.W_enc[:, latent].T
        if len(self.through):
            read = torch.where(is_error, self.through[which.clamp(min=0)], read)
        if self.read == write:
            return {write: (read + g * is_error).unsqueeze(1)}
        return {self.read: read.unsqueeze(1), write: (g * is_error).unsqueeze(1)}


def _strong(effects: SiteEffects, threshold: float) -> Tensor:
    """Which slots of which tokens pass the threshold, bool [T, F + 1]."""
    strong = torch.cat([effects.latents.abs() > threshold, effects.error.abs().unsqueeze(-1) > threshold], -1)
    return strong.flatten(0, 1)


@dataclass(frozen=True)
class _State:
    """One site's latents at the tokens that matter: those that change, and those with a retained node.

    ``token`` int64 [n], ascending. ``change`` of latents [n, F] and ``shift`` of x [n, D] (without what a skip does)
    from clean to patch, 0 where nothing is moved. ``active`` bool [n, F]: where a latent follows its input on the clean
    one. ``kept`` bool [n, 1]: tokens that the SAE's policy does not exclude.
    """

    sae: SAE
    read: Site
    shape: torch.Size
    token: Tensor
    change: Tensor
    shift: Tensor
    active: Tensor
    kept: Tensor

    @classmethod
    def of(
        cls,
        paths: Paths,
        sae: SAE,
        site: Site,
        patch: Tokens | None,
        patched: Mapping[Site, Tensor] | None,
        fixed: State | None,
        moved: Tensor,
        strong: Tensor | None,
    ) -> _State:
        read, clean = reads_of(sae, site), paths.tokens
        x, source = (paths.values[s].flatten(0, 1) for s in (site, read))
        if patch is not None and patched is not None:
            x2, source2 = (patched[s].flatten(0, 1) for s in (site, read))
            moved = moved & ((x2 != x).any(-1) | (source2 != source).any(-1))
        token = (moved if strong is None else moved | strong.any(-1)).nonzero()[:, 0]
        latents, kept = _encoded(sae, source[token], clean, token)
        before = _of_nodes(sae, x[token], source[token], kept)
        if fixed is not None:
            change, shift = fixed.latents - latents, fixed.nodes - before
        elif patch is None or patched is None:
            change, shift = -latents, sae.b_dec - before
        else:
            latents2, kept2 = _encoded(sae, source2[token], patch, token)
            after = _of_nodes(sae, x2[token], source2[token], kept2)
            change, shift = latents2 - latents, after - before
        still = ~moved[token].unsqueeze(1)
        active = kept.expand_as(latents) if isinstance(sae.activation, Identity) else latents != 0
        moves = change.masked_fill(still, 0), shift.masked_fill(still, 0)
        return cls(sae, read, clean.ids.shape, token, *moves, active, kept)

    def _through(self, g: Tensor, tokens: Tensor) -> Tensor:
        """The errors' gradients [m, d_in] through what is read: what latents, and a skip, explain less of x."""
        less = ((g @ self.sae.W_dec.T) * self.active[tokens]) @ -self.sae.W_enc.T
        return less if self.sae.W_skip is None else less - (g * self.kept[tokens]) @ self.sae.W_skip.T

    def changes(self, allowed: Tensor | None) -> Changes:
        return changes_of(self.sae, self.token, self.change, self.shift, self.shape, allowed)

    def retained(self, effects: SiteEffects, strong: Tensor) -> _Retained:
        """The nodes that pass the threshold, without latents that do not follow their input."""
        sae = self.sae
        assert effects.gradient is not None
        g = effects.gradient.flatten(0, 1).to(sae.W_dec.dtype)
        here = strong[self.token]
        row, slot = (here[:, :-1] & self.active).nonzero().unbind(1)
        errors = here[:, -1].nonzero()[:, 0]
        through = [self._through(g[self.token[some]], some) for some in errors.split(1024)]
        token = self.token[torch.cat([row, errors])]
        return _Retained(
            sae,
            self.read,
            token,
            token % self.shape[1],
            torch.cat([slot, torch.full_like(errors, sae.d_sae)]),
            g,
            torch.cat(through) if through else g.new_zeros(0, sae.d_in),
            torch.cat([torch.full_like(row, -1), torch.arange(len(errors), device=row.device)]),
        )


def _encoded(sae: SAE, source: Tensor, tokens: Tokens, token: Tensor) -> tuple[Tensor, Tensor]:
    """Latents [n, F] of some tokens, 0 at those that the policy excludes, and which it does not, [n, 1]."""
    ids, mask = tokens.ids.flatten()[token], tokens.mask.flatten()[token]
    kept = sae.policy.keep(source, ids, mask).unsqueeze(-1)
    return sae.encode(source) * kept, kept


def _of_nodes(sae: SAE, x: Tensor, source: Tensor, kept: Tensor) -> Tensor:
    """x [n, D] without what a skip adds."""
    skip = sae.through_skip(source, kept)
    return x if skip is None else x - skip


# -- edges into one site ----------------------------------------------------------------------------------------------


def _into_all(
    retained: Mapping[Site, _Retained], paths: Paths, changes: Mapping[Site, Changes], max_tokens: int, summed: Summed
) -> ByPair:
    all_edges: ByPair = {}
    for site, nodes in retained.items():
        all_edges |= _into(site, nodes, paths, changes, max_tokens, summed)
        if sum(map(len, all_edges.values())) > _MOST:
            raise UnweaveError(
                f"more than {_MOST:,} edges", where=str(site), remedy="raise the node threshold, or limit upstream"
            )
    return all_edges


def _into(
    site: Site, nodes: _Retained, paths: Paths, changes: Mapping[Site, Changes], max_tokens: int, summed: Summed
) -> ByPair:
    """All edges into one site's retained nodes."""
    if not len(nodes.token):
        return {}
    width = paths.tokens.ids.shape[1]
    by_position = summed == "none"
    keys = nodes.slot + (nodes.position * (nodes.sae.d_sae + 1) if by_position else 0)
    keys, column = keys.unique(return_inverse=True)
    slots, places = keys % (nodes.sae.d_sae + 1), keys // (nodes.sae.d_sae + 1)
    widest = max(c.width for c in changes.values()) * (width if by_position else 1)
    parts: dict[Site, list[Edges]] = {}
    for begin, rows in _blocks(column, max(1, _BUFFER // widest)):
        arrivals: dict[Site, Arrivals] = {}
        n_columns = int(column[rows].max()) + 1 - begin

        def emit(up: Site, arrived: Rows, arrivals: dict[Site, Arrivals] = arrivals, n: int = n_columns) -> None:
            if up not in arrivals:
                arrivals[up] = Arrivals(changes[up], n, by_position and arrived.spread)
            arrivals[up].add(arrived)

        # What shares a sequence comes together; otherwise tokens at like positions, whose sequences are equally short.
        first = nodes.position if by_position else nodes.token // width
        rows = rows[first[rows].argsort(stable=True)]
        for part in rows.split(max_tokens):
            start = Rows(
                nodes.gradient.new_zeros(0),
                nodes.token[part] // width,
                nodes.position[part, None],
                column[part] - begin,
            )
            _send(site, start, nodes.cotangents(site, part), paths, emit)
        for up, arrived in arrivals.items():
            at, place, slot, weight = arrived.entries()
            if by_position and not arrived.by_position:
                place = places[at + begin]
            down = torch.stack([places[at + begin], slots[at + begin]], 1)
            parts.setdefault(up, []).append(Edges(torch.stack([place, slot], 1), down, weight))
    return {(up, site): _joined(several) for up, several in parts.items()}


def _blocks(column: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """``size`` downstream columns at a time: the first column, and the nodes that belong to them."""
    for begin in range(0, int(column.max()) + 1, size):
        yield begin, ((column >= begin) & (column < begin + size)).nonzero()[:, 0]


def _send(site: Site, rows: Rows, cots: dict[Site, Tensor], paths: Paths, emit: Emit) -> None:
    kind, layer = where(site)
    if kind == "attn":
        paths.from_attention(rows, cots, layer, emit)
    elif kind == "mlp":
        paths.from_mlp(rows, cots, layer, emit)
    else:
        paths.from_stream(rows.holding(cots[site]), layer, emit)


def _joined(several: list[Edges]) -> Edges:
    if len(several) == 1:
        return several[0]
    return Edges(*(torch.cat([getattr(e, name) for e in several]) for name in ("up", "down", "weight")))


def _to_metric(effects: SiteEffects, summed: Summed, allowed: Tensor | None) -> Edges:
    """Node effects as edges, added up over examples."""
    weights = effects.slots
    if allowed is not None:
        weights = weights * allowed.to(weights.device)
    weights = weights.sum(0)
    weights = weights.sum(0, keepdim=True) if summed == "positions" else weights
    up = weights.nonzero()
    return Edges(up, torch.zeros_like(up), weights[up.unbind(1)])
