"""A circuit: effects of nodes, weights of edges, and what they were measured on (Marks et al. 2024, sec. 3).

1. A node is a latent or the error of an SAE at one site; with positions kept, at one position of it. Its effect is how
   the metric changes when the node goes from its clean to its patch value.
2. An edge from an upstream to a downstream node is the part of the downstream node's effect that comes from the
   upstream node's change, along paths that touch no other node.
3. Everything is averaged over examples. ``above`` and ``edges_above`` tell what passes thresholds.

A slot numbers a site's nodes: slots 0 to F-1 are latents, slot F is the error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Self

from torch import Tensor

from unweave.circuits import stored
from unweave.circuits.about import About, Costs, Node, Supporting
from unweave.circuits.stored import ARROW, Y
from unweave.core.errors import UnweaveError
from unweave.core.memory import refuse_if_memory
from unweave.core.result import to_plain
from unweave.core.site import Site
from unweave.core.writing import atomic_write

VERSION = 3


@dataclass(frozen=True)
class Edges:
    """Edges between two sites. up and down int64 [E, 2], (position, slot), the position 0 where summed; weight [E].

    Where the downstream end is the metric, ``down`` is all zeros.
    """

    up: Tensor
    down: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return len(self.weight)


ByPair = dict[tuple[Site, Site | None], Edges]
"""by upstream and downstream site, None for the metric"""


def edge_tensors(edges: ByPair) -> dict[str, Tensor]:
    """Edges as named tensors, for files."""
    return {
        f"edges/{up}{ARROW}{down or Y}/{part}": getattr(of_pair, part)
        for (up, down), of_pair in edges.items()
        for part in ("up", "down", "weight")
    }


def edges_from(tensors: Mapping[str, Tensor]) -> ByPair:
    """What ``edge_tensors`` was given."""
    edges: ByPair = {}
    for name in tensors:
        if name.endswith("/weight"):
            start = name.removesuffix("/weight")
            up, _, down = start.removeprefix("edges/").partition(ARROW)
            ends = Site.parse(up), None if down == Y else Site.parse(down)
            edges[ends] = Edges(*(tensors[f"{start}/{part}"] for part in ("up", "down", "weight")))
    return edges


@dataclass(frozen=True, repr=False)
class Circuit:
    """Mean effects over ``n_examples`` examples.

    ``nodes`` {site: effects [P, F + 1]}, with P = 1 where effects were summed over positions (``positions`` is False).
    ``edges`` {(upstream site, downstream site or None for the metric): Edges}. ``about`` says what was asked and what
    was measured. ``costs`` are of the search that found it here, None for a circuit that was loaded.
    """

    nodes: dict[Site, Tensor]
    edges: ByPair
    positions: bool
    n_examples: int
    about: About = About()
    costs: Costs | None = None

    def __repr__(self) -> str:
        n_edges = sum(map(len, self.edges.values()))
        where = "at each position" if self.positions else "summed over positions"
        return f"Circuit({len(self.nodes)} sites {where}, {n_edges:,} edges, mean of {self.n_examples} examples)"

    def _repr_html_(self) -> str:
        """What a notebook shows: a picture of about 60 of its strongest nodes."""
        return import_module("unweave.circuits.draw").notebook_html(self)

    def above(self, threshold: float) -> list[Node]:
        """Nodes with |effect| above the threshold, site by site, each site's largest first."""
        nodes = []
        for site, effects in self.nodes.items():
            places = (effects.abs() > threshold).nonzero()
            order = effects[places.unbind(1)].abs().argsort(descending=True)
            last = effects.shape[1] - 1
            for position, slot in places[order].tolist():
                value = float(effects[position, slot])
                nodes.append(Node(site, slot, position if self.positions else None, value, slot == last))
        return nodes

    def counts(self, threshold: float) -> tuple[int, int]:
        """How many latents and how many errors are above a threshold."""
        nodes = self.above(threshold)
        errors = sum(node.is_error for node in nodes)
        return len(nodes) - errors, errors

    def edges_above(self, node_threshold: float, edge_threshold: float) -> list[tuple[Node, Node | None, float]]:
        """(upstream node, downstream node or None for the metric, weight): both ends and |weight| above thresholds."""
        nodes = {(n.site, n.position or 0, n.slot): n for n in self.above(node_threshold)}
        strong_edges = []
        for (up_site, down_site), edges in self.edges.items():
            strong = (edges.weight.abs() > edge_threshold).nonzero()[:, 0]
            rows = (part[strong].tolist() for part in (edges.up, edges.down, edges.weight))
            for up, down, weight in zip(*rows, strict=True):
                u = nodes.get((up_site, *up))
                d = None if down_site is None else nodes.get((down_site, *down))
                if u is not None and (down_site is None or d is not None):
                    strong_edges.append((u, d, weight))
        return strong_edges

    # -- storage --------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file. What finding it cost is left out: equal circuits have equal bytes."""
        from safetensors.torch import save_file

        tensors = {f"nodes/{site}": effects for site, effects in self.nodes.items()}
        tensors |= edge_tensors(self.edges)
        about = {"version": VERSION, "positions": self.positions, "n_examples": self.n_examples}
        about["about"] = to_plain(self.about)
        with atomic_write(Path(path)) as temporary:
            held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(held, temporary, {"unweave.circuit": json.dumps(about, ensure_ascii=False, allow_nan=False)})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what ``save`` wrote. UnweaveError when it is missing, damaged, no whole circuit or something else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as handle:
                metadata = handle.metadata() or {}
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a mapping)
            if "unweave.circuit" not in metadata:
                raise ValueError("it says nothing of a circuit")
            head = stored.header(metadata["unweave.circuit"], VERSION)
            nodes = stored.nodes_of(tensors, head["positions"])
            edges = {pair: Edges(*parts) for pair, parts in stored.edges_of(tensors, nodes).items()}
            return cls(nodes, edges, head["positions"], head["n_examples"], stored.about_of(head["about"]))
        except (OSError, SafetensorError, ValueError) as error:
            refuse_if_memory(error, path)
            raise UnweaveError(
                f"cannot read a circuit: {error}", where=str(path), remedy="give a circuit.safetensors, or make it anew"
            ) from error


def strongest(mean: Mapping[Site, Tensor], *, threshold: float = 0.0, top: int | None = None) -> list[Supporting]:
    """Latents (never errors) whose support is above ``threshold``, largest first; the ``top`` largest of them."""
    strong = [
        Supporting(site, latent, float(values[latent]))
        for site, values in mean.items()
        for latent in (values[:-1] > threshold).nonzero()[:, 0].tolist()
    ]
    return sorted(strong, key=lambda s: (-s.effect, s.site, s.latent))[:top]


def means(circuit: Circuit) -> dict[Site, Tensor]:
    """A circuit's support by slot, {site: [F + 1]}."""
    return {site: values[0] for site, values in circuit.nodes.items()}
