"""The figures of the simulation."""

from __future__ import annotations

from collections.abc import Sequence

from unweave.papers.labelled_steering.simulation import Curve, Simulation
from unweave.show.figures import COLOURS, as_svg, new_figure, settings

_LINES = ("mute", "soft", "ink", "accent", "warm")


def curves(some: Sequence[Curve], name: str, x: str, y: str, described: str) -> str:
    """Scores over prevalences or priors, which run over orders of magnitude."""
    import matplotlib

    with matplotlib.rc_context(settings()):
        figure = new_figure(3.0)
        axes = figure.add_subplot()
        for place, curve in enumerate(some):
            points = [(a, b) for a, b in zip(curve.x, curve.y, strict=True) if b is not None]
            colour = COLOURS[_LINES[place - len(some)]]
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.4, label=curve.name)
        axes.set_xscale("log")
        axes.set_ylim(0, 1.02)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.legend()
        return as_svg(figure, f"labelled-steering-{name}", described)


def simulated(simulation: Simulation) -> list[tuple[str, str]]:
    """Figures 3 and 4 of the paper and the recovery of planted pairs, each with its caption."""
    ordinary = Curve(
        "ordinary F1", simulation.recovered.x, (simulation.recovered_ordinary,) * len(simulation.recovered.x)
    )
    prior, score = "Reference prior", "Calibrated F1"
    return [
        (curves(simulation.by_prevalence, "prevalence", "Prevalence of the label", "F1", "F1 by prevalence"),
         "Figure 3: of a probe that does not change, 10,000 texts; calibrated F1 (reference prior 0.1) does not fall "
         "as the label gets rarer, but scatters where few texts have it."),
        (curves(simulation.by_prior, "thresholds", prior, score, "Calibrated F1 by prior and threshold"),
         "Figure 4: at a low prior a probe that fires too seldom scores above one that fires too often."),
        (curves(simulation.by_distance, "distance", prior, score, "Best calibrated F1 by prior and distance"),
         "Figure 4, last: the lower the prior, the further apart classes must lie, at the best threshold."),
        (curves((simulation.recovered, ordinary), "recovery", prior, "Planted pairs found", "Recovery by prior"),
         "Planted pairs among as many best ones, beside wider and narrower latents."),
    ]  # fmt: skip
