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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from unweave.attribute.attribution import Method, Rule, fractions, node_effects
from unweave.attribute.completeness import Completeness, sums_of
from unweave.attribute.lazy import EffectsAgain
from unweave.attribute.runner import Batch
from unweave.attribute.states import Patch, SAEs, State, by_site_of, reads_of
from unweave.circuits.edges import edge_effects, merge
from unweave.circuits.examples import metric_values, moved, of_one_length, rows_of, spans
from unweave.circuits.faithfulness import token_means
from unweave.circuits.graph import Circuit, Edges, Y, slots_of
from unweave.circuits.parts import Held, Parts, by_site, content_of, question_of
from unweave.circuits.paths import Plan
from unweave.core.errors import UnweaveError
from unweave.core.halving import halving
from unweave.core.progress import task
from unweave.core.run import peak_memory_gb
from unweave.core.site import Site
from unweave.lm.model import LM, Tokens

Summed = Literal["none", "positions"]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Options:
    """How a circuit is found. Thresholds are in units of the metric.

    ``steps`` and ``rule`` are those of integrated gradients. ``skip_first`` first tokens of each row are left as they
    are. ``upstream`` "above" draws edges only from nodes whose mean effect is above ``node_threshold``. Edges with
    |weight| <= ``edge_threshold`` are dropped, with 0 none. ``metric_at``: see ``sae.attribution.Metric``. Examples
    without patch inputs are ablated: to zero, or each node to its "mean" over all tokens of all examples.
    """

    method: Method = "ig"
    steps: int = 10
    rule: Rule = "midpoint"
    summed: Summed = "none"
    skip_first: int = 0
    node_threshold: float = 0.1
    edge_threshold: float = 0.01
    upstream: Literal["above", "all"] = "above"
    max_tokens: int = 1024
    metric_at: Site | None = None
    ablation: Literal["zero", "mean"] = "zero"

    def __post_init__(self) -> None:
        fractions(self.steps, self.rule)
        fine = {
            "method": self.method in ("ig", "attribution", "exact"),
            "summed": self.summed in ("none", "positions"),
            "skip_first": self.skip_first >= 0,
            "node_threshold": self.node_threshold >= 0,
            "edge_threshold": self.edge_threshold >= 0,
            "upstream": self.upstream in ("above", "all"),
            "ablation": self.ablation in ("zero", "mean"),
            "max_tokens": self.max_tokens > 0,
        }
        for name, good in fine.items():
            if not good:
                raise UnweaveError(f"{name} = {getattr(self, name)!r} makes no sense", where="circuits.find.Options")


DEFAULT = Options()


def find_nodes(
    lm: LM, saes: SAEs, batches: Sequence[Batch], options: Options = DEFAULT, *, keep: Path | None = None
) -> Circuit:
    """The mean effects of all nodes, without edges.

    ``batches`` are (clean tokens, patch tokens or None to ablate, metric). Where positions are kept and lengths differ,
    examples of the commonest length are used and the others counted in ``about["skipped"]``. With a folder ``keep``,
    finished pieces lie there and are not made again: known by their inputs, options and SAEs, so that other questions
    may share it (a metric that is no dataclass is known by its name only).

    Raises UnweaveError for no examples, NaN, and a metric that no node changes.
    """
    return _Finder(lm, saes, batches, options, keep, gradients=False).nodes()


def find_circuit(
    lm: LM, saes: SAEs, batches: Sequence[Batch], options: Options = DEFAULT, *, keep: Path | None = None
) -> Circuit:
    """As ``find_nodes``, with edges. Raises UnweaveError also for exact effects, which have no gradient."""
    if options.method == "exact":
        raise UnweaveError("exact effects have no gradient, and edges need one", remedy="use ig, or find_nodes")
    finder = _Finder(lm, saes, batches, options, keep, gradients=True)
    return finder.with_edges(finder.nodes())


