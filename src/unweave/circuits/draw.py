"""A circuit as a picture (SVG) and as plain values, in the manner of Marks et al. 2024, figs. 3 and 12.

Layers go up, from the embedding to the metric, a diamond; token positions stand side by side where they were kept.
Rectangles are latents and triangles are errors, what an SAE leaves unexplained. Blue is a positive and red a
negative effect or weight, stronger as it is larger; negative edges are dashed too, so that print without colour shows
them. A latent is labelled with its annotation, where there is one, else with its site and number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from unweave.circuits.graph import Circuit, Node, Y
from unweave.circuits.picture import DIAMOND, Layout, Selection, place, select, thresholds
from unweave.core.result import to_plain
from unweave.latents.annotations import Annotation, name_of
from unweave.show.pieces import counted, esc, number, visible

POSITIVE, NEGATIVE = (33, 102, 172), (178, 24, 43)
_INK, _SOFT, _LINE, _BAND, _PAPER = "#1e2124", "#5a5e63", "#d9d5cc", "#f5f3ee", "#ffffff"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_ROOM = 118.0
"""How much of a node's width is for its label, pixels."""
_WIDE, _NARROW = "mwMWOQ@%&\u2026", "iljtfrI.,:;'|!()[] "
_HEAD, _FOOT = 66.0, 74.0


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What is drawn of a circuit, and what is written on it.

    Drawn are nodes of |effect| and edges of |weight| above the thresholds, at most ``max_nodes`` and ``max_edges``, the
    strongest; the picture says how many that leaves out. ``tokens`` (by default the circuit's own, ``about.tokens``)
    label the columns.
    """

    circuit: Circuit
    node_threshold: float
    edge_threshold: float
    annotations: Mapping[str, Annotation] = field(default_factory=dict)
    tokens: Sequence[str] | None = None
    title: str | None = None
    max_nodes: int = 150
    max_edges: int = 500

    @cached_property
    def selection(self) -> Selection:
        """UnweaveError where nothing is above the threshold, or a threshold is no number of 0 or more."""
        return select(self.circuit, self.node_threshold, self.edge_threshold, self.max_nodes, self.max_edges)

    @property
    def name(self) -> str:
        """The title, else the circuit's task."""
        return self.title or self.circuit.about.task or "Circuit"

    @property
    def columns(self) -> Sequence[str]:
        """The words over the columns; empty without any, or without columns."""
        return (self.circuit.about.tokens if self.tokens is None else self.tokens) if self.circuit.positions else ()

    def token(self, position: int | None) -> str | None:
        """The word over a column, where it is known."""
        return None if position is None or position >= len(self.columns) else self.columns[position]

    def note(self, node: Node) -> Annotation | None:
        """What was written about a node."""
        return self.annotations.get(key_of(node))

    def words(self, node: Node) -> str:
        """The annotation's text; empty without one."""
        note = self.note(node)
        return "" if note is None else note.annotation.strip()

    @property
    def summary(self) -> str:
        """What the picture holds and what it leaves out, in words."""
        shown = self.selection
        errors = sum(node.is_error for node in shown.nodes)
        text = (
            f"{counted(len(shown.nodes) - errors, 'latent')} and {counted(errors, 'error')} with |effect| above "
            f"{self.node_threshold:.3g}, {counted(len(shown.edges), 'edge')} with |weight| above "
            f"{self.edge_threshold:.3g}; mean of {counted(self.circuit.n_examples, 'example')}."
        )
        left = {"weaker node": shown.nodes_left_out, "weaker edge": shown.edges_left_out}
        words = " and ".join(counted(n, noun) for noun, n in left.items() if n)
        return text + (f" Left out for want of room: {words}." if words else "")


def key_of(node: Node) -> str:
    """The node's name among annotations: without its position."""
    return name_of(node.site, None if node.is_error else node.slot)


def to_json(picture: Picture) -> dict[str, Any]:
    """Every node and edge above the thresholds as plain values, strongest first, ready for JSON.

    Nodes have a ``name`` that edges refer to; ``"y"`` is the metric. ``about`` describes the circuit.
    """
    circuit, least = picture.circuit, picture.node_threshold
    nodes = sorted(circuit.above(least), key=lambda node: -abs(node.effect))
    edges = sorted(circuit.edges_above(least, picture.edge_threshold), key=lambda edge: -abs(edge[2]))
    return {
        "format": 2,
        "positions": circuit.positions,
        "tokens": list(picture.columns) or None,
        "n_examples": circuit.n_examples,
        "node_threshold": least,
        "edge_threshold": picture.edge_threshold,
        "sites": [str(site) for site in circuit.nodes],
        "nodes": [_node_values(node, picture) for node in nodes],
        "edges": [{"from": up.name, "to": Y if down is None else down.name, "weight": w} for up, down, w in edges],
        "about": to_plain(circuit.about),
    }


def notebook_html(circuit: Circuit) -> str:
    """A circuit in a notebook: what it is, and a picture of about 60 of its strongest nodes."""
    heading = f"<p>{esc(repr(circuit))}</p>"
    if not circuit.above(0.0):
        return heading
    limits = thresholds(circuit)
    return heading + draw_svg(Picture(circuit=circuit, node_threshold=limits.node, edge_threshold=limits.edge))


def draw_svg(picture: Picture, link: str = "") -> str:
    """The picture as one SVG document that stands on its own and loads nothing.

    With ``link`` a node links to ``#<link><its number>``, and the title is left to the page around. UnweaveError where
    nothing is above the threshold, or a threshold is no number of 0 or more.
    """
    selection = picture.selection
    tall = any(_length(picture.words(node), 11) > _ROOM for node in selection.nodes)
    layout = place(picture.circuit, selection, node_height=48.0 if tall else 34.0)
    head = 8.0 if link else _HEAD
    width = max(layout.width, 560.0)
    height = layout.height + head + _FOOT
    name, summary = picture.name, picture.summary
    shift = (width - layout.width) / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="{_FONT}" role="{"group" if link else "img"}" '
        f'aria-label="{_esc(name)}. {_esc(summary)}">',
        f'<rect width="100%" height="100%" fill="{_PAPER}"/>',
        "" if link else _heading(name, summary, width),
        f'<g transform="translate({shift:.1f} {head:.0f})">',
        _ground(layout, picture),
        '<g fill="none" stroke-linecap="round">',
        *_edges(selection, layout),
        "</g>",
        _metric(layout),
        *(_node(i, picture, layout, link) for i in range(len(selection.nodes))),
        "</g>",
        _legend(selection, height - _FOOT, width),
        "</svg>",
    ]
    return "".join(parts)


