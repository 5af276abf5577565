"""What a paper claims, and what came out here: the same three columns for every paper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["as claimed", "partly", "not as claimed", "not measured", "no claim"]
"""no claim: measured here, though the paper says nothing of it"""


@dataclass(frozen=True)
class Claim:
    """One claim of a paper beside our figure for it."""

    claim: str
    """what the paper says, with its number"""
    ours: str
    """what was measured here, with its number; "" where nothing was"""
    verdict: Verdict


def markdown(claims: Sequence[Claim]) -> str:
    """The claims as a Markdown table."""
    rows = [(claim.claim, claim.ours or "-", claim.verdict) for claim in claims]
    return markdown_table(("the paper claims", "here", "verdict"), rows)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of text below a head."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"
