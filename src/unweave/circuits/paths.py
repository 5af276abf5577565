"""The way of a gradient from one node down to the nodes before it, along paths that touch no other node.

A node's gradient is a cotangent: one vector at one token of one example. Going down, it meets the sum in the residual
stream after each block (after attention and MLP one by one, or after both where they are parallel):

1. A residual site that is a node takes the cotangent and ends the way. Other nodes lie behind it.
2. An attention or MLP site that is a node takes the cotangent that arrives where it adds to the stream. Nothing passes
   through it, so the cotangent in the stream goes on as it is: between residual sites of one block with both nodes the
   way is the identity.
3. Attention or an MLP without a node is gone through: the vector-Jacobian product of that half of the block joins the
   cotangent in the stream.
4. A transcoder's skip is a way around its nodes: what arrives where it writes goes on from where it reads.

Each product runs only its half of its block (``lm.taps`` begins at the block's input) and goes backward for many
cotangents at once. An MLP acts token by token, so a cotangent brings one token. Attention spreads it over the example's
earlier tokens, so it brings the example's tokens up to its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unweave.attribute.states import chunks, reads_of, values_of
from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.lm.model import LM, Tokens
from unweave.sae.module import SAE

ATTENTION = ("attn_heads", "attn_out", "attn_add")
MLP = ("mlp_act", "mlp_out", "mlp_add")
_BEFORE_ATTENTION = ("resid_pre", "attn_in")
_READS = {"attn": ("resid_pre", "attn_in", *ATTENTION), "mlp": ("resid_mid", "mlp_in", *MLP)}


@dataclass(frozen=True)
class Rows:
    """Cotangents. ``cot`` [n, W, D] at tokens ``position`` int64 [n, W] of examples ``example`` int64 [n].

    ``column`` int64 [n] says which downstream node each belongs to. W is 1 until attention has been gone through
    (``spread``); from then on the positions are 0 to W - 1.
    """

    cot: Tensor
    example: Tensor
    position: Tensor
    column: Tensor
    spread: bool = False

    def __len__(self) -> int:
        return len(self.cot)

    def holding(self, cot: Tensor) -> Rows:
        """The same places with other cotangents."""
        return replace(self, cot=cot)

    def part(self, rows: slice) -> Rows:
        """Some of the rows."""
        return Rows(self.cot[rows], self.example[rows], self.position[rows], self.column[rows], self.spread)


Emit = Callable[[Site, Rows], None]
"""Takes the cotangents that arrive at a node's site."""


class Plan:
    """Which nodes lie where, by block: ``stream`` (after the block; -1: before the first), ``attn`` and ``mlp``.

    Raises UnweaveError for sites that edges cannot have, for two at one place, and for SAEs without a plain decoder.
    """

    def __init__(self, lm: LM, saes: Mapping[Site, SAE]) -> None:
        self.stream: dict[int, Site] = {}
        self.attn: dict[int, Site] = {}
        self.mlp: dict[int, Site] = {}
        for site, sae in saes.items():
            sae.require_decoder()
            if sae.input_norm is not None:
                what = f"edges need the latents' own directions, and this SAE normalises every token ({sae.input_norm})"
                raise UnweaveError(what, where=str(site), remedy="leave this site out of the circuit")
            kind, layer = where(site)
            if kind == "stream" and sae.W_skip is not None:
                what = "edges cannot follow a skip in the residual stream: everything could go around the nodes there"
                remedy = "leave this site out of the circuit, or ask for node effects alone"
                raise UnweaveError(what, where=str(site), remedy=remedy)
            places = {"stream": self.stream, "attn": self.attn, "mlp": self.mlp}[kind]
            if layer in places:
                what = f"{places[layer]} and {site} are the same place of the model for a circuit"
                remedy = "keep one: a circuit has one site after a block, one in its attention and one in its MLP"
                raise UnweaveError(what, remedy=remedy)
            self._check_read(lm, kind, site, reads_of(sae, site))
            places[layer] = site

    @staticmethod
    def _check_read(lm: LM, kind: str, site: Site, read: Site) -> None:
        if read == site:
            return
        points = _READS.get(kind, ())
        if read.layer != site.layer or read.point not in points or points.index(read.point) > points.index(site.point):
            remedy = "it may read attn_in or mlp_in of the block whose attention or MLP it writes for"
            raise UnweaveError(f"edges cannot follow a transcoder from {read} to {site}", remedy=remedy)
        lm.site(read)

    def any_below(self, layer: int) -> bool:
        """Whether a node lies before the residual stream after block ``layer``."""
        return min(self.stream, default=layer) < layer or min([*self.attn, *self.mlp], default=layer + 1) <= layer

    @property
    def ends(self) -> tuple[Site, ...]:
        """The sites that have edges to the metric: the last in the stream, and those above it; else all."""
        last = max(self.stream, default=-2)
        above = [site for places in (self.attn, self.mlp) for layer, site in places.items() if layer > last]
        return tuple(sorted([*above, *([self.stream[last]] if self.stream else [])]))


