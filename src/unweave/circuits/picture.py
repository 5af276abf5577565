"""Where everything in the picture of a circuit stands: pure geometry, in pixels, y growing downwards.

1. Sites are bands from the bottom up, token positions are columns; a circuit that was summed over positions has one.
2. The nodes of a band and column are a cell. A cell of many nodes is wrapped into rows; how wide is chosen so that the
   whole picture is neither a tower nor a ribbon.
3. Sweeps up and down put every node at the mean place of its neighbours, and the order with fewest crossings is kept.
4. An edge leaves at a node's top and enters at the bottom; past the rows of its own cells it runs between the nodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from unweave.circuits.about import Node
from unweave.circuits.graph import Circuit
from unweave.core.errors import UnweaveError
from unweave.core.site import Site

GAP_X, GAP_ROW, GAP_BAND = 18.0, 24.0, 50.0
LEFT, RIGHT, TOP, BOTTOM = 104.0, 16.0, 12.0, 44.0
EMPTY_COLUMN = 76.0
DIAMOND = 17.0
_SWEEPS = 12
_SHOWN_POSITIONS = 24
_EDGES_A_NODE = 2.5

Edge = tuple[int, int | None, float]
"""Numbers of the upstream and the downstream node (None: the metric) and the weight."""


@dataclass(frozen=True)
class Selection:
    """What is drawn: the strongest nodes above the threshold, and the edges between them."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    nodes_left_out: int
    """Above the threshold, but more than were to be drawn; the weakest."""
    edges_left_out: int

    @property
    def largest(self) -> tuple[float, float]:
        """The largest |effect| and the largest |weight|, at least a tiny number."""
        tiny = 1e-30
        return (
            max((abs(node.effect) for node in self.nodes), default=tiny),
            max((abs(weight) for _, _, weight in self.edges), default=tiny),
        )


@dataclass(frozen=True)
class Band:
    """One site's stretch from ``top`` to ``bottom``."""

    site: Site
    top: float
    bottom: float


@dataclass(frozen=True)
class Column:
    """One token position's stretch from ``left`` to ``right``; ``position`` None where positions were summed."""

    position: int | None
    left: float
    right: float


@dataclass(frozen=True)
class Layout:
    """Centres (x, y) of the nodes, bands and columns, the paths of the edges, and the whole's size."""

    width: float
    height: float
    node_width: float
    node_height: float
    places: tuple[tuple[float, float], ...]
    metric: tuple[float, float]
    bands: tuple[Band, ...]
    columns: tuple[Column, ...]
    paths: tuple[str, ...]
    """One SVG path per edge, in the order of the selection."""


def select(
    circuit: Circuit, node_threshold: float, edge_threshold: float, max_nodes: int = 150, max_edges: int = 500
) -> Selection:
    """The nodes and edges to draw. UnweaveError where no node is above the threshold."""
    for name, value in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not (math.isfinite(value) and value >= 0):
            raise UnweaveError(f"{name} is {value}", where="draw", remedy="give a number of 0 or more")
    if max_nodes < 1 or max_edges < 0:
        raise UnweaveError(f"{max_nodes} nodes and {max_edges} edges cannot be drawn", where="draw")
    above = circuit.above(node_threshold)
    if not above:
        largest = max((float(effects.abs().max()) for effects in circuit.nodes.values() if effects.numel()), default=0)
        remedy = f"the largest is {largest:.3g}: give a lower node_threshold"
        raise UnweaveError(f"no node's effect is above {node_threshold:g}", where="draw", remedy=remedy)
    strongest = sorted(above, key=lambda node: -abs(node.effect))[:max_nodes]
    nodes = sorted(strongest, key=lambda node: (node.site, node.position or 0, -abs(node.effect), node.slot))
    number = {(node.site, node.position, node.slot): i for i, node in enumerate(nodes)}
    edges: list[Edge] = []
    missing = 0
    for up, down, weight in circuit.edges_above(node_threshold, edge_threshold):
        u = number.get((up.site, up.position, up.slot))
        d = None if down is None else number.get((down.site, down.position, down.slot))
        if u is None or (down is not None and d is None):
            missing += 1
        else:
            edges.append((u, d, weight))
    edges.sort(key=lambda edge: -abs(edge[2]))
    left = missing + max(0, len(edges) - max_edges)
    return Selection(tuple(nodes), tuple(edges[:max_edges]), len(above) - len(nodes), left)


