"""Finding a circuit: mean node effects over all examples, then the edges between nodes that matter (Marks et al. 2024).

1. First pass: ``node_effects`` of each piece of examples. Effects are summed over positions ("positions") or keep them
   ("none", examples of equal length), and averaged over examples; pieces count by how many examples they hold.
2. The metric's gradients [B, P, D] at the sites are kept from it, on the CPU or in files: they are all that edges need
   beside the states, which two forward passes give again, where integrated gradients would take steps x sites passes.
   They are smaller than effects by F / D.
3. Second pass: ``edge_effects``. Downstream are the nodes of an example whose own |effect| there is above the node
   threshold, before anything is averaged; upstream those whose mean over all examples is (or all).
4. A piece holds as many examples as fill passes of ``max_tokens`` tokens together with the points of their paths, and
   is halved while memory is too small for it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from unweave.attribute.attribution import EffectsAgain, Interventions, node_effects
from unweave.attribute.completeness import Completeness, sums_of
from unweave.attribute.options import AttributionOptions
from unweave.attribute.runner import Batch, Metric, Runner, rows_of
from unweave.attribute.states import Patch, SAEs, State, beyond_first, by_site_of
from unweave.circuits.about import About, Costs, EdgeCounts, Options, Search, SiteCounts
from unweave.circuits.edges import DEFAULT, edge_effects, merge
from unweave.circuits.faithfulness import token_means
from unweave.circuits.graph import ByPair, Circuit, Edges, edge_tensors, edges_from
from unweave.circuits.paths import Plan
from unweave.core.errors import UnweaveError
from unweave.core.halving import halving
from unweave.core.pieces import Held, Pieces
from unweave.core.progress import task
from unweave.core.run import peak_memory_gb
from unweave.core.site import Site
from unweave.lm.model import LM, Tokens
from unweave.sae.activations import Identity

_T = TypeVar("_T")


def find_nodes(
    lm: LM, saes: SAEs, batches: Sequence[Batch], options: Options = DEFAULT, *, pieces: Pieces | None = None
) -> Circuit:
    """The mean effects of all nodes, without edges.

    ``batches`` are (clean tokens, patch tokens or None to ablate, metric). Where positions are kept and lengths differ,
    examples of the commonest length are used and the others counted (``about.search.other_lengths``). ``pieces`` in a
    folder, which no other question may use, let interrupted work go on.

    Raises UnweaveError for no examples, NaN, and a metric that no node changes.
    """
    return _Finder(lm, saes, batches, options, pieces, gradients=False).nodes()


def find_circuit(
    lm: LM, saes: SAEs, batches: Sequence[Batch], options: Options = DEFAULT, *, pieces: Pieces | None = None
) -> Circuit:
    """As ``find_nodes``, with edges. Raises UnweaveError also for exact effects, which have no gradient."""
    if options.method == "exact":
        raise UnweaveError("exact effects have no gradient, and edges need one", remedy="use ig, or find_nodes")
    finder = _Finder(lm, saes, batches, options, pieces, gradients=True)
    return finder.with_edges(finder.nodes())


class _Finder:
    """One search; ``gradients`` are kept where edges follow."""

    def __init__(
        self, lm: LM, saes: SAEs, batches: Sequence[Batch], options: Options, pieces: Pieces | None, gradients: bool
    ) -> None:
        if not batches or not all(len(clean) for clean, _, _ in batches):
            raise UnweaveError("there are no examples", remedy="give at least one batch, and no empty ones")
        self.lm, self.saes, self.options, self.gradients = lm, by_site_of(lm, saes), options, gradients
        self.other_lengths = 0
        if options.summed == "none":
            batches, self.other_lengths = _of_one_length(batches)
        self.points = options.steps if options.method == "ig" else 1
        self.n = sum(len(clean) for clean, _, _ in batches)
        self.pieces = Pieces(None) if pieces is None else pieces
        self.means: dict[Site, State] = {}
        if options.ablation == "mean":
            if any(patch is not None for _, patch, _ in batches):
                raise UnweaveError("pairs are patched, not ablated", where="ablation", remedy="leave ablation out")
            self.means = token_means(
                lm, self.saes, batches, skip_first=options.skip_first, max_tokens=options.max_tokens
            )
        self.max_tokens = options.max_tokens  # as memory has allowed so far
        self.batches = batches
        if lm.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(lm.device)

    def _parts(self) -> list[tuple[str, Batch]]:
        """Parts of the batches, each with a name. Sizes of passes decide last bits, so they are in the name."""
        max_tokens, parts = self.options.max_tokens, []
        for number, batch in enumerate(self.batches):
            for start, stop in _spans(batch, max_tokens // self.points):
                parts.append((f"{number}-{start}-{stop}-of-{max_tokens}", rows_of(batch, slice(start, stop))))
        return parts

    def _end(self, patch: Tokens | None) -> Patch:
        """What nodes of a batch go to: a patch input's values, else their means or zero."""
        return (self.means or None) if patch is None else patch

    # -- nodes ----------------------------------------------------------------------------------------------------

    def nodes(self) -> Circuit:
        began = time.perf_counter()
        sums: dict[Site, Tensor] = {}
        values: dict[str, float] = {}
        complete = Completeness()
        with task("nodes", total=self.n, unit="examples") as shown:
            for name, part in self._parts():
                held = self.pieces.tensors(
                    f"nodes-{name}",
                    lambda part=part: self._part_nodes(part),
                    later="gradient" if self.gradients else None,
                )
                for site, values_there in _by_site(held, "sum").items():
                    sums[site] = sums[site] + values_there if site in sums else values_there.double()
                for site, values_there in _by_site(held, "total").items():
                    complete.add_sums(site, values_there)
                for side in ("clean", "patch"):
                    if side in held:
                        values[side] = values.get(side, 0.0) + float(held[side].sum())
                shown.advance(len(part[0]))
        nodes = {site: (total / self.n).float() for site, total in sums.items()}
        self._check(nodes)
        if self.options.method == "ig":
            complete.warn()
        about = self._about(nodes, {side: total / self.n for side, total in values.items()}, complete)
        return Circuit(nodes, {}, self.options.summed == "none", self.n, about, self._costs(began))

    def _about(self, nodes: Mapping[Site, Tensor], values: Mapping[str, float], complete: Completeness) -> About:
        widths = [clean.ids.shape[1] for clean, _, _ in self.batches]
        tokens: tuple[str, ...] = ()
        if self.options.summed == "none" and self.lm.tokenizer is not None:
            tokens = tuple(self.lm.pieces(self.batches[0][0].ids[0]))
        search = Search(
            options=self.options,
            shortest=min(widths),
            longest=max(widths),
            other_lengths=self.other_lengths,
            clean=values["clean"],
            patch=values.get("patch"),
            above=_above(nodes, self.options.node_threshold),
        )
        neurons = all(isinstance(sae.activation, Identity) for sae in self.saes.values())
        return About(neurons=neurons, tokens=tokens, search=search, sums=complete.rows())

    def _part_nodes(self, part: Batch) -> Held:
        """Sums [P or 1, F + 1] over the part's examples, gradients [B, P, D], and the metric's values [B]."""
        halves = self._halving(part, lambda batch, _rows, max_tokens: self._nodes_of(batch, max_tokens))
        joined = {name: [half[name] for half in halves] for name in halves[0]}
        sums = {name: torch.stack(all_).double().sum(0) for name, all_ in joined.items() if name.startswith("sum/")}
        totals = {name: torch.stack(all_).sum(0) for name, all_ in joined.items() if name.startswith("total/")}
        rest = {name: torch.cat(all_) for name, all_ in joined.items() if name not in sums and name not in totals}
        return {name: total.float() for name, total in sums.items()} | totals | rest

    def _nodes_of(self, batch: Batch, max_tokens: int) -> Held:
        o, (clean, patch, metric) = self.options, batch
        how = AttributionOptions(method=o.method, steps=o.steps, rule=o.rule, max_tokens=max_tokens)
        effects = node_effects(
            self.lm, self.saes, clean, self._end(patch), metric, how, positions=beyond_first(clean.mask, o.skip_first),
            measure=o.method != "attribution",  # whose effects need not add up
        )  # fmt: skip
        held: Held = {}
        for site in list(effects):
            of_site = effects.pop(site)  # the largest tensors: each is freed before the next is joined
            totals = sums_of(of_site)
            if totals is not None:
                held[f"total/{site}"] = totals
            slots = of_site.slots
            total = slots.sum((0, 1)).unsqueeze(0) if o.summed == "positions" else slots.sum(0)
            held[f"sum/{site}"] = total.cpu()
            if self.gradients:
                assert of_site.gradient is not None
                held[f"gradient/{site}"] = of_site.gradient.cpu()
        for side, tokens in (("clean", clean), ("patch", patch)):
            if tokens is not None:
                held[side] = _values(self.lm, tokens, metric, max_tokens).double().cpu()
        return held

    def _check(self, nodes: Mapping[Site, Tensor]) -> None:
        for site, effects in nodes.items():
            bad = int((~torch.isfinite(effects)).sum())
            if bad:
                what = f"{bad} of {effects.numel()} effects are NaN or infinite"
                raise UnweaveError(what, where=str(site), remedy="check the SAE there, the model and the metric")
        if not any(bool(effects.any()) for effects in nodes.values()):
            what = "no node changes the metric: clean and patch inputs are the same at every site, or it is constant"
            raise UnweaveError(what, remedy="check the pairs and the metric")

    # -- edges ----------------------------------------------------------------------------------------------------

    def with_edges(self, circuit: Circuit) -> Circuit:
        began = time.perf_counter()
        o = self.options
        upstream = None
        if o.upstream == "above":
            upstream = {site: (e.abs() > o.node_threshold).to(self.lm.device) for site, e in circuit.nodes.items()}
        merged: ByPair = {}
        with task("edges", total=self.n, unit="examples") as shown:
            for name, part in self._parts():
                held = self.pieces.tensors(
                    f"edges-{name}", lambda name=name, part=part: edge_tensors(self._part_edges(name, part, upstream))
                )
                merged = merge([merged, edges_from(held)])
                shown.advance(len(part[0]))
        edges = {pair: _mean(of_pair, self.n, o.edge_threshold) for pair, of_pair in merged.items()}
        edges = {pair: of_pair for pair, of_pair in edges.items() if len(of_pair)}
        for pair, of_pair in edges.items():
            if not bool(torch.isfinite(of_pair.weight).all()):
                raise UnweaveError("weights of edges are NaN or infinite", where=" -> ".join(map(str, pair)))
        assert circuit.about.search is not None and circuit.costs is not None
        counts = EdgeCounts(sum(map(len, merged.values())), sum(map(len, edges.values())))
        ends = tuple(Plan(self.lm, self.saes).ends)
        about = replace(circuit.about, search=replace(circuit.about.search, edges=counts, ends=ends))
        seconds = {"seconds_nodes": circuit.costs.seconds_nodes, "seconds_edges": _since(began)}
        return replace(circuit, edges=edges, about=about, costs=replace(self._costs(began), **seconds))

    def _part_edges(self, name: str, part: Batch, upstream: Mapping[Site, Tensor] | None) -> ByPair:
        held = self.pieces.get(f"nodes-{name}", "gradient")
        assert held is not None
        gradients = _by_site(held, "gradient")
        o = self.options

        def work(batch: Batch, rows: slice, max_tokens: int) -> ByPair:
            clean, patch, metric = batch
            end, at = self._end(patch), {"positions": beyond_first(clean.mask, o.skip_first)}
            within = Interventions(self.lm, self.saes, clean, end, metric, max_tokens=max_tokens, **at)
            effects = EffectsAgain(within, {site: g[rows] for site, g in gradients.items()})
            options = replace(o, max_tokens=max_tokens)
            return edge_effects(self.lm, self.saes, clean, end, effects, options, upstream=upstream, **at)

        return merge(self._halving(part, work))

    # -- memory and time ------------------------------------------------------------------------------------------

    def _halving(self, part: Batch, work: Callable[[Batch, slice, int], _T]) -> list[_T]:
        """``work(examples, which rows, max_tokens)`` on all of a part, in as large parts as memory has allowed so far.

        Passes hold fewer tokens where parts hold fewer examples: else points of a path would fill them up again. Where
        a single example does not fit, they hold no more than its own.
        """
        n, width = part[0].ids.shape
        first = max(1, min(n, self.max_tokens // self.points // width))
        size, narrow = first, False

        def one(rows: slice) -> _T:
            nonlocal size
            if rows.stop < n:  # the last part may be small for want of examples
                size = min(size, rows.stop - rows.start)
            tokens = width if narrow else max(width, self.max_tokens * size // first)
            return work(rows_of(part, rows), rows, tokens)

        def alone(rows: slice) -> _T:
            nonlocal narrow
            narrow = True
            return work(rows_of(part, rows), rows, width)

        results, rows = halving(n, first, one, alone)
        if narrow:
            self.max_tokens = width
        elif rows < first:
            self.max_tokens = max(1, self.max_tokens * rows // first)
        return results

    def _costs(self, began: float) -> Costs:
        on_gpu = self.lm.device.type == "cuda"
        gpu = round(torch.cuda.max_memory_allocated(self.lm.device) / 1e9, 2) if on_gpu else None
        return Costs(self.max_tokens, peak_memory_gb(), _since(began), peak_gpu_gb=gpu)


def _since(began: float) -> float:
    return round(time.perf_counter() - began, 2)


def _by_site(held: Mapping[str, Tensor], kind: str) -> dict[Site, Tensor]:
    """The tensors named ``kind/site``."""
    return {Site.parse(name[len(kind) + 1 :]): value for name, value in held.items() if name.startswith(f"{kind}/")}


def _above(nodes: Mapping[Site, Tensor], threshold: float) -> tuple[SiteCounts, ...]:
    """How many latents and errors of each site are above the threshold."""
    above = {site: effects.abs() > threshold for site, effects in nodes.items()}
    return tuple(SiteCounts(site, int(a[:, :-1].sum()), int(a[:, -1].sum())) for site, a in above.items())


def _mean(edges: Edges, n: int, threshold: float) -> Edges:
    """Means of sums over ``n`` examples, those above the threshold, the strongest first."""
    weight = edges.weight / n
    if threshold > 0:
        # Written so that NaN stays, and is found.
        strong = (~(weight.abs() <= threshold)).nonzero()[:, 0]
        edges, weight = Edges(edges.up[strong], edges.down[strong], edges.weight[strong]), weight[strong]
    order = weight.abs().argsort(descending=True, stable=True)
    return Edges(edges.up[order].cpu(), edges.down[order].cpu(), weight[order].float().cpu())


def _values(lm: LM, tokens: Tokens, metric: Metric, max_tokens: int) -> Tensor:
    """The metric [B] of inputs as they are."""
    run = Runner(lm, tokens.to(lm.device), metric, max_tokens)
    return torch.cat([run.metric_of(run.all_rows[part], {}, False) for part in run.chunks(len(tokens))])


def _of_one_length(batches: Sequence[Batch]) -> tuple[list[Batch], int]:
    """The batches of the commonest length, and how many examples the others hold. Padding is refused."""
    lengths: Counter[int] = Counter()
    for clean, _, _ in batches:
        if not bool(clean.mask.all()):
            raise UnweaveError(
                "positions cannot be kept where rows are padded", remedy="batch texts by length, or sum over positions"
            )
        lengths[clean.ids.shape[1]] += len(clean)
    # The shorter of equally common ones, so that the order of batches does not matter.
    width = min(lengths, key=lambda length: (-lengths[length], length))
    chosen = [batch for batch in batches if batch[0].ids.shape[1] == width]
    return chosen, lengths.total() - lengths[width]


def _spans(batch: Batch, max_tokens: int) -> list[tuple[int, int]]:
    """First and last rows of pieces of at most ``max_tokens`` tokens, as equal as can be."""
    n, width = batch[0].ids.shape
    pieces = -(-n // max(1, max_tokens // width))
    return [(n * i // pieces, n * (i + 1) // pieces) for i in range(pieces)]
