"""The pieces of the report: numbers and tokens as text, highlights, colours, figures."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.report import trace
from unweave.methods.evaluate.figures import cross_entropy_bars, density
from unweave.methods.trace.figures import attribution_scatter
from unweave.methods.trace.result import Effect
from unweave.methods.train.result import Curve
from unweave.methods.train.view import loss_curve
from unweave.sae.measure.result import Density
from unweave.show.model import ContextEntry
from unweave.show.pieces import context_html, duration, level, number, percent, token_chip, visible
from unweave.show.theme import DARK, HEAT_LEVELS, LIGHT, heat_alpha

# ---- numbers ----


def test_numbers_are_rounded_with_care() -> None:
    assert [number(v) for v in (0.18, 0.0, 1234567.0, 3.41234, -1.5, 32.0)] == [
        "0.180",
        "0",
        "1,234,567",
        "3.41",
        "\u22121.50",
        "32.0",
    ]
    assert number(None) == number(math.nan) == percent(None) == "n/a"
    assert percent(0.0042) == "0.42\u202f%" and percent(1.0) == "100\u202f%" and percent(0.5) == "50\u202f%"
    assert [duration(s) for s in (4.21, 200, 3900, 59.99)] == ["4.2 s", "3 min 20 s", "1 h 05 min", "60.0 s"]


@given(st.floats(0.1, 1, exclude_max=True))
def test_less_than_everything_never_reads_as_everything(fraction: float) -> None:
    assert percent(fraction) != percent(1.0)


# ---- tokens ----


def test_whitespace_and_fragments_are_visible() -> None:
    assert [visible(t) for t in ("\n", "\t", " ", "", "\x00", "\u200b", "a\nb")] == [
        "↵",
        "⇥",
        "␣",
        "∅",
        "␀",
        "[U+200B]",
        "a↵b",
    ]
    assert '<span class="uw-blank">·</span>are' in token_chip(" are")
    assert "uw-blank" not in token_chip("are") and "�" in token_chip("\ud83d")


@given(st.floats(1e-12, 1e6), st.floats(1e-6, 1e6))
def test_highlight_is_seen_wherever_a_latent_fires(activation: float, scale: float) -> None:
    step = level(activation, scale)
    assert 1 <= step <= HEAT_LEVELS
    assert activation < scale or step == HEAT_LEVELS
    assert level(-activation, scale) == level(0.0, scale) == level(activation, 0.0) == 0


def test_context_highlights_by_activation_and_marks_its_peak() -> None:
    context = ContextEntry("top", ["<i>", " b", " c"], [0.0, 1.0, 2.0], 2)
    html = context_html(context, 2.0)
    assert html.startswith('<p class="uw-context">&lt;i&gt; <span class="uw-a4"')
    assert '<span class="uw-a9 uw-peak"' in html and html.endswith("c</span></p>")


@pytest.mark.parametrize(("acts", "peak"), [([1.0], 0), ([1.0, 2.0], 2), ([1.0, 2.0], -1)])
def test_a_context_that_does_not_fit_together_is_refused(acts: list[float], peak: int) -> None:
    with pytest.raises(ValueError, match="one activation per token"):
        ContextEntry("top", ["a", "b"], acts, peak)


# ---- colours ----


def luminance(rgb: list[float]) -> float:
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: list[float], b: list[float]) -> float:
    bright, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_text_stands_out_in_both_schemes(palette: dict[str, str]) -> None:
    rgb = {name: [float(int(value[at : at + 2], 16)) for at in (1, 3, 5)] for name, value in palette.items()}
    for text in ("ink", "soft", "faint", "accent", "warm"):
        for ground in ("bg", "panel", "sunk"):
            assert contrast(rgb[text], rgb[ground]) >= 4.5, (text, ground)
    assert min(contrast(rgb["mute"], rgb[ground]) for ground in ("bg", "panel", "sunk")) >= 3  # borders and marks
    for step in range(1, HEAT_LEVELS + 1):
        alpha = heat_alpha(step)
        ground = [alpha * h + (1 - alpha) * p for h, p in zip(rgb["heat"], rgb["panel"], strict=True)]
        assert contrast(rgb["heat-ink" if step >= 6 else "ink"], ground) >= 4.5, step


# ---- figures ----

CURVE = Curve(tuple(100_000 * i for i in range(1, 50)), tuple(1 / i for i in range(1, 50)), (0.1,) * 49)


def test_figures_follow_the_colour_scheme_and_keep_text() -> None:
    svg = loss_curve(CURVE)
    assert svg.startswith("<svg ") and svg.endswith("</svg>") and "#0a" not in svg
    assert f"var(--uw-accent, {LIGHT['accent']})" in svg
    assert ">Unexplained variance</text>" in svg and "Million tokens" in svg


def test_scatter_links_its_points_and_says_the_correlations() -> None:
    svg = attribution_scatter(trace(), "ig")
    assert set(re.findall(r'href="#latent-(\d+)"', svg)) == {"0", "1", "2", "3", "5", "6"}
    assert "r = 0.98" in svg and "random latents:  r = 0.98" in svg
    other = attribution_scatter(trace(), "attribution")  # whose order is undefined
    assert "nan" not in other and "ρ" not in other and "r = 0.98" in other


def test_figures_stand_extreme_input() -> None:
    density(Density((-3.0, -2.0), (0,), 8))
    density(Density((-3.0, -2.0, -1.0), (4, 0), 0))
    loss_curve(Curve((1,), (math.nan,), (0.0,)))
    cross_entropy_bars(3.0, None, math.nan, 4.0)
    odd = replace(trace(), effects=(Effect(1, True, 0.0, math.inf, 0.0, 0.0),))
    attribution_scatter(odd, "attribution")
    long = loss_curve(Curve(tuple(range(1, 100_001)), (1.0,) * 100_000, (0.0,) * 100_000))
    assert len(long) < 90_000