def threshold_for(circuit: Circuit, n_nodes: int = 60) -> float:
    """The threshold above which about ``n_nodes`` nodes remain; 0 where there are no more than that."""
    effects = [effects.detach().cpu().double().abs().ravel() for effects in circuit.nodes.values()]
    return _threshold(torch.cat(effects).numpy(), n_nodes)


def edge_threshold_for(circuit: Circuit, node_threshold: float, n_edges: int = 150) -> float:
    """The threshold above which about ``n_edges`` edges remain between the nodes above theirs; 0 for no more."""
    return _threshold(np.abs([weight for _, _, weight in circuit.edges_above(node_threshold, 0.0)]), n_edges)


def _threshold(sizes: np.ndarray, n: int) -> float:
    """Between the n-th and the next of the largest sizes; 0 where no more than n are above it."""
    ordered = -np.sort(-sizes[sizes > 0])
    return 0.0 if len(ordered) <= n else float(ordered[n - 1 : n + 1].mean())


Why = Literal["asked", "own", "count"]
"""Where a node threshold comes from: the caller, the circuit's search, or the number of nodes to draw."""


@dataclass(frozen=True)
class Thresholds:
    """Above which |effect| nodes, and above which |weight| edges, are drawn."""

    node: float
    edge: float
    why: Why


def thresholds(
    circuit: Circuit,
    nodes: int = 60,
    max_nodes: int = 150,
    *,
    node_threshold: float | None = None,
    edge_threshold: float | None = None,
) -> Thresholds:
    """What to draw: about ``nodes`` nodes, but none below the threshold that edges were looked for with, and about 2.5
    edges for each; or the thresholds that are given."""
    search = circuit.about.search
    if node_threshold is not None:
        node, why = node_threshold, "asked"
    else:
        node, why = threshold_for(circuit, nodes), "count"
        own = search.options.node_threshold if search is not None and circuit.edges else 0.0
        if own > node and circuit.above(own):
            node, why = own, "own"
    edge = edge_threshold
    if edge is None:
        edge = edge_threshold_for(circuit, node, round(_EDGES_A_NODE * min(len(circuit.above(node)), max_nodes)))
        edge = max(edge, search.options.edge_threshold if search is not None else 0.0)  # weaker ones were never kept
    return Thresholds(node, edge, why)


def place(circuit: Circuit, selection: Selection, node_width: float = 128.0, node_height: float = 34.0) -> Layout:
    """Puts nodes, bands, columns and edges of a selection on a page."""
    columns = _columns(circuit, selection)
    cells = _cells(selection, columns)
    wrap = min(range(1, 17), key=lambda n: _misfit(cells, len(columns), n, node_width, node_height))
    grid = _Grid(selection, cells, columns, wrap, node_width, node_height)
    best = grid.places()
    fewest = _crossings(selection.edges, best, grid.metric)
    for sweep in range(_SWEEPS):
        grid.sweep(upwards=sweep % 2 == 0)
        places = grid.places()
        if (count := _crossings(selection.edges, places, grid.metric)) < fewest:
            best, fewest = places, count
    grid.settle(best)
    return Layout(
        width=grid.width,
        height=grid.height,
        node_width=node_width,
        node_height=node_height,
        places=tuple(best),
        metric=grid.metric,
        bands=tuple(grid.bands),
        columns=tuple(grid.columns),
        paths=tuple(grid.path(i, edge) for i, edge in enumerate(selection.edges)),
    )


_Cells = dict[tuple[Site, int], list[int]]
"""{(site, number of the column): nodes}"""


def _columns(circuit: Circuit, selection: Selection) -> list[int | None]:
    """All positions where they are few, else those with nodes."""
    if not circuit.positions:
        return [None]
    n_positions = max(effects.shape[0] for effects in circuit.nodes.values())
    used = sorted({node.position or 0 for node in selection.nodes})
    return list(range(n_positions)) if n_positions <= _SHOWN_POSITIONS else [*used]


