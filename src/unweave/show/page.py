"""Pages: sections in, one HTML file out that needs nothing but itself.

A view returns a ``Section``; a report puts many on a page, and a notebook shows one. Style sheets and scripts are
written into the file. A content policy forbids every connection, so what the data holds can load nothing either.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from unweave.show.model import LatentEntry
from unweave.show.pieces import esc, threads
from unweave.show.theme import MARK, asset, palette_css

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Tile:
    """A number at the head of a page: its value as text, its name, and a sentence."""

    value: str
    name: str
    sentence: str


@dataclass(frozen=True)
class Section:
    """A part of a page: its name in the bar, its heading, and the HTML below the heading."""

    short: str
    heading: str
    body: str
    styles: tuple[str, ...] = ()
    """style sheets and scripts (texts) beyond those of every page"""
    scripts: tuple[str, ...] = ()
    tiles: tuple[Tile, ...] = ()
    """what matters most, for the head of the page"""
    notes: tuple[str, ...] = ()
    """caveats for the reader, one sentence each, collected at the end of the page"""

    def embedded(self) -> str:
        """The section for a notebook, with its style and without the rest of a page."""
        styles = palette_css() + asset("pieces.css") + asset("page.css") + "".join(self.styles)
        scripts = "".join(f"<script>{script}</script>" for script in self.scripts)
        return f'<div class="uw uw-embed"><style>{styles}</style><h2>{self.heading}</h2>{self.body}{scripts}</div>'


@dataclass(frozen=True)
class Around:
    """What a view may know beside its result: the run's folder, and what else the page shows of the same SAE."""

    folder: Path | None = None
    """where the result's arrays and files lie"""
    entries: Mapping[int, LatentEntry] = field(default_factory=dict)
    """latents' records at hand, by number"""
    tags: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """sets of latents that other sections name"""
    limit: int | None = None
    """how many latents to list at most, besides those in ``tags``"""
    name: str = "latents"
    """of this SAE on the page; for the ids of elements"""


ALONE = Around()


def page(title: str, deck: str, sections: Sequence[Section]) -> str:
    """A complete HTML document; equal sections give an equal string. ``deck`` is HTML, ``title`` text."""
    anchors = _anchors(section.short for section in sections)
    styles = "".join(_distinct(section.styles for section in sections))
    scripts = "".join(_distinct(section.scripts for section in sections))
    links = "".join(f'<a href="#{a}">{esc(section.short)}</a>' for a, section in zip(anchors, sections, strict=True))
    body = "".join(
        f'<section id="{a}"><h2>{section.heading}</h2>{section.body.replace(MARK, f"{a}-")}</section>'
        for a, section in zip(anchors, sections, strict=True)
    )
    inside = (
        f'<a class="uw-skip" href="#main">Skip to the report</a>{_top(title, deck, sections)}'
        f'<div class="uw-bar"><div><nav aria-label="Sections">{links}</nav>'
        '<button type="button" class="uw-button" id="uw-theme" hidden>Colours: auto</button></div></div>'
        f'<main id="main">{body}</main>'
        '<footer class="uw-foot"><p>Made with Unweave. This file is complete in itself and loads nothing.</p></footer>'
    )
    return document(title, asset("page.css") + styles, inside, asset("page.js") + scripts)


def document(title: str, styles: str, body: str, script: str) -> str:
    """A complete HTML document of a body that may load nothing; ``styles`` come behind those of all pieces."""
    return (
        '<!DOCTYPE html>\n<html lang="en" class="uw"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><title>{esc(title)}</title>'
        f"<style>{palette_css()}{asset('pieces.css')}{styles}</style></head><body>{body}"
        f"<script>{script}</script></body></html>\n"
    )


def _top(title: str, deck: str, sections: Sequence[Section]) -> str:
    # a name with hyphens is kept whole where the line is wide enough
    heading = re.sub(r"\S+-\S+", r'<span class="uw-whole">\g<0></span>', esc(title))
    tiles = [tile for section in sections for tile in section.tiles][:4]
    cells = "".join(
        f'<div class="uw-tile"><b>{esc(tile.value)}</b><span>{esc(tile.name)}</span><p>{esc(tile.sentence)}</p></div>'
        for tile in tiles
    )
    shown = f'<div class="uw-wide uw-tiles">{cells}</div>' if cells else ""
    return f'<header class="uw-top">{threads()}<h1>{heading}</h1><p class="uw-deck">{deck}</p>{shown}</header>'


def _anchors(names: Iterable[str]) -> list[str]:
    """A fragment for each name, in the order given; equal names get numbers."""
    anchors: list[str] = []
    for name in names:
        plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "section"
        taken = sum(other == plain or re.fullmatch(rf"{re.escape(plain)}-\d+", other) is not None for other in anchors)
        anchors.append(f"{plain}-{taken + 1}" if taken else plain)
    return anchors


def _distinct(texts: Iterable[tuple[str, ...]]) -> list[str]:
    return list(dict.fromkeys(text for several in texts for text in several))


def figure(svg: str, caption: str) -> str:
    """A drawing (SVG text) with its caption (HTML)."""
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def beside(*figures: str) -> str:
    """Figures beside each other across the page; one alone stays in the text's column."""
    return f'<div class="{"uw-wide " if len(figures) > 1 else ""}uw-figures">{"".join(figures)}</div>'
