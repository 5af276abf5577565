"""Labels with scores in a file of annotations, as `unweave labels` writes and others read them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.latents import annotations as notes
from unweave.latents.annotations import Annotation, ScoredLabel

BEST = ScoredLabel(label="law", threshold=0.25, score=0.9, support=60, maximum=7.5, output_score=0.02,
                   auroc=0.91, auroc_low=0.85, auroc_high=0.95)  # fmt: skip
OTHER = ScoredLabel(label="history", threshold=0.0, score=0.3, support=51, maximum=7.5)


def test_scored_labels_are_read_back_and_are_pairs_by_score(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    one = Annotation("resid_post.9/12", "law; history", sae="0123456789ab", labels=(OTHER, BEST))
    notes.write(path, [one, Annotation("resid_post.9/error"), Annotation("embed/3", "by hand")])
    there = notes.load(path)
    assert there["resid_post.9/12"] == one and there["embed/3"].labels == ()
    assert notes.pairs(there) == [(Site("resid_post", 9), 12, label, "0123456789ab") for label in (BEST, OTHER)]
    assert "labels" not in path.read_text(encoding="utf-8").splitlines()[2], "lines without labels are as they were"
    notes.append(path, Annotation("embed/3", labels=(OTHER,)))
    assert [pair.latent for pair in notes.pairs(notes.load(path))] == [12, 3, 12]


@pytest.mark.parametrize("wrong", [{"label": 3}, {"score": "high"}, {"unknown": 1}])
def test_a_scored_label_of_another_form_is_refused_with_its_line(tmp_path: Path, wrong: dict) -> None:
    path = tmp_path / "labels.jsonl"
    line = {"name": "embed/3", "labels": [vars(OTHER) | wrong]}
    path.write_text("\n" + json.dumps(line), encoding="utf-8")
    with pytest.raises(UnweaveError, match="line 2"):
        notes.load(path)


def test_a_score_that_is_no_number_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text(json.dumps({"name": "embed/3", "labels": [vars(OTHER) | {"score": float("nan")}]}), "utf-8")
    with pytest.raises(UnweaveError, match="score of label 'history' is nan"):
        notes.load(path)