def _cells(selection: Selection, columns: Sequence[int | None]) -> _Cells:
    number = {position: c for c, position in enumerate(columns)}
    cells: _Cells = {}
    for i, node in enumerate(selection.nodes):
        cells.setdefault((node.site, number[node.position]), []).append(i)
    return cells


def _size(cells: _Cells, n_columns: int, wrap: int, node_width: float) -> tuple[list[float], dict[Site, int]]:
    """Each column's width and each band's rows when at most ``wrap`` nodes stand side by side."""
    widths = [EMPTY_COLUMN] * n_columns
    rows: dict[Site, int] = {}
    for (site, column), nodes in cells.items():
        n_rows = math.ceil(len(nodes) / wrap)
        across = math.ceil(len(nodes) / n_rows)
        widths[column] = max(widths[column], across * (node_width + GAP_X) + GAP_X)
        rows[site] = max(rows.get(site, 0), n_rows)
    return widths, rows


def _misfit(cells: _Cells, n_columns: int, wrap: int, node_width: float, node_height: float) -> float:
    widths, rows = _size(cells, n_columns, wrap, node_width)
    height = sum(n * (node_height + GAP_ROW) for n in rows.values()) + len(rows) * GAP_BAND
    return abs(math.log(sum(widths) / height))


class _Grid:
    """Cells, the order of nodes in each, and what follows from it."""

    def __init__(
        self, selection: Selection, cells: _Cells, columns: Sequence[int | None], wrap: int, width: float, height: float
    ) -> None:
        self.selection, self.cells, self.wrap = selection, cells, wrap
        self.node_width, self.node_height, self.pitch = width, height, width + GAP_X
        widths, rows = _size(cells, len(columns), wrap, width)
        edges_of_columns = np.cumsum([LEFT, *widths])
        self.columns = [
            Column(position, float(a), float(b))
            for position, a, b in zip(columns, edges_of_columns[:-1], edges_of_columns[1:], strict=True)
        ]
        self.width = float(edges_of_columns[-1]) + RIGHT
        self.bands: list[Band] = []
        top = TOP + 2 * DIAMOND + GAP_BAND
        for site in sorted(rows, reverse=True):
            bottom = top + rows[site] * (height + GAP_ROW) - GAP_ROW
            self.bands.append(Band(site, top, bottom))
            top = bottom + GAP_BAND
        self.height = top - GAP_BAND + BOTTOM
        last = self.columns[-1]
        self.metric = ((last.left + last.right) / 2, TOP + DIAMOND)
        self.band_of = {band.site: band for band in self.bands}
        self.neighbours: dict[bool, list[list[tuple[int | None, float]]]] = {
            side: [[] for _ in selection.nodes] for side in (True, False)
        }
        for u, d, weight in selection.edges:
            self.neighbours[False][u].append((d, abs(weight)))
            if d is not None:
                self.neighbours[True][d].append((u, abs(weight)))
        self._place: list[tuple[float, float]] = [(0.0, 0.0)] * len(selection.nodes)
        self._own_rows: dict[int, tuple[float, float]] = {}  # the highest and the lowest node of each node's own stack
        for cell in cells:
            self._fill(cell)

    def places(self) -> list[tuple[float, float]]:
        return list(self._place)

    def settle(self, places: list[tuple[float, float]]) -> None:
        """Keeps these places, and notes which nodes stand right above or below which."""
        self._place = list(places)
        for nodes in self.cells.values():
            stacks: dict[float, list[float]] = {}
            for node in nodes:
                stacks.setdefault(places[node][0], []).append(places[node][1])
            self._own_rows |= {i: (min(ys), max(ys)) for i in nodes for ys in [stacks[places[i][0]]]}

    def _fill(self, cell: tuple[Site, int]) -> None:
        """Gives the nodes of a cell their places, in their order: column by column, so that order is left to right."""
        site, column = cell
        nodes, band = self.cells[cell], self.band_of[site]
        n_rows = math.ceil(len(nodes) / self.wrap)
        across = math.ceil(len(nodes) / n_rows)
        middle = (self.columns[column].left + self.columns[column].right) / 2
        spare = (band.bottom - band.top + GAP_ROW) - n_rows * (self.node_height + GAP_ROW)
        for k, node in enumerate(nodes):
            x = middle + (k // n_rows - (across - 1) / 2) * self.pitch
            y = band.bottom - spare / 2 - (k % n_rows) * (self.node_height + GAP_ROW) - self.node_height / 2
            self._place[node] = (x, y)

    def sweep(self, *, upwards: bool) -> None:
        """Every cell in the order of its nodes' neighbours below (going up) or above."""
        for cell in sorted(self.cells, key=lambda cell: cell[0], reverse=not upwards):
            if len(self.cells[cell]) > 1:
                self.cells[cell].sort(key=lambda node: (self._pull(node, upwards), node))
                self._fill(cell)

    def _pull(self, node: int, upwards: bool) -> float:
        near = self.neighbours[upwards][node]
        total = sum(weight for _, weight in near)
        if not total:
            return self._place[node][0]
        return sum(weight * (self.metric if i is None else self._place[i])[0] for i, weight in near) / total

    def path(self, number: int, edge: Edge) -> str:
        """The edge's way: up from its node, between the rows above in its cell, over, and the same at its end."""
        u, d, _ = edge
        x1, y1 = self._place[u]
        y1 -= self.node_height / 2
        x2, y2 = self.metric if d is None else self._place[d]
        y2 += DIAMOND if d is None else self.node_height / 2
        spread = ((number * 7) % 11 - 5) / 5 * GAP_X * 0.3
        start, out = self._lane(u, x1, y1, x2, spread, leaving=True)
        end, back = ([], (x2, y2)) if d is None else self._lane(d, x2, y2, x1, spread, leaving=False)
        reach = max(16.0, 0.48 * (out[1] - back[1]))
        curve = f"C{out[0]:.1f} {out[1] - reach:.1f} {back[0]:.1f} {back[1] + reach:.1f} {back[0]:.1f} {back[1]:.1f}"
        return " ".join([f"M{x1:.1f} {y1:.1f}", *start, curve, *reversed(end)])

    def _lane(
        self, node: int, x: float, y: float, towards: float, spread: float, *, leaving: bool
    ) -> tuple[list[str], tuple[float, float]]:
        """Path pieces between a node and the edge of its band, and the point there; none with nothing between."""
        band = self.band_of[self.selection.nodes[node].site]
        goal = band.top if leaving else band.bottom
        highest, lowest = self._own_rows[node]
        if self._place[node][1] == (highest if leaving else lowest):
            return [], (x, y)
        lane = x + (self.pitch / 2 if towards >= x else -self.pitch / 2) + spread
        near = y - GAP_ROW * 0.9 if leaving else y + GAP_ROW * 0.9
        half = (y + near) / 2
        if leaving:
            return [f"C{x:.1f} {half:.1f} {lane:.1f} {half:.1f} {lane:.1f} {near:.1f}", f"V{goal:.1f}"], (lane, goal)
        return [f"C{lane:.1f} {half:.1f} {x:.1f} {half:.1f} {x:.1f} {y:.1f}", f"V{near:.1f}"], (lane, goal)


def _crossings(edges: Sequence[Edge], places: Sequence[tuple[float, float]], metric: tuple[float, float]) -> int:
    """How many pairs of edges cross, each taken as a straight line."""
    if len(edges) < 2:
        return 0
    a = np.array([places[u] for u, _, _ in edges])
    b = np.array([metric if d is None else places[d] for _, d, _ in edges])

    def side(p: np.ndarray, q: np.ndarray, r: np.ndarray) -> np.ndarray:
        """For every pair of edges (row: the line p q, column: the point r), on which side the point lies."""
        (px, py), (qx, qy), (rx, ry) = p.T[:, :, None], q.T[:, :, None], r.T[:, None, :]
        return np.sign((qx - px) * (ry - py) - (qy - py) * (rx - px))

    apart = side(a, b, a) * side(a, b, b) < 0
    return int((apart & apart.T).sum()) // 2
