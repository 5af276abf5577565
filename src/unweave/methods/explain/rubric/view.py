"""A rubric as rows, and as a section of a page. Needs no torch."""

from __future__ import annotations

from unweave.core.result import Row
from unweave.judge.spec import DEFAULT_JUDGE
from unweave.methods.explain.rubric.result import SCALE, Difference, JudgeInfo, RubricResult, Scores
from unweave.show.figures import COLOURS, as_svg, drawing
from unweave.show.page import ALONE, Around, Section, Tile, figure
from unweave.show.pieces import bounded, esc, latent_link, table


def rows(result: RubricResult) -> list[Row]:
    """Scores of latents and of shuffled contexts, and whether the judge tells them apart."""
    lines: list[Row] = [("judge", result.judge.model, "; ".join(notes(result.judge)))]
    lines += _scores("latents", result.real, "latents drawn at random")
    if result.shuffled is not None:
        lines += _scores("shuffled", result.shuffled, "sets of contexts of five different latents")
        above = result.above_shuffled
        chance = "" if above is None or above.p is None else f", p = {above.p:.2g}"
        lines.append(("latents above shuffled", bounded(above) + chance, verdict(above)))
    return lines


def _scores(name: str, scores: Scores, about: str) -> list[Row]:
    failed = f"; {scores.failed} answers could not be used" if scores.failed else ""
    counts = "  ".join(f"{score}: {count}" for score, count in enumerate(scores.distribution, 1))
    return [
        (f"{name}: scored", f"{scores.scored} of {scores.asked}", about + failed),
        (f"{name}: mean score", bounded(scores.mean), "1 no pattern, 5 a clear one; 95 % interval"),
        (f"{name}: 4 or 5", bounded(scores.high), "share"),
        (f"{name}: below 3", bounded(scores.low), "share"),
        (f"{name}: how many", counts, "of each score"),
    ]


def notes(judge: JudgeInfo) -> tuple[str, ...]:
    """What a reader must know of the judge."""
    small = judge.local and judge.model == DEFAULT_JUDGE
    warning = ("a small judge: read its scores only beside those of shuffled contexts",) if small else ()
    return (*((judge.note,) if judge.note else ()), *warning)


def caveats(judge: JudgeInfo) -> tuple[str, ...]:
    """``notes`` as whole sentences, for a page."""
    return tuple(f"The judge, {judge.model}: {note}." for note in notes(judge))


def measures(lines: list[Row]) -> str:
    """Rows as a table of a page."""
    return table(("Measure", "Value", "What it says"), [tuple(map(esc, row)) for row in lines], (), "Scores")


def verdict(above: Difference | None) -> str:
    """Whether the judge's scores say anything of latents."""
    if above is None:
        return "nothing to compare"
    if above.p is None:
        return "too few to tell"
    if above.shown:
        return "the judge tells latents from shuffled contexts"
    return "the judge was not shown to tell latents from shuffled contexts: do not build on its scores"


def section(result: RubricResult, around: Around = ALONE) -> Section:
    """The scores as bars and numbers, and every rated latent with the judge's name for it."""
    lines = [
        (latent_link(one.latent) if one.latent in around.entries else str(one.latent),
         "-" if one.score is None else str(one.score), esc(one.name or "-"))
        for one in result.latents
    ]  # fmt: skip
    scale = "; ".join(f"{score}: {meaning}" for score, meaning in sorted(SCALE.items()))
    lead = (
        f"{esc(result.judge.model)} saw the five strongest contexts of each of {result.real.asked} latents, drawn from "
        f"{result.eligible:,} that fire in five documents or more, and scored how clear their pattern is. {esc(scale)}."
    )
    body = [f"<p>{lead}</p>"]
    if result.shuffled is not None:
        body.append(
            f"<p>The same judge scored {result.shuffled.asked} sets of contexts of five different latents, in which "
            f"there is nothing to see. {esc(verdict(result.above_shuffled).capitalize())}.</p>"
        )
    body += [
        figure(scores_bars(result, around.name), "Share of items with each score."),
        measures(rows(result)),
        table(("Latent", "Score", "The judge's name for it"), lines, (0, 1), "Rated latents"),
    ]
    tiles = ()
    if result.real.mean is not None:
        tiles = (Tile(f"{result.real.mean.value:.1f}", "mean score of latents", verdict(result.above_shuffled)),)
    heading = "How clear latents are to a judge"
    return Section("Rubric", heading, "".join(body), tiles=tiles, notes=(*result.subject.notes, *caveats(result.judge)))


def scores_bars(result: RubricResult, name: str) -> str:
    """The share of latents, and of shuffled contexts, with each score; darker is clearer."""
    groups = [("latents", result.real), ("shuffled contexts", result.shuffled)]
    bars = [(name, scores) for name, scores in groups if scores is not None and scores.scored]
    with drawing(0.9 + 0.5 * len(bars)) as drawn:
        axes = drawn.add_subplot()
        axes.grid(axis="y", visible=False)
        for row, (_, scores) in enumerate(bars):
            left = 0.0
            for score, count in enumerate(scores.distribution, 1):
                share = count / scores.scored
                axes.barh(row, share, left=left, height=0.6, color=COLOURS["accent"], alpha=0.2 * score)
                if count:
                    axes.annotate(str(score), (left + share / 2, row), ha="center", va="center")
                left += share
        axes.set_yticks(range(len(bars)), [f"{name} ({scores.scored})" for name, scores in bars])
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xlabel("Share with each score, 1 (no pattern) to 5 (clear)")
        return as_svg(drawn, f"{name}-scores", "Shares of scores from 1 to 5, of latents and of shuffled contexts")
