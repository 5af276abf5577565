"""Figures as SVG text that follows the page's colour scheme.

Drawn with matplotlib's SVG backend, without pyplot and its global state. Colours are drawn as stand-ins and replaced
with ``var(--uw-name, light colour)``: inside the page they follow its scheme, alone the file shows the light one.
Text stays text, identifiers are prefixed by the figure's name, and equal input gives equal bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any, TypeGuard

from unweave.show.theme import LIGHT, MARK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# one stand-in per colour of the scheme, far from anything matplotlib draws by itself
COLOURS = {name: f"#0a{index:02x}fe" for index, name in enumerate(LIGHT)}
LOOKS = [(COLOURS[name], style) for style in ("-", "--", ":") for name in ("accent", "warm", "ink", "mute")]
"""colour and style of each of many lines in one figure"""
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_WIDTH, HEIGHT = 4.7, 3.2  # inches; two figures side by side on a wide page, one on a phone
_MAX_POINTS = 600


def settings(colours: Mapping[str, str] = COLOURS) -> dict[Any, Any]:
    """Matplotlib's settings; the stand-in colours are for ``as_svg``, others for pictures."""
    c = colours
    return {
        "svg.fonttype": "none", "svg.hashsalt": "unweave", "font.size": 8.5, "font.family": "DejaVu Sans",
        "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
        "axes.edgecolor": c["line"], "axes.labelcolor": c["soft"], "xtick.color": c["line"], "ytick.color": c["line"],
        "xtick.labelcolor": c["soft"], "ytick.labelcolor": c["soft"], "text.color": c["ink"],
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": c["grid"],
        "grid.linewidth": 0.8, "axes.axisbelow": True, "axes.linewidth": 0.8, "legend.frameon": False,
        "legend.fontsize": 8.5, "axes.unicode_minus": True, "lines.solid_capstyle": "round", "axes.labelpad": 5,
        "xtick.major.size": 3, "ytick.major.size": 0, "figure.constrained_layout.use": True, "path.simplify": False,
    }  # fmt: skip


@contextmanager
def drawing(height: float) -> Iterator[Figure]:
    """A new figure of this height in inches, drawn and made SVG under the settings of a page's figures."""
    import matplotlib

    with matplotlib.rc_context(settings()):
        yield new_figure(height)


def new_figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height))


def as_svg(figure: Figure, name: str, description: str) -> str:
    """Return the figure as one <svg> element with themed colours, prefixed identifiers and a text description."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg ") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    text = re.sub(r'\bid="', f'id="{MARK}{name}-', text)
    text = re.sub(r"url\(#", f"url(#{MARK}{name}-", text)
    text = re.sub(r'(<use [^>]*?xlink:href="#)', rf"\g<1>{MARK}{name}-", text)
    for key, colour in COLOURS.items():
        text = text.replace(colour, f"var(--uw-{key}, {LIGHT[key]})")
    text = re.sub(r"'DejaVu Sans'(?:, [^;\"]*)?", _FONT, text)
    head = f'<svg role="img" aria-label="{escape(description, quote=True)}" class="uw-figure" '
    return head + text[len("<svg ") :].strip()


def thin(values: Sequence[float], most: int = _MAX_POINTS) -> list[int]:
    """Return positions that keep at most ``most`` points, first and last among them."""
    if len(values) <= most:
        return list(range(len(values)))
    return sorted({round(i * (len(values) - 1) / (most - 1)) for i in range(most)})


def finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def tokens_axis(axes: Axes, largest: float) -> None:
    units = ((1e9, "billion "), (1e6, "million "), (1e3, "thousand "), (0.0, ""))
    unit, name = next((unit or 1.0, name) for unit, name in units if largest >= unit)
    axes.xaxis.set_major_formatter(lambda value, _position: f"{value / unit:g}")
    axes.set_xlabel(f"{name}tokens".capitalize())
    axes.set_xlim(0, largest or 1)
