"""The page that every paper's recipe ends in: claims beside our figures, pictures, tables; it needs no other file."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence

from unweave.papers.claims import Claim
from unweave.show.pieces import esc, table
from unweave.show.theme import asset, palette_css

_STYLE = (
    ".uw main{display:block;max-width:76rem;margin:0 auto;padding:2rem 1.5rem}.uw main>section{display:block}"
    ".uw main figure{margin:1.5em 0;max-width:none}.uw main img,.uw main svg{max-width:100%;height:auto}"
    ".uw main figcaption{max-width:60rem}"
)
"""wider than the report's column of text: the figures are many panels, the tables have long cells"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def document(title: str, heading: str, lead: str, sections: Mapping[str, str]) -> str:
    """A whole HTML page. ``lead`` is plain text; ``sections`` {heading: HTML}, those without content left out."""
    style = palette_css() + asset("pieces.css") + asset("page.css") + _STYLE
    body = "".join(f"<section><h2>{esc(name)}</h2>{html}</section>" for name, html in sections.items() if html)
    return (
        '<!DOCTYPE html>\n<html lang="en" class="uw" data-theme="light"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<title>{esc(title)}</title><style>{style}</style></head><body><main id="main">'
        f"<h1>{esc(heading)}</h1><p>{esc(lead)}</p>{body}</main></body></html>\n"
    )


def claims_html(claims: Sequence[Claim]) -> str:
    """The table of claims."""
    rows = [[esc(c.claim), esc(c.ours or "-"), esc(c.verdict)] for c in claims]
    return table(["the paper claims", "here", "verdict"], rows)


def figure(png: bytes, caption: str) -> str:
    """A picture with its caption, which is its description too."""
    data = base64.b64encode(png).decode()
    told = esc(caption)
    return f'<figure><img alt="{told}" src="data:image/png;base64,{data}"><figcaption>{told}</figcaption></figure>'
