"""How much of a behaviour a circuit carries: everything outside it is ablated (Marks et al. 2024, sec. 3.3).

1. From ``start_layer`` on, every node outside the circuit C takes a fixed value at its position: its mean over the
   patch inputs of the examples that are evaluated (or over the clean ones, or zero). One forward pass does it: at each
   site latents are computed from the stream as it is there, already changed below, x' = decode(f') + e'. A
   transcoder's skip is no node: it is always added, computed from what is read there.
   Texts of many lengths may have one mean over all their tokens instead: position by position those of a rare length
   would be ablated towards their own values. The first ``skip_first`` tokens of a text are no nodes and stay.
2. F(C) = (m(C) - m(empty)) / (m(M) - m(empty)), with the metric's mean m over the examples, the whole model M, and the
   empty circuit: 1 for all nodes, 0 for none. The same of M without C says what C misses (completeness: low is good).
3. The stream at ``start_layer`` is computed once, and circuits share batches beside the examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from unweave.attribute.runner import Batch, Runner
from unweave.attribute.states import SAEs, State, beyond_first, by_site_of, chunks, reads_of, states, values_of
from unweave.circuits.about import AblationOptions, Means
from unweave.core.errors import UnweaveError
from unweave.core.progress import Task, task
from unweave.core.site import Site
from unweave.lm.model import LM
from unweave.lm.taps import At, EditFn
from unweave.sae.module import SAE
from unweave.sae.sparse.pattern import Choice
from unweave.sae.sparse.products import weighted_rows

Kept = Mapping[Site, Tensor]
"""A circuit's nodes: bool [P or 1, F + 1] at each site, the error last."""

DEFAULT = AblationOptions()
_SAME = 1e-5
"""m(M) and m(empty) nearer than this, relative to the metric's size, differ by rounding only"""
_FEW = 0.1
"""the share of entries below which a sparse product is quicker than a dense one"""


@dataclass(frozen=True)
class Ablated:
    """The metric of every example: [C, N] with everything but a circuit ablated, [N] of the model and of no nodes."""

    circuits: Tensor
    model: Tensor
    empty: Tensor

    @property
    def faithfulness(self) -> Tensor:
        """F of each circuit, [C]. UnweaveError where m(M) = m(empty)."""
        model, empty = self.model.mean(), self.empty.mean()
        size = float(torch.cat([self.model, self.empty]).abs().max())
        if not abs(float(model - empty)) > _SAME * size:
            raise UnweaveError(
                f"the metric is {float(model):.4g} in the whole model and {float(empty):.4g} with every node ablated: "
                "nothing is left for a circuit to carry",
                where="faithfulness",
                remedy="take an earlier start layer, more sites, or examples in which the metric changes",
            )
        return (self.circuits.mean(1) - empty) / (model - empty)


def ablated_sites(lm: LM, saes: SAEs, start_layer: int = 0) -> dict[Site, SAE]:
    """The SAEs whose nodes are ablated: those in blocks from ``start_layer`` on; -1 takes in the embedding."""
    by_site = by_site_of(lm, saes)
    outside = [str(site) for site in by_site if site.layer is None and site.point != "embed"]
    if outside:
        raise UnweaveError(f"{', '.join(outside)} lies in no layer", remedy="leave it out, or name its layer's site")
    ablated = {site: sae for site, sae in by_site.items() if (-1 if site.layer is None else site.layer) >= start_layer}
    if not ablated:
        raise UnweaveError(f"no site lies in layer {start_layer} or later", where="start_layer", remedy="start earlier")
    return ablated


def ablate_outside(
    lm: LM,
    saes: SAEs,
    batches: Sequence[Batch],
    kept: Sequence[Kept],
    options: AblationOptions = DEFAULT,
    means: Means = "positions",
) -> Ablated:
    """The metric with everything outside each of ``kept`` ablated, beside that of the model and of no nodes.

    Kept sets of one position hold at all. No mean over "tokens" counts the first tokens that are skipped. Raises
    UnweaveError for kept sets that miss a site or have the wrong shape, and for rows that hold nothing but their first
    tokens.
    """
    by_site = ablated_sites(lm, saes, options.start_layer)
    if not batches:
        raise UnweaveError("there are no examples", remedy="give at least one batch")
    if means not in ("positions", "tokens"):
        raise UnweaveError(f"unknown means {means!r}", remedy="use positions or tokens")
    empty = {site: torch.zeros(1, sae.d_sae + 1, dtype=torch.bool) for site, sae in by_site.items()}
    stacked = _Circuits(lm, by_site, [empty, *kept])
    groups: dict[int, list[int]] = {}
    for place, (clean, _, _) in enumerate(batches):
        groups.setdefault(clean.ids.shape[1] if means == "positions" else 0, []).append(place)
    values: dict[int, list[Tensor]] = {}
    n = sum(len(clean) for clean, _, _ in batches)
    with task("ablation", total=n * (len(kept) + 2), unit="passes") as shown:
        for places in groups.values():
            group = [batches[place] for place in places]
            fixed = _means(lm, by_site, group, options, means)
            for place in places:
                run = _Run(lm, by_site, batches[place], fixed, options)
                values[place] = [run.unchanged(shown), run.ablated(stacked, shown)]
    model = torch.cat([values[i][0] for i in range(len(batches))])
    circuits = torch.cat([values[i][1] for i in range(len(batches))], 1)
    return Ablated(circuits[1:], model, circuits[0])


