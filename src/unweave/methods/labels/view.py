"""Labels as rows, and as a section of a page. Needs no torch."""

from __future__ import annotations

from unweave.core.intervals import Interval
from unweave.core.result import Row
from unweave.methods.labels.figures import aurocs
from unweave.methods.labels.result import LabelledLatent, LabelsResult, Passage, SiteLabels
from unweave.show.model import ContextEntry
from unweave.show.page import ALONE, Around, Section, Tile, figure
from unweave.show.pieces import bounded, chips, context_html, esc, latent_link, number, percent, table

_LISTED = 100


def rows(result: LabelsResult) -> list[Row]:
    """How many pairs, how well they hold on texts held out, and what chance reaches."""
    side = result.heldout
    lines: list[Row] = [
        ("model", result.subject.named_model, ""),
        ("texts", result.chosen_on.texts, f"{result.source}; {side.texts:,} more held out"),
        ("labels", result.supported, f"of {result.labels:,} are on enough texts"),
    ]
    for one in result.sites:
        about = "" if len(result.sites) == 1 else f"{one.site}: "
        lines += [
            (f"{about}pairs", len(one.pairs), f"of {one.candidates:,}, from {one.firing:,} latents that fire"),
            (f"{about}held-out AUROC", bounded(one.auroc, 3), "mean over pairs, 95 % interval over pairs"),
            (f"{about}... shuffled labels", bounded(one.shuffled_auroc, 3), "0.5 is chance"),
            (f"{about}told on unseen texts", one.above_half, "pairs whose own interval lies above 0.5"),
            (
                f"{about}best score by chance",
                one.shuffled_best,
                f"{_beyond(one)} of the pairs score higher{_advice(one)}",
            ),
        ]
        lines += [(f"  {pair.label.label}", f"latent {pair.latent}", _words(pair)) for pair in one.pairs[:5]]
    return lines


def _beyond(one: SiteLabels) -> int:
    return sum(pair.label.score > one.shuffled_best for pair in one.pairs)


def _advice(one: SiteLabels) -> str:
    return "" if 2 * _beyond(one) >= len(one.pairs) else ": most could be luck; raise match.prior, or give more texts"


def _auroc(pair: LabelledLatent) -> str:
    label = pair.label
    if label.auroc is None:
        return "n/a"
    text = bounded(Interval(label.auroc, label.auroc_low, label.auroc_high))
    return text if label.auroc_low is not None else f"{text}, no interval"


def _words(pair: LabelledLatent) -> str:
    return f"score {pair.label.score:.3f}, held-out AUROC {_auroc(pair)} ({pair.positive} texts have it)"


def section(result: LabelsResult, around: Around = ALONE) -> Section:
    """For each SAE the pairs with their scores, AUROC beside shuffled labels, and contexts of the best."""
    f1 = "ordinary F1" if result.prior is None else f"F1 calibrated to a prior of {result.prior:g}"
    body = [
        f"<p>A latent has a label if how often it fires in a text tells whether the text has the label. Chosen on "
        f"{result.chosen_on.texts:,} texts ({esc(result.source)}) by {f1}; tested on {result.heldout.texts:,} others, "
        f"near duplicates on one side. {result.supported:,} of {result.labels:,} labels are on enough texts. "
        "Shuffled labels should reach an AUROC of 0.5.</p>"
    ]
    for one in result.sites:
        body += _site(one, around, len(result.sites) > 1, result.heldout.texts)
    tiles = tuple(
        Tile(number(one.auroc.value), "held-out AUROC of labels", f"{one.above_half} of {len(one.pairs)} labels of "
             f"latents at {one.site} are told on texts that they were not chosen on.")
        for one in result.sites[:1] if one.auroc is not None
    )  # fmt: skip
    return Section("Labels", "Labels from tagged texts", "".join(body), tiles=tiles,
                   notes=(*result.subject.notes, *result.notes))  # fmt: skip


def _site(one: SiteLabels, around: Around, several: bool, texts: int) -> list[str]:
    lines = [
        (esc(pair.label.label), latent_link(pair.latent) if pair.latent in around.entries else str(pair.latent),
         number(pair.label.score), number(pair.heldout_score), _auroc(pair), number(pair.shuffled_auroc, 2),
         number(pair.label.threshold, 2), f"{pair.label.support:,}", number(pair.label.output_score, 2))
        for pair in one.pairs[:_LISTED]
    ]  # fmt: skip
    head = ("Label", "Latent", "Score", "Held-out score", "Held-out AUROC", "Shuffled", "Threshold", "Texts", "Output")
    text = (
        f"{one.above_half} of {len(one.pairs)} pairs have an AUROC whose interval lies above 0.5. Mean AUROC "
        f"{bounded(one.auroc, 3)}; with shuffled labels {bounded(one.shuffled_auroc, 3)}. The best of all pairs scores "
        f"{number(one.shuffled_best)} when labels are shuffled before matching; {_beyond(one)} pairs score "
        f"higher{_advice(one)}."
    )
    parts = [f"<h3>{esc(one.site)}</h3>"] if several else []
    parts.append(f"<p>{text}</p>")
    if any(pair.label.auroc is not None for pair in one.pairs):
        caption = "Held-out AUROC of each pair with its 95 % interval, best first; hollow: with shuffled labels."
        parts.append(figure(aurocs(one), caption))
    parts.append(f'<div class="uw-wide">{table(head, lines, (1, 2, 3, 4, 5, 6, 7, 8))}</div>')
    best = [pair for pair in one.pairs if pair.passages]
    if best:
        parts.append("<h3>What the best fire on, in texts held out</h3>")
        parts += [_contexts(pair, texts) for pair in best]
    return parts


def _contexts(pair: LabelledLatent, texts: int) -> str:
    """The held-out texts in which a latent fires most, of ``texts``, beside what chance would give."""
    lines = "".join(_passage(passage, pair) for passage in pair.passages)
    raised = chips((token, 0.0) for token in pair.promoted)
    have = sum(passage.labelled for passage in pair.passages)
    facts = (
        f"latent {pair.latent}; {_words(pair)}, with shuffled labels {number(pair.shuffled_auroc, 2)}. Of the texts "
        f"below {have} of {len(pair.passages)} have the label, of all held-out texts {percent(pair.positive / texts)}"
    )
    return (
        f'<article class="uw-card"><header><h3>{esc(pair.label.label)}</h3><p class="uw-facts">{esc(facts)}</p>'
        f'</header><dl class="uw-logits"><dt>Raises</dt><dd>{raised}</dd></dl>{lines}</article>'
    )


def _passage(passage: Passage, pair: LabelledLatent) -> str:
    has = "has the label" if passage.labelled else "does not have the label"
    entry = ContextEntry("top", passage.tokens, passage.values, passage.peak)
    line = context_html(entry, pair.label.maximum)
    return f'<div class="uw-row"><span class="uw-label">{has}</span>{line}</div>'
