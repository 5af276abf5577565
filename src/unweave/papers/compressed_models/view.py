"""The recipe as rows, as a section of a page, and as tables and a page of its own. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from unweave.core.result import Row
from unweave.methods.compress.transfer import view as transfer_view
from unweave.methods.saebench import view as saebench_view
from unweave.papers.claims import markdown_table
from unweave.papers.compressed_models.claims import claims
from unweave.papers.compressed_models.result import CompressedModels
from unweave.papers.page import claims_html, write_pages
from unweave.show.page import ALONE, Around, Section
from unweave.show.pieces import esc

_HEAD = ("Model", "SAEs", *transfer_view.HEAD)


def rows(result: CompressedModels) -> list[Row]:
    """What each form of each SAE explains in the compressed model."""
    return [
        (f"{study.name}, {group.name}: {name}", value, meaning)
        for study in result.studies
        for group in study.groups
        for name, value, meaning in transfer_view.rows(group.transfer)[1:]
    ]


def _table(result: CompressedModels) -> Iterator[tuple[str, ...]]:
    for study in result.studies:
        for group in study.groups:
            yield from ((study.name, group.name, *line) for line in transfer_view.cells_table(group.transfer))


def section(result: CompressedModels, _around: Around = ALONE) -> Section:
    """Claims beside our figures."""
    models = "; ".join(study.groups[0].transfer.subject.named_model for study in result.studies)
    lead = f"{models}; {result.scale} scale. Each model, and what was measured of its SAEs, is below."
    body = f'<p>{esc(lead)}</p><div class="uw-wide">{claims_html(claims(result))}</div>'
    tiles = transfer_view.section(result.studies[0].groups[0].transfer).tiles
    return Section("Compressed models", "SAEs of compressed models", body, tiles=tiles)


def _sections(result: CompressedModels) -> Iterator[Section]:
    """Claims, then every group of SAEs, then SAEBench's tasks."""
    yield section(result)
    for study in result.studies:
        for group in study.groups:
            part = transfer_view.section(group.transfer)
            yield replace(
                part, short=f"{study.name}, {group.name}", heading=f"{esc(study.name)}, {esc(group.name)}", tiles=()
            )
        for bench in study.benches:
            part = saebench_view.section(bench.scores)
            named = part.body
            for sae, form in bench.forms.items():
                named = named.replace(esc(sae), esc(form))
            yield replace(
                part, short=f"SAEBench, {bench.site}", heading=f"SAEBench at {esc(bench.site)}", body=named, tiles=()
            )


def write(result: CompressedModels, folder: Path) -> None:
    """Writes ``table.md``, ``claims.md`` and ``report.html``."""
    title, deck = "SAEs of compressed models", "Kept, pruned, or trained anew, when the model is compressed."
    write_pages(folder, title, deck, list(_sections(result)), claims(result), markdown_table(_HEAD, _table(result)))
