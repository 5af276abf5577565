"""circuits/picture.py, draw.py, draw_html.py and the stage: what is drawn, where, and that nothing leaks."""

from __future__ import annotations

import html
import itertools
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unweave.circuits.about import About, Options, Search
from unweave.circuits.draw import Picture, draw_svg, to_json
from unweave.circuits.draw_html import draw_html
from unweave.circuits.graph import Circuit, Edges
from unweave.circuits.picture import _crossings, edge_threshold_for, place, select, threshold_for, thresholds
from unweave.core.errors import UnweaveError
from unweave.core.result import as_read, as_written
from unweave.core.site import Site
from unweave.latents.annotations import Annotation
from unweave.latents.contexts import Contexts, RecordsSpec
from unweave.latents.records import Records, Written
from unweave.methods.circuits import stage_draw as job
from unweave.methods.circuits.result import Drawing
from unweave.methods.circuits.spec import CircuitDrawSpec
from unweave.methods.circuits.view import why_words

NASTY = "<script>alert(\"x\")</script> & 'quotes' ]]> \ud800 \x00"
SVG = "{http://www.w3.org/2000/svg}"
SITES = (Site("embed"), *(Site(point, layer) for layer in (0, 1) for point in ("attn_add", "mlp_add", "resid_post")))
LATENTS = 40


def circuit(per_cell: int = 2, positions: int | None = 4, seed: int = 0) -> Circuit:
    """``per_cell`` nodes at each site and position (None: summed), one in eight an error, and half of all edges."""
    g = torch.Generator().manual_seed(seed)
    n = positions or 1
    nodes, places = {}, {}
    for site in SITES:
        effects = torch.zeros(n, LATENTS + 1)
        for p in range(n):
            some = torch.randperm(LATENTS, generator=g)[:per_cell]
            if torch.rand(1, generator=g) < 0.5:
                some[0] = LATENTS
            effects[p, some] = (0.2 + torch.rand(per_cell, generator=g)) * (-1.0) ** torch.arange(per_cell)
        nodes[site], places[site] = effects, effects.nonzero()
    edges = {}
    for up, down in itertools.combinations(SITES, 2):
        if down.layer not in (up.layer, (-1 if up.layer is None else up.layer) + 1):
            continue
        pairs = [(u, d) for u in places[up].tolist() for d in places[down].tolist() if u[0] <= d[0]]
        pairs = [pair for pair in pairs if torch.rand(1, generator=g) < 0.5]
        if pairs:
            weights = 0.1 + torch.rand(len(pairs), generator=g)
            u, d = (torch.tensor([pair[i] for pair in pairs]) for i in (0, 1))
            edges[up, down] = Edges(u, d, weights * (-1.0) ** torch.arange(len(pairs)))
    last = places[SITES[-1]]
    edges[SITES[-1], None] = Edges(last, torch.zeros_like(last), nodes[SITES[-1]][last.unbind(1)])
    about = About("agreement", tokens=("The", " key", " near", " cabinets")[:n]) if positions else About("x")
    return Circuit(nodes, edges, positions is not None, 7, about)


def drawn(text: str) -> ET.Element:
    return ET.fromstring(text)


def shapes(root: ET.Element) -> dict[int, ET.Element]:
    return {int(g.get("data-n", "")): g for g in root.iter(f"{SVG}g") if g.get("data-n", "y") != "y"}


def lines(root: ET.Element) -> list[ET.Element]:
    return [path for path in root.iter(f"{SVG}path") if path.get("data-u") is not None]


# -- what is drawn ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [4, None])
def test_the_picture_holds_what_is_above_the_thresholds_and_no_more(positions: int | None) -> None:
    found = circuit(4, positions)
    node, edge = 0.6, 0.3
    root = drawn(draw_svg(Picture(circuit=found, node_threshold=node, edge_threshold=edge)))
    above, edges = found.above(node), found.edges_above(node, edge)
    assert 5 < len(above) < sum(int((e != 0).sum()) for e in found.nodes.values())
    titles = [shape.findtext(f"{SVG}title") or "" for shape in shapes(root).values()]
    assert len(titles) == len(above)
    for wanted in above:
        inner = wanted.name.partition(", ")[2] or wanted.name
        at = f" at position {wanted.position}" if wanted.position is not None else ""
        told = [t for t in titles if t.startswith((f"{inner}{at} (", f"{inner}{at}: "))]
        assert len(told) == 1
        assert float(told[0].split("effect ")[1].replace("\u2212", "-")) == pytest.approx(wanted.effect, rel=1e-2)
    assert len(lines(root)) == len(edges)
    assert {shape.find(f"{SVG}polygon") is not None for shape in shapes(root).values()} == {True, False}
    triangles = sum(shape.find(f"{SVG}polygon") is not None for shape in shapes(root).values())
    assert triangles == sum(n.is_error for n in above) > 0
    assert f"mean of {found.n_examples} examples" in "".join(root.itertext())


