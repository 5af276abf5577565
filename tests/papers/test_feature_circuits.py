"""The feature circuits paper's recipe: what it runs at each scale, and the page that it writes from finished parts."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.plain_result import Plain
from unweave.circuits.about import Options, Search
from unweave.circuits.graph import Circuit
from unweave.circuits.opened import FILE
from unweave.core.errors import UnweaveError
from unweave.core.result import as_read, as_written
from unweave.core.run import Run
from unweave.core.site import Site, matching
from unweave.inputs.subject import SAEInfo, Subject
from unweave.methods.behaviours.result import Behaviour, BehavioursResult, Cluster
from unweave.methods.behaviours.result import Counts as behaviour_counts
from unweave.methods.circuits.result import CircuitSearch, Errors, Faithfulness, Reached, Row, Sweep, Used
from unweave.methods.shift.result import METHODS, Accuracies, Judgement, Method, Seed, Share, ShiftResult, TableRow
from unweave.papers.feature_circuits import plan, recipe
from unweave.papers.feature_circuits.claims import claims as claims_of
from unweave.papers.feature_circuits.plan import plan_of
from unweave.papers.feature_circuits.recipe import Parts
from unweave.papers.feature_circuits.result import FeatureCircuits
from unweave.papers.feature_circuits.spec import MODELS, FeatureCircuitsSpec
from unweave.papers.gemma_scope import nearest_l0
from unweave.tasks.agreement import STRUCTURES


def test_the_smoke_scale_trains_at_attention_mlp_and_stream_of_consecutive_layers_and_the_embedding() -> None:
    found = plan_of(FeatureCircuitsSpec())
    assert found.training is not None and found.saes == ()
    everything = [Site("embed"), *(Site(p, i) for i in range(30) for p in ("attn_add", "mlp_add", "resid_post"))]
    sites = [site for pattern in found.training.sites for _, site in matching(pattern, everything)]
    assert len(sites) == len(set(sites)) == 13
    layers = sorted({site.layer for site in sites if site.layer is not None})
    assert layers == list(range(layers[0], layers[0] + 4)) and found.start_layer == layers[0]
    assert found.shift["classifier"]["site"] == f"resid_post.{layers[-1]}" and found.behaviours["behaviours"] == 20


def test_the_paper_scale_takes_the_published_saes(monkeypatch: pytest.MonkeyPatch) -> None:
    pythia = plan_of(FeatureCircuitsSpec(scale="paper"))
    assert pythia.model == MODELS[0] and pythia.training is None and len(pythia.saes) == 19
    assert pythia.saes[0] == "embed=saelens:pythia-70m-deduped-res-sm/blocks.0.hook_resid_pre"
    assert "mlp_add.5=saelens:pythia-70m-deduped-mlp-sm/blocks.5.hook_mlp_out" in pythia.saes
    files = [f"layer_{i}/width_16k/average_l0_{l0}/params.npz" for i in range(26) for l0 in (42, 105)]
    monkeypatch.setattr(plan, "listed", lambda repository: files)
    gemma = plan_of(FeatureCircuitsSpec(scale="paper", model=MODELS[1]))
    assert len(gemma.saes) == 78
    assert "attn_heads.25=hub:google/gemma-scope-2b-pt-att/layer_25/width_16k/average_l0_105" in gemma.saes
    # The captions of the paper's figures 7 to 14.
    assert pythia.thresholds == {
        "simple": (0.2, 0.02), "within_rc": (0.2, 0.02), "across_rc": (0.1, 0.01), "across_pp": (0.1, 0.01)
    }  # fmt: skip
    assert gemma.thresholds == {
        "simple": (0.5, 0.05), "within_rc": (0.5, 0.05), "across_rc": (0.073, 0.007), "across_pp": (0.5, 0.05)
    }  # fmt: skip


def test_the_nearest_l0_of_each_layer() -> None:
    files = [f"layer_0/width_16k/average_l0_{n}/params.npz" for n in (20, 95, 110, 400)]
    files += ["layer_1/width_16k/average_l0_7/params.npz", "layer_1/width_65k/average_l0_99/params.npz", "README.md"]
    expected = {0: "layer_0/width_16k/average_l0_95", 1: "layer_1/width_16k/average_l0_7"}
    assert nearest_l0(files, "16k", 100) == expected
    with pytest.raises(UnweaveError, match="lists no SAE"):
        nearest_l0(files, "1m", 100)


@pytest.mark.parametrize("asked", [{"model": MODELS[0]}, {"scale": "paper", "model": "gpt2"}])
def test_models_of_the_other_scale_are_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(UnweaveError):
        FeatureCircuitsSpec(**asked)


def circuit_of(slots: Mapping[tuple[str, int], float]) -> Circuit:
    nodes = {Site.parse(name): torch.zeros(2, 5) for name, _ in slots}
    for (name, slot), effect in slots.items():
        nodes[Site.parse(name)][slot % 2, slot] = effect
    return Circuit(nodes, {}, True, 3)


def test_overlap_is_of_latents_whatever_the_position() -> None:
    a = circuit_of({("resid_post.1", 0): 1.0, ("resid_post.1", 3): -1.0, ("embed", 4): 0.3, ("embed", 0): 0.01})
    b = circuit_of({("resid_post.1", 3): 0.5, ("resid_post.1", 2): 0.5, ("resid_post.1", 1): 0.4, ("embed", 4): 0.3})
    found = recipe.overlap(a, b, (0.1, 0.1))
    assert (found.sizes, found.shared, found.with_errors, found.share) == ((2, 3), 1, 2, 0.5)
    assert recipe.overlap(a, b, (0.1, 0.45)).sizes == (2, 2)
    assert recipe.overlap(a, circuit_of({("embed", 4): 1.0}), (0.1, 0.1)).share is None


@pytest.mark.parametrize("asked", [{}, *({"scale": "paper", "model": model} for model in MODELS)])
def test_every_stage_can_be_asked_at_every_scale(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The specs that the recipe makes hold together: nothing unknown, ignored or contradictory."""
    monkeypatch.setattr(plan, "listed", lambda repository: ["layer_0/width_16k/average_l0_9/params.npz"])
    specs = []

    def stage(spec: Any, runs: Path) -> Run:
        specs.append(spec)
        return finished(runs, type(spec).__name__.lower() + str(len(specs)), Plain({}), {})

    for module in (recipe.find, recipe.evaluate, recipe.draw, recipe.shift, recipe.behaviours):
        monkeypatch.setattr(module, "run", stage)
    trained = finished(tmp_path, "train", Plain({}), {})
    chosen = plan_of(FeatureCircuitsSpec(**asked))
    for more in ({}, {"annotations": "mine.jsonl"}, {"biographies": "mine.parquet"}):
        spec = FeatureCircuitsSpec.from_dict({**asked, **more})
        parts = recipe._parts(spec, chosen, trained if chosen.training else None, tmp_path)
        assert {name for part, name in parts if part == "find"} == set(STRUCTURES) and len(specs) == 14
        shift, found = specs[12], specs[13]
        assert shift.judge == ("file" if "annotations" in more else "rule")
        assert shift.biographies == more.get("biographies", chosen.shift["biographies"])
        assert (found.data is not None) == (chosen.training is None)
        assert found.behaviours <= found.clusters.number
        specs.clear()


