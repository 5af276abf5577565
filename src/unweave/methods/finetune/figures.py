"""The course of fine-tuning as figures."""

from __future__ import annotations

from unweave.methods.finetune.result import Finetuned
from unweave.show.figures import COLOURS, HEIGHT, as_svg, new_figure, settings

_STYLES = (("accent", "-"), ("warm", "-"), ("soft", "--"), ("mute", ":"))


def course(result: Finetuned, name: str) -> str:
    """Accuracy on every split, and below it the loss on the training items, against epochs."""
    import matplotlib

    with matplotlib.rc_context(settings()):
        figure = new_figure(HEIGHT)
        grid = figure.add_gridspec(2, 1, height_ratios=[2, 1])
        top, bottom = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
        bottom.sharex(top)
        for split, (colour, line) in zip(result.history[0].scores, _STYLES * 9, strict=False):
            scores = [(check.epoch, check.scores[split].accuracy, check.scores[split].loss) for check in result.history]
            style = {"color": COLOURS[colour], "linestyle": line, "linewidth": 1.4, "label": split}
            answered = [(epoch, accuracy.right) for epoch, accuracy, _ in scores if accuracy is not None]
            if answered:
                epochs, shares = zip(*answered, strict=True)
                low, high = zip(*(share.interval for share in shares), strict=True)
                top.plot(epochs, [share.value for share in shares], marker="o", markersize=2.5, **style)
                top.fill_between(epochs, low, high, color=COLOURS[colour], alpha=0.1, linewidth=0)
            else:
                top.plot([epoch for epoch, _, _ in scores], [loss for _, _, loss in scores], **style)
        answers = any(score.accuracy for score in result.history[0].scores.values())
        top.set_ylabel("Accuracy" if answers else "Loss, held out")
        if answers:
            top.set_ylim(-0.02, 1.02)
        learnt = [(check.epoch, check.loss) for check in result.history if check.loss is not None]
        bottom.plot(*zip(*learnt, strict=True), color=COLOURS["ink"], linewidth=1.4, marker="o", markersize=2.5)
        bottom.set_ylim(bottom=0)
        bottom.set_ylabel("Loss")
        bottom.set_xlabel("Epochs")
        top.tick_params(labelbottom=False)
        figure.align_ylabels()
        figure.legend(loc="outside upper center", ncols=4, handlelength=1.6)
        return as_svg(figure, f"{name}-course", "Every split, and the loss, against epochs of fine-tuning")


def projections(result: Finetuned, name: str) -> str:
    """What the model projects on the selected directions at every site, less what the base model does."""
    import matplotlib

    with matplotlib.rc_context(settings()):
        figure = new_figure(HEIGHT)
        axes = figure.add_subplot()
        for site, (colour, line) in zip(result.history[0].projections, _STYLES * 9, strict=False):
            values = [(check.epoch, check.projections[site]) for check in result.history]
            first = values[0][1]
            axes.plot(
                [epoch for epoch, _ in values], [value - first for _, value in values],
                color=COLOURS[colour], linestyle=line, linewidth=1.4, label=f"{site}, from {first:.3g}",
            )  # fmt: skip
        axes.axhline(0, color=COLOURS["line"], linewidth=1)
        axes.set_ylabel("Change of the mean projection")
        axes.set_xlabel("Epochs")
        figure.legend(loc="outside upper center", ncols=2, handlelength=1.6)
        return as_svg(figure, f"{name}-projections", "Change of the projection on selected directions against epochs")
