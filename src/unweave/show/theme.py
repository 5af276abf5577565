"""Colours and style sheets, in one place: the page, a notebook's cards, the figures and the explorer share them.

Figures are drawn in ``LIGHT`` colours and refer to the variables, so that they follow the reader's colour scheme.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import resources

MARK = "uwf-"
"""How the ids of figures begin; a page with several of one name tells them apart by it."""
LIGHT = {
    "bg": "#fcfbf8",
    "panel": "#ffffff",
    "sunk": "#f4f1ea",
    "ink": "#1e2124",
    "soft": "#53575c",
    "faint": "#666a6f",
    "line": "#dcd7cb",
    "grid": "#e9e5dc",
    "accent": "#0b6470",
    "warm": "#a8480c",
    "mute": "#8c887f",
    "heat": "#f5a742",
    "heat-ink": "#1e1406",
}
DARK = {
    "bg": "#15181b",
    "panel": "#1c2024",
    "sunk": "#22272c",
    "ink": "#e8e6e1",
    "soft": "#b6b8b8",
    "faint": "#979b9e",
    "line": "#343a40",
    "grid": "#2b3035",
    "accent": "#6cc5d1",
    "warm": "#f0a063",
    "mute": "#74797d",
    "heat": "#a9540e",
    "heat-ink": "#fff6e9",
}
HEAT_LEVELS = 9
"""Activations are shown in this many steps above zero."""


def heat_alpha(level: int) -> float:
    """Return the opacity of the highlight at ``level`` of 0..HEAT_LEVELS; a first step well above nothing."""
    return 0.0 if level <= 0 else round(0.1 + 0.9 * (level / HEAT_LEVELS) ** 1.2, 3)


def _variables(palette: dict[str, str], scheme: str) -> str:
    heat = " ".join(str(int(palette["heat"][at : at + 2], 16)) for at in (1, 3, 5))
    return f"color-scheme:{scheme};--uw-heat-rgb:{heat};" + "".join(f"--uw-{k}:{v};" for k, v in palette.items())


@lru_cache(maxsize=1)
def palette_css() -> str:
    """Return the variables of both schemes and the highlight levels; ``data-theme`` on the ``.uw`` root overrides."""
    light, dark = _variables(LIGHT, "light"), _variables(DARK, "dark")
    levels = "".join(
        f".uw .uw-a{n}{{background-color:rgb(var(--uw-heat-rgb)/{heat_alpha(n)});}}" for n in range(1, HEAT_LEVELS + 1)
    )
    strong = ",".join(f".uw .uw-a{n}" for n in range(6, HEAT_LEVELS + 1))
    return (
        f".uw{{{light}}}\n@media (prefers-color-scheme:dark){{.uw:not([data-theme=light]){{{dark}}}}}\n"
        f".uw[data-theme=dark]{{{dark}}}\n{levels}\n{strong}{{color:var(--uw-heat-ink);}}\n"
    )


@lru_cache(maxsize=8)
def asset(name: str) -> str:
    """Return the text of a style sheet or script that is shipped inside this package, e.g. "explorer.js"."""
    return resources.files("unweave.show").joinpath(name).read_text(encoding="utf-8")
