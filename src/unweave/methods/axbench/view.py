"""A comparison as rows, and as a section of a page. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator

from unweave.core.result import Row
from unweave.methods.axbench.result import METHODS, RATINGS, SUPPRESSIONS, Comparison, Judged
from unweave.show.figures import COLOURS, as_svg, drawing
from unweave.show.page import ALONE, Around, Section, Tile, beside, figure
from unweave.show.pieces import bounded, esc, number, table

_BEST = 30


def rows(result: Comparison) -> list[Row]:
    """Methods' ratings by every judge, what random latents leave of them, suppression, and detection."""
    lines: list[Row] = [
        ("pairs", len(result.pairs), f"{result.instructions} instructions each; concepts are tags of {result.texts}"),
        ("texts", result.cost.texts, f"up to {result.cost.tokens:,} new tokens; {result.cost.prompts:,} judge prompts"),
    ]
    for reason, names in _left_out(result).items():
        lines.append(("left out", len(names), f"{', '.join(names)}: {reason}"))
    for judged in result.judged:
        lines.append(("judge", judged.judge, judged.note))
        for one in judged.checks:
            lines.append((f"  check: {one.form}", number(one.auroc), one.verdict))
        for score in judged.scores:
            parts = ", ".join(f"{name} {bounded(part)}" for name, part in zip(RATINGS, score.parts, strict=True))
            lines.append((f"  {score.method}", bounded(score.rating), parts))
            if score.above_random is not None:
                concept = f"rating; its concept's {bounded(score.concept_above_random)}"
                lines.append(("    above random latents", bounded(score.above_random), concept))
        for one in judged.suppression:
            less = "" if one.less is None else f"; lower by {bounded(one.less)}"
            lines.append(
                (f"  suppressed: {one.edit}", bounded(one.parts[0]), f"concept; {SUPPRESSIONS[one.edit]}{less}")
            )
        for one in judged.selection:
            lines.append((f"  better half by {one.score}", bounded(one.rating), f"others {bounded(one.others)}"))
    for found in result.detection:
        text = f"AUROC by largest value; by mean {bounded(found.mean)}; hard negatives alone {bounded(found.max_hard)}"
        lines.append((f"detection: {found.method}", bounded(found.max), text))
    return lines


def _left_out(result: Comparison) -> dict[str, list[str]]:
    """The pairs that were left out, by reason."""
    by_reason: dict[str, list[str]] = {}
    for one in result.left_out:
        by_reason.setdefault(one.reason, []).append(f"{one.concept} ({one.pair})")
    return by_reason


def section(result: Comparison, around: Around = ALONE) -> Section:
    """Every judge's figures and tables, then detection and the pairs."""
    strengths = "10 repeats of 4 folds" if result.split == "folds" else "the first half of its instructions"
    body = [
        f"<p>{len(result.pairs)} pairs of a latent and a label were steered ({esc(result.mode)}) on "
        f"{result.instructions} instructions each, at every strength, and rated from 0 to 2 for concept, instruction "
        f"and fluency; a text's rating is their harmonic mean. Each pair's strength was chosen by {strengths} and is "
        "reported on the others. Intervals are 95 %, by a bootstrap over concepts.</p>"
    ]
    tiles: tuple[Tile, ...] = ()
    for place, judged in enumerate(result.judged):
        body += _judged(judged, f"{around.name}-{place}")
        own = next((score for score in judged.scores if score.method == "sae"), None)
        if not tiles and own is not None and own.above_random is not None:
            sentence = "labelled latents' rating above random latents', 95 % interval over concepts"
            tiles = (Tile(bounded(own.above_random), f"by {judged.judge}", sentence),)
    detection = [(METHODS[one.method], *map(bounded, (one.mean, one.max, one.max_hard))) for one in result.detection]
    head = ("Method", "Mean of a text", "Largest value", "Against hard negatives")
    body.append(_table(head, detection, "Detection on held-out texts, AUROC"))
    unread = [
        f"The ratings of {judged.judge} for {one.form}: {one.verdict}."
        for judged in result.judged
        for one in judged.checks
        if not one.reads
    ]
    missing = [f"Left out: {', '.join(names)}: {reason}." for reason, names in _left_out(result).items()]
    notes = (*result.subject.notes, *missing, *unread)
    return Section("AxBench", "Steering, judged as AxBench does", "".join(body), tiles=tiles, notes=notes)