class _Circuits:
    """Kept sets of several circuits side by side: bool [C, P or 1, F + 1] at each site, on the model's device."""

    def __init__(self, lm: LM, by_site: Mapping[Site, SAE], kept: Sequence[Kept]) -> None:
        self.n = len(kept)
        self.at: dict[Site, Tensor] = {}
        for site, sae in by_site.items():
            several = []
            for one in (kept_here.get(site) for kept_here in kept):
                if one is None or one.dtype != torch.bool or one.ndim != 2 or one.shape[1] != sae.d_sae + 1:
                    what = "misses it" if one is None else f"is {one.dtype} {list(one.shape)}"
                    raise UnweaveError(
                        f"a kept set {what}, not bool [positions or 1, {sae.d_sae + 1}]",
                        where=str(site),
                        remedy="give one truth value for every latent, and one for the error",
                    )
                several.append(one.to(lm.device))  # some come from the CPU, as the empty one does
            width = max(one.shape[0] for one in several)
            self.at[site] = torch.stack([one.expand(width, -1) for one in several])

    def rows(self, site: Site, which: Tensor, width: int) -> Tensor:
        """The kept sets [R, width or 1, F + 1] of circuits ``which`` [R]."""
        kept = self.at[site]
        if kept.shape[1] not in (1, width):
            what = f"a circuit with {kept.shape[1]} positions cannot be kept in texts of {width} tokens"
            remedy = "evaluate on texts of the length it was found on, or sum effects over positions"
            raise UnweaveError(what, where=str(site), remedy=remedy)
        return kept[which]


def _means(
    lm: LM, by_site: Mapping[Site, SAE], group: Sequence[Batch], options: AblationOptions, means: Means
) -> dict[Site, State]:
    """What ablated nodes are set to at each site: latents [P or 1, F] and error [P or 1, D], P by position."""
    max_tokens, ablation = options.max_tokens, options.ablation
    over = (0,) if means == "positions" else (0, 1)
    sums: dict[Site, list[Tensor]] = {}
    count: Tensor | int = 0
    for clean, patch, _ in group:
        tokens = clean if ablation != "patch" else patch
        if tokens is None:
            what = "these examples have no patch inputs to take means over"
            raise UnweaveError(what, where="ablation", remedy="use clean (means over the inputs themselves) or zero")
        for rows in chunks(len(tokens), tokens.ids.shape[1], max_tokens):
            part = tokens.rows(rows).to(lm.device)
            there = beyond_first(part.mask, options.skip_first).unsqueeze(-1)
            count = count + there.sum(over, keepdim=True)[0]
            for site, state in states(lm, by_site, part, max_tokens=max_tokens).items():
                new = [(value * there).sum(over, keepdim=True)[0] for value in (state.x, state.latents, state.error)]
                sums[site] = [a + b for a, b in zip(sums[site], new, strict=True)] if site in sums else new
    n = torch.as_tensor(count).clamp(min=1)
    return {
        site: State(*(total * 0 if ablation == "zero" else total / n for total in totals))
        for site, totals in sums.items()
    }


def token_means(
    lm: LM, saes: SAEs, batches: Sequence[Batch], *, skip_first: int = 0, max_tokens: int = 1024
) -> dict[Site, State]:
    """What nodes are on average over all tokens of the clean inputs, to ablate to: latents [1, F], error and x [1, D].

    The first ``skip_first`` tokens of each row do not count.
    """
    by_site = by_site_of(lm, saes)
    options = AblationOptions(ablation="clean", skip_first=skip_first, max_tokens=max_tokens)
    means = _means(lm, by_site, batches, options, "tokens")
    return {
        site: State(by_site[site].decode(mean.latents) + mean.error, mean.latents, mean.error)
        for site, mean in means.items()
    }


