"""Candidates as rows, as a section of a page, and their effect by layer. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from unweave.core.result import Row
from unweave.core.site import Site
from unweave.methods.finetune.attribute.result import AttributeResult, Candidate, SiteTotal
from unweave.show.figures import COLOURS, as_svg, new_figure, settings
from unweave.show.page import ALONE, Around, Section, figure
from unweave.show.pieces import counted, esc, latent_link, number, percent, table

_LISTED = 100
_SHOWN = 10


def rows(result: AttributeResult) -> list[Row]:
    """The strongest candidates, and how they are spread over sites."""
    lines: list[Row] = [
        ("model", result.subject.named_model, ""),
        ("task", result.examples, f"examples of {result.task}, {result.tokens:,} tokens"),
        ("candidates", len(result.candidates), result.metric),
    ]
    lines += [(f"left out: {reason}", count, "examples") for reason, count in result.skipped.items()]
    lines += [(f"  {one.site}", one.candidates, _of_site(one)) for one in result.sites if one.candidates]
    lines += [
        (f"  {one.site}/{one.number}", one.score, score_words(one, result.by)) for one in result.candidates[:_SHOWN]
    ]
    return lines


def _of_site(one: SiteTotal) -> str:
    if one.mean_share is not None:
        return f"components; {percent(one.mean_share)} of the difference is the same at every token"
    return f"of {one.firing:,} latents that fire; their scores add up to {number(one.total)}"


def score_words(one: Candidate, by: str) -> str:
    """What stands beside a score."""
    if by == "components":
        return "of the variance of its site"
    size = "" if one.size is None else f"{number(one.size)} standard deviations; "
    fires = f"fires on {percent(one.frequency)} of the tokens, {number(one.activation)} on average"
    return f"{spread(one)} (95 %); {size}{fires}"


def spread(one: Candidate) -> str:
    """Half of the score's interval; of components and of a single example nothing is known."""
    return f"± {number(one.margin)}" if one.margin else "n/a"


def section(result: AttributeResult, around: Around = ALONE) -> Section:
    """Where the candidates are, and all of them."""
    compared = f" It was compared with {esc(result.tuned)}." if result.tuned else ""
    body = [
        f"<p>{counted(len(result.candidates), 'candidate')} for ablation, by {esc(result.metric)}, averaged over "
        f"{counted(result.examples, 'example')} of {esc(result.task)} ({result.tokens:,} tokens); 95 % intervals are "
        f"over examples.{compared} None was looked at by anybody yet: <code>unweave finetune select</code> chooses.</p>"
    ]
    if result.skipped:
        body.append(f"<p>Left out: {esc(', '.join(f'{n:,} ({reason})' for reason, n in result.skipped.items()))}.</p>")
    if len(result.sites) > 1 and result.by != "components":
        caption = "Scores of the candidates added up by site, and their number."
        body.append(figure(by_site({one.site: one.total for one in result.sites}, {}), caption))
    site_rows = [(esc(one.site), f"{one.candidates:,}", esc(_of_site(one))) for one in result.sites]
    body.append(table(("Site", "Candidates", "Of"), site_rows, (1,)))
    head = ("Site", "Number", "Score", "95 %", "In deviations", "Mean activation", "Fires on")
    lines = [
        (esc(one.site), latent_link(one.number) if one.number in around.entries else str(one.number),
         number(one.score), spread(one), number(one.size), number(one.activation),
         percent(one.frequency))
        for one in result.candidates[:_LISTED]
    ]  # fmt: skip
    body.append(f'<div class="uw-wide">{table(head, lines, (1, 2, 3, 4, 5, 6))}</div>')
    return Section("Candidates", "What the task could be learnt by", "".join(body), notes=result.subject.notes)


def totals(candidates: Iterable[Candidate]) -> dict[Site, float]:
    """Scores added up by site."""
    sums: dict[Site, float] = {}
    for one in candidates:
        sums[one.site] = sums.get(one.site, 0.0) + one.score
    return sums


def by_site(all_of: Mapping[Site, float], chosen: Mapping[Site, float]) -> str:
    """Figure 3 of the paper: scores of all candidates added up by site, and of those chosen."""
    import matplotlib

    sites = sorted(all_of)
    with matplotlib.rc_context(settings()):
        canvas = new_figure(2.6)
        axes = canvas.add_subplot()
        places = range(len(sites))
        axes.bar(places, [all_of[site] for site in sites], color=COLOURS["line"], label="all candidates")
        if chosen:
            heights = [chosen.get(site, 0.0) for site in sites]
            axes.bar(places, heights, width=0.5, color=COLOURS["accent"], label="chosen")
            canvas.legend(loc="outside upper center", ncols=2)
        axes.axhline(0, color=COLOURS["line"], linewidth=1)
        axes.set_xticks(list(places), [str(site) for site in sites], rotation=45 if len(sites) > 6 else 0)
        axes.set_ylabel("Sum of scores")
        return as_svg(canvas, "finetune-by-site", "Scores of candidates added up by site")
