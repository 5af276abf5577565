"""AUROC of labelled pairs beside shuffled labels."""

from __future__ import annotations

import numpy as np

from unweave.methods.labels.result import SiteLabels
from unweave.show.figures import COLOURS, as_svg, drawing


def aurocs(site: SiteLabels) -> str:
    """Each pair's held-out AUROC with its interval, by falling AUROC, and with shuffled labels."""
    from matplotlib.ticker import MaxNLocator

    there = [(pair.label, pair.shuffled_auroc) for pair in site.pairs if pair.label.auroc is not None]
    there.sort(key=lambda one: -(one[0].auroc or 0.0))
    with drawing(3.0) as figure:
        axes = figure.add_subplot()
        places = range(1, len(there) + 1)
        columns = [[getattr(label, name) for label, _ in there] for name in ("auroc_low", "auroc_high", "auroc")]
        lines = np.array(columns, dtype=float)  # no interval: no line
        axes.vlines(places, lines[0], lines[1], color=COLOURS["accent"], alpha=0.4, linewidth=1.5)
        axes.plot(places, lines[2], "o", color=COLOURS["accent"], markersize=3, label="labels")
        hollow = {"markerfacecolor": "none", "color": COLOURS["soft"], "markersize": 3, "label": "shuffled"}
        axes.plot(places, [chance or 0.5 for _, chance in there], "o", **hollow)
        axes.axhline(0.5, color=COLOURS["line"], linewidth=1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("Pairs of latent and label, by AUROC")
        axes.set_ylabel("AUROC on held-out texts")
        axes.legend(loc="upper right")
        return as_svg(
            figure, f"labels-{site.site}", "AUROC of labelled latents on held-out texts, and of shuffled labels"
        )
