"""``unweave circuit find`` and ``evaluate`` from end to end on a tiny model: what they write, share, and refuse."""

from __future__ import annotations

import csv
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.circuit_jobs import SITES, made_pairs, spec_of, write_home
from unweave.circuits.about import Example, Options
from unweave.circuits.find import find_circuit
from unweave.circuits.graph import Circuit
from unweave.cli.app import main
from unweave.core.contents import listing
from unweave.core.errors import UnweaveError
from unweave.core.files import read_json
from unweave.core.result import as_read, as_written
from unweave.core.run import Run
from unweave.core.site import Site
from unweave.core.writing import write_json
from unweave.inputs.saes import open_saes
from unweave.lm.model import LM
from unweave.methods.circuits import stage_draw as draw
from unweave.methods.circuits import stage_evaluate as evaluate
from unweave.methods.circuits import stage_find as find
from unweave.methods.circuits import texts, view
from unweave.methods.circuits.figures import curve_name
from unweave.methods.circuits.result import CircuitSearch, Faithfulness, LeftOut
from unweave.methods.circuits.spec import CircuitDrawSpec, CircuitEvaluateSpec, CircuitFindSpec
from unweave.methods.circuits.sweep import SweepOptions, sweep
from unweave.sae.module import SAE, ReLU
from unweave.show.page import Around
from unweave.tasks import agreement
from unweave.tasks.agreement import Pair

# Few steps, for speed: their sums need not agree with what is measured.
pytestmark = pytest.mark.filterwarnings("ignore:effects at .* add up to:unweave.core.errors.UnweaveWarning")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("circuit")
    write_home(folder)
    return folder


@pytest.fixture(scope="module")
def found(home: Path) -> Run[CircuitSearch]:
    return find.run(spec_of(home), home / "runs")


def test_a_circuit_is_found_saved_and_described(home: Path, found: Run[CircuitSearch]) -> None:
    assert {p.name for p in found.path.iterdir()} >= {"circuit.safetensors", "circuit.json", "pairs.jsonl", "DONE"}
    assert not (found.path / "parts").exists()
    circuit = Circuit.load(found.path / "circuit.safetensors")
    opened = open_saes(spec_of(home))
    chosen = agreement.load(found.path / "pairs.jsonl")
    options = Options(steps=2, node_threshold=0.1, max_tokens=7)
    again = find_circuit(opened.lm, opened.saes, agreement.batches(opened.lm, chosen), options)
    assert (circuit.n_examples, circuit.positions) == (9, True)
    for site, effects in again.nodes.items():
        torch.testing.assert_close(circuit.nodes[site], effects, rtol=1e-3, atol=1e-5)
    assert {pair: len(e) for pair, e in circuit.edges.items()} == {pair: len(e) for pair, e in again.edges.items()}
    six = [pair.clean_prefix for pair in chosen if len(pair.clean_prefix) == 6]
    assert "".join(circuit.about.tokens) == six[0] and len(circuit.about.tokens) == 6
    assert circuit.about.examples[0] == Example("clean", chosen[0].clean_prefix, chosen[0].clean_answer)
    assert (circuit.about.of, circuit.about.neurons) == ("model", False)
    result = found.result
    assert result.used.left_out == (LeftOut("another length than the commonest", 2),)
    assert (result.latents, result.errors) == circuit.counts(0.1) and result.latents > 5
    whole = read_json(found.path / "circuit.json")
    assert len(whole["nodes"]) == len(circuit.above(0.1))
    assert len(whole["edges"]) == len(circuit.edges_above(0.1, 0.01)) > 5
    weights = [abs(edge["weight"]) for edge in whole["edges"]]
    assert weights == sorted(weights, reverse=True) and result.edges == len(weights)
    for site in {node.site for node in result.strongest}:
        best = max(circuit.above(0.1), key=lambda node, site=site: abs(node.effect) * (node.site == site))
        assert next(node for node in result.strongest if node.site == site) == best
    shown = [
        {"from": e.up.name, "to": e.down.name if e.down else "y", "weight": e.weight} for e in result.strongest_edges
    ]
    assert shown == whole["edges"][:20]
    assert as_read(CircuitSearch, json.loads(json.dumps(as_written(result))), "here") == result


