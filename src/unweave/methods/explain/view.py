"""Explanations as rows, and as a section of a page. Needs no torch."""

from __future__ import annotations

from unweave.core.result import Row
from unweave.methods.explain.result import ExplainedLatent, ExplainResult, ScoreSummary
from unweave.methods.explain.rubric.view import caveats, measures, notes
from unweave.show.page import ALONE, Around, Section, Tile
from unweave.show.pieces import bounded, esc, latent_link, table

_CHANCE = {"simulation": "correlation, 0 is chance", "rubric": "1 no pattern, 5 a clear one"}


def rows(result: ExplainResult) -> list[Row]:
    """The judge and whether it reads, what asking takes, and every score beside its controls."""
    lines: list[Row] = [("judge", result.judge.model, "; ".join(notes(result.judge)))]
    unread = ""
    if (check := result.check) is not None:
        kinds = ", ".join(f"{kind} {_number(value)}" for kind, value in check.aurocs.items())
        lines.append(("judge on known cases", check.verdict.split(":")[0], f"{check.verdict}; {kinds}"))
        unread = "" if check.reads else "; by a judge not shown to read"
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
        about = f"{_CHANCE.get(one.score, 'AUROC, 0.5 is chance')}; 95 % interval{failed}{unread}"
        lines.append((one.score, bounded(one.chosen), about))
        if one.shuffled is not None:
            control = (
                "contexts of five different latents" if one.score == "rubric" else "the explanations of other latents"
            )
            lines.append((f"{one.score}: control", bounded(one.shuffled), control))
            lines.append((f"{one.score}: above control", bounded(one.above), verdict(one)))
        if one.random is not None:
            lines.append((f"{one.score}: random latents", bounded(one.random), "drawn beside those named"))
    if any(one.selected is not None for one in result.latents):
        lines.append(("selected", sum(bool(one.selected) for one in result.latents), "latents, by the query"))
    return lines


def verdict(one: ScoreSummary) -> str:
    """Whether a score says anything of explanations."""
    if one.above is None or one.above.p is None:
        return "too few to tell"
    return f"{'' if one.above.shown else 'not shown to be '}above its control, p = {one.above.p:.2g}"


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
        return (
            name,
            words,
            *map(_number, numbers),
            one.kind or "-",
            _number(one.relevance) + " *" * bool(one.selected),
        )

    def best(one: ExplainedLatent) -> float:
        value = one.scores.get(names[0]) if names else None
        return -9.0 if value is None else value

    lines = [line(one) for one in sorted(result.latents, key=best, reverse=True)]
    body = (
        f"<p>{esc(result.judge.model)} saw contexts of {len(result.latents)} latents and said what they share. Each "
        "explanation was tested on contexts of other documents, and so was another latent's on the same contexts.</p>"
    ) + measures(rows(result))
    body += table(head, lines, (0, *range(2, 4 + len(names)), 5 + len(names)), "Explanations") if lines else ""
    scored = [(one, one.chosen.value) for one in result.scores if one.chosen is not None]
    tiles = [Tile(f"{value:.2f}", f"{one.score} score of explanations", verdict(one)) for one, value in scored[:1]]
    warnings = caveats(result.judge)
    if result.check is not None and not result.check.reads:
        warnings += (f"The judge, {result.judge.model}, was {result.check.verdict}: do not build on its ratings.",)
    heading = "What latents respond to, in a chat model's words"
    return Section("Explanations", heading, body, tiles=tuple(tiles), notes=(*result.subject.notes, *warnings))