def test_colours_by_sign_and_size() -> None:
    effects = torch.zeros(1, 5)
    effects[0, :4] = torch.tensor([1.0, 0.2, -1.0, -0.2])
    sites = (Site("resid_post", 0), Site("resid_post", 1))
    up = torch.tensor([[0, 0], [0, 1]])
    edges: dict[tuple[Site, Site | None], Edges] = {(sites[0], sites[1]): Edges(up, up, torch.tensor([2.0, -1.0]))}
    root = drawn(
        draw_svg(
            Picture(
                circuit=Circuit(dict.fromkeys(sites, effects), edges, False, 1), node_threshold=0.1, edge_threshold=0.0
            )
        )
    )
    fills = {}
    for shape in shapes(root).values():
        title, rect = shape.findtext(f"{SVG}title") or "", shape.find(f"{SVG}rect")
        assert rect is not None
        fills[title.split(":")[0]] = tuple(int(rect.get("fill", "")[i : i + 2], 16) for i in (1, 3, 5))
    blue, pale, red, rose = (fills[f"resid_post.0/{i}"] for i in range(4))
    assert blue[2] > blue[0] and pale[2] > pale[0] and red[0] > red[2] and rose[0] > rose[2]
    assert sum(pale) > sum(blue) and sum(rose) > sum(red)
    plus, minus = sorted(lines(root), key=lambda p: p.get("stroke-dasharray") is not None)
    assert plus.get("stroke-dasharray") is None and minus.get("stroke-dasharray")
    assert float(plus.get("stroke-width", 0)) > float(minus.get("stroke-width", 0))


def test_annotations_are_the_labels_and_whatever_they_hold_stays_text() -> None:
    found = circuit(3)
    above = [n for n in found.above(0.3) if not n.is_error]
    name = f"{above[0].site}/{above[0].slot}"
    said = {name: Annotation(name, NASTY, NASTY, 70, 20, False)}
    tokens = [NASTY, "\n", "", " x"]
    picture = Picture(
        circuit=found, node_threshold=0.3, edge_threshold=0.3, annotations=said, tokens=tokens, title=NASTY
    )
    svg, page = draw_svg(picture), draw_html(picture)
    for text in (svg, page):
        assert "<script>alert" not in text and "alert(&quot;x&quot;)" in text
        assert text.encode("utf-8")
    words = [t.text or "" for t in drawn(svg).iter(f"{SVG}text")]
    assert any(word.startswith("<script>") for word in words)
    assert "not relevant to the task" in page and "interpretability 70 of 100" in page
    plain = {str(t) for t in words}
    other = next(n for n in above if f"{n.site}/{n.slot}" != name)
    assert f"{other.site}/{other.slot}" in plain


def test_caps_are_told_and_keep_the_strongest() -> None:
    found = circuit(6)
    selection = select(found, 0.0, 0.0, max_nodes=20, max_edges=15)
    sizes = sorted((abs(n.effect) for n in found.above(0.0)), reverse=True)
    assert sorted((abs(n.effect) for n in selection.nodes), reverse=True) == sizes[:20]
    assert selection.nodes_left_out == len(sizes) - 20 and len(selection.edges) == 15
    assert selection.edges_left_out == len(found.edges_above(0.0, 0.0)) - 15
    text = draw_svg(Picture(circuit=found, node_threshold=0.0, edge_threshold=0.0, max_nodes=20, max_edges=15))
    assert f"{selection.nodes_left_out:,} weaker nodes and {selection.edges_left_out:,} weaker edges" in text
    assert "Left out" not in draw_svg(Picture(circuit=circuit(1), node_threshold=0.0, edge_threshold=0.0))