_NOT_XML = dict.fromkeys((*range(9), 11, 12, *range(14, 32), 0xFFFE, 0xFFFF), "\ufffd")


def _esc(text: str) -> str:
    """A text inside an element or attribute of an XML document, in which control characters have no place at all."""
    return esc(text.translate(_NOT_XML))


def _node_values(node: Node, picture: Picture) -> dict[str, Any]:
    note = picture.note(node)
    values: dict[str, Any] = {
        "name": node.name,
        "site": str(node.site),
        "latent": None if node.is_error else node.slot,
        "error": node.is_error,
        "position": node.position,
        "token": picture.token(node.position),
        "effect": node.effect,
    }
    fields = ("annotation", "notes", "interpretability", "complexity", "relevant")
    return values | {name: getattr(note, name, None) for name in fields}


def _shade(value: float, largest: float) -> tuple[str, str]:
    """The fill for a value, and black or white for what is written on it."""
    strength = 0.10 + 0.90 * min(1.0, abs(value) / largest)
    full = POSITIVE if value > 0 else NEGATIVE
    mixed = [round(255 + (c - 255) * strength) for c in full]
    light = 0.299 * mixed[0] + 0.587 * mixed[1] + 0.114 * mixed[2]
    return _hex(mixed), _INK if light > 140 else "#ffffff"


def _hex(colour: Sequence[int]) -> str:
    return "#" + "".join(f"{c:02x}" for c in colour)


def _text(
    x: float, y: float, text: str, size: float, fill: str = _INK, anchor: str = "middle", weight: int = 400
) -> str:
    heavy = f' font-weight="{weight}"' if weight != 400 else ""
    where = f'x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" text-anchor="{anchor}"'
    return f'<text {where} fill="{fill}"{heavy}>{_esc(text)}</text>'


def _length(text: str, size: float) -> float:
    """About how many pixels a text is wide, rather too many, since the reader's font is not known."""
    letters = (0.92 if c in _WIDE else 0.40 if c in _NARROW else 0.72 if c.isupper() else 0.62 for c in text)
    return size * sum(letters)


