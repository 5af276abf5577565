"""A circuit as a page to look around in: the picture, and beside it a card for the node that is pointed at.

A card holds the node's effect, what was said about it, its strongest edges, the tokens it promotes and its contexts.
Every node is a link to its card, so that the page works by keyboard and without scripts; ``draw.js`` adds pointing.
The page is one file and a content policy forbids every connection.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources

from unweave.circuits.draw import Picture, draw_svg, key_of, signed
from unweave.circuits.graph import Node
from unweave.core.site import Site
from unweave.latents.annotations import Annotation
from unweave.latents.records import LatentRecord, Records
from unweave.latents.view import entry_of
from unweave.show.page import document
from unweave.show.pieces import contexts_html, esc, logits_html, number, percent, rate_text, table

_EDGES = 6
"""How many edges a card shows in each direction."""
_LINK = "node-"


def draw_html(picture: Picture, records: Mapping[Site, Records] | None = None, note: str = "") -> str:
    """The page as a complete HTML document; equal arguments give an equal string.

    ``records`` {site: Records} show what latents respond to, as far as they hold them; ``note`` is a sentence
    under the title. UnweaveError as for ``draw_svg``.
    """
    name = picture.name
    svg = draw_svg(picture, link=_LINK)
    cards = "".join(_card(i, picture, _record(node, records or {})) for i, node in enumerate(picture.selection.nodes))
    body = (
        f'<header class="uw-circuit-top"><h1>{esc(name)}</h1><p>{esc(f"{picture.summary} {note}".strip())}</p>'
        '<p class="uw-circuit-how">Point at a node to see its edges; click it, or reach it with the Tab key, to read '
        'about it. Esc lets go.<button type="button" id="uw-size" hidden>Full size</button></p>'
        '</header><main class="uw-circuit"><div class="uw-circuit-picture" tabindex="0" '
        f'role="region" aria-label="The circuit">{svg}</div><aside class="uw-circuit-cards" aria-live="polite">'
        f'<p class="uw-circuit-hint">Choose a node.</p>{cards}</aside></main>'
        f'<section class="uw-circuit-all"><details><summary>All nodes as a table</summary>'
        f"{_all_nodes(picture)}</details></section>"
    )
    return document(name, _own("draw.css"), body, _own("draw.js"))


def _own(name: str) -> str:
    return resources.files("unweave.circuits").joinpath(name).read_text(encoding="utf-8")


def _record(node: Node, records: Mapping[Site, Records]) -> LatentRecord | None:
    """The node's record, None for errors and latents without one."""
    of_site = records.get(node.site)
    if of_site is None or node.is_error:
        return None
    listed = of_site.latents is None or node.slot in of_site.latents
    return of_site.latent(node.slot) if listed else None


def _at(node: Node, picture: Picture) -> str:
    if node.position is None:
        return ""
    token = picture.token(node.position)
    return f"position {node.position}" + (f", {token.strip()!r}" if token else "")


def _card(i: int, picture: Picture, record: LatentRecord | None) -> str:
    node = picture.selection.nodes[i]
    annotation = picture.note(node)
    facts = [key_of(node), _at(node, picture), f"effect {signed(node.effect)}"]
    parts = [f'<p class="uw-facts">{esc("; ".join(fact for fact in facts if fact))}</p>']
    if node.is_error:
        parts.append('<p class="uw-facts">What the SAE does not explain of its site.</p>')
    if annotation is not None:
        parts.append(_said(annotation))
    body = _edges(i, picture)
    if record is not None:
        entry = entry_of(record, kinds=("top", "quantile"))
        fires = rate_text(entry.firing_rate)
        parts.append(f'<p class="uw-facts">{esc(fires)}; strongest activation {number(entry.max_activation)}</p>')
        body += logits_html(entry) + contexts_html(entry)
    return (
        f'<article class="uw-card" id="{_LINK}{i}" tabindex="-1"><header>'
        f"<h3>{esc(picture.words(node) or key_of(node))}</h3>{''.join(parts)}</header>{body}</article>"
    )


def _said(annotation: Annotation) -> str:
    """Notes, ratings and relevance of an annotation; the text itself is the card's heading."""
    ratings = [
        f"{name} {value:g} of 100"
        for name, value in (("interpretability", annotation.interpretability), ("complexity", annotation.complexity))
        if value is not None
    ]
    if annotation.relevant is not None:
        ratings.append("relevant to the task" if annotation.relevant else "not relevant to the task")
    notes = f'<p class="uw-note">{esc(annotation.notes)}</p>' if annotation.notes else ""
    return notes + (f'<p class="uw-facts">{esc("; ".join(ratings))}</p>' if ratings else "")


def _edges(i: int, picture: Picture) -> str:
    """The strongest edges into and out of a node, as links."""
    edges = picture.selection.edges
    into: list[tuple[int | None, float]] = [(u, weight) for u, d, weight in edges if d == i]
    out = [(d, weight) for u, d, weight in edges if u == i]
    parts = []
    for heading, ends in (("Strongest edges in", into), ("Strongest edges out", out)):
        if not ends:
            continue
        rows = []
        for other, weight in sorted(ends, key=lambda edge: -abs(edge[1]))[:_EDGES]:
            sign = "uw-up" if weight > 0 else "uw-down"
            rows.append(f'<li><b class="{sign}">{signed(weight)}</b> {_linked(other, picture)}</li>')
        more = f" ({len(ends) - _EDGES} more)" if len(ends) > _EDGES else ""
        parts.append(f'<h4 class="uw-kind">{heading}{more}</h4><ul class="uw-circuit-edges">{"".join(rows)}</ul>')
    return "".join(parts)


def _linked(i: int | None, picture: Picture) -> str:
    """A node where others are listed: what it stands for, and where."""
    if i is None:
        return "the metric"
    node = picture.selection.nodes[i]
    words, where = picture.words(node), key_of(node)
    at = "" if node.position is None else f" at {node.position}"
    return f'<a href="#{_LINK}{i}">{esc(f"{words} ({where})" if words else where)}</a>{at}'


def _all_nodes(picture: Picture) -> str:
    nodes = picture.selection.nodes
    total = sum(abs(node.effect) for node in nodes) or 1.0
    rows = []
    for i, node in sorted(enumerate(nodes), key=lambda item: -abs(item[1].effect)):
        link = f'<a href="#{_LINK}{i}">{esc(key_of(node))}</a>'
        share = percent(abs(node.effect) / total)
        rows.append([link, esc(_at(node, picture)), esc(picture.words(node)), number(node.effect), share])
    return table(["Node", "Where", "Annotation", "Effect", "Share of all |effects| shown"], rows, numeric=(3, 4))
