"""A selection as rows and as a section of a page. Needs no torch."""

from __future__ import annotations

from unweave.core.result import Row
from unweave.methods.finetune.attribute.view import by_site, spread, totals
from unweave.methods.finetune.diagnosis import Diagnosis, EditCheck
from unweave.methods.finetune.select.result import SelectResult
from unweave.show.page import ALONE, Around, Section, Tile, figure
from unweave.show.pieces import counted, esc, number, percent, table

_SHOWN = 20


def rows(result: SelectResult) -> list[Row]:
    """What was chosen, what it does, and where the files are."""
    chosen = [one for one in result.weighed if one.chosen]
    how = f"of {counted(len(result.weighed), 'candidate')}, by {result.by} {result.query}".rstrip()
    lines: list[Row] = [("model", result.subject.named_model, ""), ("chosen", len(chosen), how)]
    if result.unknown:
        lines.append(("not judged", result.unknown, "candidates of which nothing is known"))
    lines += [(f"  {one.candidate.name}", one.candidate.score, one.why) for one in chosen[:_SHOWN]]
    lines.append(("controls", len(result.controls), ", ".join(path.stem for path in result.controls)))
    if result.diagnosis is not None:
        lines += edit_rows(result.diagnosis)
    return lines


def edit_rows(diagnosis: Diagnosis) -> list[Row]:
    """What each ablation does to the untrained model, and what to beware of."""
    lines: list[Row] = [(f"{one.edit} ablation", one.change, _edit_words(one)) for one in diagnosis.edits]
    return [*lines, *(("warning", "", words) for words in diagnosis.warnings)]


def _edit_words(one: EditCheck) -> str:
    return (
        f"± {number(one.margin)} of {number(one.before)} (correct - incorrect, untrained model); right answer ahead on "
        f"{percent(one.right_after)}, before {percent(one.right_before)}; costs {percent(one.cost)} of a pass"
    )


def section(result: SelectResult, around: Around = ALONE) -> Section:
    """Where the chosen ones are, what ablating them does to the untrained model, and every candidate."""
    chosen = [one for one in result.weighed if one.chosen]
    query = f" <b>{esc(result.query)}</b>" if result.query else ""
    unknown = f" Of {counted(result.unknown, 'candidate')} nothing is known." if result.unknown else ""
    body = [
        f"<p>{len(chosen)} of {counted(len(result.weighed), 'candidate')} chosen by {esc(result.by)}{query}; "
        f"they are ranked by {esc(result.metric)} ({esc(result.attribution)}).{unknown} To change the choice, edit "
        "<code>candidates.jsonl</code> (<code>relevant</code>) and give it back with <code>--by annotations</code>. "
        f"Controls: {esc(', '.join(path.stem for path in result.controls)) or 'none'}.</p>"
    ]
    everything = totals(one.candidate for one in result.weighed)
    if len(everything) > 1:
        plot = by_site(everything, totals(one.candidate for one in chosen))
        body.append(figure(plot, "Scores added up by site: of all candidates, and of those chosen."))
    if result.diagnosis is not None:
        body += diagnosis_html(result.diagnosis)
    head = ("", "Candidate", "Score", "95 %", "Fires on", "Relevance", "What is known")
    lines = [
        ("chosen" if one.chosen else "", esc(one.candidate.name), number(one.candidate.score),
         spread(one.candidate), percent(one.candidate.frequency), number(one.relevance, 2),
         esc(one.words))
        for one in result.weighed
    ]  # fmt: skip
    body.append(f'<h3>Candidates</h3><div class="uw-wide">{table(head, lines, (2, 3, 4, 5))}</div>')
    texts = [(esc(one.candidate.name), "<br>".join(map(esc, one.contexts))) for one in chosen if one.contexts]
    if texts:
        body += ["<h3>What the chosen ones fire on</h3>", table(("Candidate", "Strongest contexts"), texts)]
    tiles = (Tile(str(len(chosen)), "chosen for ablation", f"Of {len(result.weighed)} candidates, by {result.by}."),)
    return Section("Selection", "What the model shall not learn by", "".join(body), tiles=tiles,
                   notes=result.subject.notes)  # fmt: skip


def diagnosis_html(diagnosis: Diagnosis) -> list[str]:
    """What ablating the chosen ones does to the untrained model, and where that lies on their directions."""
    parts = ["<h3>On the untrained model</h3>"]
    parts += [f"<p><b>Warning.</b> {esc(words)}</p>" for words in diagnosis.warnings]
    edits = [
        (esc(one.edit), number(one.before), f"{number(one.change)} ± {number(one.margin)}", percent(one.right_before),
         percent(one.right_after), percent(one.cost))
        for one in diagnosis.edits
    ]  # fmt: skip
    head = ("Ablation", "correct − incorrect", "Change (95 %)", "Right before", "Right after", "Cost of a pass")
    if edits:
        parts.append(table(head, edits, (1, 2, 3, 4, 5), f"{diagnosis.items:,} training items"))
    spans = ", ".join(f"{esc(site)} {percent(share)}" for site, share in diagnosis.span_share.items())
    parts.append(f"<p>Share of the variance of activations that the span of the chosen ones has: {spans}.</p>")
    caption = f"Directions, on {diagnosis.tokens:,} tokens"
    head = ("Direction", "Mean", "Fires on", "Projection", "Deviation", "Variance", "Zeroing shifts by", "Span")
    lines = [
        (esc(f"{one.site}/{one.number}"), number(one.activation), percent(one.frequency), number(one.projection),
         number(one.deviation), percent(one.share), f"{number(one.zero_shift, 2)} dev.",
         "adds the concept" if one.span_adds else "removes")
        for one in diagnosis.directions
    ]  # fmt: skip
    return [*parts, f'<div class="uw-wide">{table(head, lines, (1, 2, 3, 4, 5, 6), caption)}</div>']