def _cut(text: str, room: float, size: float) -> str:
    """As much of a text as there is room for."""
    if _length(text, size) <= room:
        return text
    length = next((n for n in range(len(text), 0, -1) if _length(text[:n] + "\u2026", size) <= room), 1)
    return text[:length].rstrip() + "\u2026"


def _wrapped(text: str, room: float, size: float) -> list[str]:
    """A text on two lines at most."""
    words, line = text.split(), ""
    while words and (not line or _length(f"{line} {words[0]}", size) <= room):
        line = f"{line} {words.pop(0)}".strip()
    return [_cut(line, room, size)] + ([_cut(" ".join(words), room, size)] if words else [])


def _heading(name: str, summary: str, width: float) -> str:
    """Title and counts; the latter on two lines where the picture is narrow."""
    room = width - 48
    title = _text(24, 28, _cut(name, room, 16), 16, weight=600, anchor="start")
    lines = _wrapped(summary, room, 11.5)
    rows = "".join(_text(24, 46 + 14 * k, line, 11.5, _SOFT, "start") for k, line in enumerate(lines))
    return f"<g><title>{_esc(name)}</title>{title}</g><g><title>{_esc(summary)}</title>{rows}</g>"


def _column(token: str) -> str:
    """A token's name above its column: "..." where it holds only the rest of a character that began before it."""
    return visible(token.strip() or " ") if token else "\u2026"


def _ground(layout: Layout, picture: Picture) -> str:
    """Bands with the names of their sites, columns with their tokens."""
    parts = []
    for k, band in enumerate(layout.bands):
        top, bottom = band.top - 14, band.bottom + 14
        if k % 2 == 0:
            parts.append(
                f'<rect x="0" y="{top:.1f}" width="{layout.width:.1f}" height="{bottom - top:.1f}" fill="{_BAND}"/>'
            )
        middle = (band.top + band.bottom) / 2 + 4
        parts.append(_text(12, middle, _cut(str(band.site), 92, 12), 12, _SOFT, "start", 600))
    for k, column in enumerate(layout.columns):
        if k:
            way = f"M{column.left:.1f} {layout.bands[0].top - 24:.1f}V{layout.height - 26:.1f}"
            parts.append(f'<path d="{way}" stroke="{_LINE}" stroke-dasharray="2 4"/>')
        if column.position is None:
            continue
        token = picture.token(column.position)
        label = f"{column.position}" if token is None else _column(token)
        note = f"position {column.position}" + ("" if token is None else f": {token!r}")
        middle = (column.left + column.right) / 2
        text = _text(middle, layout.height - 8, _cut(label, column.right - column.left - 8, 13), 13, weight=600)
        parts.append(f"<g><title>{_esc(note)}</title>{text}</g>")
    return "".join(parts)


def _edges(selection: Selection, layout: Layout) -> list[str]:
    """Weakest first, so that the strongest lie on top."""
    largest = selection.largest[1]
    names = [node.name for node in selection.nodes]
    parts = []
    for (u, d, weight), path in reversed(list(zip(selection.edges, layout.paths, strict=True))):
        share = min(1.0, abs(weight) / largest)
        full = POSITIVE if weight > 0 else NEGATIVE
        dash = "" if weight > 0 else ' stroke-dasharray="6 4"'
        label = f"{names[u]} \u2192 {Y if d is None else names[d]}: {signed(weight)}"
        parts.append(
            f'<path d="{path}" stroke="{_hex(full)}" stroke-width="{0.7 + 4.8 * share:.2f}" '
            f'stroke-opacity="{0.35 + 0.5 * share:.2f}"{dash} data-u="{u}" data-d="{"y" if d is None else d}">'
            f"<title>{_esc(label)}</title></path>"
        )
    return parts


def signed(value: float) -> str:
    return f"{'+' if value > 0 else ''}{number(value)}"


def _metric(layout: Layout) -> str:
    x, y = layout.metric
    r = DIAMOND
    points = f"{x:.1f},{y - r:.1f} {x + 1.5 * r:.1f},{y:.1f} {x:.1f},{y + r:.1f} {x - 1.5 * r:.1f},{y:.1f}"
    return (
        f'<g data-n="y"><title>the metric</title><polygon points="{points}" fill="#fff" stroke="{_INK}" '
        f'stroke-width="1.4"/>{_text(x, y + 5, Y, 14, weight=600)}</g>'
    )


