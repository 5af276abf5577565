"""How far the weights of each projection moved, by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unweave.methods.compress.result import TensorChange
from unweave.show.figures import LOOKS, as_svg, new_figure, settings


def changes(tensors: Sequence[TensorChange]) -> str:
    """||W' - W|| / ||W|| of each projection over blocks."""
    import matplotlib
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(settings()):
        figure = new_figure(3.2)
        axes: Any = figure.add_subplot()
        for place, name in enumerate(dict.fromkeys(tensor.name for tensor in tensors)):
            own = [tensor for tensor in tensors if tensor.name == name]
            colour, style = LOOKS[place % len(LOOKS)]
            layers, values = [tensor.layer for tensor in own], [tensor.change for tensor in own]
            look = {"color": colour, "linestyle": style, "marker": "o", "markersize": 2.5, "linewidth": 1.2}
            axes.plot(layers, values, label=name, **look)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("Block")
        axes.set_ylabel("Relative change of the weights")
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper right", fontsize=7, ncols=2)
        return as_svg(figure, "compress-changes", "Relative change of each projection's weights by block")
