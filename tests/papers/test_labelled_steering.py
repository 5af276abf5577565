"""The labelled steering recipe: what it runs at each scale, the paper's simulation, and everything on a tiny model."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.jobs import spec_of
from helpers.models import build_tiny, build_tiny_tokenizer
from unweave.core.errors import UnweaveError
from unweave.core.intervals import Interval
from unweave.core.result import as_read, as_written
from unweave.lm.model import LM
from unweave.methods.axbench.spec import AxbenchSpec
from unweave.methods.labels.spec import LabelsSpec
from unweave.papers.labelled_steering import claims, plan, recipe, simulation, texts, view
from unweave.papers.labelled_steering.plan import HIGH, LOW, SEED, Plan, plan_of
from unweave.papers.labelled_steering.result import LabelledSteering
from unweave.papers.labelled_steering.spec import FORA, LabelledSteeringSpec, MixSpec
from unweave.tasks.tagged.spec import TaggedSpec

WORDS = {"sea": "sea wave salt ship", "soup": "soup pot stir", "war": "war tank fear"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNWEAVE_CACHE", str(tmp_path / "cache"))


def write_rows(path: Path, tags: dict[str, str], n: int = 150) -> Path:
    """Texts whose words say which of the tags they have; every fourth has none."""
    draw, names = random.Random(0), [*tags, ""]
    with open(path, "w", encoding="utf-8") as out:
        for i in range(n):
            tag = names[i % len(names)]
            words = draw.choices([*tags.get(tag, "house road").split(), "time", "day"], k=7)
            out.write(json.dumps({"text": " ".join(words) + f" {i}", "tags": [tag or "none"]}) + "\n")
    return path


def paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **given: Any) -> LabelledSteeringSpec:
    """The paper scale with dumps that are empty files, and a repository that lists a few SAEs."""
    files = [f"layer_{i}/width_16k/average_l0_{l0}/params.npz" for i in (9, 17, 32) for l0 in (14, 26, 125, 400)]
    monkeypatch.setattr(plan, "listed", lambda repository: files)
    for forum in FORA:
        (tmp_path / f"{forum}.stackexchange.com.7z").write_bytes(b"")
    asked = {"scale": "paper", "stackexchange": str(tmp_path), "judge": {"model": "gpt-4o-mini"}}
    return LabelledSteeringSpec.from_dict(asked | given)


def test_the_smoke_scale_compares_two_sparsities_at_two_layers_and_two_seeds() -> None:
    found = plan_of(LabelledSteeringSpec())
    assert found.training is not None and found.mix is not None
    assert found.training.sites == ("resid_post.{9,20}",) and set(found.variants) == {LOW, HIGH, SEED}
    assert len(found.training.variants) == 3
    assert found.labelled == ((SEED, "calibrated"),) and (LOW, "ordinary") in found.comparisons
    AxbenchSpec.from_dict({**found.shared, **found.compare, "saes": ["x"], "pairs": "x"})
    trained = plan.with_texts(found.training, "x.jsonl")
    own, others = trained.data.sources[-1], trained.data.sources[:-1]
    assert own.weight / (own.weight + sum(one.weight for one in others)) == pytest.approx(1 / 3)


def test_the_paper_scale_has_the_papers_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan_of(paper(tmp_path, monkeypatch))
    assert list(found.corpora) == list(FORA) and len(FORA) == 11
    assert found.saes[LOW] == tuple(
        f"hub:google/gemma-scope-9b-pt-res/layer_{layer}/width_16k/average_l0_26" for layer in (17, 32)
    )
    assert all("average_l0_125" in name for name in found.saes[HIGH])
    labels = LabelsSpec.from_dict({**found.shared, **found.labels, "saes": ["x"]})
    match = labels.match
    assert (match.prior, match.support, match.output_score, labels.model) == (1e-3, 50, 1e-3, "google/gemma-2-9b-it")
    compared = AxbenchSpec.from_dict({**found.shared, **found.compare, "saes": ["x"], "pairs": "x"})
    assert (compared.protocol.per_pair, compared.protocol.split, compared.raters) == (20, "folds", ("chat",))
    assert {"sae", "random", "lora", "prompt"} <= set(found.comparisons[LOW, "calibrated"])


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"scale": "paper"}, "Stack Exchange dumps, which are not given"),
        ({"scale": "paper", "stackexchange": "x"}, "none is given"),
        ({"stackexchange": "x"}, "its own texts"),
    ],
)
def test_what_a_scale_needs_is_refused_at_once(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(UnweaveError, match=says):
        LabelledSteeringSpec.from_dict(asked)


def test_a_missing_forum_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = paper(tmp_path, monkeypatch)
    (tmp_path / "law.stackexchange.com.7z").unlink()
    listed = plan.listed
    monkeypatch.setattr(plan, "listed", lambda repository: pytest.fail("the hub was asked first"))
    with pytest.raises(UnweaveError, match="the dump of law is missing"):
        plan_of(spec)
    (tmp_path / "law.stackexchange.com").mkdir()
    (tmp_path / "law.stackexchange.com" / "Posts.xml").write_text("")
    monkeypatch.setattr(plan, "listed", listed)
    assert plan_of(spec).corpora["law"].source.endswith("law.stackexchange.com")


def test_texts_of_several_sources_are_balanced_and_divided(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", {"game::sea": WORDS["sea"], "role::soup": WORDS["soup"]})
    two = write_rows(tmp_path / "two.jsonl", {"war": WORDS["war"]})
    sources = tuple(TaggedSpec(source=str(path), seed=seed) for seed, path in enumerate((one, two)))
    spec = MixSpec(sources=sources[:1], facets=("game::",), per_label=20, support=30, characters=20)
    some = list(texts.mixed(spec))
    taken = [label for text in some for label in text.labels]
    assert {label: taken.count(label) for label in taken} == {"game::sea": 20, "none": 20}  # no role:: label
    assert all(len(text.text) <= 20 and text.source == "one" for text in some)
    with pytest.raises(UnweaveError, match="'none' is a label of"):
        texts.run(replace(spec, sources=sources), tmp_path / "runs")
    done = texts.run(spec, tmp_path / "runs")
    train = [json.loads(line)["text"] for line in done.file(texts.TRAIN).read_text().splitlines()]
    assert len(train) == done.result.train < done.result.texts and set(train) <= {text.text for text in some}
    alike = {"text": "the very same words again and again in every one of these texts ", "tags": ["game::sea"]}
    with open(one, "a", encoding="utf-8") as out:
        out.writelines(json.dumps(alike | {"text": alike["text"] + str(i)}) + "\n" for i in range(30))
    many = list(texts.mixed(replace(spec, per_label=1000)))
    assert sum(text.text.startswith("the very same") for text in many) == 1


def test_the_simulations_formula_is_that_of_drawn_texts() -> None:
    draw = np.random.default_rng(0)
    n, prior, threshold, distance = 400_000, 0.03, 1.4, 2.0
    label = draw.random(n) < prior  # with the reference prior as prevalence it is the ordinary F1
    fires = draw.normal(distance * label) > threshold
    ordinary = 2 * (fires & label).sum() / (fires.sum() + label.sum())
    assert simulation.score(threshold, distance, prior) == pytest.approx(ordinary, abs=0.01)


def test_the_simulation_has_the_papers_shape() -> None:
    ordinary, calibrated = simulation.by_prevalence(simulation.PRIORS)
    rare, common = [curve.y[6] or 0.0 for curve in (ordinary, calibrated)], [ordinary.y[-1], calibrated.y[-1]]
    assert rare[0] < 0.2 * (common[0] or 0.0) and rare[1] == pytest.approx(common[1], rel=0.1)
    hyper, *_, hypo = simulation.by_prior(simulation.THRESHOLDS)
    assert "hyperactive" in hyper.name and "hypoactive" in hypo.name
    assert (hypo.y[3] or 0) > 10 * (hyper.y[3] or 0) and (hypo.y[-1] or 0) < (hyper.y[-1] or 0)
    near, *_, far = simulation.by_distance(simulation.DISTANCES)
    assert (near.y[0] or 0) / (far.y[0] or 1) < (near.y[-1] or 0) / (far.y[-1] or 1)
    low, flat, plain = (simulation.recovery(prior, texts=2000) for prior in (1e-3, 0.49, None))
    assert low > max(flat, plain) and low > 0.9


def tiny_plan(home: Path) -> Plan:
    """Two layers, two sparsities, two seeds of a random model, on texts of three tags."""
    model = build_tiny("llama")
    model.config.max_position_embeddings = 256
    model.save_pretrained(home / "model")
    build_tiny_tokenizer(chat_template=None).save_pretrained(home / "model")
    (home / "text").mkdir()
    write_rows(home / "text" / "plain.jsonl", WORDS, 400)
    source = write_rows(home / "tagged.jsonl", WORDS, 240)
    (home / "asked.txt").write_text("\n".join(f"Say {w}." for w in "abcdefgh"))
    base = spec_of(home, sites=("resid_post.{0,1}",))
    variants = ({"k": [4, 8], "seed": [0]}, {"k": [4], "seed": [1]})
    training = replace(base, sae=replace(base.sae, tokens=2048), variants=variants)
    return Plan(
        shared={"device": "cpu"},
        mix=MixSpec(sources=(TaggedSpec(source=str(source)),), per_label=50, support=20),
        training=training,
        variants={LOW: "k4-seed0", HIGH: "k8-seed0", SEED: "k4-seed1"},
        saes={},
        corpora={},
        drawn=150,
        labels={"match": {"top": 3, "per_label": 1, "support": 5, "output_score": 0.0}, "context": 32},
        compare={
            "protocol": {"per_pair": 4, "suppression": False, "instructions": str(home / "asked.txt")},
            "steering": {"factors": [0.5, 2.0]},
            "generation": {"max_new_tokens": 5, "temperature": 0.0},
            "learning": {"examples": 6, "heldout": 5, "tokens": 12},
        },
        comparisons={
            (LOW, "calibrated"): ("unedited", "sae", "random", "prompt"),
            (HIGH, "calibrated"): ("sae", "random"),
            (LOW, "ordinary"): ("sae", "random"),
        },
        labelled=((SEED, "calibrated"),),
    )


def test_the_recipe_end_to_end_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    small = tiny_plan(tmp_path / "home")
    monkeypatch.setattr(recipe, "plan_of", lambda spec: small)
    done = recipe.run(LabelledSteeringSpec(), tmp_path / "runs")
    result = done.result
    assert not done.reused and {one.part for one in result.runs} == {"texts", "train", "labels", "axbench"}
    assert [(one.saes, one.f1) for one in result.labelled] == [*small.comparisons, (SEED, "calibrated")]
    assert [str(one.site) for one in result.survival] == ["resid_post.0", "resid_post.1"]
    sides = result.labelled[0].labels
    assert sides.chosen_on.texts + sides.heldout.texts == 150
    labels = [pair.label.label for site in result.labelled[0].labels.sites for pair in site.pairs]
    assert max(labels.count(label) for label in labels) <= 2  # one a site
    assert {sample.method for sample in result.samples} == {"unedited", "sae", "random"}
    html, told = (done.path / "report.html").read_text(), (done.path / "claims.md").read_text()
    for claim in claims.claims(result):
        assert claim.verdict in html and claim.verdict in told
    assert html.count("<svg") >= 6 and "default-src 'none'" in html
    assert "| low L0 | calibrated |" in (done.path / "table.md").read_text()
    assert result.rows() and view.section(result).tiles
    assert as_read(LabelledSteering, json.loads(json.dumps(as_written(result))), "") == result

    assert len(claims.rated(result, LOW)) == len(labels)
    by_judge = next(one for one in result.pairs(LOW)[0].judged.scores if one.method == "sae")
    assert claims.gain(result.pairs(LOW), "sae", "random") == by_judge.above_random
    assert claims.gain(result.pairs(LOW), "sae", "random", 0) == by_judge.concept_above_random
    assert claims.mean(claims.rated(result, LOW)) == by_judge.rating

    monkeypatch.setattr(LM, "load", lambda *args, **options: pytest.fail("something was loaded"))
    again = recipe.run(LabelledSteeringSpec(), tmp_path / "runs")
    assert again.reused and again.result == result


@pytest.mark.parametrize(
    ("gain", "above", "same"),
    [
        (Interval(0.3, 0.1, 0.5), "as claimed", "not as claimed"),
        (Interval(0.3, -0.1, 0.7), "partly", "partly"),
        (Interval(-0.05, -0.2, 0.1), "not as claimed", "as claimed"),
    ],
)
def test_verdicts_follow_the_interval(gain: Interval, above: str, same: str) -> None:
    assert (claims._above(gain, 1), claims._same(gain)) == (above, same)
    assert claims._above(None, 1) == "not measured"
