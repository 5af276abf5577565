"""Choosing among candidates: by every way, what is refused, controls, and the command with its files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from unweave.cli.app import main
from unweave.core.errors import UnweaveError
from unweave.core.run import Run
from unweave.core.site import Site
from unweave.latents import annotations, relevance, selection
from unweave.latents.annotations import Annotation, ScoredLabel, name_of
from unweave.latents.latent_record import Context, LatentRecord
from unweave.lm.chat import Role
from unweave.methods.finetune.attribute.result import Candidate
from unweave.methods.finetune.select import view
from unweave.methods.finetune.select.result import SelectResult
from unweave.methods.finetune.select.select import (
    by_annotation,
    by_label,
    by_relevance,
    by_rule,
    choose,
    described,
    draws,
    random_directions,
)  # fmt: skip
from unweave.methods.finetune.select.spec import FinetuneSelectSpec

NINE, TEN = Site("resid_post", 9), Site("resid_post", 10)
CANDIDATES = [Candidate(site, number, score, 0.1, 1.0, 0.2) for site, number, score in (
    (NINE, 4, 3.0), (TEN, 1, -2.0), (NINE, 7, 1.5), (TEN, 0, 1.0), (TEN, 9, 0.5)
)]  # fmt: skip


def numbers(chosen: list[Candidate]) -> list[tuple[Site, int]]:
    return [(one.site, one.number) for one in chosen]


def test_a_rule_takes_the_strongest_of_sites_and_sign() -> None:
    verdicts = by_rule(CANDIDATES)
    assert verdicts[NINE, 7].why == "rank 3 of 5"
    assert numbers(choose(CANDIDATES, verdicts, top=2)) == [(NINE, 4), (TEN, 1)]
    assert numbers(choose(CANDIDATES, verdicts, top=2, sign="positive", sites=["resid_post.10"])) == [
        (TEN, 0),
        (TEN, 9),
    ]
    assert numbers(choose(CANDIDATES, verdicts, sign="negative")) == [(TEN, 1)]
    with pytest.raises(UnweaveError, match=r"no candidate is of the sites mlp_\* and sign either") as refused:
        choose(CANDIDATES, verdicts, sites=["mlp_*"])
    assert "resid_post.9, resid_post.10" in refused.value.remedy


def test_a_query_takes_what_is_relevant_enough_and_says_how_far_the_best_is() -> None:
    words = {(NINE, 7): "she, her", (TEN, 0): "seas"}
    verdicts = by_relevance({(NINE, 7): 0.61, (TEN, 0): 0.2}, words, 0.5)
    (one,) = choose(CANDIDATES, verdicts)
    assert (one.number, verdicts[NINE, 7].why) == (7, "she, her (0.61)")
    with pytest.raises(UnweaveError, match=r"the best candidate, resid_post.9/7, has 0.610 .*2 of 5") as refused:
        choose(CANDIDATES, by_relevance({(NINE, 7): 0.61, (TEN, 0): 0.2}, words, 0.7))
    assert "0.61 or less" in refused.value.remedy
    with pytest.raises(UnweaveError, match="nothing speaks for any of 5"):
        choose(CANDIDATES, {})


def label(name: str, auroc: float | None) -> ScoredLabel:
    return ScoredLabel(label=name, threshold=0.1, score=0.5, support=60, maximum=3.0, auroc=auroc)


def test_labels_count_where_they_hold_on_texts_held_out() -> None:
    said = {
        (NINE, 4): Annotation(name_of(NINE, 4), labels=(label("sea", 0.9), label("gender::she", 0.7))),
        (NINE, 7): Annotation(name_of(NINE, 7), labels=(label("gender::he", 0.55), label("gender::she", None))),
        (TEN, 0): Annotation(name_of(TEN, 0), labels=(label("sea", 0.9),)),
    }
    verdicts = by_label(said, ("gender::*",), 0.6)
    assert numbers(choose(CANDIDATES, verdicts)) == [(NINE, 4)]
    assert verdicts[NINE, 4].why == "gender::she, AUROC 0.70" and (TEN, 0) not in verdicts
    assert not by_label({(NINE, 7): Annotation("resid_post.9/7", labels=(label("a", None),))}, ("a",), 0.0)[
        NINE, 7
    ].passes


def test_a_persons_word_counts() -> None:
    said = {
        (NINE, 4): Annotation(name_of(NINE, 4), "she", relevant=False),
        (TEN, 9): Annotation(name_of(TEN, 9), "nurses", relevant=True),
        (TEN, 0): Annotation(name_of(TEN, 0)),
    }
    verdicts = by_annotation(said)
    assert numbers(choose(CANDIDATES, verdicts)) == [(TEN, 9)]
    assert verdicts[TEN, 9].why == "nurses" and (TEN, 0) not in verdicts


def test_controls_are_as_many_others() -> None:
    chosen = CANDIDATES[:2]
    drawn = draws(CANDIDATES, chosen, 20, seed=1)
    assert drawn == draws(CANDIDATES, chosen, 20, seed=1) != draws(CANDIDATES, chosen, 20, seed=2)
    for one in drawn:
        assert len({*numbers(one)}) == 2 and not {*numbers(one)} & {*numbers(chosen)}
    assert {key for one in drawn for key in numbers(one)} == {*numbers(CANDIDATES[2:])}
    assert draws(CANDIDATES, CANDIDATES, 0) == []
    with pytest.raises(UnweaveError, match="only 2 are left for controls"):
        draws(CANDIDATES, CANDIDATES[:3], 1)


def test_random_directions_span_as_much() -> None:
    sizes = {TEN: (3, 8), NINE: (1, 8)}
    rows = random_directions(sizes, 0)
    for site, (rank, width) in sizes.items():
        assert rows[site].shape == (rank, width)
        torch.testing.assert_close(rows[site] @ rows[site].T, torch.eye(rank))
        assert torch.equal(rows[site], random_directions(sizes, 0)[site])
        assert not torch.allclose(rows[site], random_directions(sizes, 1)[site])
    many = torch.cat([random_directions({NINE: (1, 8)}, seed)[NINE] for seed in range(200)])
    assert float(many.mean(0).abs().max()) < 0.12  # no side is preferred


def context(*texts: str, focus: int) -> Context:
    n = len(texts)
    return Context((0,) * n, texts, (1.0,) * n, (True,) * n, focus, 0, 0, Role.TEXT, None)


def test_without_an_explanation_a_latent_is_what_it_fires_on_and_promotes() -> None:
    record = LatentRecord(
        3, 5, 0.1, 2.0, 1.0, None, ((" her", 1.0), (" ", 0.9), (" she", 0.8)), (),
        (context("that", " she", " went", focus=1), context(" she", focus=0)), (context("\n", "Mrs", focus=1),), (),
    )  # fmt: skip
    assert described(record) == "she, Mrs; promotes her, she"
    assert described(replace(record, top=(), quantile=())) == ""


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"by": "query"}, "there is no query"),
        ({"by": "query", "query": {"text": "sea"}}, "nothing is known"),
        ({"by": "label", "labels": ["a"]}, "by label needs a file"),
        ({"by": "annotations"}, "by annotations needs a file"),
        ({"by": "label", "annotations": "a.jsonl"}, "there are no labels"),
        ({"query": {"text": "sea"}}, "would have no effect"),
        ({"labels": ["a"]}, "would have no effect"),
        ({"top": 0}, "at least 1"),
    ],
)
def test_questions_that_make_no_sense(fields: dict[str, Any], what: str) -> None:
    with pytest.raises(UnweaveError, match=what):
        FinetuneSelectSpec.from_dict({"attribution": "runs/a"} | fields)


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def attributed(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of attribution with 12 candidates."""
    folder = tmp_path_factory.mktemp("attributed")
    items = [{"prompt": f"the keys {i}", "correct": "ab"[i % 2], "incorrect": "ba"[i % 2]} for i in range(16)]
    (folder / "choices.jsonl").write_text("\n".join(map(json.dumps, items)))
    asked = ("--saes", str(trained.path / "sae"), "--task.task", str(folder / "choices.jsonl"), "--sign", "either")
    assert main(["finetune", "attribute", *asked, "--top", "12", "--runs", str(folder), "--json"]) == 0
    return next(folder.glob("finetune-attribute-*"))


