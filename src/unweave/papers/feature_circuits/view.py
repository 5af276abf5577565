"""The recipe as rows, as a section of a page, and as tables and a page of its own. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from unweave.core.result import Row
from unweave.methods.behaviours import view as behaviours_view
from unweave.methods.circuits.figures import curves_svg
from unweave.methods.shift import view as shift_view
from unweave.methods.shift.result import Method
from unweave.papers.claims import markdown_table
from unweave.papers.feature_circuits.claims import LEVEL, claims, reached, reached_heads
from unweave.papers.feature_circuits.result import FeatureCircuits
from unweave.papers.page import claims_html, write_pages
from unweave.show.page import ALONE, Around, Section, figure
from unweave.show.pieces import esc, table

PICTURE = "circuit.svg"
"""of a drawing's run"""


def rows(result: FeatureCircuits) -> list[Row]:
    """How many nodes carry the behaviour, SHIFT's rows, and how many behaviours there are."""
    lines: list[Row] = []
    for structure in result.structures:
        features, random, neurons, _ = reached(structure.faithfulness)
        lines.append((f"nodes for {LEVEL:g}: {structure.name}", features, f"random: {random}; neurons: {neurons}"))
    sizes = result.overlap.sizes
    lines.append(("latents in both across RC and PP", result.overlap.shared, f"of {sizes[0]} and {sizes[1]}"))
    methods: tuple[Method, ...] = ("original", "random", "shift", "retrain", "oracle")
    names = [shift_view.NAMES[method] for method in methods]
    lines += [row for row in result.shift.rows() if row[0] in names]
    index = f"{result.part('behaviours')}/{behaviours_view.INDEX}"
    return [*lines, ("behaviours", len(result.behaviours.behaviours), f"page: {index}")]


def section(result: FeatureCircuits, around: Around = ALONE) -> Section:
    """Claims beside our figures, how many nodes carry agreement, a circuit, SHIFT's table, and the behaviours."""
    sites = ", ".join(str(sae.site) for sae in result.subject.saes)
    lead = f"{result.subject.named_model}; {sites}; {result.scale} scale."
    heads, lines = _reached_table(result)
    counted = table([esc(h) for h in heads], [[esc(c) for c in row] for row in lines])
    curves = "".join(_curves(structure.name, curves_svg(structure.faithfulness)) for structure in result.structures)
    body = [
        f'<p>{esc(lead)}</p><div class="uw-wide">{claims_html(claims(result))}</div>',
        f'<h3>How many nodes carry a behaviour</h3><div class="uw-wide">{counted}</div>{curves}',
        _circuit(result, around.folder),
        f'<h3>SHIFT</h3><div class="uw-wide">{shift_view.section(result.shift).body}</div>',
        f"<h3>Behaviours</h3>{_behaviours(result)}",
    ]
    return Section("Feature circuits", "Sparse feature circuits", "".join(body), notes=result.subject.notes)


def write(result: FeatureCircuits, folder: Path) -> None:
    """Writes ``table.md``, ``claims.md`` and ``report.html``."""
    title, deck = "Sparse feature circuits", "Agreement, SHIFT, and behaviours found without labels."
    tables = markdown_table(*_reached_table(result)) + "\n" + shift_view.markdown(result.shift)
    write_pages(folder, title, deck, [section(result, Around(folder))], claims(result), tables)


def _reached_table(result: FeatureCircuits) -> tuple[list[str], list[list[str]]]:
    return ["structure", *reached_heads()], [[s.name, *reached(s.faithfulness)] for s in result.structures]


def _curves(structure: str, svg: str) -> str:
    caption = (
        f"{structure.replace('_', ' ')}: faithfulness of the circuit alone, and of everything but it, on sentences "
        "that it was not found on. Dotted: as many random nodes."
    )
    return f'<div class="uw-wide">{figure(svg.replace("faithfulness-", f"{structure}-"), esc(caption))}</div>'


def _circuit(result: FeatureCircuits, folder: Path | None) -> str:
    """The drawing, where its run lies beside this one's."""
    path = None if folder is None else folder.parent / result.part("draw", "across_pp") / PICTURE
    if path is None or not path.is_file():
        return ""
    svg = path.read_text(encoding="utf-8")
    heading = "<h3>The circuit across a prepositional phrase</h3>"
    return f'{heading}<div class="uw-wide" style="overflow-x:auto">{svg}</div>'


def _behaviours(result: FeatureCircuits) -> str:
    lines = [[esc(cell) for cell in row] for row in behaviours_view.listing(result.behaviours)]
    index = f"{result.part('behaviours')}/{behaviours_view.INDEX}"
    return table(["behaviour", "what comes next", "size"], lines) + (
        f"<p>Contexts and circuits of each: <code>{esc(index)}</code>.</p>"
    )
