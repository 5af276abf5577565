"""The recipe as rows, as a section of a page, and as tables, figures and a page of its own. Needs no torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from unweave.core.result import Row
from unweave.core.writing import write_file
from unweave.methods.explain.rubric import view as rubric
from unweave.methods.special_tokens import view as special_tokens
from unweave.papers.claims import markdown
from unweave.papers.instruct_saes import figures
from unweave.papers.instruct_saes.claims import claims, contests, words
from unweave.papers.instruct_saes.compare import Cell, cells
from unweave.papers.instruct_saes.figures import kind_name, measure_name
from unweave.papers.instruct_saes.result import MEASURES, RECIPES, InstructSaes, Measure
from unweave.papers.page import claims_html, figure
from unweave.show.page import ALONE, Around, Section, page
from unweave.show.pieces import esc, table
from unweave.show.plots import png

_SHOWN = MEASURES[:4]
_CAPTIONS = {
    "errors": "Errors by layer. A point is one initialisation, the bar their mean; lower is better. All at the "
    "same number of active latents over all tokens, along each recipe's own curve, unless marked in the tables.",
    "curves": "Errors over the number of active latents, one initialisation, without norm outliers.",
    "ratings": "The judge's scores, and the same judge's scores of contexts shuffled between latents.",
}
_NOTE = (
    "Mean and standard deviation over seeds of log2 of the paper's error; in brackets the active latents per token "
    "on these very tokens. Lower is better. Errors are moved to the same L0 over all tokens along each recipe's "
    "L0-MSE curve; what cannot be moved there is marked, and counts in no comparison."
)


def rows(result: InstructSaes) -> list[Row]:
    """FAST against the other recipes, and the judge's mean scores."""
    lines: list[Row] = [("SAEs", len(result.saes), "all measured on the same held-out conversations")]
    for measure in _SHOWN:
        for other, contest in contests(result, measure):
            lines.append((f"FAST against {other}", words(contest), measure_name(measure)))
    for rated in result.ratings:
        mean, judge = rated.rubric.real.mean, rated.rubric.judge.model
        lines.append((f"rating of {rated.recipe}", mean.value if mean else None, f"mean of 1 to 5, by {judge}"))
    return lines


def section(result: InstructSaes, around: Around = ALONE) -> Section:
    """Claims beside our figures, the figures, and a table for every measure."""
    del around
    images = "".join(figure(picture, _CAPTIONS[name]) for name, picture in _pictures(result).items())
    tables = "".join(
        f"<h3>{esc(measure_name(measure))}</h3>"
        + table(_HEAD, [[esc(cell) for cell in row] for row in _table(result, measure)])
        for measure in MEASURES
    )
    body = (
        f'<p>{esc(_lead(result))}</p><div class="uw-wide">{claims_html(claims(result))}</div>'
        f'<div class="uw-wide">{images}</div><p>{esc(_NOTE)}</p><div class="uw-wide">{tables}</div>'
    )
    heading = "FAST: whole conversations against block training"
    return Section("FAST", heading, body, notes=result.special_tokens.subject.notes)


def write(result: InstructSaes, folder: Path) -> None:
    """Writes ``table.md``, ``claims.md``, the figures and ``report.html``, with the parts' own sections."""
    for name, picture in _pictures(result).items():
        write_file(folder / f"{name}.png", picture)
    parts = [section(result), special_tokens.section(result.special_tokens, Around(name="special-tokens"))]
    for number, rated in enumerate(result.ratings):
        part = rubric.section(rated.rubric, Around(name=f"rubric-{number}"))
        parts.append(replace(part, short=f"Rubric, {rated.recipe}", heading=f"{part.heading}: {esc(rated.recipe)}"))
    texts = {
        "table.md": f"{_NOTE}\n\n" + "\n".join(_markdown(result, measure) for measure in MEASURES),
        "claims.md": markdown(claims(result)),
        "report.html": page("FAST: SAEs of instruct models", "Whole conversations against block training.", parts),
    }
    for name, text in texts.items():
        write_file(folder / name, text)


def _lead(result: InstructSaes) -> str:
    widths = " and ".join(str(width) for width in sorted({sae.expansion for sae in result.saes}))
    return (
        f"{result.special_tokens.subject.named_model}; {', '.join(result.sites)}; SAEs {widths} times as wide; "
        f"{result.tokens:,} tokens per SAE, the same for all; {result.scale} scale."
    )


def _pictures(result: InstructSaes) -> dict[str, bytes]:
    seed = min(sae.seed for sae in result.saes)
    by_measure = [(measure, cells(result.saes, measure, result.k)) for measure in _SHOWN]
    drawn = {
        "errors": figures.errors(result.saes, by_measure),
        "curves": figures.curves(result.saes, Measure("all", outliers=False), seed),
    }
    if result.ratings:
        drawn["ratings"] = figures.ratings(result.ratings)
    return {name: png(picture) for name, picture in drawn.items()}


# -- tables -----------------------------------------------------------------------------------------------------------


_HEAD = ("kind", "site", *RECIPES)


def _table(result: InstructSaes, measure: Measure) -> list[list[str]]:
    """A row per kind and site, the recipes side by side: mean and spread over seeds, and the L0 that was measured."""
    by_place: dict[tuple[str, int, str], dict[str, Cell]] = {}
    for cell in cells(result.saes, measure, result.k):
        by_place.setdefault(cell.place, {})[cell.recipe] = cell
    lines = []
    for (kind, expansion, site), by_recipe in by_place.items():
        shown = [_cell_words(by_recipe[recipe]) if recipe in by_recipe else "-" for recipe in RECIPES]
        lines.append([kind_name(kind, expansion, result.saes), site, *shown])
    return lines


def _cell_words(cell: Cell) -> str:
    """`-1.234 ± 0.010 (L0 31.9)`: mean, spread over seeds where there are several, and the L0 on these very tokens."""
    mark = "" if cell.comparable else "; not comparable"
    spread = f" ± {cell.spread:.3f}" if len(cell.values) > 1 else ""
    return f"{cell.mean:.3f}{spread} (L0 {sum(cell.own_l0) / len(cell.own_l0):.1f}{mark})"


def _markdown(result: InstructSaes, measure: Measure) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (_HEAD, *_table(result, measure))]
    lines.insert(1, "|" + " --- |" * len(_HEAD))
    return f"### {measure_name(measure)}\n\n" + "\n".join(lines) + "\n"
