"""circuits/annotations.py: our lines and the paper's, what is refused, and that nothing given is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave.circuits import annotations as notes
from unweave.circuits.annotations import Annotation
from unweave.core.errors import UnweaveError
from unweave.core.site import Site


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"])),
    ratings=st.tuples(*2 * [st.one_of(st.none(), st.integers(0, 100))]),
    relevant=st.sampled_from([True, False, None]),
)
def test_whatever_is_appended_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, text: str, ratings: tuple, relevant: bool | None
) -> None:
    path = tmp_path_factory.mktemp("a") / "new" / "annotations.jsonl"
    clear, complex_ = ratings
    one = Annotation("resid_post.24/3036", text, text[::-1], clear, complex_, relevant, "0123456789ab")
    other = Annotation("embed/5")
    for annotation in (other, one):
        notes.append(path, annotation)
    assert notes.load(path) == {"embed/5": other, "resid_post.24/3036": one}
    assert len(path.read_bytes().split(b"\n")) == 3


def test_the_last_line_for_a_name_counts_and_a_cut_line_is_never_continued(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"name": "embed/5", "annotation": "cats"}, "", {"name": "embed/6"})
    assert not path.read_text().endswith("\n")
    notes.append(path, Annotation("embed/5", "dogs", relevant=False))
    found = notes.load(path)
    assert list(found) == ["embed/5", "embed/6"]
    assert found["embed/5"] == Annotation("embed/5", "dogs", relevant=False)
    assert (found["embed/5"].site, found["embed/5"].latent) == (Site("embed"), 5)


def test_the_papers_lines(tmp_path: Path) -> None:
    """Both spellings of notes, numbers as text, no layer at the embedding, the table's heading, lines without words."""
    path = write(
        tmp_path / "paper.jsonl",
        {
            "Component": "resid",
            "Layer": "5",
            "Feature": "3036",
            "Name": "resid_5/3036",
            "Annotation": "verbs",
            "Notes": "on that",
        },
        {"Component": "attn", "Layer": 3, "Feature": "7", "Annotation": "nouns", "notes": "start and end"},
        {"Component": "Component", "Layer": "", "Feature": "", "Name": "Name", "Annotation": "Annotation"},
        {"Component": "embed", "Layer": "", "Feature": "5", "Name": "embed/5", "Annotation": "kids"},
        {"Component": "embed", "Feature": "5", "Name": "embed/5"},
        {"Name": "mlp_3/12", "Annotation": "prepositions"},
    )
    found = notes.load(path)
    assert {name: (a.annotation, a.notes) for name, a in found.items()} == {
        "resid_post.5/3036": ("verbs", "on that"),
        "attn_add.3/7": ("nouns", "start and end"),
        "embed/5": ("kids", ""),
        "mlp_add.3/12": ("prepositions", ""),
    }
    used = [Site("attn_heads", 3), Site("attn_out", 4), Site("mlp_out", 3), Site("resid_pre", 5)]
    assert set(notes.load(path, used)) == {"resid_post.5/3036", "attn_heads.3/7", "embed/5", "mlp_out.3/12"}
    with pytest.raises(UnweaveError, match=r"attn_3/7 could be at attn_heads\.3 or attn_out\.3") as error:
        notes.load(path, [*used, Site("attn_out", 3)])
    assert error.value.where == f"{path}, line 2"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ({"annotation": "x"}, "there is no name"),
        ({"name": "embed/5", "relevent": False}, "did you mean 'relevant'"),
        ({"name": "embed/5", "relevant": "no"}, "relevant is 'no'"),
        ({"name": "embed/5", "relevant": 0}, "relevant is 0"),
        ({"name": "embed/5", "interpretability": 101}, "interpretability is 101"),
        ({"name": "embed/5", "complexity": "high"}, "complexity is 'high'"),
        ({"name": "embed/5", "complexity": True}, "complexity is True"),
        ({"name": "embed/5", "annotation": 7}, "not text"),
        ({"name": "embed/five"}, "names no latent"),
        ({"name": "resid.5/5"}, "is not a site"),
        ({"Component": "conv", "Layer": "1", "Feature": "2", "Annotation": "x"}, "is not a site"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path: Path, line: object, says: str) -> None:
    path = write(tmp_path / "a.jsonl", {"name": "embed/5"}, line, {"name": "embed/6"})
    with pytest.raises(UnweaveError) as error:
        notes.load(path)
    assert says in str(error.value) and error.value.where == f"{path}, line 2"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UnweaveError, match="cannot read annotations"):
        notes.load(tmp_path / "none.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UnweaveError, match="cannot read annotations"):
        notes.load(tmp_path / "bytes.jsonl")


def test_trap_41_annotations_of_another_training_are_refused() -> None:
    site = Site("resid_post", 24)
    said = {"resid_post.24/7": Annotation("resid_post.24/7", "x", sae="aaaaaaaaaaaa"), "embed/1": Annotation("embed/1")}
    notes.refuse_strangers(said, {site: "aaaaaaaaaaaa", Site("embed"): "c"})
    notes.refuse_strangers(said, {Site("embed"): "c"})
    with pytest.raises(UnweaveError, match=r"resid_post\.24/7 was annotated in autoencoder aaaaaaaaaaaa"):
        notes.refuse_strangers(said, {site: "bbbbbbbbbbbb"})