def _judged(judged: Judged, name: str) -> Iterator[str]:
    checks = "; ".join(f"{one.form} {one.verdict}" for one in judged.checks)
    yield f"<h3>{esc(judged.judge)}</h3><p>{esc(judged.note)} On known cases: {esc(checks)}.</p>"
    yield beside(
        figure(bars(judged, name), "Each method's rating at the strength chosen for each pair."),
        figure(curves(judged, name), "Mean over all pairs at each strength."),
    )
    ratings = tuple(map(str.capitalize, RATINGS))
    scores = [
        (METHODS[one.method], *map(bounded, (one.rating, *one.parts, one.above_random, one.concept_above_random)))
        for one in judged.scores
    ]
    yield _table(("Method", "Rating", *ratings, "Above random", "Concept above random"), scores, "Ratings")
    left = [(SUPPRESSIONS[one.edit], *map(bounded, (*one.parts, one.less))) for one in judged.suppression]
    yield _table(("Taken away while the prompt asks for it", *ratings, "Concept lower by"), left, "Suppression")
    chosen = [
        (one.score, str(one.pairs), *map(bounded, (one.rating, one.others, one.concept)), number(one.correlation))
        for one in judged.selection
    ]
    head = ("Better half by", "Pairs", "Rating", "Others", "Concept", "Rank correlation")
    yield _table(head, chosen, "Selection of pairs")
    best = sorted((one for one in judged.rated if one.method == "sae"), key=lambda one: -(one.rating or 0.0))[:_BEST]
    pairs = [
        (one.concept, one.pair, *map(number, (one.strength, one.rating, *one.parts)), str(one.failed)) for one in best
    ]
    yield _table(("Label", "Latent", "Strength", "Rating", *ratings, "Failed"), pairs, "Best pairs")


def _table(head: tuple[str, ...], lines: list[tuple[str, ...]], name: str) -> str:
    return table(head, [tuple(map(esc, line)) for line in lines], range(1, len(head)), name) if lines else ""


_STYLES = {
    "sae": ("accent", "-", "o"),
    "random": ("mute", "-", "o"),
    "diffmean": ("warm", "-", "s"),
    "probe": ("warm", "--", "^"),
    "reft": ("ink", "-", "D"),
    "lora": ("ink", "-.", ""),
    "prompt": ("ink", ":", ""),
    "unedited": ("mute", ":", ""),
}
"""colour, line and marker of each method"""
_SHORT = {"sae": "labelled latents", "random": "random latents", "prompt": "prompt", "unedited": "unedited"}


def _label(method: str) -> str:
    return _SHORT.get(method, METHODS[method])


def bars(judged: Judged, name: str) -> str:
    """Each method's mean rating (bar) and concept rating (dot), with 95 % intervals over concepts."""
    shown = [score for score in judged.scores if score.rating is not None]
    with drawing(1.0 + 0.36 * len(shown)) as drawn:
        axes = drawn.add_subplot()
        axes.grid(axis="y", visible=False)
        for row, score in enumerate(shown):
            for interval, shift, colour in ((score.rating, 0.0, "ink"), (score.parts[0], 0.28, "warm")):
                if interval is None:
                    continue
                if shift:
                    axes.scatter([interval.value], [row + shift], s=18, color=COLOURS[colour], zorder=3)
                else:
                    alpha = 0.85 if score.method == "sae" else 0.4
                    axes.barh(row, interval.value, height=0.5, color=COLOURS["accent"], alpha=alpha)
                if interval.low is not None and interval.high is not None:
                    axes.plot([interval.low, interval.high], [row + shift] * 2, color=COLOURS[colour], linewidth=1.2)
        axes.set_yticks(range(len(shown)), [_label(score.method) for score in shown])
        axes.invert_yaxis()
        axes.set_xlim(0, 2)
        axes.set_xlabel("Rating, 0 to 2 (bar: harmonic mean; dot: concept)")
        return as_svg(drawn, f"{name}-methods", "Mean rating of each method with its interval over concepts")


def curves(judged: Judged, name: str) -> str:
    """Mean rating of each method against its strength; those without one are level lines."""
    with drawing(3.2) as drawn:
        axes = drawn.add_subplot()
        factors = [point.factor for point in judged.points if point.factor is not None]
        for method in dict.fromkeys(point.method for point in judged.points):
            points = [(p.factor, p.rating) for p in judged.points if p.method == method and p.rating is not None]
            colour, line, marker = _STYLES[method]
            style = {"color": COLOURS[colour], "linestyle": line, "linewidth": 1.5, "label": _label(method)}
            if points and points[0][0] is None:
                axes.axhline(points[0][1], **style)
            elif points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, marker=marker, markersize=3.5, **style)
        if factors and max(factors) > 20 * min(factors):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _position: f"{value:g}")
        axes.set_ylim(0, 2)
        axes.set_xlabel("Strength, in largest activations")
        axes.set_ylabel("Mean rating")
        drawn.legend(loc="outside upper center", ncols=3, handlelength=1.6)
        return as_svg(drawn, f"{name}-strengths", "Mean rating of each method against its strength")
