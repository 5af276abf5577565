"""Circuits: means over examples by hand, options that are used, halving, going on after an interruption, bad input."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unweave.attribute import attribution as again
from unweave.attribute.attribution import SiteEffects, node_effects
from unweave.attribute.completeness import TOLERANCE
from unweave.attribute.options import AttributionOptions
from unweave.attribute.runner import AtSite
from unweave.circuits import find as module
from unweave.circuits.about import EdgeCounts, Options, Search
from unweave.circuits.edges import edge_effects
from unweave.circuits.find import find_circuit, find_nodes
from unweave.circuits.graph import Circuit
from unweave.core.errors import UnweaveError, UnweaveWarning
from unweave.core.pieces import Pieces
from unweave.core.site import Site
from unweave.lm.model import LM, Tokens
from unweave.sae.activations import ReLU, TopK
from unweave.sae.module import SAE
from unweave.sae.neurons import neurons

# Few steps, for speed: their sums need not agree with what is measured.
pytestmark = pytest.mark.filterwarnings("ignore:effects at .* add up to:unweave.core.errors.UnweaveWarning")

F = 16
NAMES = ("embed", "attn_add.0", "mlp_add.0", "resid_post.0", "attn_add.1", "mlp_add.1", "resid_post.1")
FAST = Options(steps=2, node_threshold=0.03, edge_threshold=0.0, max_tokens=24)


def make_sae(lm: LM, site: str, seed: int) -> SAE:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    d = lm.width(site)
    weights = (draw(d, F) / d**0.5, draw(F) * 0.3, draw(F, d) * 0.3, draw(d) * 0.2)
    return SAE(*weights, TopK(6) if seed % 2 else ReLU(), read=Site.parse(site))


def saes_of(lm: LM, names: tuple[str, ...] = NAMES) -> dict[Site, SAE]:
    return {Site.parse(name): make_sae(lm, name, seed) for seed, name in enumerate(names)}


def difference(out: Tensor, rows: Tensor) -> Tensor:
    """A metric that is another for every example of a batch."""
    return out[:, 5] - (1.0 + 0.5 * rows.to(out.device)) * out[:, 7]


def pair(n: int, width: int, seed: int) -> Any:
    clean = torch.randint(3, 97, (n, width), generator=torch.Generator().manual_seed(seed))
    patch = clean.clone()
    patch[:, 1] = (patch[:, 1] + 11) % 90 + 3
    return Tokens.of(clean), Tokens.of(patch), difference


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sums_of_effects_stand_beside_what_is_measured(tiny: Any, family: str) -> None:
    """Neurons ablated to zero: normalisation makes the path's end steep. Steps that grow shorter towards it find the
    sum where equal ones do not; to their means a few steps are enough."""
    lm = LM(tiny(family).double(), None)
    clean, _, _ = pair(6, 5, 3)
    saes = {site: neurons(lm, site) for site in (Site("resid_post", 0), Site("resid_post", 1))}
    options = Options(steps=10, rule="midpoint", summed="positions", skip_first=1, max_tokens=64)
    with pytest.warns(UnweaveWarning, match=r"add up to .*ablation: mean"):
        off = find_nodes(lm, saes, [(clean, None, difference)], options).about
    assert off.incomplete is not None and "add up" in off.incomplete and not all(row.complete for row in off.sums)
    graded = dataclasses.replace(options, rule="graded", steps=80)
    assert find_nodes(lm, saes, [(clean, None, difference)], graded).about.incomplete is None
    circuit = find_nodes(lm, saes, [(clean, None, difference)], dataclasses.replace(options, ablation="mean"))
    fine = circuit.about
    assert fine.incomplete is None and all(row.complete for row in fine.sums) and fine.neurons
    for site in saes:
        with lm.taps(read=[site]) as seen:
            before = difference(lm(clean)[:, -1], torch.arange(6))  # type: ignore[index]
        x = seen[site].clone()
        x[:, 1:] = x[:, 1:].mean((0, 1))
        with lm.taps(edit={site: lambda _x, _at, x=x: x}):
            after = difference(lm(clean)[:, -1], torch.arange(6))  # type: ignore[index]
        (row,) = [row for row in fine.sums if row.site == site]
        assert row.change == pytest.approx(float((after - before).mean()), rel=1e-5)
        assert row.sum == pytest.approx(float(circuit.nodes[site].sum()), rel=1e-5)
        assert abs(row.sum - row.change) <= TOLERANCE * float((after - before).abs().mean())
    with pytest.raises(UnweaveError, match="patched, not ablated"):
        find_nodes(lm, saes, [pair(2, 4, 1)], dataclasses.replace(options, ablation="mean"))


def one_by_one(lm: LM, saes: Any, batches: Any, o: Options) -> tuple[dict[Site, Tensor], dict[Any, float]]:
    """Sums of node effects and edges over examples that are run each on its own, divided by their number."""
    n = sum(len(clean) for clean, _, _ in batches)
    examples = []
    for clean, patch, _ in batches:
        for i in range(len(clean)):
            row = slice(i, i + 1)
            metric = lambda out, rows, i=i: difference(out, rows + i)  # noqa: E731
            examples.append((clean.rows(row), None if patch is None else patch.rows(row), metric))
    found = []
    nodes: dict[Site, Tensor] = {}
    for clean, patch, metric in examples:
        at = torch.arange(clean.ids.shape[1]).unsqueeze(0) >= o.skip_first
        effects = node_effects(
            lm,
            saes,
            clean,
            patch,
            metric,
            AttributionOptions(method=o.method, steps=o.steps, rule=o.rule),
            positions=at,
        )
        found.append((clean, patch, effects, at))
        for site, e in effects.items():
            slots = torch.cat([e.latents[0], e.error[0].unsqueeze(-1)], -1)
            slots = slots.sum(0, keepdim=True) if o.summed == "positions" else slots
            nodes[site] = nodes.get(site, 0) + slots / n
    upstream = {site: e.abs() > o.node_threshold for site, e in nodes.items()} if o.upstream == "above" else None
    edges: dict[Any, float] = {}
    for clean, patch, effects, at in found if o.method != "exact" else ():
        parts = edge_effects(
            lm,
            saes,
            clean,
            patch,
            effects,
            Options(node_threshold=o.node_threshold, summed=o.summed),
            positions=at,
            upstream=upstream,
        )
        for pair_, e in parts.items():
            for up, down, weight in zip(e.up.tolist(), e.down.tolist(), e.weight.tolist(), strict=True):
                key = (*pair_, tuple(up), tuple(down))
                edges[key] = edges.get(key, 0.0) + weight / n
    return nodes, edges


def listed(circuit: Circuit) -> dict[Any, float]:
    return {
        (*pair_, tuple(up), tuple(down)): weight
        for pair_, e in circuit.edges.items()
        for up, down, weight in zip(e.up.tolist(), e.down.tolist(), e.weight.tolist(), strict=True)
    }


def search_of(circuit: Circuit) -> Search:
    assert circuit.about.search is not None
    return circuit.about.search


def max_tokens_of(circuit: Circuit) -> int:
    assert circuit.costs is not None
    return circuit.costs.max_tokens


@pytest.fixture(scope="module")
def case() -> Any:
    """GPT-2 in float64, and batches of 5, 2 and 1 examples of two lengths; pieces of two and three examples."""
    from helpers.models import build_tiny

    lm = LM(build_tiny("gpt2").double(), None)
    return lm, saes_of(lm), [pair(5, 4, 1), pair(2, 4, 2), pair(1, 3, 3)]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("summed", ["none", "positions"])
def test_means_are_those_of_examples_run_one_by_one(tiny: Any, family: str, summed: Any) -> None:
    lm = LM(tiny(family).double(), None)
    saes = saes_of(lm)
    batches = [pair(3, 4, 1), pair(2, 4, 2)]
    options = dataclasses.replace(FAST, summed=summed, upstream="above" if family == "gpt2" else "all", max_tokens=16)
    circuit = find_circuit(lm, saes, batches, options)
    nodes, edges = one_by_one(lm, saes, batches, options)
    assert list(circuit.nodes) == list(saes)
    for site, e in nodes.items():
        close(circuit.nodes[site], e)
        assert circuit.nodes[site].shape == (4 if summed == "none" else 1, F + 1)
    found = listed(circuit)
    assert len(edges) > 30
    for key in set(found) | set(edges):
        assert found.get(key, 0.0) == pytest.approx(edges.get(key, 0.0), rel=1e-4, abs=1e-6)
    assert (circuit.positions, circuit.n_examples) == (summed == "none", 5)


def test_lengths_and_zero_ablation_and_what_is_reported(case: Any) -> None:
    lm, saes, batches = case
    kept = find_nodes(lm, saes, batches, FAST)
    assert (kept.n_examples, search_of(kept).other_lengths) == (7, 1)
    nodes, _ = one_by_one(lm, saes, batches[:2], FAST)
    for site, e in nodes.items():
        close(kept.nodes[site], e)
    summed = dataclasses.replace(FAST, summed="positions")
    whole = find_circuit(lm, saes, batches, summed)
    search = search_of(whole)
    assert (whole.n_examples, search.other_lengths) == (8, 0)
    assert (search.shortest, search.longest) == (3, 4)
    nodes, edges = one_by_one(lm, saes, batches, summed)
    for site, e in nodes.items():
        close(whole.nodes[site], e)
    above = {kind: sum(int((e.abs() > 0.03)[:, part].sum()) for e in nodes.values())
             for kind, part in (("latents", slice(0, -1)), ("errors", slice(-1, None)))}  # fmt: skip
    counted = {kind: sum(getattr(row, kind) for row in search.above) for kind in above}
    assert counted == above and whole.counts(0.03) == (above["latents"], above["errors"])
    assert search.edges == EdgeCounts(len(edges), len(listed(whole)))
    values = {}
    for side in (0, 1):
        each = [difference(lm(b[side])[:, -1], torch.arange(len(b[0]))) for b in batches]  # type: ignore[index]
        values[side] = float(torch.cat(each).mean())
    assert (search.clean, search.patch) == pytest.approx((values[0], values[1]))
    assert whole.costs is not None and whole.costs.peak_gb > 0
    assert whole.costs.seconds_nodes > 0 and whole.costs.seconds_edges is not None
    assert search.options.summed == "positions" and not whole.about.neurons
    without = [(clean, None, metric) for clean, _, metric in batches]
    ablated = find_nodes(lm, saes, without, summed)
    nodes, _ = one_by_one(lm, saes, without, summed)
    for site, e in nodes.items():
        close(ablated.nodes[site], e)
    assert search_of(ablated).patch is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_count_as_if_they_were_not(case: Any, side: Any) -> None:
    lm, saes, _ = case
    ids = torch.randint(3, 97, (2, 4), generator=torch.Generator().manual_seed(5)).tolist()
    rows = [(ids[0], [4] * 4), (ids[1][:3], [4] * 3)]
    padded = [(Tokens.pad(rows, 0, side), None, difference)]
    alone = [(Tokens.pad(rows[:1], 0), None, difference),
             (Tokens.pad(rows[1:], 0), None, lambda out, at: difference(out, at + 1))]  # fmt: skip
    options = dataclasses.replace(FAST, summed="positions", skip_first=1)
    a, b = (find_circuit(lm, saes, batches, options) for batches in (padded, alone))
    for site in a.nodes:
        close(a.nodes[site], b.nodes[site])
    found, wanted = listed(a), listed(b)
    assert len(found) == len(wanted) > 30
    assert all(found[key] == pytest.approx(weight, rel=1e-4, abs=1e-6) for key, weight in wanted.items())
    with pytest.raises(UnweaveError, match="padded"):
        find_nodes(lm, saes, padded, FAST)
    with pytest.raises(UnweaveError, match="first 3"):
        find_nodes(lm, saes, padded, dataclasses.replace(options, skip_first=3))


@pytest.mark.parametrize(
    "change",
    [
        {"method": "attribution"},
        {"method": "exact"},
        {"steps": 5},
        {"rule": "left"},
        {"summed": "positions"},
        {"skip_first": 2},
        {"node_threshold": 0.01},
        {"edge_threshold": 0.002},
        {"upstream": "all"},
        {"metric_at": Site("final_norm")},
    ],
)
def test_every_option_is_used(case: Any, change: dict[str, Any]) -> None:
    """Each changes the circuit, to what the same options give when examples run one by one."""
    lm, saes, batches = case
    batches = batches[1:2]
    options = dataclasses.replace(FAST, **{name: value for name, value in change.items() if name != "metric_at"})
    if "metric_at" in change:
        batches = [(*batches[0][:2], AtSite(lambda out, rows: out[:, -1, 3], change["metric_at"]))]
    make = find_nodes if change.get("method") == "exact" else find_circuit
    plain, changed = (make(lm, saes, batches, o) for o in (dataclasses.replace(options, **{
        name: getattr(FAST, name) for name in change if name != "metric_at"}), options))  # fmt: skip
    if "metric_at" in change:
        total = node_effects(lm, saes, *batches[0], AttributionOptions(method="ig", steps=2, rule="midpoint"))
        close(changed.nodes[Site("embed")][:, :-1], total[Site("embed")].latents.mean(0))
        return
    nodes, edges = one_by_one(lm, saes, batches, options)
    for site, e in nodes.items():
        close(changed.nodes[site], e)
    found = listed(changed)
    if change.get("method") != "exact":
        strong = {key: w for key, w in edges.items() if abs(w) > options.edge_threshold}
        assert {k for k, w in strong.items() if abs(w) > 1e-6} <= set(found)
        assert all(found[key] == pytest.approx(edges[key], rel=1e-4, abs=1e-6) for key in found)
        assert all(abs(w) > options.edge_threshold for w in found.values())
    same_nodes = all(torch.equal(plain.nodes[site], changed.nodes[site]) for site in saes if plain.nodes[
        site].shape == changed.nodes[site].shape) and plain.positions == changed.positions  # fmt: skip
    assert not (same_nodes and listed(plain) == found)


# -- memory and interruptions -----------------------------------------------------------------------------------------


def test_batches_are_halved_when_memory_runs_out(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, saes, batches = case
    options = dataclasses.replace(FAST, max_tokens=40)
    whole = find_circuit(lm, saes, batches, options)
    assert max_tokens_of(whole) == 40
    asked: list[tuple[int, int]] = []

    def narrow(function: Any) -> Any:
        def run(lm: LM, saes: Any, clean: Tokens, *args: Any, **named: Any) -> Any:
            asked.append((len(clean), args[2].max_tokens))
            if len(clean) > 2:
                raise MemoryError
            return function(lm, saes, clean, *args, **named)

        return run

    monkeypatch.setattr(module, "node_effects", narrow(node_effects))
    monkeypatch.setattr(module, "edge_effects", narrow(edge_effects))
    found = find_circuit(lm, saes, batches, options)
    # 5 examples: too many; then 2, 2 and 1, and 2 of the other batch. What memory allowed is remembered for the edges.
    assert asked == [(5, 40), *[(2, 16), (2, 16), (1, 16), (2, 16)] * 2]
    assert max_tokens_of(found) == 16
    for site in saes:
        close(found.nodes[site], whole.nodes[site])
    assert listed(found).keys() == listed(whole).keys()


def test_passes_of_an_example_that_does_not_fit_hold_its_own_tokens_only(
    case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, saes, batches = case
    options = dataclasses.replace(FAST, max_tokens=40)
    whole = find_circuit(lm, saes, batches[:1], options)
    asked: list[tuple[int, int]] = []

    def narrow(lm: LM, saes: Any, clean: Tokens, *args: Any, **named: Any) -> Any:
        asked.append((len(clean), args[2].max_tokens))
        if args[2].max_tokens > clean.ids.shape[1]:
            raise MemoryError
        return node_effects(lm, saes, clean, *args, **named)

    monkeypatch.setattr(module, "node_effects", narrow)
    found = find_circuit(lm, saes, batches[:1], options)
    assert asked == [(5, 40), (2, 16), (1, 8), *[(1, 4)] * 5]
    assert max_tokens_of(found) == 4
    for site in saes:
        close(found.nodes[site], whole.nodes[site])
    assert listed(found).keys() == listed(whole).keys()


def test_edges_hold_one_site_s_effects_at_a_time(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    lm, saes, batches = case
    held: list[weakref.ref[Tensor]] = []

    def watched(sae: SAE, gradient: Tensor, change: Any) -> SiteEffects:
        found = effects_of(sae, gradient, change)
        held.extend(weakref.ref(x) for x in (found.latents, change.latents))
        return found

    class Watched(again.EffectsAgain):
        def __getitem__(self, site: Site) -> SiteEffects:
            assert all(ref() is None for ref in held)
            with monkeypatch.context() as patch:
                patch.setattr(again, "effects_of", watched)
                return super().__getitem__(site)

    effects_of = again.effects_of
    monkeypatch.setattr(module, "EffectsAgain", Watched)
    find_circuit(lm, saes, batches[1:2], FAST)
    assert len(held) == 2 * len(saes)  # each site's once


def test_only_what_is_needed_again_is_kept(case: Any, tmp_path: Path) -> None:
    """Without a folder gradients, and these only where edges are asked for; in files sums are in float32."""
    lm, saes, batches = case
    pieces = [Pieces(None), Pieces(None)]
    find_nodes(lm, saes, batches, FAST, pieces=pieces[0])
    find_circuit(lm, saes, batches, FAST, pieces=pieces[1])
    assert pieces[0]._tensors == {}
    kept = [set(part) for part in pieces[1]._tensors.values()]
    assert kept == [{f"gradient/{site}" for site in saes}] * 3
    find_nodes(lm, saes, batches, FAST, pieces=Pieces(tmp_path))
    for path in tmp_path.iterdir():
        found = Pieces(tmp_path).get(path.stem, "sum/")
        assert found is not None and {x.dtype for x in found.values()} == {torch.float32} and len(found) == len(saes)


def test_pieces_of_other_sizes_are_not_taken(case: Any, tmp_path: Path) -> None:
    """How many tokens a pass holds decides last bits: work that goes on in other passes gives what these give."""
    lm, _, batches = case
    saes = saes_of(lm, ("embed", "mlp_add.0", "resid_post.1"))
    for options in (FAST, dataclasses.replace(FAST, max_tokens=16), dataclasses.replace(FAST, max_tokens=25)):
        found = find_circuit(lm, saes, batches, options, pieces=Pieces(tmp_path))
        wanted = find_circuit(lm, saes, batches, options)
        assert all(torch.equal(found.nodes[site], wanted.nodes[site]) for site in saes)
        assert listed(found) == listed(wanted)
    before = set(tmp_path.iterdir())
    find_circuit(lm, saes, batches, FAST, pieces=Pieces(tmp_path))
    assert set(tmp_path.iterdir()) == before


def test_edges_to_the_metric_that_are_total_effects_say_so(case: Any) -> None:
    lm, _, batches = case
    last = find_circuit(lm, saes_of(lm), batches, FAST)
    assert list(map(str, search_of(last).ends)) == ["resid_post.1"]
    alone = find_circuit(lm, saes_of(lm, ("mlp_add.0", "resid_post.1", "attn_add.2", "mlp_add.2")), batches, FAST)
    assert {str(up) for up, down in alone.edges if down is None} == {"resid_post.1", "attn_add.2", "mlp_add.2"}
    assert list(map(str, search_of(alone).ends)) == ["resid_post.1", "attn_add.2", "mlp_add.2"]


def test_interrupted_work_goes_on(case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, saes, batches = case
    whole = find_circuit(lm, saes, batches, FAST)
    calls: dict[str, int] = {"node_effects": 0, "edge_effects": 0}
    limit = {"node_effects": 2, "edge_effects": 99}

    def watched(name: str, function: Any) -> Any:
        def run(*args: Any, **named: Any) -> Any:
            if calls[name] >= limit[name]:
                raise KeyboardInterrupt
            calls[name] += 1
            return function(*args, **named)

        return run

    monkeypatch.setattr(module, "node_effects", watched("node_effects", node_effects))
    monkeypatch.setattr(module, "edge_effects", watched("edge_effects", edge_effects))
    with pytest.raises(KeyboardInterrupt):
        find_circuit(lm, saes, batches, FAST, pieces=Pieces(tmp_path))
    limit.update(node_effects=99, edge_effects=1)
    with pytest.raises(KeyboardInterrupt):
        find_circuit(lm, saes, batches, FAST, pieces=Pieces(tmp_path))
    assert calls == {"node_effects": 3, "edge_effects": 1}
    limit.update(edge_effects=99)
    found = find_circuit(lm, saes, batches, FAST, pieces=Pieces(tmp_path))
    assert calls == {"node_effects": 3, "edge_effects": 3}
    assert all(torch.equal(found.nodes[site], whole.nodes[site]) for site in saes)
    assert listed(found) == listed(whole)
    next(tmp_path.glob("edges-*")).write_bytes(b"nonsense")
    with pytest.raises(UnweaveError, match="delete it"):
        find_circuit(lm, saes, batches, FAST, pieces=Pieces(tmp_path))


# -- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, saes, batches = case

    def refused(words: str, given: Any = batches, options: Options = FAST, make: Any = find_nodes) -> None:
        with pytest.raises(UnweaveError, match=words):
            make(lm, saes, given, options)

    clean, patch, _ = batches[0]
    refused("no examples", [])
    refused("no examples", [(clean.rows(slice(0, 0)), None, difference)])
    refused("no node changes the metric", [(clean, clean, difference)])
    refused("exact effects have no gradient", options=dataclasses.replace(FAST, method="exact"), make=find_circuit)
    refused("do not line up", [(clean, patch.rows(slice(0, 2)), difference)])
    refused("NaN", [(clean, patch, lambda out, rows: out[:, 0] * float("nan"))])
    for wrong in ({"method": "guess"}, {"summed": "some"}, {"skip_first": -1}, {"max_tokens": 0}, {"upstream": "no"},
                  {"node_threshold": -1.0}, {"edge_threshold": -0.1}):  # fmt: skip
        with pytest.raises(UnweaveError, match=next(iter(wrong))):
            Options(**wrong)
    with pytest.raises(UnweaveError, match="steps must be at least 1"):
        Options(steps=0)

    def broken(*args: Any, **named: Any) -> Any:
        found = node_effects(*args, **named)
        one = found[Site("embed")]
        bad = one.latents.clone()
        bad[0, 1, 2] = float("inf")
        return found | {Site("embed"): SiteEffects(bad, one.error, one.gradient)}

    monkeypatch.setattr(module, "node_effects", broken)
    refused("1 of 68 effects are NaN or infinite")
