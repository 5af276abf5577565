"""The course of training as a figure."""

from __future__ import annotations

import math

from unweave.methods.train.result import Curve
from unweave.show.figures import COLOURS, HEIGHT, as_svg, finite, new_figure, settings, thin, tokens_axis


def loss_curve(curve: Curve) -> str:
    """Return the loss against the tokens seen and, below it, the share of dead latents where it was recorded."""
    import matplotlib

    keep = thin(curve.tokens)
    tokens, loss = [curve.tokens[i] for i in keep], [curve.loss[i] for i in keep]
    later = [value for value in loss[len(loss) // 50 :] if math.isfinite(value)]
    with matplotlib.rc_context(settings()):
        figure = new_figure(HEIGHT)
        dead = curve.dead_fraction
        grid = figure.add_gridspec(2 if dead else 1, 1, height_ratios=[2.6, 1] if dead else [1])
        top = figure.add_subplot(grid[0])
        top.plot(tokens, loss, color=COLOURS["accent"], linewidth=1.6)
        top.set_ylim(0, 1.08 * max(later, default=1.0) or 1.0)
        top.set_ylabel("Unexplained variance")
        if finite(loss[-1]):
            top.annotate(
                f"{loss[-1]:.3g}", (tokens[-1], loss[-1]), xytext=(-3, 6), textcoords="offset points", ha="right",
                color=COLOURS["accent"], fontweight="bold",
            )  # fmt: skip
        bottom = top
        if dead:
            bottom = figure.add_subplot(grid[1], sharex=top)
            bottom.fill_between(tokens, [100 * dead[i] for i in keep], color=COLOURS["warm"], alpha=0.35, linewidth=0)
            bottom.plot(tokens, [100 * dead[i] for i in keep], color=COLOURS["warm"], linewidth=1.2)
            bottom.set_ylim(0, max(5.0, 110 * max(dead)))
            bottom.set_ylabel("Dead, %")
            top.tick_params(labelbottom=False)
        tokens_axis(bottom, max(tokens, default=1.0))
        figure.align_ylabels()
        return as_svg(figure, "loss", "Unexplained variance against tokens of training")