def select(attributed: Path, runs: Path, *options: str) -> Run[SelectResult]:
    before = {*runs.glob("finetune-select-*")}
    assert main(["finetune", "select", "--attribution", str(attributed), "--runs", str(runs), "--json", *options]) == 0
    (folder,) = {*runs.glob("finetune-select-*")} - before
    return Run.at(folder, SelectResult)


def test_the_command_writes_a_selection_and_controls(attributed: Path, tmp_path: Path) -> None:
    run = select(attributed, tmp_path, "--top", "3", "--controls.random", "2")
    result = run.result
    best = selection.read(run.path / result.selection)
    assert len(best) == 3 and best.by == "rule" and best.candidates == 12 and best.sites[0].sae
    assert [path.stem for path in result.controls] == ["random-0", "random-1", "directions-0"]
    *random, spread = [selection.read(run.path / path) for path in result.controls]
    for one in random:
        assert len(one) == 3 and not {*one.sites[0].numbers} & {*best.sites[0].numbers} and one.by == "random"
    (rows,) = spread.directions.values()
    assert rows.shape == (3, 32) and spread.kind == "directions"
    assert result.diagnosis is not None and [one.edit for one in result.diagnosis.edits] == ["zero", "span", "mean"]
    body = view.section(result).body
    assert "candidates.jsonl" in body and body.count("chosen") > 3 and len(result.rows()) > 6


