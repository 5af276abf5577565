"""The recipe as rows, as a section of a page, and as tables and a page of its own. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from unweave.core.result import Row
from unweave.methods.axbench import view as axbench_view
from unweave.methods.axbench.result import METHODS
from unweave.methods.labels import view as labels_view
from unweave.papers.claims import markdown_table
from unweave.papers.labelled_steering.claims import claims, gain, mean, sources
from unweave.papers.labelled_steering.figures import simulated
from unweave.papers.labelled_steering.plan import LOW
from unweave.papers.labelled_steering.result import F1, LabelledSteering
from unweave.papers.page import claims_html, write_pages
from unweave.show.page import ALONE, Around, Section, Tile, beside, figure
from unweave.show.pieces import bounded, esc, number, table

_HEAD = ("SAEs", "Pairs by", "Method", "Pairs", "Rating", "Concept", "Above random")


def rows(result: LabelledSteering) -> list[Row]:
    """How well labels hold, and every method's rating."""
    lines: list[Row] = []
    for one in result.labelled:
        for site in one.labels.sites:
            name = f"{one.corpus}: {one.saes}, {one.f1}: {site.site}"
            lines.append((f"held-out AUROC, {name}", bounded(site.auroc, 3), f"{len(site.pairs)} pairs"))
    for saes, f1, method, pairs, rating, concept, above in _table(result):
        lines.append((f"{saes}, {f1} F1: {method}", rating, f"concept {concept}; above random {above}; {pairs} pairs"))
    return lines


def _table(result: LabelledSteering) -> list[tuple[str, ...]]:
    """A line for every set of SAEs, way of labelling and method, over all corpora."""
    lines = []
    sets: dict[tuple[str, F1], None] = dict.fromkeys((one.saes, one.f1) for one in result.steered)
    for saes, f1 in sets:
        runs = result.pairs(saes, f1)
        for method in dict.fromkeys(score.method for run in runs for score in run.judged.scores):
            some = [one for run in runs for one in run.of(method)]
            above = "" if method == "random" else bounded(gain(runs, method, "random"))
            cells = (METHODS[method], str(len(some)), bounded(mean(some)), bounded(mean(some, 0)), above)
            lines.append((saes, f1, *cells))
    return lines


def section(result: LabelledSteering, around: Around = ALONE) -> Section:
    """Claims beside our figures, ratings, texts, the main labels and comparison, and the simulation."""
    subject = result.labelled[0].labels.subject
    lead = f"{subject.named_model}; {', '.join(str(sae.site) for sae in subject.saes)}; {result.scale} scale."
    main = result.pairs(LOW)
    ratings = table(_HEAD, [tuple(map(esc, line)) for line in _table(result)], (3, 4, 5, 6))
    body = [
        f'<p>{esc(lead)}</p><div class="uw-wide">{claims_html(claims(result))}</div>',
        f'<h3>Ratings</h3><div class="uw-wide">{ratings}</div>',
        f'<h3>By source of the labels (Figures 2 and 6)</h3><div class="uw-wide">{_sources(result)}</div>',
        f'<h3>What was written</h3><div class="uw-wide">{_samples(result)}</div>',
        "<h3>The calibrated F1</h3>",
    ]
    figures = [figure(svg, caption) for svg, caption in simulated(result.simulation)]
    body += [beside(*figures[:2]), beside(*figures[2:])]
    body += [axbench_view.section(one.comparison, Around(name=f"axbench-{i}")).body for i, one in enumerate(main)]
    labels = [one for one in result.labelled if (one.saes, one.f1) == (LOW, "calibrated")]
    body += [labels_view.section(one.labels).body for one in labels]
    tiles = (
        Tile(
            bounded(gain(main, "sae", "random")),
            "labelled above random latents",
            "rating of 2, pair by pair, 95 % interval over concepts",
        ),
    )
    notes = dict.fromkeys((*subject.notes, *(note for one in labels for note in one.labels.notes)))
    return Section("Labelled steering", "Labelled latents steer", "".join(body), tiles=tiles, notes=tuple(notes))


def _sources(result: LabelledSteering) -> str:
    lines = [
        tuple(map(esc, (source, METHODS[method], len(some), bounded(mean(some)), bounded(mean(some, 0)))))
        for source, by_method in sources(result).items()
        for method, some in by_method.items()
    ]
    return table(("Source", "Method", "Pairs", "Rating", "Concept"), lines, (2, 3, 4))


def _samples(result: LabelledSteering) -> str:
    lines = [
        (esc(one.concept), esc(f"{METHODS[one.method]}{'' if one.factor is None else f' x {one.factor:g}'}"),
         esc(one.instruction), esc(one.text), number(one.rating))
        for one in result.samples
    ]  # fmt: skip
    return table(("Label", "Method", "Instruction", "Text", "Rating"), lines, (4,))


def write(result: LabelledSteering, folder: Path) -> None:
    """Writes ``table.md``, ``claims.md`` and ``report.html``."""
    title, deck = "Labelled steering", "Latents labelled by tagged texts, steered as AxBench does."
    lines = markdown_table(_HEAD, _table(result))
    write_pages(folder, title, deck, [section(result, Around(folder))], claims(result), lines)