class _Finder:
    """One question; ``gradients`` says whether edges will be asked for."""

    def __init__(
        self, lm: LM, saes: SAEs, batches: Sequence[Batch], options: Options, keep: Path | None, gradients: bool
    ) -> None:
        if not batches or not all(len(clean) for clean, _, _ in batches):
            raise UnweaveError("there are no examples", remedy="give at least one batch, and no empty ones")
        self.lm, self.saes, self.options, self.gradients = lm, by_site_of(lm, saes), options, gradients
        skipped = 0
        if options.summed == "none":
            batches, skipped = of_one_length(batches)
        self.points = options.steps if options.method == "ig" else 1
        self.n = sum(len(clean) for clean, _, _ in batches)
        self.parts = Parts(keep)
        self.means: dict[Site, State] = {}
        if options.ablation == "mean":
            if any(patch is not None for _, patch, _ in batches):
                raise UnweaveError("pairs are patched, not ablated", where="ablation", remedy="leave ablation out")
            self.means = token_means(
                lm, self.saes, batches, skip_first=options.skip_first, max_tokens=options.max_tokens
            )
        self.pieces = self._pieces(batches)
        self.max_tokens = options.max_tokens  # as memory has allowed so far
        widths = [clean.ids.shape[1] for clean, _, _ in batches]
        self.about: dict[str, Any] = {
            "options": self._options(),
            "examples": self.n,
            "lengths": {"shortest": min(widths), "longest": max(widths)},
            "skipped": {"another length than the commonest": skipped} if skipped else {},
            "seconds": {},
            "memory": {"max_tokens": options.max_tokens},
        }
        if lm.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(lm.device)

    def _options(self) -> dict[str, Any]:
        metric_at = self.options.metric_at
        return asdict(self.options) | {"metric_at": None if metric_at is None else str(metric_at)}

    def _pieces(self, batches: Sequence[Batch]) -> list[tuple[str, Batch]]:
        """Pieces of batches, each with the name of its parts. In a folder these tell one question from another."""
        asked: Any = None
        if self.parts.folder is not None:
            options = {name: value for name, value in self._options().items() if name != "max_tokens"}
            digests = [[str(site), str(reads_of(sae, site)), sae.digest()] for site, sae in self.saes.items()]
            means = {
                f"{site}/{kind}": getattr(m, kind) for site, m in self.means.items() for kind in ("latents", "error")
            }
            asked = [options, self.gradients, self.lm.name, str(self.lm.dtype), digests, content_of(None, means)]
        found = []
        for number, batch in enumerate(batches):
            for start, stop in spans(batch, self.options.max_tokens // self.points):
                piece = rows_of(batch, slice(start, stop))
                found.append((f"{number}-{start}-{stop}{f'-{question_of(piece, asked)}' if asked else ''}", piece))
        return found

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
            for name, piece in self.pieces:
                found = self.parts.made(
                    f"nodes-{name}",
                    lambda piece=piece: self._piece_nodes(piece),
                    later="gradient" if self.gradients else None,
                )
                for site, part in by_site(found, "sum").items():
                    sums[site] = sums[site] + part if site in sums else part.double()
                for site, part in by_site(found, "total").items():
                    complete.add_sums(site, part)
                for kind in ("clean", "patch"):
                    if kind in found:
                        values[kind] = values.get(kind, 0.0) + float(found[kind].sum())
                shown.advance(len(piece[0]))
        nodes = {site: (total / self.n).float() for site, total in sums.items()}
        self._check(nodes)
        self.about["metric"] = {kind: total / self.n for kind, total in values.items()}
        self.about["completeness"] = complete.to_dict()
        self.about["incomplete"] = complete.warn() if self.options.method == "ig" else None
        self.about["above"] = _counts(nodes, self.options.node_threshold)
        self._close("nodes", began)
        return Circuit(nodes, {}, self.options.summed == "none", self.n, dict(self.about))

    def _piece_nodes(self, piece: Batch) -> Held:
        """Sums [P or 1, F + 1] over the piece's examples, gradients [B, P, D], and the metric's values [B]."""
        parts = self._halving(piece, lambda batch, _rows, max_tokens: self._nodes_of(batch, max_tokens))
        joined = {name: [part[name] for part in parts] for name in parts[0]}
        sums = {name: torch.stack(found).double().sum(0) for name, found in joined.items() if name.startswith("sum/")}
        totals = {name: torch.stack(found).sum(0) for name, found in joined.items() if name.startswith("total/")}
        rest = {name: torch.cat(found) for name, found in joined.items() if name not in sums and name not in totals}
        return {name: total.float() for name, total in sums.items()} | totals | rest

    def _nodes_of(self, batch: Batch, max_tokens: int) -> Held:
        o, (clean, patch, metric) = self.options, batch
        effects = node_effects(
            self.lm, self.saes, clean, self._end(patch), metric, method=o.method, steps=o.steps, rule=o.rule,
            positions=moved(clean, o.skip_first), metric_at=o.metric_at, max_tokens=max_tokens,
            measure=o.method != "attribution",  # of which nobody expects that it adds up
        )  # fmt: skip
        found: Held = {}
        for site in list(effects):
            one = effects.pop(site)  # the largest tensors there are: each is let go before the next is joined
            totals = sums_of(one)
            if totals is not None:
                found[f"total/{site}"] = totals
            slots = slots_of({site: one})[site]
            total = slots.sum((0, 1)).unsqueeze(0) if o.summed == "positions" else slots.sum(0)
            found[f"sum/{site}"] = total.cpu()
            if self.gradients:
                assert one.gradient is not None
                found[f"gradient/{site}"] = one.gradient.cpu()
        for kind, tokens in (("clean", clean), ("patch", patch)):
            if tokens is not None:
                found[kind] = (
                    metric_values(self.lm, tokens, metric, metric_at=o.metric_at, max_tokens=max_tokens).double().cpu()
                )
        return found

    def _check(self, nodes: Mapping[Site, Tensor]) -> None:
        for site, effects in nodes.items():
            bad = int((~torch.isfinite(effects)).sum())
            if bad:
                raise UnweaveError(
                    f"{bad} of {effects.numel()} effects are NaN or infinite",
                    where=str(site),
                    remedy="check the autoencoder there, the model and the metric",
                )
        if not any(bool(effects.any()) for effects in nodes.values()):
            raise UnweaveError(
                "no node changes the metric: clean and patch inputs are the same at every site, or it is constant",
                remedy="check the pairs and the metric",
            )

    # -- edges ----------------------------------------------------------------------------------------------------

    def with_edges(self, circuit: Circuit) -> Circuit:
        began = time.perf_counter()
        o = self.options
        upstream = None
        if o.upstream == "above":
            upstream = {site: (e.abs() > o.node_threshold).to(self.lm.device) for site, e in circuit.nodes.items()}
        limits = ""  # these depend on all pieces
        if self.parts.folder is not None:
            limits = "-" + content_of(None, upstream or {})
        merged: dict[tuple[Site, Site | None], Edges] = {}
        with task("edges", total=self.n, unit="examples") as shown:
            for name, piece in self.pieces:
                found = self.parts.made(
                    f"edges-{name}{limits}",
                    lambda name=name, piece=piece: _held(self._piece_edges(name, piece, upstream)),
                )
                merged = merge([merged, _edges(found)])
                shown.advance(len(piece[0]))
        edges = {pair: _mean(found, self.n, o.edge_threshold) for pair, found in merged.items()}
        edges = {pair: found for pair, found in edges.items() if len(found)}
        for pair, found in edges.items():
            if not bool(torch.isfinite(found.weight).all()):
                raise UnweaveError("weights of edges are NaN or infinite", where=" -> ".join(map(str, pair)))
        self.about["edges"] = {"found": sum(map(len, merged.values())), "kept": sum(map(len, edges.values()))}
        ends = Plan(self.lm, self.saes).ends
        if len(ends) > 1:
            self.about["edges_to_y"] = (
                f"total effects of {', '.join(map(str, ends))}: what one does through a later one counts at both"
            )
        self._close("edges", began)
        return Circuit(circuit.nodes, edges, circuit.positions, self.n, dict(self.about))

    def _piece_edges(
        self, name: str, piece: Batch, upstream: Mapping[Site, Tensor] | None
    ) -> dict[tuple[Site, Site | None], Edges]:
        held = self.parts.get(f"nodes-{name}", "gradient")
        assert held is not None
        gradients = by_site(held, "gradient")
        o = self.options

        def work(batch: Batch, rows: slice, max_tokens: int) -> dict[tuple[Site, Site | None], Edges]:
            clean, patch, _ = batch
            positions = moved(clean, o.skip_first)
            mine = {site: g[rows] for site, g in gradients.items()}
            end = self._end(patch)
            effects = EffectsAgain(self.lm, self.saes, clean, end, mine, positions, max_tokens)
            return edge_effects(
                self.lm, self.saes, clean, end, effects, threshold=o.node_threshold, positions=positions,
                max_tokens=max_tokens, summed=o.summed, upstream=upstream,
            )  # fmt: skip

        return merge(self._halving(piece, work))

    # -- memory and time ------------------------------------------------------------------------------------------

    def _halving(self, piece: Batch, work: Callable[[Batch, slice, int], _T]) -> list[_T]:
        """``work(examples, which rows, max_tokens)`` on all of a piece, in as large parts as memory has allowed so far.

        Passes hold fewer tokens where parts hold fewer examples: else points of a path would fill them up again. Where
        a single example does not fit, they hold no more than its own.
        """
        n, width = piece[0].ids.shape
        first = max(1, min(n, self.max_tokens // self.points // width))
        size, narrow = first, False

        def one(rows: slice) -> _T:
            nonlocal size
            if rows.stop < n:  # the last part may be small for want of examples
                size = min(size, rows.stop - rows.start)
            tokens = width if narrow else max(width, self.max_tokens * size // first)
            return work(rows_of(piece, rows), rows, tokens)

        def alone(rows: slice) -> _T:
            nonlocal narrow
            narrow = True
            return work(rows_of(piece, rows), rows, width)

        found, rows = halving(n, first, one, alone)
        if narrow:
            self.max_tokens = width
        elif rows < first:
            self.max_tokens = max(1, self.max_tokens * rows // first)
        return found

    def _close(self, part: str, began: float) -> None:
        self.about["seconds"][part] = round(time.perf_counter() - began, 2)
        self.about["memory"] |= {"max_tokens_used": self.max_tokens, "peak_gb": peak_memory_gb()}
        if self.lm.device.type == "cuda":
            self.about["memory"]["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated(self.lm.device) / 1e9, 2)


def _counts(nodes: Mapping[Site, Tensor], threshold: float) -> dict[str, Any]:
    """How many latents and errors are above the threshold: of all sites, and of each."""
    sites = {}
    for site, effects in nodes.items():
        above = effects.abs() > threshold
        sites[str(site)] = {"latents": int(above[:, :-1].sum()), "errors": int(above[:, -1].sum())}
    total = {kind: sum(found[kind] for found in sites.values()) for kind in ("latents", "errors")}
    return total | {"sites": sites}


def _mean(edges: Edges, n: int, threshold: float) -> Edges:
    """Means of sums over ``n`` examples, those above the threshold, the strongest first."""
    weight = edges.weight / n
    if threshold > 0:
        # Written so that NaN stays, and is found.
        strong = (~(weight.abs() <= threshold)).nonzero()[:, 0]
        edges, weight = Edges(edges.up[strong], edges.down[strong], edges.weight[strong]), weight[strong]
    order = weight.abs().argsort(descending=True, stable=True)
    return Edges(edges.up[order].cpu(), edges.down[order].cpu(), weight[order].float().cpu())


def _held(edges: Mapping[tuple[Site, Site | None], Edges]) -> Held:
    found: Held = {}
    for (up, down), entries in edges.items():
        name = f"{up} {down or Y}"
        found |= {f"up/{name}": entries.up, f"down/{name}": entries.down, f"weight/{name}": entries.weight}
    return found


def _edges(held: Held) -> dict[tuple[Site, Site | None], Edges]:
    found = {}
    for name in held:
        if name.startswith("weight/"):
            pair = name.removeprefix("weight/")
            up, _, down = pair.partition(" ")
            entries = Edges(held[f"up/{pair}"], held[f"down/{pair}"], held[name])
            found[Site.parse(up), None if down == Y else Site.parse(down)] = entries
    return found
