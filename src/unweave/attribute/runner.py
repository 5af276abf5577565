"""Passes of one batch of examples with a site set to given values: as few blocks as its values can reach.

1. Below the site a pass is the clean one. So it begins at the site (``lm.taps(start=...)``), or before the block that
   holds it; the clean residual stream there comes from the pass that the clean states are from.
2. What an MLP adds enters the stream and nothing else, and so does what attention adds where both stand in parallel:
   such a value x is set by beginning after the block with stream + (x - clean x).
3. Other sites inside a block are edited in a pass that begins before the block.
4. Logits are wanted at last tokens alone: in the last block other tokens need only their keys and values.
5. Rows fill batches of ``max_tokens`` tokens whatever they are: examples, points of a path, and sites whose passes
   begin at the same place.

Only the logits of last tokens are computed (of those that the metric reads, where it says so), or none where the metric
reads a site (``AtSite``): the pass ends there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unweave.attribute.states import chunks, values_of
from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.lm.model import LM, Tokens
from unweave.lm.shortcuts import last_tokens_only
from unweave.lm.taps import At, EditFn, Start
from unweave.lm.unembed import knows, unembed

Metric = Callable[[Tensor, Tensor], Tensor]
"""``metric(out [R, V], rows int64 [R]) -> [R]``: one number per row from the logits at its last token. ``rows`` says
which example of the batch each row is: methods run examples several times and in other groups. A metric may have an
attribute ``logits_read``, int64 [k]: the ids whose logits it reads. The others are then not computed, and NaN. One with
an attribute ``site`` reads that site's value [R, P, D] instead (``AtSite``)."""
Batch = tuple[Tokens, "Tokens | None", Metric]
"""clean tokens, patch tokens (None: ablation), metric"""


@dataclass(frozen=True)
class AtSite:
    """A metric of a site's value: ``of(value [R, P, D], rows [R]) -> [R]``."""

    of: Metric
    site: Site

    def __call__(self, out: Tensor, rows: Tensor) -> Tensor:
        return self.of(out, rows)


@dataclass(frozen=True)
class Beginning:
    """Where a pass begins that sets one site. ``stream`` is a residual site, ``embed``, or None: at the tokens.

    ``how`` the site is set: it "is" the stream there, it "adds" to it, or it is set by an "edit" on the way.
    """

    stream: Site | None
    how: Literal["is", "adds", "edit"]


@dataclass(frozen=True)
class Path:
    """The values x + alpha shift of a site: x, shift [N, P, D], of the examples ``rows`` int64 [N]."""

    site: Site
    x: Tensor
    shift: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Shifted:
    """A metric of some of a batch's examples, from number ``first`` on, that keep the numbers they have in it."""

    metric: Metric
    first: int

    @property
    def logits_read(self) -> Tensor | None:
        return getattr(self.metric, "logits_read", None)

    @property
    def site(self) -> Site | None:
        return getattr(self.metric, "site", None)

    def __call__(self, out: Tensor, rows: Tensor) -> Tensor:
        return self.metric(out, rows + self.first)


def rows_of(batch: Batch, rows: slice) -> Batch:
    """Some of a batch's examples; their metric still gets the numbers they have in the whole batch."""
    clean, patch, metric = batch
    return clean.rows(rows), None if patch is None else patch.rows(rows), Shifted(metric, rows.start)


