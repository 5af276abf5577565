"""Scores as stacked bars."""

from __future__ import annotations

from unweave.methods.explain.rubric.result import RubricResult
from unweave.show.figures import COLOURS, as_svg, new_figure, settings


def scores_bars(result: RubricResult, name: str) -> str:
    """The share of latents, and of shuffled contexts, with each score; darker is clearer."""
    import matplotlib

    groups = [("latents", result.real), ("shuffled contexts", result.shuffled)]
    bars = [(name, scores) for name, scores in groups if scores is not None and scores.scored]
    with matplotlib.rc_context(settings()):
        figure = new_figure(0.9 + 0.5 * len(bars))
        axes = figure.add_subplot()
        axes.grid(axis="y", visible=False)
        for row, (_, scores) in enumerate(bars):
            left = 0.0
            for score, count in enumerate(scores.distribution, 1):
                share = count / scores.scored
                axes.barh(row, share, left=left, height=0.6, color=COLOURS["accent"], alpha=0.2 * score)
                if count:
                    axes.annotate(str(score), (left + share / 2, row), ha="center", va="center")
                left += share
        axes.set_yticks(range(len(bars)), [f"{name} ({scores.scored})" for name, scores in bars])
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xlabel("Share with each score, 1 (no pattern) to 5 (clear)")
        return as_svg(figure, f"{name}-scores", "Shares of scores from 1 to 5, of latents and of shuffled contexts")
