"""What a paper claims, and what came out here: the same three columns for every paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["as claimed", "partly", "not as claimed", "not measured"]


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
    rows = [("the paper claims", "here", "verdict"), ("---", "---", "---")]
    rows += [(claim.claim, claim.ours or "-", claim.verdict) for claim in claims]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows) + "\n"
