"""Figures of SAEs in compressed models: a line for each site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from unweave.methods.compress.transfer.result import ORIGINAL, RETRAINED, Cell, Transfer
from unweave.show.figures import LOOKS, as_svg, new_figure, settings

_ANEW = 1.03
"""where SAEs that were trained anew stand on the axis of sparsities"""
Points = Sequence[tuple[float, float]]


def _drawn(
    about: tuple[str, str],
    lines: Iterable[tuple[str, Points]],
    x: str,
    y: str,
    corner: str,
    tune: Callable[[Any], None],
) -> str:
    """Lines by name as the figure ``about`` (name, description); ``tune`` gets the axes before the legend is drawn."""
    import matplotlib

    with matplotlib.rc_context(settings()):
        figure = new_figure(3.2)
        axes: Any = figure.add_subplot()
        for place, (name, points) in enumerate(lines):
            colour, style = LOOKS[place % len(LOOKS)]
            look = {"color": colour, "linestyle": style, "marker": "o", "markersize": 3, "linewidth": 1.2}
            if points:
                axes.plot(*zip(*points, strict=True), label=name, **look)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        tune(axes)
        axes.legend(fontsize=7, ncols=2, loc=corner)
        return as_svg(figure, f"transfer-{about[0]}", about[1])


def sweep(result: Transfer, what: Literal["unexplained", "loss"]) -> str:
    """Figure 1 of the paper: pruned SAEs by their sparsity, in the compressed model; crosses: SAEs trained anew."""

    def value(cell: Cell) -> float:
        m = cell.metrics
        return m.unexplained_variance if what == "unexplained" else m.ce_sae - m.ce_clean

    cells = {site: [c for c in result.cells if (c.site, c.on) == (site, "compressed")] for site in result.sites}
    lines = [
        (str(site), sorted((cell.sparsity or 0.0, value(cell)) for cell in own if cell.form != RETRAINED))
        for site, own in cells.items()
    ]

    def tune(axes: Any) -> None:
        for (colour, _), own in zip(LOOKS * len(cells), cells.values(), strict=False):
            anew = [value(cell) for cell in own if cell.form == RETRAINED]
            axes.plot([_ANEW] * len(anew), anew, "x", color=colour, markersize=5, clip_on=False)
        if what == "unexplained":
            axes.set_ylim(0, min(axes.get_ylim()[1], 1.6))

    y = "Unexplained variance" if what == "unexplained" else "Loss above the model's own (nats)"
    about = (what, f"Pruned SAEs in the compressed model by sparsity: {what}")
    return _drawn(about, lines, "Share of the SAE's weights that is 0", y, "upper left", tune)


def rates(result: Transfer) -> str:
    """Survival of the original SAEs' latents by how often they fire."""
    lines, ranges = [], []
    for site in result.sites:
        cell = result.of(site, ORIGINAL, "compressed")
        if cell is not None and cell.survival is not None:
            bins = enumerate(cell.survival.by_rate)
            lines.append((str(site), [(place, one.mean.value) for place, one in bins if one.mean is not None]))
            ranges = [f"{one.low:g} to {one.high:g}" for one in cell.survival.by_rate]

    def tune(axes: Any) -> None:
        axes.set_xticks(range(len(ranges)), ranges)
        axes.set_ylim(0, 1.02)

    about = ("rates", "Survival of latents by firing rate")
    return _drawn(about, lines, "Firing rate in the original model", "Mean correlation", "lower left", tune)


def damage(result: Transfer) -> str:
    """Mean damage to latents over what each compression costs the model."""
    order = sorted(result.compressions, key=lambda one: one.loss.after)
    lines = [
        (str(site), [(one.loss.after - one.loss.before, 1 - own.survival.every.mean.value)
                     for one in order for own in one.sites if own.site == site and own.survival.every.mean is not None])
        for site in result.sites
    ]  # fmt: skip

    def tune(axes: Any) -> None:
        axes.set_xscale("symlog", linthresh=0.01)
        axes.set_ylim(0, 1.02)

    about = ("damage", "Damage to latents over damage to the model")
    return _drawn(about, lines, "Loss above the original model's (nats)", "1 - mean correlation", "upper left", tune)