def test_a_finished_question_loads_nothing(
    home: Path, found: Run[CircuitSearch], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = CircuitEvaluateSpec(circuit=found.path, pairs=home / "test.jsonl", neurons=False, errors=("keep",), draws=0)
    drawing = CircuitDrawSpec(circuit=found.path)
    done = [evaluate.run(asked, home / "runs"), draw.run(drawing, home / "runs")]

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights are loaded")

    for kind in (LM, SAE, Circuit):
        monkeypatch.setattr(kind, "load", refuse)
    for contexts in (False, True):
        find.run.inputs(spec_of(home))
        draw.run.inputs(replace(drawing, contexts=contexts))
    assert find.run(spec_of(home), home / "runs").reused
    again = [
        evaluate.run(replace(asked, saes=(str(home / "saes"),)), home / "runs"), draw.run(drawing, home / "runs")
    ]  # fmt: skip
    assert [run.path for run in again] == [run.path for run in done] and all(run.reused for run in again)


def test_results_are_shown_without_a_model(home: Path, found: Run[CircuitSearch]) -> None:
    """As rows and as sections of a page, each with every number that matters; in a notebook too."""
    asked = CircuitEvaluateSpec(
        circuit=found.path, pairs=home / "test.jsonl", neurons=False, errors=("default", "remove"), draws=3
    )
    measured, drawn = evaluate.run(asked, home / "runs"), draw.run(CircuitDrawSpec(circuit=found.path), home / "runs")
    assert as_read(Faithfulness, json.loads(json.dumps(as_written(measured.result))), "here") == measured.result
    rows = {name: value for name, value, _ in found.result.rows()}
    assert rows["latents"] == found.result.latents and rows["edges"] == found.result.edges
    assert {"task", "examples", "metric", "sum / measured", "resid_post.1"} <= set(rows)
    text = view.section(found.result).body
    assert found.result.strongest[0].name in text and "The strongest edges" in text and "mlp_add.1" in text
    section = view.section(measured.result)
    assert "<svg" in section.body and "without errors" in section.body
    assert any("fails this task" in note for note in section.notes)
    row = next(row for row in measured.result.curves[0].rows if row.nodes > 3)
    assert row.random is not None and row.random.low <= row.random.mean <= row.random.high and row.random.draws == 3
    assert (
        "<svg" in view.section(drawn.result, Around(drawn.path)).body and "<svg" not in view.section(drawn.result).body
    )
    for run in (found, measured, drawn):
        assert "uw-embed" in run.result._repr_html_()


def test_a_run_is_known_by_the_content_of_what_it_reads(home: Path, found: Run[CircuitSearch], tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere.jsonl"
    copy.write_bytes((home / "train.jsonl").read_bytes())
    (tmp_path / "saes").symlink_to(home / "saes")
    same = find.run(spec_of(home, pairs=copy, saes=(str(tmp_path / "saes"),), max_tokens=50), home / "runs")
    assert same.reused and same.path == found.path
    copy.write_text(copy.read_text() + copy.read_text().splitlines()[0] + "\n")
    assert find.run(spec_of(home, pairs=copy, edges=False), home / "runs").path != found.path
    for change in ({"steps": 3}, {"rule": "right"}, {"seed": 1}, {"sites": ("resid_post.1",)}, {"examples": 8}):
        assert spec_of(home, **change).digest() != spec_of(home).digest()


def test_single_inputs_are_ablated(home: Path) -> None:
    spec = spec_of(home, pairs=None, inputs=home / "inputs.jsonl", metric="neg-logit", edges=False)
    run = find.run(spec, home / "runs")
    circuit = Circuit.load(run.path / "circuit.safetensors")
    assert (circuit.positions, circuit.n_examples) == (False, 9)
    assert run.result.used.left_out == (LeftOut("the answer is not a single token", 1),)
    assert run.result.search.patch is None and (run.path / "inputs.jsonl").exists()
    kept = find.run(replace(spec, summed="none"), home / "runs")
    assert LeftOut("another length than the commonest", 1) in kept.result.used.left_out
    with pytest.raises(UnweaveError, match="other texts than it was found on"):
        evaluate.run(CircuitEvaluateSpec(circuit=run.path), home / "runs")
    with pytest.raises(UnweaveError, match="single texts, not of pairs"):
        evaluate.run(CircuitEvaluateSpec(circuit=run.path, pairs=home / "test.jsonl"), home / "runs")
    other = home / "others.jsonl"
    other.write_text("\n".join(json.dumps({"context": p.clean_prefix, "answer": "k"}) for p in made_pairs(4, 9)))
    done = evaluate.run(
        CircuitEvaluateSpec(circuit=run.path, inputs=other, neurons=False, errors=("keep",), draws=0), home / "runs"
    )
    (curve,) = done.result.curves
    assert (curve.errors, curve.ablation) == ("keep", "clean")
    with pytest.raises(UnweaveError, match="no patch"):
        evaluate.run(CircuitEvaluateSpec(circuit=run.path, inputs=other, ablation="patch"), home / "runs")


def test_a_circuit_is_evaluated_on_other_texts_beside_neurons(home: Path, found: Run[CircuitSearch]) -> None:
    spec = CircuitEvaluateSpec(
        circuit=found.path, pairs=home / "test.jsonl", thresholds=(0.0, 0.05, 0.2), draws=2, seed=3, examples=30
    )
    run = evaluate.run(spec, home / "runs")
    assert run.result.used.left_out == (
        LeftOut("the circuit was found on the same text", 2), LeftOut("not of 6 tokens, as the circuit's texts", 3)
    )  # fmt: skip
    assert run.result.used.examples == 6 and run.result.curves[0].start_layer == 1
    shown = {row[0]: row[1:] for row in run.result.rows()}
    # a model of random weights: 5 of 9 and 3 of 9 answers are right
    assert shown["right answers"][0] == "56% / 33%" and "fails this task" in shown["right answers"][1]
    curves = {curve_name(c.errors, c.neurons): c for c in run.result.curves}
    names = ["latents and errors", "without attention and MLP errors", "without errors", "neurons"]
    assert list(curves) == names == [curve_name(r.errors, r.neurons) for r in run.result.reached]
    assert all(shown[name][0] == "-" for name in names)
    assert run.result.curve("remove") == curves["without errors"] and run.result.curve("keep") is None
    opened = open_saes(spec_of(home))
    kept = [p for p in agreement.load(home / "test.jsonl") if len(p.clean_prefix) == 6]
    kept = [p for p in kept if p not in made_pairs(2, 0)]
    wanted = sweep(
        opened.lm, opened.saes, agreement.batches(opened.lm, kept), Circuit.load(found.path / "circuit.safetensors"),
        SweepOptions(start_layer=1, draws=2, seed=3), thresholds=(0.0, 0.05, 0.2),
    )  # fmt: skip
    for a, b in zip(curves["latents and errors"].rows, wanted.rows, strict=True):
        assert (a.nodes, a.latents) == (b.nodes, b.latents)
        assert (a.faithfulness, a.completeness) == pytest.approx((b.faithfulness, b.completeness), abs=1e-4)
    assert all(row.errors == 0 for row in curves["without errors"].rows)
    assert curves["without errors"].rows[0].latents == curves["latents and errors"].rows[0].latents
    assert (run.path / "faithfulness.png").read_bytes()[:4] == b"\x89PNG"
    rows = list(csv.DictReader((run.path / "faithfulness.csv").read_text().splitlines()))
    assert len(rows) == 12 and float(rows[1]["faithfulness"]) == curves[names[0]].rows[1].faithfulness
    (neuron_run,) = [p for p in (home / "runs").glob("circuit-find-*") if read_json(p / "spec.json")["spec"]["neurons"]]
    nodes = Circuit.load(neuron_run / "circuit.safetensors").nodes
    assert sorted(map(str, nodes)) == sorted(SITES) and nodes[Site("embed")].shape == (6, 33)
    units = curves["neurons"].rows[0]
    assert units.errors == 0
    assert units.latents == sum(int((e != 0).sum()) for site, e in nodes.items() if site.layer == 1)
    found_units = Run.at(neuron_run, CircuitSearch).result
    assert found_units.neurons and found_units.rows()[5][0] == "neurons" and found_units.errors == 0
    assert view.section(found_units).heading.startswith("Circuit of neurons")
    asked = Run.at(neuron_run).spec
    assert (asked["steps"], asked["rule"], asked["seed"]) == (2, "midpoint", 0)
    assert evaluate.run(spec, home / "runs").reused


def test_curves_are_kept_when_evaluation_is_interrupted(
    home: Path, found: Run[CircuitSearch], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = CircuitEvaluateSpec(circuit=found.path, pairs=home / "test.jsonl", neurons=False, draws=0, seed=5)
    calls: list[str] = []

    def watched(*args: Any, **named: Any) -> Any:
        if len(calls) == 2:
            calls.append("stopped")
            raise KeyboardInterrupt
        calls.append(args[4].errors)
        return sweep(*args, **named)

    monkeypatch.setattr(evaluate, "sweep", watched)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(spec, home / "runs")
    run = evaluate.run(spec, home / "runs")
    assert calls == ["default", "remove-attn-mlp", "stopped", "remove"]
    counts = [row.nodes for row in run.result.curves[2].rows]
    assert len(counts) > 8 and counts == sorted(counts, reverse=True)


def test_the_test_split_is_what_a_task_s_circuit_is_measured_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def pairs(lm: LM, task: str, n: int, *, seed: int, split: str) -> list[Pair]:
        asked.append((task, n, seed, split))
        return made_pairs(n, seed if split == "train" else seed + 100)

    monkeypatch.setattr(texts.agreement, "pairs", pairs)
    run = find.run(spec_of(home, pairs=None, task="simple", examples=5, edges=False), home / "runs")
    quick = CircuitEvaluateSpec(circuit=run.path, neurons=False, errors=("default",), draws=0, examples=4, seed=2)
    evaluate.run(quick, home / "runs")
    assert asked == [("simple", 5, 0, "train"), ("simple", 4, 2, "test")]
    late = find.run(spec_of(home, pairs=None, split="test", examples=5, edges=False), home / "runs")
    with pytest.raises(UnweaveError, match="other texts than it was found on"):
        evaluate.run(replace(quick, circuit=late.path), home / "runs")


def test_single_texts_of_another_length_are_counted_where_positions_are_kept(home: Path, tmp_path: Path) -> None:
    spec = spec_of(home, pairs=None, inputs=home / "inputs.jsonl", summed="none", edges=False)
    run = find.run(spec, home / "runs")
    texts = [p.clean_prefix for p in (*made_pairs(4, 9), *made_pairs(3, 10, 5))]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"context": text, "answer": "k"}) for text in texts))
    quick = CircuitEvaluateSpec(
        circuit=run.path, inputs=tmp_path / "b.jsonl", neurons=False, errors=("default",), draws=0
    )
    done = evaluate.run(quick, home / "runs")
    assert done.result.used.examples == 4
    assert done.result.used.left_out == (LeftOut("not of 6 tokens, as the circuit's texts", 3),)
    (tmp_path / "c.jsonl").write_text(json.dumps({"context": texts[-1], "answer": "k"}))
    with pytest.raises(UnweaveError, match=r"(?s)no example is left.*6 tokens"):
        evaluate.run(replace(quick, inputs=tmp_path / "c.jsonl"), home / "runs")