def where(site: Site) -> tuple[str, int]:
    """Stream, attn or mlp, and the block. Raises UnweaveError for a site whose edges are not defined."""
    layer = site.layer
    if site.point == "embed":
        return "stream", -1
    if layer is not None:
        if site.point == "resid_post":
            return "stream", layer
        if site.point == "resid_pre":
            return "stream", layer - 1
        if site.point in ATTENTION:
            return "attn", layer
        if site.point in MLP:
            return "mlp", layer
    remedy = f"use embed, resid_post, {', '.join((*ATTENTION, *MLP))}, or ask for node effects alone"
    raise UnweaveError(f"edges to and from {site} are not defined", remedy=remedy)


class Paths:
    """Takes cotangents down, in one batch of examples.

    ``values`` are the clean run's activations [B, P, D] at the nodes' sites, what their SAEs read, and the blocks'
    inputs. ``max_tokens`` bounds the tokens of one pass.
    """

    def __init__(self, lm: LM, plan: Plan, saes: Mapping[Site, SAE], tokens: Tokens, max_tokens: int) -> None:
        self.lm, self.plan, self.tokens, self.max_tokens = lm, plan, tokens, max_tokens
        self.parallel = lm.layout.parallel
        top = max((place for at in (plan.stream, plan.attn, plan.mlp) for place in at), default=-1)
        points = ("resid_pre",) if self.parallel else ("resid_pre", "resid_mid")
        inputs = [Site(point, layer) for layer in range(max(top, 0) + 1) for point in points]
        self.saes = saes
        self.sites = {*saes, *(reads_of(sae, site) for site, sae in saes.items())}
        self.values = values_of(lm, {*self.sites, *inputs}, tokens, max_tokens=max_tokens)

    # -- going down -----------------------------------------------------------------------------------------------

    def from_stream(self, rows: Rows, layer: int, emit: Emit) -> None:
        """Cotangents in the stream after block ``layer``, on their way into the block."""
        if not self.plan.any_below(layer):
            return
        mid = rows
        if layer in self.plan.mlp:
            site = self.plan.mlp[layer]
            arrived = self._to_site(rows, site)
            emit(site, arrived)
            skip = self._around(arrived, site)
            if skip:
                mid = rows.holding(rows.cot + self._mlp(rows, layer, skip))
        else:
            mid = rows.holding(rows.cot + self._mlp(rows, layer, {Site("mlp_add", layer): rows.cot}))
        self._into_attention(mid, rows if self.parallel else mid, layer, emit)

    def from_mlp(self, rows: Rows, cots: Mapping[Site, Tensor], layer: int, emit: Emit) -> None:
        """Cotangents [n, 1, D] at sites of block ``layer``'s MLP (or what it reads, ``resid_mid``), by site."""
        below = rows.holding(self._mlp(rows, layer, cots))
        if self.parallel:
            self._arrive(below, layer - 1, emit)
        else:
            self._into_attention(below, below, layer, emit)

    def from_attention(self, rows: Rows, cots: Mapping[Site, Tensor], layer: int, emit: Emit) -> None:
        """Cotangents [n, 1, D] at sites of block ``layer``'s attention (or what it reads, ``resid_pre``), by site."""
        if not self.plan.any_below(layer - 1) and layer - 1 not in self.plan.stream:
            return
        sites = list(cots)
        for parts in self._spread([rows.holding(cots[site]) for site in sites]):
            below = self._attention(parts[0], layer, {s: part.cot for s, part in zip(sites, parts, strict=True)})
            self._arrive(parts[0].holding(below), layer - 1, emit)

    def _into_attention(self, stream: Rows, into: Rows, layer: int, emit: Emit) -> None:
        """``stream`` goes on past block ``layer``'s attention, ``into`` is what reaches attention itself."""
        if layer in self.plan.attn:
            site = self.plan.attn[layer]
            arrived = self._to_site(into, site)
            emit(site, arrived)
            skip = self._around(arrived, site)
            if any(read.point in _BEFORE_ATTENTION for read in skip):  # token by token
                stream, skip = stream.holding(stream.cot + self._attention(into, layer, skip)), {}
            if not skip:
                self._arrive(stream, layer - 1, emit)
                return
            ((end, cot),) = skip.items()
            into = into.holding(cot)
        else:
            end = Site("attn_add", layer)
        if not self.plan.any_below(layer - 1) and layer - 1 not in self.plan.stream:
            return
        for past, here in self._spread([stream, into]):
            through = self._attention(here, layer, {end: here.cot})
            self._arrive(past.holding(past.cot + through), layer - 1, emit)

    def _arrive(self, rows: Rows, layer: int, emit: Emit) -> None:
        """Cotangents in the stream after block ``layer``, from above."""
        site = self.plan.stream.get(layer)
        if site is None:
            self.from_stream(rows, layer, emit)
        else:
            emit(site, self._embedded(rows) if site.point == "embed" else rows)

    def _spread(self, several: list[Rows]) -> Iterator[list[Rows]]:
        """The same places with cotangents over whole sequences, at most ``max_tokens`` tokens at a time.

        Cotangents of one example and one downstream node share a sequence: all they will be is summed.
        """
        first = several[0]
        if first.spread:
            for part in chunks(len(first), first.cot.shape[1], self.max_tokens):
                yield [rows.part(part) for rows in several]
            return
        place = first.position[:, 0]
        keys, sequence = torch.stack([first.column, first.example], 1).unique(dim=0, return_inverse=True)
        ends = torch.zeros(len(keys), dtype=torch.int64, device=place.device).scatter_reduce(0, sequence, place, "amax")
        order = ends.argsort(stable=True)  # short ones together
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device)
        sequence, keys, ends = rank[sequence], keys[order], ends[order]
        for part in self._parts(ends.tolist()):
            column, example = keys[part].unbind(1)
            width = int(ends[part.stop - 1]) + 1
            here = ((sequence >= part.start) & (sequence < part.stop)).nonzero()[:, 0]
            position = torch.arange(width, device=place.device).expand(len(column), width)
            yield [
                Rows(_scattered(rows.cot[here, 0], sequence[here] - part.start, place[here], position), example,
                     position, column, spread=True)
                for rows in several
            ]  # fmt: skip

    def _parts(self, ends: list[int]) -> Iterator[slice]:
        """Slices of sequences that end at these positions (ascending), each of ``max_tokens`` tokens at most."""
        begin = 0
        for i, end in enumerate(ends):
            if i > begin and (i - begin + 1) * (end + 1) > self.max_tokens:
                yield slice(begin, i)
                begin = i
        if ends:
            yield slice(begin, len(ends))

    def _around(self, arrived: Rows, site: Site) -> dict[Site, Tensor]:
        """Cotangents that arrived where a transcoder writes, at what its skip reads; nothing where it has none."""
        sae = self.saes[site]
        if sae.W_skip is None:
            return {}
        read = reads_of(sae, site)
        kept = sae.policy.keep(self.values[read], self.tokens.ids, self.tokens.mask)
        here = kept[arrived.example.unsqueeze(1), arrived.position].unsqueeze(-1)
        return {read: (arrived.cot * here).to(sae.W_skip.dtype) @ sae.W_skip.T}

    # -- vector-Jacobian products -----------------------------------------------------------------------------------

    def _at(self, site: Site, rows: Rows) -> Tensor:
        """The clean activations [n, W, D] where the rows are."""
        return self.values[site][rows.example.unsqueeze(1), rows.position]

    def _tokens(self, rows: Rows) -> Tokens:
        at = (rows.example.unsqueeze(1), rows.position)
        mask = self.tokens.mask[at] if rows.spread else torch.ones_like(rows.position, dtype=torch.bool)
        return Tokens(self.tokens.ids[at], mask, self.tokens.roles[at])

    def _attention(self, rows: Rows, layer: int, cots: Mapping[Site, Tensor]) -> Tensor:
        """From sites of a block's attention to the block's input."""
        return self._through(rows, Site("resid_pre", layer), layer, {}, cots)

    def _mlp(self, rows: Rows, layer: int, cots: Mapping[Site, Tensor]) -> Tensor:
        """From sites of a block's MLP to the MLP's place in the stream, token by token.

        The pass begins at the block's input with the value before the MLP, and attention adds nothing.
        """
        before = Site("resid_pre" if self.parallel else "resid_mid", layer)
        return self._through(rows, before, layer, {Site("attn_add", layer): lambda x, _at: torch.zeros_like(x)}, cots)

    def _through(
        self, rows: Rows, before: Site, layer: int, edit: Mapping[Site, Callable], cots: Mapping[Site, Tensor]
    ) -> Tensor:
        leaf = self._at(before, rows).requires_grad_()
        direct = {site: cot for site, cot in cots.items() if site != before}
        cot = self._product(rows, (Site("resid_pre", layer), leaf), edit, direct, leaf)
        return cot + cots[before] if before in cots else cot

    def _to_site(self, rows: Rows, site: Site) -> Rows:
        """From where attention or an MLP adds to the stream back to a site inside of it, token by token."""
        layer, kind = site.layer, where(site)[0]
        assert layer is not None
        end = Site(f"{kind}_add", layer)
        if site == end:
            return rows
        leaf = self._at(site, rows).requires_grad_()
        start = Site("resid_pre", layer)
        edit = {site: lambda x, _at: leaf.to(x.dtype)}
        return rows.holding(self._product(rows, (start, self._at(start, rows)), edit, {end: rows.cot}, leaf))

    def _embedded(self, rows: Rows) -> Rows:
        """From the first block's input to the embedding (some families scale it)."""
        if torch.equal(self.values[Site("embed")], self.values[Site("resid_pre", 0)]):
            return rows
        leaf = self._at(Site("embed"), rows).requires_grad_()
        edit = {Site("embed"): lambda x, _at: leaf.to(x.dtype)}
        return rows.holding(self._product(rows, None, edit, {Site("resid_pre", 0): rows.cot}, leaf))

    def _product(
        self,
        rows: Rows,
        start: tuple[Site, Tensor] | None,
        edit: Mapping[Site, Callable],
        cots: Mapping[Site, Tensor],
        leaf: Tensor,
    ) -> Tensor:
        """Cotangents at sites times their Jacobians by ``leaf``, in one pass forward and backward."""
        sites = sorted(cots)
        if not sites:
            return torch.zeros_like(leaf)
        with self.lm.taps(read=sites, edit=edit, stop=sites[-1], grad=True, start=start) as seen:
            self.lm(self._tokens(rows))
            values = [seen[site] for site in sites]
        into = [cots[site].to(value.dtype) for site, value in zip(sites, values, strict=True)]
        return torch.autograd.grad(values, leaf, into)[0]


def _scattered(cot: Tensor, sequence: Tensor, place: Tensor, position: Tensor) -> Tensor:
    """Cotangents [m, D] of single tokens, in sequences [n, W, D] that are zero elsewhere."""
    out = cot.new_zeros(*position.shape, cot.shape[-1])
    return out.index_put_((sequence, place), cot, accumulate=True)
