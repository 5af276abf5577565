"""A circuit's search, measurement and drawing as rows, and as sections of a page. Needs no torch."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from functools import singledispatch

from unweave.attribute.result import incomplete
from unweave.circuits.about import Example
from unweave.core.result import Row
from unweave.inputs.subject import Subject
from unweave.methods.circuits import figures
from unweave.methods.circuits.figures import curve_name
from unweave.methods.circuits.result import CircuitSearch, Drawing, Faithfulness, Reached, Used
from unweave.show.page import ALONE, Around, Section, Tile, figure
from unweave.show.pieces import capital, esc, number, table

_COLUMNS = ("threshold", "nodes", "latents", "errors", "faithfulness", "completeness")


# -- the examples -----------------------------------------------------------------------------------------------------


def _used_rows(used: Used) -> list[Row]:
    left_out = "; ".join(f"{left.examples} left out: {left.reason}" for left in used.left_out)
    lines: list[Row] = [("examples", used.examples, left_out)]
    if (right := used.accuracy) is not None:
        words = right.problem or "on clean and patch texts; chance: 50%"
        lines.append(("right answers", f"{right.clean:.0%} / {right.patch:.0%}", words))
    return lines


def example_words(examples: Sequence[Example]) -> str:
    """The first example in a sentence; empty where none is known."""
    names = {"clean": "clean", "patch": "patch", "alone": "input"}
    text = "; ".join(f"{names[example.side]}: {f'{example.text} →{example.answer}'!r}" for example in examples)
    return f"For example, {text}." if text else ""


def _lead(task: str, used: Used) -> str:
    left = "".join(f" {group.examples:,} left out: {group.reason}." for group in used.left_out)
    right = ""
    if used.accuracy is not None:
        right = (
            f" The model prefers the right answer in {used.accuracy.clean:.0%} of the clean and "
            f"{used.accuracy.patch:.0%} of the patch texts; chance is half."
        )
    text = f"{capital(task)}, {used.examples:,} examples.{left}{right} {example_words(used.first)}"
    return f"<p>{esc(text)}</p>"


def _notes(subject: Subject | None, *more: str | None) -> tuple[str, ...]:
    own = subject.notes if subject is not None else ()
    return (*own, *(f"{capital(note)}." for note in more if note))


# -- the search -------------------------------------------------------------------------------------------------------


@singledispatch
def rows(result: CircuitSearch) -> list[Row]:
    """What the terminal shows of a search, a measurement or a drawing."""
    search, options = result.search, result.search.options
    metric = f"{search.clean:.2f} on clean texts"
    if search.patch is not None:
        metric += f", {search.patch:.2f} on patch texts"
    lines = [
        ("task", result.task, ""),
        *_used_rows(result.used),
        ("metric", metric, "mean"),
        *_sum_rows(result),
        (_noun(result), result.latents, f"with a mean effect above {options.node_threshold:g}"),
        ("errors", result.errors, "the same of what SAEs leave unexplained"),
    ]
    if result.edges is not None:
        lines.append(("edges", result.edges, f"between them, above {options.edge_threshold:g}"))
    if note := ends_note(result):
        lines.append(("edges to y", len(search.ends), note))
    best = {node.site: node for node in reversed(result.strongest)}
    lines += [
        (str(site), best[site].name, f"the strongest of its nodes: {best[site].effect:+.3f}") for site in sorted(best)
    ]
    return lines


def _noun(result: CircuitSearch) -> str:
    return "neurons" if result.neurons else "latents"


def incomplete_of(result: CircuitSearch) -> str | None:
    """What a reader must know where integrated gradients do not add up to the measured change."""
    return incomplete(result.sums) if result.search.options.method == "ig" else None


def ends_note(result: CircuitSearch) -> str:
    """What edges to the metric are, where they are total effects; else empty."""
    ends = result.search.ends
    if len(ends) < 2:
        return ""
    return f"total effects of {', '.join(map(str, ends))}: what one does through a later one counts at both"


def _sum_rows(result: CircuitSearch) -> list[Row]:
    """The effects' sum and the measured change, of the site where they differ most."""
    if not result.sums:
        return []
    worst = max(result.sums, key=lambda row: abs(row.sum - row.change))
    fine = f"of all effects at {worst.site}, and of moving all there; elsewhere they are closer"
    return [("sum / measured", f"{worst.sum:.3f} / {worst.change:.3f}", incomplete_of(result) or fine)]


@singledispatch
def section(result: CircuitSearch, around: Around = ALONE) -> Section:
    """What a page shows of a search, a measurement or a drawing."""
    options = result.search.options
    nodes = [(esc(node.name), number(node.effect)) for node in sorted(result.strongest, key=lambda n: -abs(n.effect))]
    parts = [
        _lead(result.task, result.used),
        f"<p>{result.latents:,} {_noun(result)} and {result.errors:,} errors have a mean effect on the metric above "
        f"{options.node_threshold:g}, in either direction"
        + (f"; {result.edges:,} edges between them a weight above {options.edge_threshold:g}" if result.edges else "")
        + f".{f' Edges to the metric are {esc(ends_note(result))}.' if ends_note(result) else ''}</p>",
        _site_table(result),
        table(("Node", "Effect"), nodes, (1,), "The strongest nodes of each site"),
    ]
    if result.strongest_edges:
        edges = [
            (esc(edge.up.name), esc(edge.down.name) if edge.down else "the metric", number(edge.weight))
            for edge in result.strongest_edges
        ]
        parts.append(table(("From", "To", "Weight"), edges, (2,), "The strongest edges"))
    tile = Tile(
        f"{result.latents:,}", f"{_noun(result)} in the circuit", f"Of {result.task}, above {options.node_threshold:g}."
    )
    notes = _notes(result.subject, result.used.problem, incomplete_of(result))
    heading = f"Circuit{' of neurons' if result.neurons else ''}: {esc(result.task)}"
    return Section("Circuit", heading, "".join(parts), tiles=(tile,), notes=notes)