def _node(i: int, picture: Picture, layout: Layout, link: str) -> str:
    node = picture.selection.nodes[i]
    fill, ink = _shade(node.effect, picture.selection.largest[0])
    looks = f'fill="{fill}" stroke="{_hex(POSITIVE if node.effect > 0 else NEGATIVE)}" stroke-width="1.1"'
    words, note, token = picture.words(node), picture.note(node), picture.token(node.position)
    at = f" at position {node.position}" if node.position is not None else ""
    at += f" ({token.strip()})" if token else ""
    notes = f". {note.notes}" if note and note.notes else ""
    effect = signed(node.effect)
    label = f"{key_of(node)}{at}: effect {effect}" + (f". {words}" if words else "") + notes
    x, y = layout.places[i]
    if node.is_error:
        inside = _triangle(x, y, layout.node_height, looks, effect)
    else:
        lines = _wrapped(words, _ROOM, 11) if words else [_cut(f"{node.site}/{node.slot}", _ROOM, 11)]
        inside = _rectangle(x, y, layout, looks, ink, lines, f"latent {node.slot}, {effect}" if words else effect)
    shape = f'<g data-n="{i}"><title>{_esc(label)}</title>{inside}</g>'
    return f'<a href="#{_esc(link)}{i}" aria-label="{_esc(label)}">{shape}</a>' if link else shape


def _rectangle(x: float, y: float, layout: Layout, looks: str, ink: str, lines: Sequence[str], small: str) -> str:
    w, h = layout.node_width, layout.node_height
    box = f'<rect x="{x - w / 2:.1f}" y="{y - h / 2:.1f}" width="{w:.1f}" height="{h:.1f}" rx="3" {looks}/>'
    top = y - (len(lines) * 12.5 + 11) / 2 + 10
    rows = [_text(x, top + 12.5 * k, line, 11, ink) for k, line in enumerate(lines)]
    return box + "".join(rows) + _text(x, top + 12.5 * len(lines) - 0.5, small, 9, ink)


def _triangle(x: float, y: float, height: float, looks: str, effect: str) -> str:
    foot = y + height / 2 - 12
    points = f"{x:.1f},{y - height / 2:.1f} {x + 19:.1f},{foot:.1f} {x - 19:.1f},{foot:.1f}"
    shape = f'<polygon points="{points}" {looks} stroke-linejoin="round"/>'
    plate = f'<rect x="{x - 26:.1f}" y="{foot + 1:.1f}" width="52" height="11" fill="{_PAPER}" fill-opacity=".8"/>'
    return f"{shape}{plate}{_text(x, foot + 10, effect, 9)}"


def _legend(selection: Selection, top: float, width: float) -> str:
    """What shapes, colours and lines mean, and what the deepest colour and the thickest line stand for."""
    effect, weight = selection.largest
    blue, red = _hex(POSITIVE), _hex(NEGATIVE)
    y = top + 26
    items = [
        (f'<rect x="0" y="-9" width="22" height="12" rx="2" fill="#fff" stroke="{_SOFT}"/>', 28, "latent"),
        (f'<polygon points="11,-11 22,3 0,3" fill="#fff" stroke="{_SOFT}"/>', 28, "error: what is not explained"),
        (f'<polygon points="11,-12 24,-3 11,6 -2,-3" fill="#fff" stroke="{_SOFT}"/>', 30, "the metric"),
        (f'<rect x="0" y="-9" width="22" height="12" rx="2" fill="{blue}"/>', 28, "raises it when patched"),
        (f'<rect x="0" y="-9" width="22" height="12" rx="2" fill="{red}"/>', 28, "lowers it when patched"),
    ]
    x, line, parts = 24.0, 0, []
    for shape, room, words in items:
        wide = room + _length(words, 11) + 18
        if x + wide > width and x > 24:
            x, line = 24.0, line + 1
        inside = shape + _text(room, 1, words, 11, _SOFT, "start")
        parts.append(f'<g transform="translate({x:.0f} {y + 16 * line:.0f})">{inside}</g>')
        x += wide
    scale = f"Deepest colour: effect \u00b1{number(effect)}."
    if selection.edges:
        scale += f" Thickest line: weight \u00b1{number(weight)}; negative weights are red and dashed."
    parts.append(_text(24, y + 16 * (line + 1) + 3, scale, 11, _SOFT, "start"))
    return f'<g><path d="M24 {top + 4:.1f}H{width - 24:.1f}" stroke="{_LINE}"/>{"".join(parts)}</g>'