def test_a_person_edits_the_candidates_and_gives_them_back(attributed: Path, tmp_path: Path) -> None:
    first = select(attributed, tmp_path, "--top", "3", "--items", "0")
    lines = annotations.load(first.path / "candidates.jsonl")
    assert [one.relevant for one in lines.values()] == [True] * 3 + [False] * 9
    names = list(lines)
    mine = [replace(lines[name], relevant=False) for name in names[:5]]
    mine.append(replace(lines[names[5]], relevant=True, annotation="keys"))
    annotations.write(tmp_path / "mine.jsonl", mine)
    again = select(attributed, tmp_path, "--by", "annotations", "--annotations", str(tmp_path / "mine.jsonl"))
    best = selection.read(again.path / "selection.json")
    assert [name_of(best.sites[0].site, one.number) for one in best.sites[0].chosen] == [names[5]]
    assert best.sites[0].chosen[0].why == "keys" and again.result.unknown == 6 and first.result.diagnosis is None


def test_a_query_is_held_against_explanations_or_what_latents_fire_on(
    attributed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, dict[Any, str]]] = []

    def cosines(query: str, labels: dict[Any, str], embedder: str, device: str | None) -> dict[Any, float]:
        asked.append((query, dict(labels)))
        return {key: 0.9 if text == "keys" else 0.1 for key, text in labels.items()}

    monkeypatch.setattr(relevance, "cosines", cosines)
    lines = annotations.load(attributed / "candidates.jsonl")
    second = list(lines)[1]
    annotations.write(tmp_path / "mine.jsonl", [replace(lines[second], annotation="keys")])
    query = ("--by", "query", "--query.text", "doors", "--items", "0", "--annotations", str(tmp_path / "mine.jsonl"))
    run = select(attributed, tmp_path, *query)
    best = selection.read(run.path / "selection.json")
    assert [name_of(best.sites[0].site, best.sites[0].numbers[0])] == [second] and len(best) == 1
    assert asked[0] == ("doors", {(best.sites[0].site, best.sites[0].numbers[0]): "keys"}) and run.result.unknown == 11
    assert best.query == "doors (at least 0.5 by embedding)"
    run = select(attributed, tmp_path, *query, "--contexts", "2000")
    assert len(asked[1][1]) > 6 and asked[1][1][best.sites[0].site, best.sites[0].numbers[0]] == "keys"
    chosen = next(one for one in run.result.weighed if one.chosen)
    assert "[" in chosen.contexts[0] and "Strongest contexts" in view.section(run.result).body


def test_nothing_selected_and_strangers_are_refused(
    attributed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*options: str) -> str:
        words = ["finetune", "select", "--attribution", str(attributed), "--runs", str(tmp_path), *options]
        assert main(words) == 2
        return capsys.readouterr().err

    lines = annotations.load(attributed / "candidates.jsonl")
    annotations.write(tmp_path / "none.jsonl", [replace(one, relevant=False) for one in lines.values()])
    assert "nothing is selected" in refused("--by", "annotations", "--annotations", str(tmp_path / "none.jsonl"))
    annotations.write(tmp_path / "other.jsonl", [replace(one, relevant=True, sae="0" * 12) for one in lines.values()])
    assert "was annotated in SAE" in refused("--by", "annotations", "--annotations", str(tmp_path / "other.jsonl"))
    assert "left for controls" in refused("--top", "7")
