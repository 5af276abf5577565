"""A comparison as rows, and as a section of a page. Needs no torch."""

from __future__ import annotations

from unweave.core.intervals import Interval
from unweave.core.result import Row
from unweave.methods.saebench.compare.result import ComparedSAEs, Entry, Pair, Table
from unweave.show.figures import COLOURS, as_svg, new_figure, settings
from unweave.show.page import ALONE, Around, Section, figure
from unweave.show.pieces import bounded, esc, number, table


def rows(result: ComparedSAEs) -> list[Row]:
    """Each number of each SAE, and what can be said of pairs."""
    lines: list[Row] = [("model", result.model, "")]
    for one in result.tables:
        lines.append((one.key, one.site, _about(one)))
        for entry in one.entries:
            untold = f"; not told from {', '.join(entry.untold)}" if entry.untold else ""
            lines.append((f"  {entry.sae}", _shown(entry), f"{entry.kind}, L0 {number(entry.l0)}{untold}"))
        lines += [("  " + pair.better, f"{pair.difference:+.3f}", _says(pair)) for pair in one.pairs]
    return lines


def _shown(entry: Entry) -> str:
    return bounded(Interval(entry.value, entry.low, entry.high), 3)


def _about(one: Table) -> str:
    best = "higher" if one.better > 0 else "lower"
    return f"{one.task}, {one.form} form, {best} is better{'; ' + one.why_not if one.why_not else ''}"


def _says(pair: Pair) -> str:
    if pair.l0 is not None:
        return f"ahead of {pair.worse} on the curves at L0 {number(pair.l0)}, by one SAE each way"
    return f"ahead of {pair.worse}" if pair.told else f"not told from {pair.worse}"


def section(result: ComparedSAEs, around: Around = ALONE) -> Section:
    """For each number a table, a figure over L0, and what can be said of pairs."""
    del around
    body = []
    for i, one in enumerate(result.tables):
        lines = [
            (esc(entry.sae), esc(entry.kind), number(entry.l0), _shown(entry),
             esc(", ".join(entry.untold)))
            for entry in one.entries
        ]  # fmt: skip
        says = "; ".join(f"{pair.better} {_says(pair)} ({pair.difference:+.3f})" for pair in one.pairs)
        listed = table(("SAE", "Kind", "L0", "Value", "Not told from"), lines, (2, 3))
        body.append(f"<h3>{esc(one.key)} at {esc(one.site)}</h3><p>{esc(_about(one))}.</p>{listed}")
        body.append(f"<p>{esc(says)}.</p>" if says else "")
        body.append(figure(over_l0(one, f"compare-{i}"), "Each SAE with its 95 % interval; lines join one kind."))
    return Section("Comparison", "SAEs side by side", "".join(body))


def over_l0(one: Table, name: str) -> str:
    """A number against L0, a line for each kind of SAE."""
    import matplotlib

    with matplotlib.rc_context(settings()):
        drawn = new_figure(3.0)
        axes = drawn.add_subplot()
        colours = [COLOURS[key] for key in ("accent", "ink", "soft")]
        for i, kind in enumerate(dict.fromkeys(entry.kind for entry in one.entries)):
            own = [entry for entry in one.entries if entry.kind == kind]
            x, y = [entry.l0 for entry in own], [entry.value for entry in own]
            bars = [[e.value - e.low for e in own], [e.high - e.value for e in own]]
            colour, style = colours[i % len(colours)], ("-", "--", ":")[i // len(colours) % 3]
            axes.errorbar(x, y, bars, marker="o", markersize=3, linestyle=style, color=colour, label=kind)
        axes.set_xscale("log")
        axes.set_xlabel("Active latents per token (L0)")
        axes.set_ylabel(one.key.replace("_", " "))
        axes.legend()
        return as_svg(drawn, name, f"{one.key} of SAEs against their L0")