def _site_table(result: CircuitSearch) -> str:
    sums = {row.site: row for row in result.sums}
    lines = []
    for row in result.search.above:
        of_site = sums.get(row.site)
        cells = ("", "") if of_site is None else (number(of_site.sum), number(of_site.change))
        lines.append((str(row.site), f"{row.latents:,}", f"{row.errors:,}", *cells))
    head = ("Site", capital(_noun(result)), "Errors", "Sum of all effects", "Measured change")
    return table(head, lines, (1, 2, 3, 4), "Nodes above the threshold, and whether effects add up")


# -- faithfulness -----------------------------------------------------------------------------------------------------


@rows.register
def _(result: Faithfulness) -> list[Row]:
    first = result.curves[0]
    return [
        ("task", result.task, ""),
        *_used_rows(result.used),
        ("metric of the model", first.model, "mean"),
        ("metric of no nodes", first.empty, f"everything from layer {first.start_layer} on ablated"),
        *(_reached_row(reached, result) for reached in result.reached),
        ("figure", str(result.figure), "faithfulness and completeness over the number of nodes"),
    ]


def _reached_row(reached: Reached, result: Faithfulness) -> Row:
    name = curve_name(reached.errors, reached.neurons)
    if result.used.problem:
        return (name, "-", "the model fails this task, see its right answers")
    drawn = any(row.random is not None for row in result.curves[0].rows)
    beside = f"; random ones: {_nodes(reached.random_nodes)}" if drawn else ""
    return (name, _nodes(reached.nodes), f"nodes for faithfulness {result.level:g}, of {reached.changing:,}{beside}")


def _nodes(value: float | None) -> str:
    return "never" if value is None else f"{value:,.0f}"


@section.register
def _(result: Faithfulness, around: Around = ALONE) -> Section:
    first = result.curves[0]
    lines = [
        (esc(curve_name(r.errors, r.neurons)), _nodes(r.nodes), _nodes(r.random_nodes), f"{r.changing:,}")
        for r in result.reached
    ]
    caption = (
        "Left, how much of the behaviour is left with the circuit alone: 1 for the whole model, 0 for no nodes. Right, "
        "how much is left without the circuit. Dotted: as many random nodes."
    )
    head = ("Circuit", f"Nodes for {result.level:g}", "Random nodes for it", "Of")
    parts = [
        _lead(result.task, result.used),
        f"<p>Everything outside the circuit is set to {_ABLATED[first.ablation]}, from layer {first.start_layer} on. "
        f"The metric is {number(first.model)} in the whole model and {number(first.empty)} without any node.</p>",
        f'<div class="uw-wide">{figure(figures.curves_svg(result), caption)}</div>',
        table(head, lines, (1, 2, 3), "How many nodes carry the behaviour"),
    ]
    tile = Tile(
        _nodes(result.reached[0].nodes),
        f"nodes for faithfulness {result.level:g}",
        f"Of {result.reached[0].changing:,} that change. {capital(result.task)}.",
    )
    heading = f"How much the circuit carries: {esc(result.task)}"
    tiles = () if result.used.problem else (tile,)
    return Section(
        "Faithfulness", heading, "".join(parts), tiles=tiles, notes=_notes(result.subject, result.used.problem)
    )


_ABLATED = {"patch": "its mean over the patch texts", "clean": "its mean over the clean texts", "zero": "zero"}


def curves_csv(result: Faithfulness) -> str:
    """All rows as CSV."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("circuit", *_COLUMNS, "random", "random_low", "random_high"))
    for curve in result.curves:
        name = curve_name(curve.errors, curve.neurons)
        for row in curve.rows:
            drawn = [getattr(row.random, column, "") for column in ("mean", "low", "high")]
            writer.writerow((name, *(getattr(row, column) for column in _COLUMNS), *drawn))
    return out.getvalue()


# -- the drawing ------------------------------------------------------------------------------------------------------


def why_words(result: Drawing) -> str:
    """How the node threshold was chosen."""
    reasons = {"asked": "as asked", "own": "the circuit's own"}
    return reasons.get(result.why, f"chosen so that about {result.wanted} nodes remain")


@rows.register
def _(result: Drawing) -> list[Row]:
    left = f"{result.nodes_left_out:,} nodes, {result.edges_left_out:,} edges"
    return [
        ("nodes drawn", result.nodes, f"{result.errors} of them errors, {result.labelled} labelled"),
        ("node threshold", result.node_threshold, why_words(result)),
        ("edges drawn", result.edges, ""),
        ("edge threshold", result.edge_threshold, ""),
        ("left out", left, "for want of room"),
    ]


@section.register
def _(result: Drawing, around: Around = ALONE) -> Section:
    text = (
        f"<p>{result.nodes:,} nodes, {result.errors:,} of them errors, with an effect above "
        f"{result.node_threshold:.3g} ({why_words(result)}), and {result.edges:,} edges of weight above "
        f"{result.edge_threshold:.3g}. For want of room {result.nodes_left_out:,} nodes and "
        f"{result.edges_left_out:,} edges are left out.</p>"
    )
    picture = ""
    if around.folder is not None:
        svg = (around.folder / result.picture).read_text(encoding="utf-8")
        picture = f'<div class="uw-wide" style="overflow-x:auto">{svg}</div>'
    heading = f"The circuit drawn: {esc(result.title)}"
    return Section("Drawing", heading, text + picture, notes=_notes(result.subject))