def test_first_tokens_that_were_skipped_stay_in_evaluation(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = find.run(spec_of(home, skip_first=2, edges=False, examples=4), home / "runs")
    quick = CircuitEvaluateSpec(circuit=run.path, pairs=home / "test.jsonl", errors=("default",), draws=0)
    done = evaluate.run(quick, home / "runs")
    assert [(curve.neurons, curve.skip_first) for curve in done.result.curves] == [(False, 2), (True, 2)]


def test_an_evaluation_is_known_by_the_circuit_s_content(home: Path, found: Run[CircuitSearch], tmp_path: Path) -> None:
    """Not by its folder's name; and autoencoders named by relative paths are found from elsewhere."""
    quick = CircuitEvaluateSpec(
        circuit=found.path, pairs=home / "test.jsonl", neurons=False, errors=("keep",), draws=0, seed=8
    )
    first = evaluate.run(quick, tmp_path / "runs")
    shutil.copytree(found.path, tmp_path / "renamed")
    assert evaluate.run(replace(quick, circuit=tmp_path / "renamed"), tmp_path / "runs").path == first.path
    circuit = Circuit.load(found.path / "circuit.safetensors")
    nodes = {site: effects * 2 for site, effects in circuit.nodes.items()}
    replace(circuit, nodes=nodes).save(tmp_path / "renamed" / "circuit.safetensors")
    with pytest.raises(UnweaveError, match=r"damaged: circuit\.safetensors"):  # not what that run made
        evaluate.run(replace(quick, circuit=tmp_path / "renamed"), tmp_path / "runs")
    listed = read_json(tmp_path / "renamed" / "DONE")
    listed |= listing(tmp_path / "renamed", leave_out=set(os.listdir(tmp_path / "renamed")) - {"circuit.safetensors"})
    write_json(tmp_path / "renamed" / "DONE", listed)  # a run that made this one
    assert evaluate.run(replace(quick, circuit=tmp_path / "renamed"), tmp_path / "runs").path != first.path


def test_relative_paths_of_autoencoders_are_found_from_elsewhere(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    run = find.run(spec_of(home, saes=("saes",), seed=4, examples=3, edges=False), home / "runs")
    monkeypatch.chdir(tmp_path)
    quick = CircuitEvaluateSpec(circuit=run.path, pairs=home / "test.jsonl", neurons=False, errors=("keep",), draws=0)
    assert evaluate.run(quick, tmp_path / "runs").result.reached


def test_a_circuit_of_embeddings_alone_is_evaluated_from_there(home: Path) -> None:
    run = find.run(spec_of(home, sites=("embed",), edges=False), home / "runs")
    quick = CircuitEvaluateSpec(
        circuit=run.path, pairs=home / "test.jsonl", neurons=False, errors=("default",), draws=0
    )
    assert evaluate.run(quick, home / "runs").result.curves[0].start_layer == -1


def test_one_file_may_serve_several_sites(home: Path) -> None:
    name = str(home / "unplaced")
    g = torch.Generator().manual_seed(2)
    enc, dec = torch.randn(32, 16, generator=g), torch.randn(16, 32, generator=g)
    SAE(enc, torch.zeros(16), dec, torch.zeros(32), ReLU()).save(name)
    opened = open_saes(spec_of(home, saes=(f"resid_post.1={name}", f"resid_post.2={name}")))
    assert opened.names == {Site("resid_post", 1): name, Site("resid_post", 2): name}
    assert [sae.write for sae in opened.saes.values()] == list(opened.saes)
    with pytest.raises(UnweaveError, match="two SAEs are at"):
        open_saes(spec_of(home, saes=(f"resid_post.1={name}", str(home / "saes"))))


def test_neurons_are_those_of_the_model_that_the_autoencoders_are_in(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its dtype, and loaded once; why a mismatch was accepted stays in the record."""
    lm = LM.load(str(home / "model"), device="cpu")
    g = torch.Generator().manual_seed(3)
    enc, dec = torch.randn(32, 16, generator=g) * 0.3, torch.randn(16, 32, generator=g) * 0.3
    sae = SAE(
        enc, torch.zeros(16), dec, torch.zeros(32), ReLU(), read=lm.site("resid_post.1"),
        provenance={"train": {"model": str(home / "model"), "dtype": "bfloat16"}},
    )  # fmt: skip
    sae.save(tmp_path / "sae")
    used: list[LM] = []

    def opening(spec: Any, lm: Any = None) -> Any:
        opened = open_saes(spec, lm)
        used.append(opened.lm)
        return opened

    monkeypatch.setattr(find, "open_saes", opening)
    monkeypatch.setattr(evaluate, "open_saes", opening)
    spec = spec_of(home, saes=(str(tmp_path / "sae"),), edges=False, accept_mismatch="a test")
    run = find.run(spec, tmp_path / "runs")
    quick = CircuitEvaluateSpec(circuit=run.path, pairs=home / "test.jsonl", errors=("default",), draws=0)
    done = evaluate.run(quick, tmp_path / "runs")
    assert {model.dtype for model in used} == {torch.bfloat16} and len(used) == 4
    assert len({id(model) for model in used[1:]}) == 1
    assert done.result.subject.accepted == run.result.subject.accepted != {}
    (units,) = [p for p in (tmp_path / "runs").glob("circuit-find-*") if read_json(p / "spec.json")["spec"]["neurons"]]
    assert read_json(units / "spec.json")["inputs"]["dtype"] == "torch.bfloat16"
    alone = CircuitFindSpec.from_dict(read_json(units / "spec.json")["spec"])
    assert find.run(alone, tmp_path / "runs").path != units  # asked on its own it is in float32


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": "simple"}, "task and pairs are both given"),
        ({"metric": "neg-logit"}, "metric = 'neg-logit' would have no effect"),
        ({"split": "test"}, "split = 'test' would have no effect"),
        ({"method": "attribution", "steps": 2}, "steps = 2 would have no effect"),
        ({"method": "attribution", "steps": 10, "rule": "left"}, "rule = 'left' would have no effect"),
        ({"edges": False, "edge_threshold": 0.5}, "edge_threshold = 0.5 would have no effect"),
        ({"edges": False, "upstream": "all"}, "upstream = 'all' would have no effect"),
        ({"method": "exact", "steps": 10}, "exact effects have no gradient"),
        ({"examples": 0}, "examples must be at least 1; 0 was given"),
        ({"node_threshold": -0.1}, "node_threshold"),
    ],
)
def test_options_that_make_no_sense_or_would_be_ignored_are_refused(
    home: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UnweaveError, match=words):
        spec_of(home, **changes)


def test_none_is_a_way_to_sum_and_not_the_want_of_one() -> None:
    given = CircuitFindSpec.from_dict({"saes": ["x"], "inputs": "a.jsonl", "summed": "none"})
    assert given.summed == "none" and given.keeps_positions
    assert CircuitFindSpec.from_dict(given.to_dict()) == given
    assert not CircuitFindSpec.from_dict({"saes": ["x"], "inputs": "a.jsonl"}).keeps_positions


def test_conventions_stand_for_rule_and_metric(home: Path) -> None:
    def asked(**values: Any) -> tuple[str, str]:
        spec = CircuitFindSpec.from_dict({"saes": ["x"], **values})
        return spec.rule, spec.metric

    assert asked() == asked(convention="unweave") == ("midpoint", "neg-log-p")
    assert asked(convention="paper") == ("right", "neg-log-p")
    assert asked(convention="code") == ("left", "neg-log-p")  # of pairs there is one metric
    assert asked(convention="code", inputs="a.jsonl") == ("left", "neg-logit")
    assert asked(convention="code", inputs="a.jsonl", metric="neg-log-p", rule="right") == ("right", "neg-log-p")
    assert asked(convention="code", method="attribution", inputs="a.jsonl") == ("midpoint", "neg-logit")
    for name in ("paper", "code", "unweave"):
        with pytest.raises(UnweaveError, match="would have no effect"):
            asked(convention=name, method="attribution")
    with pytest.raises(UnweaveError, match="conventions: unweave, paper, code"):
        asked(convention="mine")


def test_bad_files_and_runs_are_named(home: Path, found: Run[CircuitSearch], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with pytest.raises(UnweaveError, match="nowhere"):
        find.run(spec_of(home, pairs=home / "nowhere.jsonl"), runs)
    agreement.save(tmp_path / "bad.jsonl", [Pair("abc", "abcd", "e", "f", ""), Pair("abc", "abd", "ef", "f", "")])
    with pytest.raises(UnweaveError, match=r"different numbers of tokens.*not a single token"):
        find.run(spec_of(home, pairs=tmp_path / "bad.jsonl"), runs)
    with pytest.raises(UnweaveError, match="no SAE is at"):
        find.run(spec_of(home, sites=("resid_post.2",)), runs)
    with pytest.raises(UnweaveError, match="there is no circuit here"):
        evaluate.run(CircuitEvaluateSpec(circuit=tmp_path), runs)
    shutil.copy(found.path / "circuit.safetensors", tmp_path)
    with pytest.raises(UnweaveError, match="not a run directory"):
        evaluate.run(CircuitEvaluateSpec(circuit=tmp_path), runs)
    other = tmp_path / "saes"
    lm = LM.load(str(home / "model"), device="cpu")
    g = torch.Generator().manual_seed(1)
    for site in SITES:
        enc, dec = torch.randn(32, 16, generator=g), torch.randn(16, 32, generator=g)
        SAE(enc, torch.zeros(16), dec, torch.zeros(32), ReLU(), read=lm.site(site)).save(other / site)
    with pytest.raises(UnweaveError, match="not those that the circuit was found with"):
        evaluate.run(CircuitEvaluateSpec(circuit=found.path, saes=(str(other),), pairs=home / "test.jsonl"), runs)
    with pytest.raises(UnweaveError, match="no example is left"):
        evaluate.run(CircuitEvaluateSpec(circuit=found.path, pairs=home / "train.jsonl"), runs)
    for wrong in ({"examples": 0}, {"start_layer": -2}, {"errors": ()}, {"thresholds": (-1.0,)},
                  {"spaced": "paper", "thresholds": (0.1,)}, {"pairs": Path("a"), "inputs": Path("b")}):  # fmt: skip
        with pytest.raises(UnweaveError):
            CircuitEvaluateSpec(circuit=found.path, **wrong)


def test_the_command_line_finds_and_evaluates(
    home: Path, found: Run[CircuitSearch], capfd: pytest.CaptureFixture[str]
) -> None:
    line = ["--runs", str(home / "runs"), "--json"]
    saes = ["--saes", str(home / "saes"), "--model", str(home / "model"), "--pairs", str(home / "train.jsonl")]
    assert main(["circuit", "find", *saes, "--steps", "2", *line]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert shown["reused"] and Path(shown["run"]) == found.path
    options = ["--pairs", str(home / "test.jsonl"), "--no-neurons", "--errors", "default", "--draws", "0"]
    assert main(["circuit", "evaluate", "--circuit", str(found.path), *options, *line[:2]]) == 0
    assert "latents and errors" in capfd.readouterr().out
