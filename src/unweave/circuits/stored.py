"""What a circuit's file must hold, looked at before it becomes a circuit; see ``graph.Circuit.load``.

    nodes/SITE                              effects, floats [P, F + 1]; P = 1 where they were summed over positions
    edges/SITE -> SITE|y/up, down, weight   int64 [E, 2], int64 [E, 2], floats [E]

All numbers are finite, and both ends of an edge are nodes that the file has. Raises ValueError, in words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unweave.circuits.about import About
from unweave.core.errors import UnweaveError
from unweave.core.files import parse_json
from unweave.core.result import from_plain
from unweave.core.site import Site

ARROW = " -> "
Y = "y"
"""the metric, as the downstream end of edges"""
_PARTS = ("up", "down", "weight")
_FORMS = {"version": int, "positions": bool, "n_examples": int, "about": dict}


def header(text: str, version: int) -> dict[str, Any]:
    """The plain values of a circuit: {version, positions, n_examples, about}."""
    try:
        head = parse_json(text, "its header")
    except UnweaveError as error:
        raise ValueError(f"its header is damaged: {error.what}") from error
    if not isinstance(head, dict) or set(head) != set(_FORMS):
        raise ValueError(f"its header must have {', '.join(_FORMS)} and nothing else")
    for name, form in _FORMS.items():
        if not isinstance(head[name], form) or (form is int and isinstance(head[name], bool)):
            raise ValueError(f"{name} is {str(head[name])[:60]!r} in its header, which is no {form.__name__}")
    if head["version"] != version:
        raise ValueError(f"written in version {head['version']}, this is version {version}")
    if head["n_examples"] < 1:
        raise ValueError(f"a mean of {head['n_examples']} examples is none")
    return head


def about_of(values: dict[str, Any]) -> About:
    """The circuit's description in the header."""
    try:
        return from_plain(About, values, "about")
    except UnweaveError as error:
        raise ValueError(f"in its header {error.where}: {error.what}") from error


def nodes_of(tensors: Mapping[str, Tensor], positions: bool) -> dict[Site, Tensor]:
    """Effects by site, in the order of the model."""
    nodes = {_site(name[6:], name): value for name, value in tensors.items() if name.startswith("nodes/")}
    if not nodes:
        raise ValueError("it has no nodes")
    rows = next(iter(nodes.values())).shape[:1]
    for site, effects in nodes.items():
        _floats(effects, f"nodes/{site}")
        if effects.ndim != 2 or effects.shape[0] < 1 or effects.shape[1] < 2:
            raise ValueError(f"nodes/{site} has shape {list(effects.shape)}, not [positions, latents + 1]")
        if effects.shape[:1] != rows or (not positions and effects.shape[0] != 1):
            wanted = f"{rows[0]} as elsewhere" if positions else "1, as effects are summed over positions"
            raise ValueError(f"nodes/{site} has {effects.shape[0]} positions, not {wanted}")
    return dict(sorted(nodes.items()))


def edges_of(
    tensors: Mapping[str, Tensor], nodes: Mapping[Site, Tensor]
) -> dict[tuple[Site, Site | None], tuple[Tensor, Tensor, Tensor]]:
    """(up, down, weight) by pair of sites, in the order of the model; the metric last."""
    parts_of: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition("/")
        pair, _, part = rest.rpartition("/")
        if kind == "edges" and ARROW in pair and part in _PARTS:
            parts_of.setdefault(pair, {})[part] = value
        elif kind != "nodes":
            raise ValueError(f"it has a tensor {name!r}, which no circuit has")
    edges = {}
    for pair, parts in parts_of.items():
        if missing := [part for part in _PARTS if part not in parts]:
            raise ValueError(f"edges/{pair} lacks {', '.join(missing)}")
        first, _, second = pair.partition(ARROW)
        up, down = _site(first, pair), None if second == Y else _site(second, pair)
        if down is not None and not up < down:
            raise ValueError(f"edges/{pair} does not lead from an earlier site to a later one")
        for site in (up, down):
            if site is not None and site not in nodes:
                raise ValueError(f"edges/{pair} lies at {site}, where the file has no nodes")
        edges[up, down] = _checked(pair, parts, nodes[up], None if down is None else nodes[down])
    return dict(sorted(edges.items(), key=lambda item: (item[0][1] is None, item[0][1] or item[0][0], item[0][0])))


def _checked(pair: str, parts: Mapping[str, Tensor], up: Tensor, down: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    weight = parts["weight"]
    _floats(weight, f"edges/{pair}/weight")
    if weight.ndim != 1:
        raise ValueError(f"edges/{pair}/weight has shape {list(weight.shape)}, not [edges]")
    for part, effects in (("up", up), ("down", down)):
        ends, name = parts[part], f"edges/{pair}/{part}"
        if ends.dtype != torch.int64 or ends.shape != (len(weight), 2):
            raise ValueError(f"{name} is {ends.dtype} {list(ends.shape)}, not int64 [{len(weight)}, 2]")
        limits = ends.new_tensor((1, 1) if effects is None else effects.shape)
        bad = ((ends < 0) | (ends >= limits)).any(1).nonzero().flatten()
        if len(bad):
            position, slot = ends[bad[0]].tolist()
            raise ValueError(f"{name} names position {position}, slot {slot}: there is no such node")
    both = torch.cat([parts["up"], parts["down"]], 1)
    if len(both.unique(dim=0)) != len(both):
        raise ValueError(f"edges/{pair} has an edge twice")
    return parts["up"], parts["down"], weight


def _floats(values: Tensor, name: str) -> None:
    if not values.is_floating_point():
        raise ValueError(f"{name} holds {values.dtype}, not floats")
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name} holds NaN or infinity")


def _site(text: str, name: str) -> Site:
    try:
        site = Site.parse(text)
    except UnweaveError as error:
        raise ValueError(f"in {name!r}: {error.what}") from error
    if str(site) != text:
        raise ValueError(f"in {name!r}: a site is written {site}")
    return site
