"""The paper's figures on our numbers: accuracies by condition, effects by layer, and what happens over training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from unweave.papers.concept_ablation.result import NAMES, Name, Task
from unweave.show.figures import COLOURS, as_svg, new_figure, settings

_HUES = ("mute", "accent", "warm", "ink", "soft")


def accuracies(task: Task, number: int) -> str:
    """Figures 2 and 6: accuracy between the two answers where the cue misleads, a point per seed, a bar at the mean."""
    import matplotlib

    with matplotlib.rc_context(settings()):
        figure = new_figure(2.9)
        axes = figure.add_subplot()
        names: list[Name] = [name for name in NAMES if task.of(name)]
        names.reverse()
        for place, name in enumerate(names):
            spread = task.spread(name, "ood")
            if spread is not None:
                axes.barh(place, spread.mean, height=0.6, color=COLOURS["accent" if name == "zero" else "line"])
                axes.plot(spread.values, [place] * len(spread.values), ".", color=COLOURS["ink"], markersize=5)
        axes.set_yticks(range(len(names)), [NAMES[name].split(":")[0] for name in names])
        axes.axvline(0.5, color=COLOURS["mute"], linewidth=0.8, linestyle=":")
        axes.set_xlim(0, 1.02)
        axes.set_xlabel("Accuracy where the cue misleads")
        return as_svg(figure, f"concept-ablation-accuracy-{number}", f"Accuracy by condition, {task.name}")


def effects(tasks: Sequence[Task]) -> str:
    """Figure 3: the summed effect of the candidates at each site, and of those chosen (dashed)."""
    import matplotlib

    with matplotlib.rc_context(settings()):
        figure = new_figure(2.9)
        axes = figure.add_subplot()
        for place, task in enumerate(tasks):
            layers = [one.site.layer or 0 for one in task.sites]
            colour = COLOURS[_HUES[place % len(_HUES)]]
            axes.plot(
                layers, [one.total for one in task.sites], color=colour, marker=".", label=task.name.replace("*", "")
            )
            axes.plot(layers, [one.chosen_total for one in task.sites], color=colour, marker=".", linestyle="--")
        axes.set_xlabel("Layer")
        axes.set_ylabel("Summed effect")
        figure.legend(loc="outside upper center", ncols=2, handlelength=1.6)
        return as_svg(figure, "concept-ablation-effects", "Effects by layer: all candidates, chosen ones dashed")


def _line(place: int, name: Name) -> dict[str, Any]:
    """How a condition's curve is drawn; the last ones, whose colours are alike, dashed and dotted."""
    style = ("-", "-", "-", "--", ":")[place]
    return {"color": COLOURS[_HUES[place]], "linestyle": style, "marker": ".", "label": NAMES[name]}


def learning(task: Task, names: Sequence[Name], split: str, number: int) -> str:
    """Accuracy over training, mean over seeds, on one split without any edit."""
    import matplotlib

    with matplotlib.rc_context(settings()):
        figure = new_figure(2.9)
        axes = figure.add_subplot()
        for place, name in enumerate(names):
            runs = [one.finetuned.history for one in task.of(name)]
            if not runs:
                continue
            steps = [check.step for check in runs[0]]
            scores = [[check.scores[split].accuracy for check in run if split in check.scores] for run in runs]
            values = [[one.between.value for one in row if one is not None] for row in scores]
            if all(len(row) == len(steps) for row in values):
                axes.plot(steps, np.mean(values, 0), **_line(place, name))
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("Step")
        axes.set_ylabel(f"Accuracy, {split}")
        figure.legend(loc="outside upper center", ncols=2, handlelength=1.6)
        return as_svg(figure, f"concept-ablation-{split}-{number}", f"Accuracy on {split} over training, {task.name}")


def projections(task: Task, names: Sequence[Name]) -> str:
    """The mean projection on the chosen directions over training, over sites and seeds, less that of the base model."""
    import matplotlib

    with matplotlib.rc_context(settings()):
        figure = new_figure(2.9)
        axes = figure.add_subplot()
        for place, name in enumerate(names):
            runs = [one.finetuned.history for one in task.of(name)]
            rows = [[np.mean(list(check.projections.values())) for check in run if check.projections] for run in runs]
            if rows and rows[0]:
                curve = np.mean(rows, 0)
                steps = [check.step for check in runs[0] if check.projections]
                axes.plot(steps, curve - curve[0], **_line(place, name))
        axes.set_xlabel("Step")
        axes.set_ylabel("Projection, change")
        figure.legend(loc="outside upper center", ncols=2, handlelength=1.6)
        return as_svg(figure, "concept-ablation-projections", f"Projection on the concept over training, {task.name}")
