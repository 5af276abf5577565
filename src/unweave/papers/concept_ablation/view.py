"""The recipe as rows, as a section of a page, and as tables and a page of its own. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from unweave.core.result import Row
from unweave.papers.claims import markdown_table
from unweave.papers.concept_ablation.claims import claims, words
from unweave.papers.concept_ablation.figures import accuracies, effects, learning, projections
from unweave.papers.concept_ablation.result import NAMES, ConceptAblation, Name
from unweave.papers.page import claims_html, write_pages
from unweave.show.page import ALONE, Around, Section, Tile, beside, figure
from unweave.show.pieces import esc, percent, table

_HEAD = ("Task", "Condition", "Validation", "Ambiguous", "Cue misleads", "95 % interval", "All tokens: validation",
         "cue misleads")  # fmt: skip
_CURVES: tuple[Name, ...] = ("none", "zero", "span", "random", "penalty")


def rows(result: ConceptAblation) -> list[Row]:
    """Accuracy where the cue misleads, of every task under every condition."""
    return [
        (f"{task}: {condition}", misled, f"validation {validation}; interval {interval}; among all tokens {full}")
        for task, condition, validation, _, misled, interval, _, full in _table(result)
    ]


def _table(result: ConceptAblation) -> Iterator[tuple[str, ...]]:
    """Mean and standard error over seeds; between the two answers but for the last two columns."""
    for task in result.tasks:
        for name in NAMES:
            if not task.of(name):
                continue
            ood = task.spread(name, "ood")
            interval = None if ood is None else ood.interval
            yield (
                task.name, NAMES[name],
                *(words(task.spread(name, split)) for split in ("validation", "ambiguous", "ood")),
                "n/a" if interval is None else f"{100 * interval[0]:.0f} to {100 * interval[1]:.0f}",
                words(task.spread(name, "validation", "all")),
                words(task.spread(name, "ood", "all")),
            )  # fmt: skip


def section(result: ConceptAblation, _around: Around = ALONE) -> Section:
    """Claims beside our figures, accuracies, effects by layer, and what happens over training."""
    lead = (
        f"{result.subject.named_model}; {', '.join(str(sae.site) for sae in result.subject.saes)}; "
        f"{result.scale} scale. "
        "Accuracies in %, as deployed (without an edit but where a condition is of the test): mean and standard error "
        "over seeds, 95 % intervals by Student's t. Between the two answers; the last columns ask for the right answer "
        "among all tokens."
    )
    lines = [tuple(map(esc, line)) for line in _table(result)]
    first = result.tasks[0]
    body = [
        f'<p>{esc(lead)}</p><div class="uw-wide">{claims_html(claims(result))}</div>',
        f'<h3>Accuracies</h3><div class="uw-wide">{table(_HEAD, lines, (2, 3, 4, 5, 6, 7))}</div>',
        f"<p>{esc(_before(result))} {esc(_left_out(result))}</p>",
        "<h3>Where the cue misleads (Figures 2 and 6)</h3>",
        *_pairs([figure(accuracies(task, i), esc(task.name)) for i, task in enumerate(result.tasks)]),
        "<h3>Effects by layer (Figure 3)</h3>",
        beside(figure(effects(result.tasks), "Summed effects of the candidates; of those chosen dashed.")),
        f"<h3>Over training: {esc(first.name)}</h3>",
        beside(
            figure(learning(first, _CURVES, "validation", 0), "Accuracy on validation, without any edit."),
            figure(learning(first, _CURVES, "ood", 0), "The same where the cue misleads."),
        ),
        beside(figure(projections(first, _CURVES), "Mean projection on the chosen directions, less the base model's.")),
    ]
    gain = first.gain("zero", "random")
    tiles = (Tile(words(gain), "chosen above random latents", f"{first.name}, where the cue misleads, seed by seed"),)
    return Section(
        "Concept ablation", "What a model learns, steered", "".join(body), tiles=tiles, notes=result.subject.notes
    )


def _pairs(figures: list[str]) -> list[str]:
    return [beside(*figures[i : i + 2]) for i in range(0, len(figures), 2)]


def _before(result: ConceptAblation) -> str:
    """What the untrained model does."""
    shown = "; ".join(
        f"{task.name} {percent(task.before('validation'))} and {percent(task.before('ood'))}" for task in result.tasks
    )
    return f"Before training, between the two answers, on validation and where the cue misleads: {shown}."


def _left_out(result: ConceptAblation) -> str:
    """Which tasks the paper's filter would leave out."""
    some = [task.name for task in result.tasks if not task.misled]
    if not some:
        return "In every task plain fine-tuning learns the unintended policy."
    return f"Plain fine-tuning learns the intended policy in {', '.join(some)}, which the paper's filter leaves out."


def write(result: ConceptAblation, folder: Path) -> None:
    """Writes ``table.md``, ``claims.md`` and ``report.html``."""
    title, deck = "Fine-tuning with concepts taken out", "What is learnt where two policies fit the data."
    write_pages(folder, title, deck, [section(result)], claims(result), markdown_table(_HEAD, _table(result)))
