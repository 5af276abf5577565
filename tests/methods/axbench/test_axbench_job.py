"""`unweave axbench` as a whole on a tiny model, with scripted truth and a scripted judge."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from helpers.models import build_tiny, build_tiny_tokenizer
from helpers.progress import ShownTask
from unweave.core.errors import UnweaveError
from unweave.core.result import as_read, as_written
from unweave.core.site import Site
from unweave.judge.base import CachedJudge
from unweave.judge.scripted import Scripted
from unweave.latents.annotations import Annotation, ScoredLabel, write
from unweave.lm.model import LM
from unweave.methods.axbench import compare, stage, view
from unweave.methods.axbench.result import RATINGS, Comparison
from unweave.methods.axbench.spec import AxbenchSpec
from unweave.sae.activations import ReLU
from unweave.sae.module import SAE

SITE = Site("resid_post", 1)
WORDS = {"sea": "sea wave salt ship", "soup": "soup salt pot stir"}


@pytest.fixture
def spec(tmp_path: Path) -> AxbenchSpec:
    """A tiny model on disk, an SAE, texts of two tags, and a pair for each."""
    model = build_tiny("llama")
    model.config.max_position_embeddings = 256
    model.save_pretrained(tmp_path / "model")
    build_tiny_tokenizer(chat_template=None).save_pretrained(tmp_path / "model")
    lm = LM.load(str(tmp_path / "model"))
    g = torch.Generator().manual_seed(0)
    sae = SAE(
        torch.randn(32, 40, generator=g),
        torch.zeros(40),
        torch.randn(40, 32, generator=g),
        torch.zeros(32),
        ReLU(),
        read=SITE,
    )
    sae.provenance = {"train": {"model": str(tmp_path / "model"), "dtype": "float32"}}
    sae.accept(lm, "a test")
    sae.save(tmp_path / "sae")
    draw = random.Random(0)
    with open(tmp_path / "texts.jsonl", "w") as out:
        for i in range(160):
            tag = [None, "sea", "soup"][i % 3]
            words = (WORDS[tag].split() if tag else ["house", "road"]) + ["time", "day", "hand", "way"]
            row = {"text": " ".join(draw.choices(words, k=7)) + f" {i}", "tags": [tag] if tag else ["none"]}
            out.write(json.dumps(row) + "\n")
    digest = SAE.load(tmp_path / "sae").digest()
    labels = {4: "sea", 9: "soup", 11: "sea"}
    scored = {
        j: ScoredLabel(label=n, threshold=0.1, score=0.9 - j / 99, support=50, maximum=1.0) for j, n in labels.items()
    }
    write(tmp_path / "pairs.jsonl", [Annotation(f"{SITE}/{j}", sae=digest, labels=(one,)) for j, one in scored.items()])
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"instruction": f"Say {w}."}) + "\n" for w in "abcdefgh"))
    return AxbenchSpec.from_dict(
        {
            "saes": [str(tmp_path / "sae")],
            "accept_mismatch": "a test",
            "pairs": str(tmp_path / "pairs.jsonl"),
            "texts": {"source": str(tmp_path / "texts.jsonl")},
            "methods": ["unedited", "sae", "random", "diffmean", "probe", "reft", "lora", "prompt"],
            "protocol": {"instructions": str(tmp_path / "asked.jsonl"), "per_pair": 4},
            "steering": {"factors": [0.5, 2.0]},
            "generation": {"max_new_tokens": 6, "temperature": 0.0},
            "learning": {"examples": 6, "heldout": 5, "tokens": 12, "reft": {"epochs": 1}, "lora": {"epochs": 1}},
        }
    )


def test_everything_is_generated_rated_and_shown(
    spec: AxbenchSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(conversation: Any) -> str:
        return f"It is so.\nRating: [[{sum(map(ord, conversation[0]['content'])) % 3}]]"

    judge = CachedJudge(Scripted(answer, "the script"))
    monkeypatch.setattr(stage, "open_judge", lambda *_: judge)
    monkeypatch.setattr("unweave.methods.axbench.stage.check_judge", lambda _: None)
    spec = replace(spec, raters=("truth", "chat"))
    done = stage.run(spec, tmp_path / "runs")
    result = done.result
    assert [pair.concept for pair in result.pairs] == ["sea", "soup", "sea"]
    per_pair = 4 * (1 + 2 + 2 + 2 + 2 + 2 + 1 + 1 + 3)
    assert result.cost.texts == 3 * per_pair and result.cost.prompts == 9 * per_pair
    table = pq.read_table(done.path / result.generations).to_pylist()
    assert len(table) == 2 * 3 * per_pair
    assert {row["judge"] for row in table} == {"scripted truth", "the script"}
    assert all(0 <= row[f"{name}_rating"] <= 2 for row in table for name in RATINGS)
    assert {row["concept"] for row in table} == {"sea", "soup"}
    assert all(row["prompt"].endswith(row["instruction"]) for row in table)
    steered = next(row for row in table if row["method"] == "sae" and row["factor"] == 2.0)
    maximum = next(pair.maximum for pair in result.pairs if pair.name == steered["latent"])
    assert steered["value"] == pytest.approx(2.0 * maximum)
    lm, sae = LM.load(str(tmp_path / "model")), SAE.load(tmp_path / "sae")
    sae.accept(lm, "a test")
    edit = sae.clamp({int(steered["latent"].split("/")[1]): steered["value"]}, where="all")
    assert lm.generate(steered["prompt"], edit=edit, max_new_tokens=6) == steered["text"]
    for block, mode in (("suppress-latent", "zero"), ("suppress-span", "span")):
        kept = next(row for row in table if row["method"] == block)
        ablation = sae.ablate([int(kept["latent"].split("/")[1])], mode=mode, where="all")
        assert lm.generate(kept["prompt"], edit=ablation, max_new_tokens=6) == kept["text"]
    unedited = [row["text"] for row in table if row["method"] == "unedited"]
    assert unedited == [lm.generate(row["prompt"], max_new_tokens=6) for row in table if row["method"] == "unedited"]
    for judged in result.judged:
        assert [score.method for score in judged.scores] == list(spec.methods)
        assert all(score.rating is not None and score.rating.low is not None for score in judged.scores)
        assert [one.edit for one in judged.suppression] == ["prompt", "latent", "span"]
        assert len(judged.rated) == 3 * len(spec.methods)
    truth = result.judged[0]
    assert {one.form: one.reads for one in truth.checks}["concept"]
    assert {one.method for one in result.detection} == {"sae", "random", "diffmean", "probe", "reft"}
    assert as_read(Comparison, json.loads(json.dumps(as_written(result))), "") == result
    html = view.section(result).embedded()
    assert html.count("<svg") == 4 and "Suppression" in html and "sea" in html
    assert any("not shown to read" in str(row[2]) for row in view.rows(result))
    assert stage.run(spec, tmp_path / "runs").reused


def test_an_interrupted_comparison_goes_on_where_it_was(
    spec: AxbenchSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(spec, methods=("sae", "probe", "lora"), protocol=replace(spec.protocol, suppression=False))
    whole = stage.run(spec, tmp_path / "whole").result

    class Interrupted(Exception):
        pass

    def interrupt(*_: Any) -> Any:
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(compare, "rate_all", interrupt)
        with pytest.raises(Interrupted):
            stage.run(spec, tmp_path / "parts")

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("it was finished before")

    monkeypatch.setattr("unweave.methods.axbench.generate.generate_sweep", refuse)
    monkeypatch.setattr(compare, "adapted", refuse)
    monkeypatch.setattr("unweave.methods.axbench.directions.linear_probe", refuse)
    assert stage.run(spec, tmp_path / "parts").result == whole


def test_what_cannot_be_compared_is_refused_before_the_model_is_loaded(
    spec: AxbenchSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(*_: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(stage, "open_saes", loads)
    other = tmp_path / "other.jsonl"
    empty, stranger = tmp_path / "empty.jsonl", tmp_path / "stranger.jsonl"
    other.write_text('{"question": "?"}\n')
    empty.write_text("\n")
    write(
        stranger,
        [Annotation(f"{SITE}/1", labels=(ScoredLabel(label="moon", threshold=0, score=1, support=9, maximum=1),))],
    )
    for changed, words in (
        ({"most_texts": 10}, "texts of up to 6 tokens"),
        ({"protocol": replace(spec.protocol, per_pair=9)}, "9 instructions per pair, and there are 8"),
        ({"protocol": replace(spec.protocol, instructions=other)}, "no text instruction"),
        ({"protocol": replace(spec.protocol, instructions=empty)}, "no instructions"),
        ({"pairs": empty}, "no latent has a scored label"),
        ({"pairs": stranger}, "no text has the tag 'moon'"),
    ):
        with pytest.raises(UnweaveError, match=words):
            stage.run(replace(spec, **changed), tmp_path / "runs")
    for changed, words in (
        ({"methods": ("unedited",)}, "suppression needs the method sae"),
        ({"methods": ("sae", "sae")}, "without repetition"),
        ({"judge": {"model": "x"}}, "only where a chat model rates"),
        ({"steering": {"factors": [2.0, 1.0]}}, "rising"),
        ({"steering": {"factors": [0.0, 1.0]}}, "above 0"),
        ({"steering": {"factors": [1.0, float("inf")]}}, "inf is not a number"),
        ({"steering": {"factors": []}}, "factors"),
        ({"steering": {"facters": [1.0]}}, "factors"),
        ({"steering": {"factors": [1.0], "preset": "clamp"}}, "preset has no effect"),
    ):
        with pytest.raises(UnweaveError, match=words):
            AxbenchSpec.from_dict(spec.to_dict() | changed)


def test_a_pair_with_too_few_texts_is_left_out_and_named(spec: AxbenchSpec, tmp_path: Path) -> None:
    with open(tmp_path / "texts.jsonl", "a") as out:
        out.write(json.dumps({"text": "a comet of ice", "tags": ["comet"]}) + "\n")
    digest = SAE.load(tmp_path / "sae").digest()
    comet, sea = (ScoredLabel(label=n, threshold=0.1, score=1, support=50, maximum=1.0) for n in ("comet", "sea"))
    lines = [Annotation(f"{SITE}/{j}", sae=digest, labels=(one,)) for j, one in ((7, comet), (4, sea))]
    write(tmp_path / "pairs.jsonl", lines)
    spec = replace(spec, methods=("sae", "random"), protocol=replace(spec.protocol, suppression=False))
    result = stage.run(spec, tmp_path / "runs").result
    assert [pair.concept for pair in result.pairs] == ["sea"] and result.cost.pairs == 1
    (left,) = result.left_out
    assert (left.pair, left.concept) == (f"{SITE}/7", "comet") and "fewer than 2" in left.reason
    assert ("left out", 1, f"comet ({SITE}/7): {left.reason}") in view.rows(result)
    assert any(f"comet ({SITE}/7)" in note for note in view.section(result).notes)
    write(tmp_path / "pairs.jsonl", lines[:1])
    with pytest.raises(UnweaveError, match=r"of its texts (to learn on|held out)") as caught:
        stage.run(spec, tmp_path / "runs")
    assert "'comet'" in caught.value.where


def test_all_texts_are_generated_under_one_bar(
    spec: AxbenchSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown_tasks: list[ShownTask]
) -> None:
    monkeypatch.setattr("unweave.methods.axbench.generate._CHUNK", 10)
    stage.run(replace(spec, methods=("sae", "probe", "lora")), tmp_path / "runs")
    assert len({shown.name for shown in shown_tasks}) == len(shown_tasks)
    by = {shown.name: shown for shown in shown_tasks}
    assert by["LoRA"].done == by["LoRA"].total == 12
    assert all(shown.done == shown.total for shown in shown_tasks if shown.unit == "texts")
    assert "generate" not in by and by["texts of all pairs"].total > 10


def test_pairs_of_another_sae_and_unknown_latents_are_refused(spec: AxbenchSpec, tmp_path: Path) -> None:
    label = ScoredLabel(label="sea", threshold=0, score=1, support=9, maximum=1)
    for name, digest, words in (
        (f"{SITE}/4", "0123456789ab", "was annotated in SAE 0123456789ab"),
        (f"{SITE}/40", None, "there is no latent .*/40; there are 40 latents"),
        ("resid_post.0/4", None, f"there are SAEs at {SITE}"),
    ):
        write(tmp_path / "wrong.jsonl", [Annotation(name, sae=digest, labels=(label,))])
        with pytest.raises(UnweaveError, match=words):
            stage.run(replace(spec, pairs=tmp_path / "wrong.jsonl"), tmp_path / "runs")


def test_the_cost_is_said_before_the_texts_are_read(
    spec: AxbenchSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(stage, "say", said.append)
    monkeypatch.setattr(stage, "open_tagged", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stage.run(replace(spec, methods=("sae",)), tmp_path / "runs")
    assert said == ["at most 60 texts for 3 pairs (360 new tokens), and 0 prompts to a judge"]
