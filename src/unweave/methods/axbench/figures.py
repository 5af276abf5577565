"""The figures of a comparison: methods with their intervals, and ratings against strength."""

from __future__ import annotations

from unweave.methods.axbench.result import METHODS, Judged
from unweave.show.figures import COLOURS, as_svg, drawing

_STYLES = {
    "sae": ("accent", "-", "o"),
    "random": ("mute", "-", "o"),
    "diffmean": ("warm", "-", "s"),
    "probe": ("warm", "--", "^"),
    "reft": ("ink", "-", "D"),
    "lora": ("ink", "-.", ""),
    "prompt": ("ink", ":", ""),
    "unedited": ("mute", ":", ""),
}
"""colour, line and marker of each method"""
_SHORT = {"sae": "labelled latents", "random": "random latents", "prompt": "prompt", "unedited": "unedited"}


def _label(method: str) -> str:
    return _SHORT.get(method, METHODS[method])


def bars(judged: Judged, name: str) -> str:
    """Each method's mean rating (bar) and concept rating (dot), with 95 % intervals over concepts."""
    shown = [score for score in judged.scores if score.rating is not None]
    with drawing(1.0 + 0.36 * len(shown)) as figure:
        axes = figure.add_subplot()
        axes.grid(axis="y", visible=False)
        for row, score in enumerate(shown):
            for interval, shift, colour in ((score.rating, 0.0, "ink"), (score.parts[0], 0.28, "warm")):
                if interval is None:
                    continue
                if shift:
                    axes.scatter([interval.value], [row + shift], s=18, color=COLOURS[colour], zorder=3)
                else:
                    alpha = 0.85 if score.method == "sae" else 0.4
                    axes.barh(row, interval.value, height=0.5, color=COLOURS["accent"], alpha=alpha)
                if interval.low is not None and interval.high is not None:
                    axes.plot([interval.low, interval.high], [row + shift] * 2, color=COLOURS[colour], linewidth=1.2)
        axes.set_yticks(range(len(shown)), [_label(score.method) for score in shown])
        axes.invert_yaxis()
        axes.set_xlim(0, 2)
        axes.set_xlabel("Rating, 0 to 2 (bar: harmonic mean; dot: concept)")
        return as_svg(figure, f"{name}-methods", "Mean rating of each method with its interval over concepts")


def curves(judged: Judged, name: str) -> str:
    """Mean rating of each method against its strength; those without one are level lines."""
    with drawing(3.2) as figure:
        axes = figure.add_subplot()
        factors = [point.factor for point in judged.points if point.factor is not None]
        for method in dict.fromkeys(point.method for point in judged.points):
            points = [(p.factor, p.rating) for p in judged.points if p.method == method and p.rating is not None]
            colour, line, marker = _STYLES[method]
            style = {"color": COLOURS[colour], "linestyle": line, "linewidth": 1.5, "label": _label(method)}
            if points and points[0][0] is None:
                axes.axhline(points[0][1], **style)
            elif points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, marker=marker, markersize=3.5, **style)
        if factors and max(factors) > 20 * min(factors):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _position: f"{value:g}")
        axes.set_ylim(0, 2)
        axes.set_xlabel("Strength, in largest activations")
        axes.set_ylabel("Mean rating")
        figure.legend(loc="outside upper center", ncols=3, handlelength=1.6)
        return as_svg(figure, f"{name}-strengths", "Mean rating of each method against its strength")
