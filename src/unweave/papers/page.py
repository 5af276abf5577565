"""What the pages of papers' recipes share: claims beside our figures, and pictures inside the file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from unweave.core.writing import write_file
from unweave.papers.claims import Claim, markdown
from unweave.show.page import Section, page
from unweave.show.pieces import esc, table


def claims_html(claims: Sequence[Claim]) -> str:
    """The table of claims."""
    rows = [[esc(c.claim), esc(c.ours or "-"), esc(c.verdict)] for c in claims]
    return table(["the paper claims", "here", "verdict"], rows)


def write_pages(
    folder: Path, title: str, deck: str, sections: Sequence[Section], claims: Sequence[Claim], table: str
) -> None:
    """Writes ``table.md``, ``claims.md`` and ``report.html``."""
    texts = {"table.md": table, "claims.md": markdown(claims), "report.html": page(title, deck, sections)}
    for name, text in texts.items():
        write_file(folder / name, text)


def figure(png: bytes, caption: str) -> str:
    """A picture with its caption, which is its description too."""
    data = base64.b64encode(png).decode()
    told = esc(caption)
    return f'<figure><img alt="{told}" src="data:image/png;base64,{data}"><figcaption>{told}</figcaption></figure>'
