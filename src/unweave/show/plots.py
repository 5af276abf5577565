"""What every matplotlib figure here shares: a quiet panel, and how it becomes a file."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

from unweave.show.theme import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def quiet(ax: Axes, colours: Mapping[str, str] = LIGHT) -> None:
    """Horizontal lines behind the data, no frame above and to the right, soft labels."""
    ax.set_facecolor(colours["panel"])
    ax.grid(axis="y", color=colours["grid"], linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(colours["line"])
    ax.tick_params(colors=colours["soft"], labelsize=9)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144, metadata={"Software": None})
    return buffer.getvalue()
