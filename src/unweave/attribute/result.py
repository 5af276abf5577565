"""What results hold of attribution. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unweave.core.site import Site

TOLERANCE = 0.1
"""how far the mean sum may be from the mean change, as a share of the mean size of the examples' changes"""


@dataclass(frozen=True)
class SiteSum:
    """The sum of all effects at a site beside what moving everything there really changes; means over examples."""

    site: Site
    sum: float
    change: float
    complete: bool
    """whether they differ by no more than the tolerance"""
    examples: int


def incomplete(rows: Sequence[SiteSum]) -> str | None:
    """What a reader must know where sums and changes differ; None where they agree."""
    off = [row for row in rows if not row.complete]
    if not off:
        return None
    worst = max(off, key=lambda row: abs(row.sum - row.change))
    more = f" and at {len(off) - 1} other sites of {len(rows)}" if len(off) > 1 else ""
    return (
        f"effects at {worst.site} add up to {worst.sum:.3g}, but moving everything there changes the metric by "
        f"{worst.change:.3g}; they differ by more than {TOLERANCE:.0%}{more}. Take more steps. Where nodes "
        "are ablated to zero, ablate them to their means (ablation: mean), or take 80 or more graded steps (rule: "
        "graded) and leave first tokens alone (skip_first: 1)"
    )
