"""Measures beside the truth, as rows and as a section of a page. Needs no torch."""

from __future__ import annotations

from unweave.core.result import Row
from unweave.methods.saebench.known.result import KnownResult
from unweave.show.page import ALONE, Around, Section
from unweave.show.pieces import esc, table


def rows(result: KnownResult) -> list[Row]:
    """Each measure of each SAE, and what is true."""
    lines: list[Row] = [("features", result.features, f"{_about(result)}; {result.tokens:,} activations")]
    for sae in dict.fromkeys(one.sae for one in result.measures):
        lines.append((sae, "", ""))
        lines += [(f"  {one.key}", _shown(one.measured), f"truth {_shown(one.truth)}")
                  for one in result.measures if one.sae == sae]  # fmt: skip
    return lines


def _about(result: KnownResult) -> str:
    return f"in {result.width} dimensions{', in superposition' if result.features > result.width else ''}"


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def section(result: KnownResult, around: Around = ALONE) -> Section:
    """A table with a row for each SAE and two columns for each measure."""
    del around
    keys = list(dict.fromkeys(one.key for one in result.measures))
    of = {(one.sae, one.key): one for one in result.measures}
    lines = [
        (esc(sae), *(_shown(value) for key in keys for value in (of[sae, key].measured, of[sae, key].truth)))
        for sae in dict.fromkeys(one.sae for one in result.measures)
    ]
    head = ("SAE", *(word for key in keys for word in (key.replace("_", " ").capitalize(), "Truth")))
    about = f"<p>{result.features} known features {_about(result)}, {result.tokens:,} activations.</p>"
    listed = f'<div class="uw-wide">{table(head, lines, tuple(range(1, len(head))))}</div>'
    return Section("Known features", "Measures beside the truth", about + listed)