def test_thresholds_that_leave_about_as_many_as_asked() -> None:
    found = circuit(6)
    assert len(found.above(threshold_for(found, 30))) == 30
    assert threshold_for(found, 10**6) == 0.0
    node = threshold_for(found, 60)
    assert len(found.edges_above(node, edge_threshold_for(found, node, 40))) == 40
    assert edge_threshold_for(found, node, 10**6) == 0.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"node_threshold": 99.0}, "no node's effect is above 99"),
        ({"node_threshold": -1.0}, "node_threshold is -1"),
        ({"edge_threshold": float("nan")}, "edge_threshold is nan"),
        ({"max_nodes": 0}, "cannot be drawn"),
    ],
)
def test_what_cannot_be_drawn(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UnweaveError, match=says):
        asked: dict[str, Any] = {"node_threshold": 0.1, "edge_threshold": 0.1} | change
        draw_svg(Picture(circuit=circuit(), **asked))


def test_json_says_the_same() -> None:
    found = circuit(4)
    said = {str(n.name.partition(", ")[2]): Annotation(n.name.partition(", ")[2], "w") for n in found.above(0.5)[:1]}
    values = json.loads(
        json.dumps(
            to_json(Picture(circuit=found, node_threshold=0.5, edge_threshold=0.4, annotations=said)), allow_nan=False
        )
    )
    assert [n["name"] for n in values["nodes"]] == [
        n.name for n in sorted(found.above(0.5), key=lambda n: -abs(n.effect))
    ]
    assert {(e["from"], e["to"]) for e in values["edges"]} == {
        (u.name, d.name if d else "y") for u, d, _ in found.edges_above(0.5, 0.4)
    }
    assert {n["token"] for n in values["nodes"]} <= set(found.about.tokens)
    assert sum(n["annotation"] == "w" for n in values["nodes"]) >= 1


# -- where it stands --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("per_cell", "positions"), [(1, 4), (7, 4), (12, None), (1, 30)])
def test_nothing_overlaps_layers_go_up_and_columns_are_positions(per_cell: int, positions: int | None) -> None:
    found = circuit(per_cell, positions)
    selection = select(found, 0.0, 0.5, max_nodes=400)
    layout = place(found, selection)
    w, h = layout.node_width, layout.node_height
    for (x, y), (a, b) in itertools.combinations(layout.places, 2):
        assert abs(x - a) >= w - 1e-6 or abs(y - b) >= h - 1e-6
    columns = {column.position: column for column in layout.columns}
    bands = {band.site: band for band in layout.bands}
    for node, (x, y) in zip(selection.nodes, layout.places, strict=True):
        column, band = columns[node.position], bands[node.site]
        assert column.left <= x - w / 2 and x + w / 2 <= column.right
        assert band.top <= y - h / 2 + 1e-6 and y + h / 2 <= band.bottom + 1e-6
        assert 0 < x < layout.width and layout.metric[1] < y < layout.height
    in_order = sorted(layout.bands, key=lambda band: -band.top)
    assert [band.site for band in in_order] == sorted(bands)
    assert all(below.top > above.bottom for below, above in itertools.pairwise(in_order))
    assert 0.3 < layout.width / layout.height < 9


def test_paths_begin_and_end_at_their_nodes() -> None:
    found = circuit(9, None)
    selection = select(found, 0.0, 0.5, max_nodes=400)
    layout = place(found, selection)
    for (u, d, _), path in zip(selection.edges, layout.paths, strict=True):
        numbers = [float(n) for n in re.findall(r"-?\d+\.\d+", path)]
        assert numbers[:2] == pytest.approx(
            [layout.places[u][0], layout.places[u][1] - layout.node_height / 2], abs=0.1
        )
        end = (layout.metric[0], layout.metric[1]) if d is None else layout.places[d]
        assert numbers[-2] == pytest.approx(end[0], abs=0.1) and numbers[-1] >= end[1]
        ys = [numbers[1], numbers[-1]]
        assert ys[0] > ys[1]


