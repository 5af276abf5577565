"""SHIFT's table, its figure, and why latents were ablated, from the result alone. Needs no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from unweave.attribute.result import incomplete
from unweave.core.result import Row
from unweave.core.writing import write_file
from unweave.methods.shift.result import LEAST_GAP, MEASURES, METHODS, Judgement, Measure, Method, Seed, ShiftResult
from unweave.show.figures import COLOURS, as_svg, settings
from unweave.show.page import ALONE, Around, Section, Tile, figure
from unweave.show.pieces import capital, esc, number, table
from unweave.show.plots import png
from unweave.show.theme import LIGHT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES: dict[Method, str] = {
    "original": "original",
    "concepts": "concept bottleneck",
    "random": "random latents",
    "shift": "SHIFT",
    "retrain": "SHIFT + retrain",
    "neurons": "neuron skyline",
    "features": "feature skyline",
    "oracle": "oracle",
}
HEADS: dict[Measure, str] = {"profession": "profession ↑", "gender": "gender ↓", "worst": "worst group ↑"}
_COLOURS: dict[Measure, str] = {"profession": "accent", "gender": "mute", "worst": "warm"}
_RECOVERED: tuple[Method, ...] = ("shift", "retrain", "random")


def rows(result: ShiftResult) -> list[Row]:
    """Table 2, what of the gap was recovered, and what a reader must know."""
    lines: list[Row] = []
    for method in METHODS:
        shown = " / ".join(accuracy(result, method, measure) for measure in MEASURES)
        lines.append((NAMES[method], shown, "profession / gender / worst group, %"))
    lines.append(("gap of the worst group", f"{100 * result.gap:.1f}", "points from the original to the oracle"))
    n = len(result.seeds)
    for method in _RECOVERED:
        share = result.recovered(method)
        value = "-" if share is None else f"{100 * share:.0f} %"
        lines.append((f"recovered by {NAMES[method]}", value, f"of that gap; {n} seed{'s' * (n > 1)}"))
    lines.append(("judgement", result.judgement.by, judged(result.judgement)))
    lines.append(("biographies", result.biographies, result.biographies_note))
    return [*lines, *(("warning", "", warning) for warning in warnings(result))]


def accuracy(result: ShiftResult, method: Method, measure: Measure) -> str:
    """ "76.0 ± 3.1", in %; without a deviation where there is one seed."""
    spread = result.spread(method, measure)
    return f"{100 * result.mean(method, measure):.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")


def judged(judgement: Judgement) -> str:
    """How many latents were judged to be what."""
    unknown = judgement.count(None)
    counts = (
        f"of {len(judgement.verdicts)} latents {judgement.count(True)} irrelevant, {judgement.count(False)} relevant"
    )
    return counts + (f", {unknown} without a verdict, which are kept" if unknown else "")


def warnings(result: ShiftResult) -> list[str]:
    """What makes the table say less than it seems to."""
    lines = [_unknown(result.judgement)] if result.judgement.count(None) else []
    if result.gap < LEAST_GAP:
        lines.append(
            f"the oracle's worst group is only {100 * result.gap:.0f} points above the original's: the task is too "
            "easy to say anything about SHIFT"
        )
    sums = {"latents": [seed.sums for seed in result.seeds]}
    sums["neurons of the skyline"] = [seed.neuron_sums for seed in result.seeds]
    for of, by_seed in sums.items():
        off = [(seed, problem) for seed, one in enumerate(by_seed) if (problem := incomplete(one))]
        if off:
            lines.append(f"{of}: {off[0][1]} (seed {', '.join(str(seed) for seed, _ in off)})")
    if bare := [seed for seed, count in enumerate(result.ablated) if not count]:
        lines.append(f"no latent was judged irrelevant for seed {', '.join(map(str, bare))}: nothing was ablated")
    return lines


def _unknown(judgement: Judgement) -> str:
    """How many latents have no verdict, and why."""
    reasons = Counter(verdict.why for verdict in judgement.verdicts if verdict.irrelevant is None)
    if judgement.by == "file":
        reasons = Counter({"the file does not say": reasons.total()})
    listed = "; ".join(f"{reason}: {count}" for reason, count in reasons.items())
    return f"{reasons.total()} of {len(judgement.verdicts)} latents have no verdict and were kept ({listed})"


# -- files ------------------------------------------------------------------------------------------------------------


def save(folder: Path, result: ShiftResult) -> None:
    """Writes table.md, accuracies.svg and accuracies.png."""
    drawn = bars(result, LIGHT)
    contents = {
        "table.md": markdown(result).encode("utf-8"),
        "accuracies.svg": as_svg(bars(result, COLOURS), "shift", _description(result)).encode("utf-8"),
        "accuracies.png": png(drawn),
    }
    for name, content in contents.items():
        write_file(folder / name, content)


def markdown(result: ShiftResult) -> str:
    """The table as the paper has it, with what a reader must know below it."""
    lines = ["| Method | " + " | ".join(HEADS[m] for m in MEASURES) + " |", "|---" * (len(MEASURES) + 1) + "|"]
    for method in METHODS:
        lines.append(f"| {NAMES[method]} | {' | '.join(accuracy(result, method, m) for m in MEASURES)} |")
    lines += [
        "",
        f"Accuracies in %, {_over(result)}. Classifier at {result.site}; latents ablated per seed: "
        f"{', '.join(map(str, result.ablated))}.",
        f"Judgement ({result.judgement.by}): {judged(result.judgement)}.",
    ]
    if result.biographies_note:
        lines.append(f"Data: {result.biographies_note}.")
    lines += [f"Warning: {warning}." for warning in warnings(result)]
    return "\n".join(lines) + "\n"


def _over(result: ShiftResult) -> str:
    n = len(result.seeds)
    return "one seed" if n == 1 else f"mean ± standard deviation over {n} seeds"


def bars(result: ShiftResult, colours: Mapping[str, str]) -> Figure:
    """Three bars per method, with the standard deviation over seeds; a dotted line at chance."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(settings(colours)):
        drawn = Figure(figsize=(8.6, 3.6))
        drawn.patch.set_facecolor(colours["bg"])
        ax = drawn.subplots()
        ax.grid(axis="x", visible=False)
        for place, measure in enumerate(MEASURES):
            at = [i + 0.26 * (place - 1) for i in range(len(METHODS))]
            spreads = [100 * (result.spread(method, measure) or 0.0) for method in METHODS]
            ax.bar(
                at, [100 * result.mean(method, measure) for method in METHODS], 0.23, yerr=spreads,
                color=colours[_COLOURS[measure]], label=HEADS[measure],
                error_kw={"ecolor": colours["ink"], "elinewidth": 0.9},
            )  # fmt: skip
        ax.axhline(50, color=colours["faint"], linewidth=0.8, linestyle=":")
        ax.set_xticks(range(len(METHODS)), [NAMES[method].replace(" ", "\n", 1) for method in METHODS])
        ax.set_ylim(0, 104)
        ax.set_ylabel("Accuracy, %")
        handles, labels = ax.get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return drawn


