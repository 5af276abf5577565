"""Explanations as rows, and as a section of a page. Needs no torch."""

from __future__ import annotations

from unweave.core.result import Row
from unweave.methods.explain.result import ExplainedLatent, ExplainResult, ScoreSummary
from unweave.methods.explain.rubric.view import notes, shown
from unweave.show.page import ALONE, Around, Section, Tile
from unweave.show.pieces import esc, latent_link, table

_SCALES = {
    "detection": "AUROC, 0.5 is chance",
    "fuzzing": "AUROC, 0.5 is chance",
    "simulation": "correlation, 0 is chance",
    "rubric": "1 no pattern, 5 a clear one",
}


def rows(result: ExplainResult) -> list[Row]:
    """The judge and whether it reads, what asking takes, and every score beside its controls."""
    lines: list[Row] = [("judge", result.judge.model, "; ".join(notes(result.judge)))]
    if result.check is not None:
        kinds = ", ".join(f"{kind} {_number(value)}" for kind, value in result.check.aurocs.items())
        lines.append(("judge on known cases", result.check.verdict.split(":")[0], f"{result.check.verdict}; {kinds}"))
    plan = result.estimate
    lines.append(("prompts", plan.prompts, f"about {plan.tokens_per_latent:,} tokens for each latent"))
    lines.append(("tokens", plan.prompt_tokens + plan.new_tokens, f"estimated, {plan.new_tokens:,} of them replies"))
    if plan.price is not None:
        lines.append(("price", f"{plan.price:.2f}", "estimated, at the prices given"))
    if result.seconds is not None:
        lines.append(("minutes", f"{result.seconds / 60:.1f}", "at the pace of the first prompt"))
    if not result.latents:
        return lines
    explained = sum(bool(one.explanation) for one in result.latents)
    few = f"; {len(result.too_few)} of those named fire in too few documents" if result.too_few else ""
    lines.append(("explained", f"{explained} of {len(result.latents)}", f"latents{few}"))
    for one in result.scores:
        failed = f"; {one.failed} of {one.asked} answers could not be used" if one.failed else ""
        lines.append((one.score, shown(one.chosen), f"{_SCALES[one.score]}; 95 % interval{failed}{_unread(result)}"))
        if one.shuffled is not None:
            lines.append((f"{one.score}: control", shown(one.shuffled), _control(one)))
            lines.append((f"{one.score}: above control", shown(one.above), verdict(one)))
        if one.random is not None:
            lines.append((f"{one.score}: random latents", shown(one.random), "drawn beside those named"))
    if any(one.selected is not None for one in result.latents):
        lines.append(("selected", sum(bool(one.selected) for one in result.latents), "latents, by the query"))
    return lines


def _control(one: ScoreSummary) -> str:
    return "contexts of five different latents" if one.score == "rubric" else "the explanations of other latents"


def verdict(one: ScoreSummary) -> str:
    """Whether a score says anything of explanations."""
    if one.above is None or one.above.p is None:
        return "too few to tell"
    p = f"p = {one.above.p:.2g}"
    return f"above its control, {p}" if one.above.shown else f"not shown to be above its control, {p}"


def _unread(result: ExplainResult) -> str:
    return "; by a judge not shown to read" if result.check is not None and not result.check.reads else ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def section(result: ExplainResult, around: Around = ALONE) -> Section:
    """Every score beside its controls, and every latent with its explanation, best first."""
    names = [one.score for one in result.scores]
    head = ("Latent", "Explanation", *(name.capitalize() for name in names), "Input", "Output", "Kind", "Relevance")

    def line(one: ExplainedLatent) -> tuple[str, ...]:
        name = latent_link(one.latent) if one.latent in around.entries else str(one.latent)
        words = esc(one.explanation or f"({one.failure})") + (" (random)" if one.random else "")
        numbers = (*(one.scores.get(score) for score in names), one.input_score, one.output_score)
        chosen = " *" if one.selected else ""
        return (name, words, *map(_number, numbers), one.kind or "-", _number(one.relevance) + chosen)

    def best(one: ExplainedLatent) -> float:
        value = one.scores.get(names[0]) if names else None
        return -9.0 if value is None else value

    lines = [line(one) for one in sorted(result.latents, key=best, reverse=True)]
    lead = (
        f"<p>{esc(result.judge.model)} saw contexts of {len(result.latents)} latents and said what they share. Each "
        "explanation was tested on contexts of other documents, and so was another latent's on the same contexts.</p>"
    )
    body = lead + table(
        ("Measure", "Value", "What it says"), [tuple(map(esc, row)) for row in rows(result)], (), "Scores"
    )
    body += table(head, lines, (0, *range(2, 4 + len(names)), 5 + len(names)), "Explanations") if lines else ""
    first = next((one for one in result.scores if one.chosen is not None), None)
    tiles = ()
    if first is not None and first.chosen is not None:
        tiles = (Tile(f"{first.chosen.value:.2f}", f"{first.score} score of explanations", verdict(first)),)
    caveats = [f"The judge, {result.judge.model}: {note}." for note in notes(result.judge)]
    if result.check is not None and not result.check.reads:
        caveats.append(f"The judge, {result.judge.model}, was {result.check.verdict}: do not build on its ratings.")
    return Section(
        "Explanations", "What latents respond to, in a chat model's words", body, tiles=tiles,
        notes=(*result.subject.notes, *caveats),
    )  # fmt: skip