def row_of(faithfulness: float) -> Row:
    return Row(0.1, 3, 2, 1, faithfulness, 0.0, None)


def finished(folder: Path, stage: str, result: Any, files: Mapping[str, str | bytes]) -> Run[Any]:
    with Run.open(folder, stage, FeatureCircuitsSpec(), kind=type(result)) as run:
        for name, content in files.items():
            (run.path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        run.finish(result)
    return run


def parts_of(
    folder: Path,
    *,
    features: float | None = 30.0,
    neurons: float | None = 700.0,
    without: float = 0.4,
    shift: float = 0.9,
    retrain: float = 0.95,
    random: float = 0.2,
    oracle: float = 1.0,
) -> Parts:
    """Finished runs with the numbers given, as the recipe's stages write them. The original's worst group is at 0.2."""
    kinds: list[tuple[Errors, bool, float | None, float | None, int, float]] = [
        ("default", False, features, None, 900, 1.0),
        ("remove-attn-mlp", False, None, None, 900, 1.2),
        ("remove", False, None, None, 900, without),
        ("default", True, neurons, 800.0, 1000, 1.0),
    ]
    reached = tuple(Reached(of_neurons, errors, n, random_, all_) for errors, of_neurons, n, random_, all_, _ in kinds)
    curves = tuple(
        Sweep(of_neurons, errors, (row_of(top), row_of(0.1)), 1.0, 0.0, 4, 1, "patch", "positions", 0, all_)
        for errors, of_neurons, _, _, all_, top in kinds
    )
    sites = (Site("embed"), Site("resid_post", 1))
    subject = Subject("tiny <model>", "random", tuple(SAEInfo(site, "relu", 8, 4, None, "0") for site in sites), {})
    used, search = Used(4, (), None, ()), Search(Options(), 3, 3, 0, 1.0, 0.0, ())
    found, evaluated, drawn = {}, {}, {}
    for structure in STRUCTURES:
        circuit = circuit_of({("resid_post.1", 0): 1.0}).save(folder / "circuit.safetensors").read_bytes()
        searched = CircuitSearch(
            subject, structure, False, used, search, (), 0, (), (), Path(FILE), Path("circuit.json")
        )
        found[structure] = finished(folder / structure, "find", searched, {FILE: circuit})
        paths = (Path("faithfulness.png"), Path("faithfulness.csv"))
        measured = Faithfulness(subject, "x", structure, used, 0.8, reached, curves, *paths)
        evaluated[structure] = finished(folder / structure, "evaluate", measured, {"faithfulness.png": b"p"})
        drawn[structure] = finished(
            folder, f"draw-{structure}", Plain({}), {"circuit.svg": "<svg><title>x</title></svg>"}
        )
    worst: dict[Method, float] = dict.fromkeys(METHODS, 0.2)
    worst |= {"shift": shift, "retrain": retrain, "random": random, "oracle": oracle}
    half, whole = Share(1, 2), Share(100, 100)
    rows = tuple(
        TableRow(method, 0, Accuracies(half, half, (Share(round(100 * share), 100), whole, whole, whole)))
        for method, share in worst.items()
    )
    seed = Seed((), rows, (), ())  # where nothing is ablated, which the page must say
    tabled = ShiftResult(subject, sites[1], "templated", "templated text", Judgement("rule", ()), (seed,))
    shifted = finished(folder, "shift", tabled, {})
    one = Behaviour(0, 3, (("a <b>", 3),), (), 4, 1, 0, 0, (), ())
    counts = behaviour_counts(9, 8, 1, 0, 0, 0, 7)
    clusters = (Cluster(12, 0.4, 0.1, 0.01),) * 9
    discovered = BehavioursResult(subject, counts, "latents", "ig", 8, clusters, None, (one,) * 2)
    parts: Parts = {}
    for part, of_structures in (("find", found), ("evaluate", evaluated), ("draw", drawn)):
        parts |= {(part, name): run for name, run in of_structures.items()}  # type: ignore[dict-item]
    return parts | {("shift", None): shifted, ("behaviours", None): finished(folder, "behaviours", discovered, {})}


@pytest.mark.parametrize(
    ("numbers", "verdicts"),
    [
        ({}, ["as claimed", "as claimed", "as claimed"]),
        ({"neurons": None, "shift": 0.5}, ["as claimed", "as claimed", "partly"]),
        ({"neurons": 100.0, "retrain": 0.8}, ["not as claimed", "as claimed", "partly"]),
        ({"features": None, "without": 0.95, "random": 0.6}, ["not as claimed", "not as claimed", "not as claimed"]),
        ({"random": 0.5}, ["as claimed", "as claimed", "partly"]),
        ({"shift": 0.33, "oracle": 0.35}, ["as claimed", "as claimed", "not measured"]),
    ],
)
def test_the_page_says_what_the_parts_found(tmp_path: Path, numbers: dict[str, Any], verdicts: list[str]) -> None:
    spec = FeatureCircuitsSpec()
    parts = parts_of(tmp_path, **numbers)
    done = recipe.together(spec, tmp_path, parts)
    claims = claims_of(done.result)
    assert [claims[i].verdict for i in (0, 1, 3)] == verdicts
    assert f"{numbers.get('without', 0.4):.2f}" in claims[1].ours and "1.00" in claims[1].ours
    assert claims[2].verdict == "as claimed" and "1 latents are in both" in claims[2].ours
    assert "nothing was ablated" in claims[3].ours and "templated text" in claims[3].ours
    assert "2 behaviours" in claims[4].ours and "clusters 0.400, random 0.100" in claims[4].ours
    html = (done.path / "report.html").read_text()
    assert "tiny &lt;model&gt; (random)" in html and "a &lt;b&gt;" in html and "<svg>" in html
    assert "templated text" in html and "default-src 'none'" in html
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", html.split("</style>", 1)[1])
    text = (done.path / "table.md").read_text()
    first = "never (of 900)" if "features" in numbers else "30"
    assert f"| simple | {first} | never (of 900) |" in text and "| Method |" in text
    named = {(one.part, one.structure) for one in done.result.runs}
    assert named >= {("find", "simple"), ("evaluate", "across_pp"), ("shift", None), ("behaviours", None)}
    assert as_read(FeatureCircuits, json.loads(json.dumps(as_written(done.result))), "") == done.result


def test_a_page_of_other_parts_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = parts_of(tmp_path)
    other = first["shift", None].path.with_name("shift-0123456789ab")
    shutil.copytree(first["shift", None].path, other)
    monkeypatch.setattr(recipe, "plan_of", lambda spec: replace(plan_of(spec), training=None, saes=("x",)))
    asked = iter([first, first, first | {("shift", None): Run.at(other, ShiftResult)}])
    monkeypatch.setattr(recipe, "_parts", lambda *_: next(asked))
    runs = [recipe.run(FeatureCircuitsSpec(), tmp_path / "runs") for _ in range(3)]
    assert [run.reused for run in runs] == [False, True, False]
    assert [run.path == runs[0].path for run in runs] == [True, True, False]