def test_sweeps_leave_fewer_crossings_than_the_first_order() -> None:
    """Nodes in pairs, wired the wrong way round: untangled completely."""
    effects = torch.zeros(1, 9)
    effects[0, :8] = torch.arange(8, 0, -1) / 8
    lower, upper = Site("resid_post", 0), Site("resid_post", 1)
    reverse = torch.stack([torch.zeros(8, dtype=torch.long), torch.arange(7, -1, -1)], 1)
    straight = torch.stack([torch.zeros(8, dtype=torch.long), torch.arange(8)], 1)
    edges: dict[tuple[Site, Site | None], Edges] = {(lower, upper): Edges(straight, reverse, torch.ones(8))}
    found = Circuit({lower: effects, upper: effects.clone()}, edges, False, 1)
    selection = select(found, 0.0, 0.0)
    layout = place(found, selection)
    assert _crossings(selection.edges, layout.places, layout.metric) == 0


@pytest.mark.parametrize("seed", range(5))
def test_crossings_equal_a_plain_loop(seed: int) -> None:
    g = np.random.default_rng(seed)
    places = [(float(x), float(y)) for x, y in g.random((12, 2))]
    edges = [
        (int(a), int(b) if b < 12 else None, 1.0)
        for a, b in zip(g.integers(0, 12, 15), g.integers(0, 13, 15), strict=True)
    ]
    metric = (0.5, -0.2)

    def ends(edge: tuple[int, int | None, float]) -> tuple[tuple[float, float], tuple[float, float]]:
        return places[edge[0]], metric if edge[1] is None else places[edge[1]]

    def turn(p: Any, q: Any, r: Any) -> float:
        return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])

    count = 0
    for one, other in itertools.combinations(edges, 2):
        (a, b), (c, d) = ends(one), ends(other)
        if len({a, b, c, d}) == 4:
            count += turn(a, b, c) * turn(a, b, d) < 0 and turn(c, d, a) * turn(c, d, b) < 0
    assert _crossings(edges, places, metric) == count


# -- the page ---------------------------------------------------------------------------------------------------------


def records_for(latents: list[int]) -> Records:
    """Two contexts for each latent, whose tokens are hostile."""
    n, width = len(latents), 3
    c = 2 * n
    contexts = Contexts(
        latent=np.repeat(latents, 2).astype(np.int32),
        kind=np.tile(np.array([0, 1], np.uint8), n),
        band=np.tile(np.array([-1, 0], np.int8), n),
        token=np.arange(c),
        document=np.arange(c),
        role=np.ones(c, np.uint8),
        value=np.ones(c, np.float32),
        focus=np.ones(c, np.int32),
        offsets=np.arange(c + 1) * width,
        ids=np.tile(np.array([0, 1, 2], np.int32), c),
        values=np.tile(np.array([0, 1, 0.3], np.float32), c),
        counted=np.ones(c * width, bool),
    )
    ids, scores = np.tile(np.array([1, 2]), (n, 1)), np.ones((n, 2), np.float32)
    numbers = np.ones(n, np.float32)
    texts = {0: " </script>", 1: NASTY.replace("\x00", ""), 2: "\n"}
    written = Written(ids, scores, ids, scores)
    return Records(100, np.full(n, 5), numbers, numbers, contexts, written, texts, RecordsSpec(), np.array(latents))


def test_the_page_is_complete_safe_and_reachable_by_keyboard() -> None:
    found = circuit(3)
    above = found.above(0.3)
    by_site: dict[Site, set[int]] = {}
    for node in above[:-3]:
        if not node.is_error:
            by_site.setdefault(node.site, set()).add(node.slot)
    records = {site: records_for(sorted(some)) for site, some in by_site.items()}
    picture = Picture(circuit=found, node_threshold=0.3, edge_threshold=0.3)
    page = draw_html(picture, records)
    assert page == draw_html(picture, records)
    assert "default-src 'none'" in page
    assert page.count("<script>") == page.count("</script>") == 1
    assert not re.search(r"(src|href)=\"(?!#)", page) and "@import" not in page and "url(" not in page
    links, cards = re.findall(r'<a href="#node-(\d+)" aria-label', page), re.findall(r'id="node-(\d+)"', page)
    assert sorted(map(int, links)) == sorted(map(int, cards)) == list(range(len(above)))
    assert set(re.findall(r'href="#node-(\d+)"', page)) <= set(cards)
    assert page.count("Where it fires most strongly") == sum(
        not n.is_error and n.slot in by_site.get(n.site, ()) for n in above
    )
    strongest = max(found.edges_above(0.3, 0.3), key=lambda edge: abs(edge[2]))
    sign = "+" if strongest[2] > 0 else "\u2212"
    weight = f"{sign}{abs(strongest[2]):.2f}"
    assert weight in html.unescape(page)