class Runner:
    """Runs one batch of examples with a site set to given values, and evaluates the metric, within ``max_tokens``."""

    def __init__(self, lm: LM, tokens: Tokens, metric: Metric, max_tokens: int) -> None:
        self.lm, self.tokens, self.metric, self.max_tokens = lm, tokens, metric, max_tokens
        site: Site | None = getattr(metric, "site", None)
        self.metric_at = None if site is None else lm.site(site)
        self._clean: dict[Site, Tensor] = {}
        read: Tensor | None = getattr(metric, "logits_read", None)
        self._read = None if read is None else read.to(lm.device).unique()

    def chunks(self, n_rows: int) -> Iterator[slice]:
        """Slices of rows that fit into one pass."""
        return chunks(n_rows, self.tokens.ids.shape[1], self.max_tokens)

    @property
    def all_rows(self) -> Tensor:
        """0 to B - 1, int64 [B]."""
        return torch.arange(len(self.tokens), device=self.lm.device)

    # -- where passes begin ---------------------------------------------------------------------------------------

    def beginning(self, site: Site) -> Beginning:
        """Where a pass that sets ``site`` begins. Raises UnweaveError where the metric is read before the site."""
        end, n_layers = self.metric_at, self.lm.n_layers
        # Where a module path lies is not known from its name; other taps may need what lies below.
        if self.lm.sessions or "path" in (site.point, "" if end is None else end.point):
            return Beginning(None, "edit")
        if end is not None and end < site:
            raise UnweaveError(f"the metric does not depend on {site}", remedy=_BELOW)
        if site.point == "embed":
            return Beginning(site, "is")
        if site.layer is None:
            return Beginning(_before(n_layers), "edit")
        if site.point in ("resid_pre", "resid_post"):
            return Beginning(_before(site.layer + (site.point == "resid_post")), "is")
        if (end is None or end >= Site("resid_post", site.layer)) and self._only_adds(site):
            return Beginning(_before(site.layer + 1), "adds")
        return Beginning(_before(site.layer), "edit")

    def _only_adds(self, site: Site) -> bool:
        layout = self.lm.layout
        points = ("mlp_add", "attn_add") if layout.parallel else ("mlp_add",)
        return layout.tap(site) in [layout.tap(Site(point, site.layer)) for point in points]

    def needs(self, sites: Iterable[Site]) -> set[Site]:
        """The sites whose clean values passes that set ``sites`` begin with."""
        needed: set[Site] = set()
        for site in sites:
            begin = self.beginning(site)
            if begin.stream is not None and begin.how != "is":
                needed.add(begin.stream)
            if begin.how == "adds":
                needed.add(site)
        return needed

    @property
    def known(self) -> set[Site]:
        """The sites whose clean values are kept."""
        return set(self._clean)

    def know(self, values: Mapping[Site, Tensor]) -> None:
        """Keeps clean values [B, P, D] of sites that passes begin with."""
        self._clean.update(values)

    def clean_values(self, sites: Iterable[Site], read: Iterable[Site]) -> dict[Site, Tensor]:
        """The clean values of ``sites``, of those that passes which set them need (kept), and of ``read``."""
        sites = list(sites)
        needed = self.needs(sites)
        values = values_of(self.lm, {*sites, *needed, *read}, self.tokens, max_tokens=self.max_tokens)
        self.know({site: values[site] for site in needed})
        return values

    # -- passes ---------------------------------------------------------------------------------------------------

    def metric_of(
        self, rows: Tensor, edits: Mapping[Site, EditFn], grad: bool, start: Start | None = None, shortcut: bool = False
    ) -> Tensor:
        """The metric [R] of the examples ``rows`` [R] with edits in place, the pass begun at ``start``.

        ``shortcut`` leaves out what the logits do not need: for edits that look at nothing but shapes.
        Raises UnweaveError for a metric that is NaN or infinite, or not one number per row.
        """
        lm, whole = self.lm, self.tokens
        batch = Tokens(whole.ids[rows], whole.mask[rows], whole.roles[rows])
        with torch.set_grad_enabled(grad):
            if self.metric_at is not None:
                with lm.taps([self.metric_at], edits, self.metric_at, grad, start) as seen:
                    lm(batch)
                out = seen[self.metric_at]
            else:
                out = self._last_logits(batch, edits, grad, start, shortcut)
            value = self.metric(out.float() if out.dtype in (torch.bfloat16, torch.float16) else out, rows)
        if value.shape != rows.shape:
            remedy = "return one number per row: metric(out [R, V], rows [R]) -> [R]"
            raise UnweaveError(f"the metric gave shape {list(value.shape)} for {len(rows)} rows", remedy=remedy)
        bad = ~torch.isfinite(value.detach())
        if bool(bad.any()):
            what = f"the metric is NaN or infinite for {int(bad.sum())} of {len(rows)} rows"
            remedy = "check the metric, and the model on this text"
            raise UnweaveError(what, where=f"example {int(rows[bad][0])} of the batch", remedy=remedy)
        return value

    def _last_logits(
        self, batch: Tokens, edits: Mapping[Site, EditFn], grad: bool, start: Start | None, shortcut: bool
    ) -> Tensor:
        """Logits [R, V] at last tokens; NaN where the metric says that it does not read them."""
        lm, width = self.lm, batch.ids.shape[1]
        last = width - 1 - batch.mask.flip(1).int().argmax(1)
        rows = torch.arange(len(batch), device=last.device)
        if lm.sessions or any(site.point in ("logits", "path") for site in edits) or not knows(lm):
            keep = width - int(last.min())
            with lm.taps(edit=edits, grad=grad, start=start):
                logits = lm(batch, keep_logits=keep)
            assert logits is not None
            return logits[rows, last - (width - keep)]
        end = Site("final_norm")
        # Inside the last MLP a value would have one token a row, which is not what an edit there sets.
        less = shortcut and Site("mlp_act", lm.n_layers - 1) not in edits
        tokens_left_out = last_tokens_only(lm, last) if less else nullcontext()
        with tokens_left_out, lm.taps([end], edits, end, grad, start) as seen:
            lm(batch)
        hidden = seen[end][rows, last]
        if self._read is None:
            return unembed(lm, hidden)
        nothing = hidden.new_full((len(batch), lm.vocab_size), torch.nan)
        return nothing.index_copy(1, self._read, unembed(lm, hidden, self._read))

    def gradients(self, sites: Sequence[Site], also: Iterable[Site]) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
        """The metric's gradients [B, P, D] at ``sites`` on the clean run, from one pass, and the values there.

        Values come of the sites ``also`` too.
        """
        extra = set(also) - set(sites)
        gradients: dict[Site, list[Tensor]] = {site: [] for site in sites}
        values: dict[Site, list[Tensor]] = {site: [] for site in (*sites, *extra)}
        for part in self.chunks(len(self.tokens)):
            seen: dict[Site, Tensor] = {}

            def probe(x: Tensor, at: At, seen: dict[Site, Tensor] = seen) -> Tensor:
                # A node of its own, since the model may use the same tensor elsewhere too (the residual stream is also
                # the MLP's input in post-norm families); at the first site it is the leaf where the graph begins.
                seen[at.site] = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
                return seen[at.site]

            def look(x: Tensor, at: At, seen: dict[Site, Tensor] = seen) -> None:
                seen[at.site] = x

            edits = dict.fromkeys(extra, look) | dict.fromkeys(sites, probe)
            value = self.metric_of(self.all_rows[part], edits, grad=True)
            for site, g in zip(sites, _grad(value, [seen.get(s) for s in sites], sites), strict=True):
                gradients[site].append(g)
            missing = [str(site) for site in extra if site not in seen]
            if missing:
                raise UnweaveError(f"the metric does not depend on {', '.join(missing)}", remedy=_BELOW)
            for site in values:
                values[site].append(seen[site].detach())
        return _cat(gradients), _cat(values)

    def path_gradients(
        self, paths: Sequence[Path], alphas: Sequence[float], weights: Sequence[float] | None = None
    ) -> list[Tensor]:
        """For each path the mean over ``alphas`` of the metric's gradient at x + alpha shift, [N, P, D].

        ``weights`` are how much each point counts (by default all the same, adding up to 1). On each path only its own
        site moves. Paths that begin at the same place share batches; only one mean gradient per path and example is
        kept.
        """
        points = list(zip(alphas, weights or [1 / len(alphas)] * len(alphas), strict=True))
        means = [torch.zeros_like(path.x) for path in paths]
        by_start: dict[Site | None, list[int]] = {}
        for place, path in enumerate(paths):
            by_start.setdefault(self.beginning(path.site).stream, []).append(place)
        for places in by_start.values():
            sizes = [len(paths[place].rows) * len(points) for place in places]
            for part in self.chunks(sum(sizes)):
                self._points(paths, list(_segments(places, sizes, part)), points, means)
        return means

    def _points(
        self,
        paths: Sequence[Path],
        segments: Sequence[tuple[int, range]],
        points: Sequence[tuple[float, float]],
        means: list[Tensor],
    ) -> None:
        """Adds to ``means`` the weighted gradients at some points of some paths: by (path, numbers of its points)."""
        settings, leaves, shares = [], [], []
        for place, numbers in segments:
            path = paths[place]
            numbered = torch.arange(numbers.start, numbers.stop, device=path.x.device)
            here = numbered % len(path.rows)
            at = torch.tensor(points, dtype=path.x.dtype, device=path.x.device)[numbered // len(path.rows)]
            alpha, weight = at[:, :, None, None].unbind(1)
            leaves.append((path.x[here] + alpha * path.shift[here]).requires_grad_())
            settings.append((path.site, path.rows[here], leaves[-1]))
            shares.append((here, weight))
        value = self.with_sites(settings, grad=True)
        gradients = _grad(value, leaves, [site for site, _, _ in settings])
        for (place, _), (here, weight), g in zip(segments, shares, gradients, strict=True):
            means[place].index_add_(0, here, g * weight)

    def with_sites(self, settings: Sequence[tuple[Site, Tensor, Tensor]], grad: bool) -> Tensor:
        """The metric of rows, one after another: of each (site, examples int64 [n], value [n, P, D]) with it in place.

        All sites must begin at the same place; values pass their gradients on.
        """
        begins = [self.beginning(site) for site, _, _ in settings]
        edits: dict[Site, EditFn] = {}
        streams, first = [], 0
        for begin, (site, rows, value) in zip(begins, settings, strict=True):
            if begin.how == "edit":
                edits[site] = _put(value, first)
            if begin.how == "is":
                streams.append(value)
            elif begin.stream is not None:
                stream = self._clean[begin.stream][rows]
                adds = begin.how == "adds"
                streams.append(stream + (value - self._clean[site][rows]) if adds else stream.to(value.dtype))
            first += len(rows)
        where = begins[0].stream
        return self.metric_of(
            torch.cat([rows for _, rows, _ in settings]),
            edits,
            grad,
            None if where is None else (where, torch.cat(streams)),
            shortcut=True,
        )

    def values_at(self, site: Site, base: Tensor, changed: tuple[Tensor, Callable[[slice], Tensor]] | None) -> Tensor:
        """The metric [N] with the site at ``base`` [B, P, D]; or at ``base[rows] + shift(slice of rows)``, N rows."""
        rows = torch.arange(len(base), device=base.device) if changed is None else changed[0]
        values = [base.new_zeros(0)]
        for part in self.chunks(len(rows)):
            value = base[rows[part]] if changed is None else base[rows[part]] + changed[1](part)
            values.append(self.with_sites([(site, rows[part], value)], grad=False).to(base.dtype))
        return torch.cat(values)


_BELOW = "use sites that lie before what it reads"


def _before(block: int) -> Site:
    """The residual stream before a block, by the name under which a pass can begin there and read it."""
    return Site("resid_post", block - 1) if block else Site("resid_pre", 0)


def _put(value: Tensor, first: int) -> EditFn:
    """The edit that sets the rows from ``first`` on."""

    def edit(x: Tensor, _at: At) -> Tensor:
        new, last = value.to(x.dtype), first + len(value)
        return new if len(new) == len(x) else torch.cat([x[:first], new, x[last:]])

    return edit


def _segments(places: Sequence[int], sizes: Sequence[int], part: slice) -> Iterator[tuple[int, range]]:
    """What a slice of all points holds of each path: (path, numbers of its points)."""
    first = 0
    for place, size in zip(places, sizes, strict=True):
        start, stop = max(part.start - first, 0), min(part.stop - first, size)
        if start < stop:
            yield place, range(start, stop)
        first += size


def _grad(value: Tensor, at: Sequence[Tensor | None], sites: Sequence[Site]) -> list[Tensor]:
    reached = [x for x in at if x is not None]
    raw: Sequence[Tensor | None] = []
    if len(reached) == len(at) and value.requires_grad:
        raw = torch.autograd.grad(value.sum(), reached, allow_unused=True)
    gradients = [g for g in raw if g is not None]
    if len(gradients) < len(at):
        missing = [str(s) for s, g in zip(sites, raw or [None] * len(at), strict=True) if g is None]
        raise UnweaveError(f"the metric does not depend on {', '.join(missing)}", remedy=_BELOW)
    return gradients


def _cat(parts: Mapping[Site, list[Tensor]]) -> dict[Site, Tensor]:
    return {site: torch.cat(tensors) for site, tensors in parts.items()}
