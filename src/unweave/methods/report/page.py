"""The whole report as one HTML file that needs nothing but itself.

1. The head: title, a sentence on what was done, and the four numbers that matter most.
2. One section per step of the main job (``sections.py``); a step that was not run says so.
3. Style sheets and scripts are written into the file, the latents' data as JSON beside the explorer.

A content policy in the page forbids every connection, so that what the data holds can load nothing either.
"""

from __future__ import annotations

import re

from unweave.methods.report.numbers import sentence, shown, value_of
from unweave.methods.report.sections import SECTIONS, Section, sae_words
from unweave.show.model import ReportData
from unweave.show.pieces import esc, number, threads
from unweave.show.theme import asset, palette_css

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def render(data: ReportData) -> str:
    """Return the report as a complete HTML document; equal data gives an equal string."""
    sections = [build(data) for build in SECTIONS]
    styles = palette_css() + asset("pieces.css") + asset("page.css") + asset("explorer.css")
    scripts = asset("page.js") + (asset("explorer.js") if data.latents is not None else "")
    links = "".join(f'<a href="#{section.anchor}">{esc(section.short)}</a>' for section in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en" class="uw"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{esc(data.title)}</title><style>{styles}</style></head><body>"
        f'<a class="uw-skip" href="#main">Skip to the report</a>{_top(data)}'
        f'<div class="uw-bar"><div><nav aria-label="Sections">{links}</nav>'
        '<button type="button" class="uw-button" id="uw-theme" hidden>Colours: auto</button></div></div>'
        f'<main id="main">{"".join(map(_section, sections))}</main>'
        f'<footer class="uw-foot"><p>Made with Unweave. This file is complete in itself and loads nothing.</p></footer>'
        f"<script>{scripts}</script></body></html>\n"
    )


def _section(section: Section) -> str:
    return f'<section id="{section.anchor}"><h2>{esc(section.heading)}</h2>{section.body}</section>'


def _top(data: ReportData) -> str:
    note = f" ({esc(data.model_note)})" if data.model_note else ""
    site = f" at <code>{esc(data.site)}</code>" if data.site else ""
    what = sae_words(data.sae) if data.sae is not None else "sparse autoencoder"
    told = [
        "how faithful it is" if data.evaluation is not None else "",
        "what each latent responds to" if data.latents is not None else "",
        f"which ones cause {esc(data.attribution.task)}" if data.attribution is not None else "",
        "what happens when one is turned up" if data.steering is not None else "",
    ]
    parts = [part for part in told if part]
    shows = f" Here is {', '.join(parts[:-1])}{' and ' if parts[1:] else ''}{parts[-1]}." if parts else ""
    comma = "," if data.sae is not None and data.sae.k is not None else ""
    deck = f"A {what}{comma} for the activations{site} of {esc(data.model)}{note}.{shows}"
    # a name with hyphens is kept whole where the line is wide enough
    title = re.sub(r"\S+-\S+", r'<span class="uw-whole">\g<0></span>', esc(data.title))
    return f'<header class="uw-top">{threads()}<h1>{title}</h1><p class="uw-deck">{deck}</p>{_tiles(data)}</header>'


def _tiles(data: ReportData) -> str:
    values, tiles = data.evaluation or {}, []
    names = {
        "unexplained_variance": "unexplained variance",
        "recovered_vs_mean": "of the loss recovered",
        "alive_fraction": "of latents alive",
    }
    for key, name in names.items():
        if value_of(values, key) is not None:
            tiles.append((shown(key, values), name, sentence(key, values, data.sae) or ""))
    found = data.attribution
    if found is not None and found.share is not None:
        n = sum(row.chosen for row in found.rows)
        words = f"How much of the whole change in {found.task} its {n} strongest latents make when they move together"
        order = found.correlations.get("weaker_ig_spearman", found.correlations.get("ig_spearman"))
        if order is not None:  # without the strongest, where it is known: one latent can make a correlation on its own
            rest = " but the first" if "weaker_ig_spearman" in found.correlations else ""
            words += f". Integrated gradients order them{rest} as measurements do at {number(order)}; 1 is perfect"
        tiles.append((f"{found.share:.0%}", "of the effect found", f"{words}."))
    if not tiles:
        return ""
    cells = "".join(
        f'<div class="uw-tile"><b>{esc(value)}</b><span>{esc(name)}</span><p>{esc(words)}</p></div>'
        for value, name, words in tiles
    )
    return f'<div class="uw-wide uw-tiles">{cells}</div>'
