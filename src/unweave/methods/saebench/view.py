"""SAEBench's measures as rows, and as a section of a page. Needs no torch."""

from __future__ import annotations

from unweave.core.intervals import Interval
from unweave.core.result import Row
from unweave.methods.saebench.result import Measure, SaebenchResult, Scores
from unweave.show.page import ALONE, Around, Section, Tile
from unweave.show.pieces import bounded, esc, number, table


def rows(result: SaebenchResult) -> list[Row]:
    """The headline numbers with their baselines, and what could not run."""
    lines: list[Row] = [
        ("model", result.subject.named_model, ""),
        ("form", result.form, f"{result.seeds} seeds; 95 % intervals over them"),
    ]
    for one in result.scores:
        lines.append((f"{one.task}", one.sae, f"{one.site}, L0 {number(one.l0)}, on {one.source}"))
        lines += [(f"  {m.key}", shown(m), verdict(m)) for m in one.measures if m.better]
    lines += [(f"{one.task} not run", one.sae or str(one.site), one.reason) for one in result.not_run]
    return lines


def shown(measure: Measure) -> str:
    """ "0.83 [0.80, 0.86]" """
    return bounded(Interval(measure.value, measure.low, measure.high), 3)


def verdict(measure: Measure) -> str:
    """What a headline number can carry, in a sentence."""
    if not measure.gaps:
        return "nothing to compare with"
    beside = ", ".join(f"{gap.baseline} {gap.value:.3f}" for gap in measure.gaps)
    least = f"differences below {measure.smallest:.3f} go unseen"
    if measure.untold:
        return f"cannot tell the SAE from {' and '.join(measure.untold)} ({beside}; {least})"
    return f"{beside}; {least}"


def section(result: SaebenchResult, around: Around = ALONE) -> Section:
    """A table for each task and SAE, headline numbers first, each with interval, resolution and baselines."""
    del around
    form = "as they should be" if result.form == "correct" else "as SAEBench computes them"
    body = [
        f"<p>Measures of SAEBench, {form}, over {result.seeds} seeds that draw data and probes anew, with 95 % "
        "intervals. A difference of two SAEs below the resolution goes unseen more often than once in five times.</p>"
    ]
    for one in result.scores:
        body.append(_scores(one))
    for one in result.not_run:
        body.append(f"<p>{esc(one.task)} did not run at {esc(one.site)} {esc(one.sae)}: {esc(one.reason)}</p>")
    tiles = tuple(
        Tile(number(m.value), f"{m.key} of {one.sae}", verdict(m)) for one in result.scores[:1] for m in one.measures
        if m.better
    )  # fmt: skip
    notes = dict.fromkeys(result.subject.notes)
    notes |= dict.fromkeys(note for one in result.scores for note in one.notes)
    return Section("SAEBench", "SAEBench's measures", "".join(body), tiles=tiles[:2], notes=tuple(notes))


def _scores(one: Scores) -> str:
    names = dict.fromkeys(gap.baseline for m in one.measures for gap in m.gaps)
    lines = []
    for m in sorted(one.measures, key=lambda m: not m.better):
        of = {gap.baseline: gap for gap in m.gaps}
        beside = [number(of[name].value) if name in of else "" for name in names]
        says = f"cannot tell it from {' and '.join(m.untold)}" if m.untold else ""
        lines.append((esc(m.key), esc(shown(m)), number(m.smallest), *beside, esc(says)))
    head = ("Measure", "Value", "Resolution", *map(str.capitalize, names), "")
    about = f"<h3>{esc(one.task)}: {esc(one.sae)} at {esc(one.site)}</h3><p>{esc(one.source)}. L0 {number(one.l0)}.</p>"
    return f'{about}<div class="uw-wide">{table(head, lines, tuple(range(1, 3 + len(names))))}</div>'