def _description(result: ShiftResult) -> str:
    shown = "; ".join(f"{NAMES[method]}: {accuracy(result, method, 'worst')} %" for method in METHODS)
    return f"Accuracy of the worst group by method: {shown}"


# -- a page -----------------------------------------------------------------------------------------------------------


def section(result: ShiftResult, around: Around = ALONE) -> Section:
    """The table, the figure, and every seed's numbers and latents."""
    data = f" {esc(result.biographies_note)}." if result.biographies_note else ""
    parts = [
        f"<p>A classifier of professors and nurses at {esc(result.site)} was trained where gender and profession say "
        "the same. Latents that it rests on and that are not about the profession were set to zero; gender should then "
        "be no better than chance, and the worst of the four groups as right as the others. "
        f"Biographies: {esc(result.biographies)}.{data}</p>",
        summary(result),
        f"<p>Judgement ({esc(result.judgement.by)}): {esc(judged(result.judgement))}.</p>",
        *(f"<p>{esc(capital(warning))}.</p>" for warning in warnings(result)),
        *(_seed(result, number, seed) for number, seed in enumerate(result.seeds)),
    ]
    share = result.recovered("shift")
    words = f"Of the gap of {100 * result.gap:.0f} points between the worst group's accuracies, original to oracle."
    tiles = () if share is None else (Tile(f"{100 * share:.0f}\u202f%", "of the gap recovered by SHIFT", words),)
    return Section("SHIFT", "A classifier without gender", "".join(parts), tiles=tiles, notes=result.subject.notes)


def summary(result: ShiftResult) -> str:
    """The table over seeds and the figure, as HTML."""
    lines = [
        (esc(NAMES[method]), *(esc(accuracy(result, method, measure)) for measure in MEASURES)) for method in METHODS
    ]
    drawn = as_svg(bars(result, COLOURS), "shift", _description(result))
    listed = table(("Method", *HEADS.values()), lines, (1, 2, 3), f"Accuracies in %, {_over(result)}")
    return listed + f'<div class="uw-wide">{figure(drawn, f"Accuracies in %, {_over(result)}; dotted: chance.")}</div>'


def _seed(result: ShiftResult, number_: int, seed: Seed) -> str:
    """One seed's table with intervals, and its latents with the verdicts."""
    lines = []
    for method in METHODS:
        for draw, reached in enumerate(seed.of(method)):
            name = NAMES[method] + (f", draw {draw + 1}" if len(seed.of(method)) > 1 else "")
            cells = (_interval(*reached.share(m).interval, reached.share(m).value) for m in MEASURES)
            lines.append((esc(name), *cells))
    verdicts = {(v.site, v.latent): v for v in result.judgement.verdicts}
    words = {True: "ablated", False: "kept", None: "kept: no verdict"}
    latents = [
        (esc(latent.name), number(latent.effect), words[v.irrelevant], esc(v.why))
        for latent in seed.circuit
        if (v := verdicts.get((latent.site, latent.latent))) is not None
    ]
    return (
        f"<details><summary>Seed {number_}: {len(seed.circuit)} latents in the circuit, {result.ablated[number_]} "
        "ablated</summary>"
        + table(("Method", *HEADS.values()), lines, (1, 2, 3), "Accuracies in %, with Wilson's 95 % intervals")
        + table(("Latent", "Support, logits", "Verdict", "Why"), latents, (1,))
        + "</details>"
    )


def _interval(low: float, high: float, value: float) -> str:
    return f"{100 * value:.1f} ({100 * low:.0f}\u2013{100 * high:.0f})"