def test_a_circuit_shows_itself_in_a_notebook() -> None:
    """A picture of about 60 nodes; nothing but words where no node has an effect; and what it holds stays text."""
    found = circuit(6)
    found = replace(found, about=replace(found.about, task=NASTY))
    shown = found._repr_html_()
    nodes = shown.count('<g data-n="') - 1
    assert 40 < nodes <= 60 < len(found.above(0.0)) and "mean of 7 examples" in shown
    assert "<script>alert" not in shown and "alert(&quot;x&quot;)" in shown
    none = replace(found, nodes={site: e * 0 for site, e in found.nodes.items()}, edges={})
    assert none._repr_html_().startswith("<p>Circuit(7 sites at each position, 0 edges")


# -- the stage --------------------------------------------------------------------------------------------------------


def test_the_stage_writes_three_files_and_is_reused(tmp_path: Path) -> None:
    found = circuit(5)
    folder = tmp_path / "found"
    found.save(folder / "circuit.safetensors")
    notes = tmp_path / "notes.jsonl"
    node = next(n for n in found.above(0.9) if not n.is_error)
    notes.write_text(json.dumps({"name": f"{node.site}/{node.slot}", "annotation": "harbours"}))
    spec = CircuitDrawSpec(circuit=folder, annotations=notes, nodes=30)
    run = job.run(spec, tmp_path / "runs")
    drawn = run.result
    assert drawn.nodes == 30 and "about 30" in why_words(drawn) and drawn.labelled >= 1
    assert as_read(Drawing, json.loads(json.dumps(as_written(drawn))), "here") == drawn
    for name in (drawn.picture, drawn.report, drawn.listing):
        assert "harbours" in (run.path / name).read_text(encoding="utf-8")
    moved = tmp_path / "moved.safetensors"
    (folder / "circuit.safetensors").rename(moved)
    again = job.run(CircuitDrawSpec(circuit=moved, annotations=notes, nodes=30), tmp_path / "runs")
    assert again.reused and again.path == run.path
    notes.write_text("")
    other = job.run(CircuitDrawSpec(circuit=moved, annotations=notes, nodes=30), tmp_path / "runs")
    assert other.path != run.path and other.result.labelled == 0


def test_a_circuits_own_threshold_bounds_what_is_drawn(tmp_path: Path) -> None:
    """Below it no edges were looked for: nodes would stand alone for no reason of theirs."""
    search = Search(Options(node_threshold=0.8), 4, 4, 0, 1.0, 0.0, ())
    found = circuit(5)
    found = replace(found, about=replace(found.about, search=search))
    found.save(tmp_path / "c.safetensors")
    result = job.run(CircuitDrawSpec(circuit=tmp_path / "c.safetensors"), tmp_path).result
    assert result.node_threshold == 0.8 == thresholds(found).node and why_words(result) == "the circuit's own"
    asked = CircuitDrawSpec(circuit=tmp_path / "c.safetensors", node_threshold=0.7, edge_threshold=0.5)
    assert job.run(asked, tmp_path).result.node_threshold == 0.7


def test_what_the_stage_refuses(tmp_path: Path) -> None:
    with pytest.raises(UnweaveError, match="there is no circuit here"):
        job.run(CircuitDrawSpec(circuit=tmp_path), tmp_path)
    circuit().save(tmp_path / "circuit.safetensors")
    with pytest.raises(UnweaveError, match="does not say where its SAEs are"):
        job.run(CircuitDrawSpec(circuit=tmp_path, contexts=True), tmp_path)
    with pytest.raises(UnweaveError, match="cannot read it"):
        job.run(CircuitDrawSpec(circuit=tmp_path, annotations=tmp_path / "none.jsonl"), tmp_path)
    with pytest.raises(UnweaveError, match="would have no effect"):
        CircuitDrawSpec(circuit=tmp_path, tokens=5)
    (tmp_path / "circuit.safetensors").write_bytes(b"no")
    with pytest.raises(UnweaveError, match="cannot read a circuit"):
        job.run(CircuitDrawSpec(circuit=tmp_path), tmp_path)