class _Run:
    """One batch of examples, run from the start layer on with nodes ablated."""

    def __init__(
        self, lm: LM, by_site: Mapping[Site, SAE], batch: Batch, means: Mapping[Site, State], options: AblationOptions
    ) -> None:
        self.lm, self.by_site, self.means = lm, by_site, means
        self.tokens = batch[0].to(lm.device)
        self.free = beyond_first(self.tokens.mask, options.skip_first)
        self.runner = Runner(lm, self.tokens, batch[2], options.max_tokens)
        self.sources = {reads_of(sae, site) for site, sae in by_site.items() if reads_of(sae, site) != site}
        self.reads = sorted(self.sources - set(by_site))
        self.fixed: dict[Site, Tensor] = {}
        self.start: Site | None = None
        first = options.start_layer
        if first > 0 and all((site.layer or 0) >= first for site in self.reads):
            self.start = Site("resid_pre", first)
            self.stream = values_of(lm, [self.start], self.tokens, max_tokens=options.max_tokens)[self.start]

    def unchanged(self, shown: Task) -> Tensor:
        """The metric [N] of the model as it is."""
        rows = self.runner.all_rows
        values = []
        for part in self.runner.chunks(len(rows)):
            values.append(self._metric(rows[part], {}))
            shown.advance(len(rows[part]))
        return torch.cat(values)

    def ablated(self, circuits: _Circuits, shown: Task) -> Tensor:
        """The metric [C, N] with everything outside each circuit ablated."""
        n = len(self.tokens)
        which = torch.arange(circuits.n, device=self.lm.device).repeat_interleave(n)
        rows = self.runner.all_rows.repeat(circuits.n)
        values = []
        for part in self.runner.chunks(len(rows)):
            read: dict[Site, Tensor] = {}
            edits: dict[Site, EditFn] = dict.fromkeys(self.reads, lambda x, at, read=read: read.update({at.site: x}))
            for site, sae in self.by_site.items():
                edits[site] = self._edit(site, sae, circuits, which[part], self.free[rows[part]], read)
            values.append(self._metric(rows[part], edits))
            shown.advance(len(rows[part]))
        return torch.cat(values).view(circuits.n, n)

    def _edit(
        self, site: Site, sae: SAE, circuits: _Circuits, which: Tensor, free: Tensor, read: dict[Site, Tensor]
    ) -> EditFn:
        source, mean = reads_of(sae, site), self.means[site]
        fixed = self._fixed(site, sae, circuits)

        def edit(x: Tensor, at: At) -> Tensor:
            whole, encoded = x.to(sae.W_dec.dtype), x if source == site else read[source]
            counted = sae.policy.keep(encoded, at.ids, at.mask).unsqueeze(-1)
            latents, skip = sae.encode(encoded) * counted, sae.through_skip(encoded, counted)
            kept = circuits.rows(site, which, x.shape[1])
            with_error = kept[..., -1:]
            # Where the error is kept, latents outside are taken off x, so that a circuit of everything leaves the model
            # as it is bit for bit; where it is not, those inside are put together. Each needs one sum of few rows.
            summed = _sums(latents * (kept[..., :-1] != with_error), sae.W_dec)
            alone = sae.b_dec + mean.error + summed
            alone = alone if skip is None else alone + skip
            new = torch.where(with_error, whole - summed, alone) + fixed[which]
            new = torch.where(free.unsqueeze(-1), new, whole).to(x.dtype)
            if site in self.sources:
                read[site] = new
            return new

        return edit

    def _fixed(self, site: Site, sae: SAE, circuits: _Circuits) -> Tensor:
        """What the latents outside each circuit stand for at their means, [C, P or 1, D]."""
        if site not in self.fixed:
            mean = self.means[site].latents
            kept = circuits.rows(site, torch.arange(circuits.n, device=mean.device), self.tokens.ids.shape[1])
            self.fixed[site] = torch.where(kept[..., :-1], 0, mean) @ sae.W_dec
        return self.fixed[site]

    def _metric(self, rows: Tensor, edits: Mapping[Site, EditFn]) -> Tensor:
        start = None if self.start is None else (self.start, self.stream[rows])
        return self.runner.metric_of(rows, edits, False, start)


def _sums(values: Tensor, table: Tensor) -> Tensor:
    """values [R, P, F] @ table [F, D], through the entries that are not 0 where these are few."""
    flat = values.flatten(0, 1)
    rows, columns = flat.nonzero(as_tuple=True)
    if len(rows) > _FEW * flat.numel():
        return values @ table
    choice = Choice(columns, F.pad(torch.bincount(rows, minlength=len(flat)).cumsum(0), (1, 0)), len(table))
    return weighted_rows(flat[rows, columns], choice, table).view(*values.shape[:2], -1)
