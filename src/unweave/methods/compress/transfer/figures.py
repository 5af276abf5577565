"""Figures of SAEs in compressed models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from unweave.methods.compress.transfer.result import ORIGINAL, RETRAINED, Cell, Transfer
from unweave.show.figures import COLOURS, as_svg, new_figure, settings

_LOOKS = [(colour, style) for style in ("-", "--", ":") for colour in ("accent", "warm", "ink", "mute")]


@contextmanager
def _axes() -> Iterator[tuple[Any, Any]]:
    import matplotlib

    with matplotlib.rc_context(settings()):
        figure = new_figure(3.2)
        yield figure, figure.add_subplot()


def sweep(result: Transfer, what: Literal["unexplained", "loss"]) -> str:
    """Figure 1 of the paper: pruned SAEs by their sparsity, in the compressed model; retrained ones as level lines."""

    def value(cell: Cell) -> float:
        m = cell.metrics
        return m.unexplained_variance if what == "unexplained" else m.ce_sae - m.ce_clean

    with _axes() as (figure, axes):
        for place, site in enumerate(result.sites):
            colour = COLOURS[_LOOKS[place % 4][0]]
            marker = "osD^v<>*x"[place // 4 % 9]
            own = [cell for cell in result.cells if cell.site == site and cell.on == "compressed"]
            pruned = sorted((cell.sparsity or 0.0, value(cell)) for cell in own if cell.form != RETRAINED)
            axes.plot(
                *zip(*pruned, strict=True), color=colour, marker=marker, markersize=3, linewidth=1.2, label=str(site)
            )
            for cell in own:
                if cell.form == RETRAINED:
                    axes.axhline(value(cell), color=colour, linestyle="--", linewidth=0.7)
        axes.set_xlabel("Share of the SAE's weights that is 0")
        axes.set_ylabel("Unexplained variance" if what == "unexplained" else "Loss above the model's own (nats)")
        if what == "unexplained":
            axes.set_ylim(0, min(axes.get_ylim()[1], 1.6))
        axes.legend(fontsize=7, ncols=2, loc="upper left")
        return as_svg(figure, f"transfer-{what}", f"Pruned SAEs in the compressed model by sparsity: {what}")


def rates(result: Transfer) -> str:
    """Survival of the original SAEs' latents by how often they fire."""
    with _axes() as (figure, axes):
        for place, site in enumerate(result.sites):
            cell = result.of(site, ORIGINAL, "compressed")
            if cell is None or cell.survival is None:
                continue
            bins = [one for one in cell.survival.by_rate if one.mean is not None]
            places = [cell.survival.by_rate.index(one) for one in bins]
            colour, style = _LOOKS[place % len(_LOOKS)]
            values = [one.mean.value for one in bins if one.mean is not None]
            axes.plot(places, values, color=COLOURS[colour], linestyle=style, marker="o", markersize=3, label=str(site))
            ranges = [f"{one.low:g} to {one.high:g}" for one in cell.survival.by_rate]
            axes.set_xticks(range(len(ranges)), ranges)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("Firing rate in the original model")
        axes.set_ylabel("Mean correlation before and after")
        axes.legend(fontsize=7, ncols=2, loc="lower left")
        return as_svg(figure, "transfer-rates", "Survival of latents by firing rate")


def damage(result: Transfer) -> str:
    """Mean damage to latents over what each compression costs the model, a line for each site."""
    order = sorted(result.compressions, key=lambda one: one.loss.after)
    with _axes() as (figure, axes):
        for place, site in enumerate(result.sites):
            points = []
            for one in order:
                mean = next(own.survival.every.mean for own in one.sites if own.site == site)
                if mean is not None:
                    points.append((one.loss.after - one.loss.before, 1 - mean.value))
            colour, style = _LOOKS[place % len(_LOOKS)]
            axes.plot(*zip(*points, strict=True), color=COLOURS[colour], linestyle=style, marker="o", markersize=3,
                      label=str(site))  # fmt: skip
        axes.set_xscale("symlog", linthresh=0.01)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("Loss of the compressed model above the original's (nats)")
        axes.set_ylabel("1 - mean correlation of latents")
        axes.legend(fontsize=7, ncols=2, loc="upper left")
        return as_svg(figure, "transfer-damage", "Damage to latents over damage to the model")
