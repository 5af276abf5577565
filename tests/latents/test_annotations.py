"""latents/annotations.py: our lines and the paper's, what is refused, and that nothing given is lost."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.models import build_tiny, build_tiny_tokenizer
from unweave.circuits.about import About, Judged, Node
from unweave.circuits.graph import Circuit
from unweave.cli.app import main
from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.data.corpus import Source
from unweave.data.pack import PackSpec
from unweave.data.spec import DataSpec, StreamSpec
from unweave.inputs.saes import open_saes
from unweave.inputs.spec import OfSAEsSpec
from unweave.latents import annotations as notes
from unweave.latents.annotations import Annotation
from unweave.latents.records import LatentRecord
from unweave.methods.annotate.annotating import Question, Tally, in_circuit, walk
from unweave.methods.circuits import stage_draw as draw
from unweave.methods.circuits.spec import CircuitDrawSpec
from unweave.methods.train import stage as train
from unweave.methods.train.kinds import ReLUSpec
from unweave.methods.train.spec import TrainSpec


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
    with pytest.raises(UnweaveError, match=r"resid_post\.24/7 was annotated in SAE aaaaaaaaaaaa"):
        notes.refuse_strangers(said, {site: "bbbbbbbbbbbb"})


# -- asking -----------------------------------------------------------------------------------------------------------

SITE = Site("resid_post", 1)


def question(latent: int, sae: str = "a" * 12) -> Question:
    record = LatentRecord(latent, 3, 0.01, 2.0, 1.0, None, ((" are", 1.0),), (), (), (), ())
    return Question(f"{SITE}/{latent}", sae, record, ((1, 0.5), (4, -0.7)))


class Person:
    """Answers from a list, then end of input; remembers what was shown, asked and told."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.asked, self.shown, self.told = list(answers), list[str](), list[str](), list[str]()

    def ask(self, prompt: str) -> str:
        self.asked.append(prompt)
        if not self.answers:
            raise EOFError
        return self.answers.pop(0)

    def show(self, shown: Question, number: int, n: int, before: Annotation | None) -> None:
        self.shown.append(f"{shown.name} {number}/{n}{' again' if before else ''}")

    def walk(self, path: Path, *latents: int, known: int = 0) -> Tally:
        return walk([question(j) for j in latents], path, self.ask, self.show, self.told.append, known=known)


def test_a_form_is_asked_and_written_answer_by_answer(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    person = Person("plural nouns", "80", "12.5", "y", "mostly keys", "", "", "", "n", "")
    assert person.walk(path, 7, 9, known=3) == Tally(2, 3, 0)
    assert notes.load(path) == {
        f"{SITE}/7": Annotation(f"{SITE}/7", "plural nouns", "mostly keys", 80, 12.5, True, "a" * 12),
        f"{SITE}/9": Annotation(f"{SITE}/9", relevant=False, sae="a" * 12),
    }
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 6 and lines[0]["annotation"] == "plural nouns" and lines[0]["interpretability"] is None
    assert person.shown == [f"{SITE}/7 1/2", f"{SITE}/9 2/2"] and question(7).effect == -0.7


@pytest.mark.parametrize("end", [":quit", ":q", None])
def test_leaving_in_the_middle_keeps_what_was_said(tmp_path: Path, end: str | None) -> None:
    person = Person("cats", "60", *([end] if end else []))
    assert person.walk(tmp_path / "a.jsonl", 1, 2, 3) == Tally(1, 0, 2)
    assert notes.load(tmp_path / "a.jsonl")[f"{SITE}/1"].interpretability == 60


def test_skip_back_and_keeping_or_taking_back_answers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    person = Person("cats", "60", "", "y", "", ":s", ":back", ":b", "", "-", "", "n", "", ":skip", "end", ":q")
    assert person.walk(path, 1, 2, 3) == Tally(2, 0, 1)
    assert [shown.split("/")[1].split()[0] for shown in person.shown] == ["1", "2", "3", "2", "1", "2", "3"]
    assert person.shown[4].endswith("again") and any("[cats]" in prompt for prompt in person.asked)
    found = notes.load(path)
    assert found[f"{SITE}/1"] == Annotation(f"{SITE}/1", "cats", relevant=False, sae="a" * 12)
    assert found[f"{SITE}/3"].annotation == "end" and f"{SITE}/2" not in found


def test_wrong_answers_are_asked_again_and_help_is_told(tmp_path: Path) -> None:
    person = Person(":help", ":what", "x", "lots", "101", "nan", "5", "", "maybe", "yes", "")
    assert person.walk(tmp_path / "a.jsonl", 1) == Tally(1, 0, 0)
    assert "brackets" in person.told[0] and "no command :what" in person.told[1]
    assert sum("number from 0 to 100" in told for told in person.told) == 3
    assert "y or n" in person.told[5] and len(person.told) == 6
    assert notes.load(tmp_path / "a.jsonl")[f"{SITE}/1"].relevant is True


def test_answers_about_another_autoencoder_are_not_mixed(tmp_path: Path) -> None:
    notes.append(tmp_path / "a.jsonl", Annotation(f"{SITE}/1", "x", sae="b" * 12))
    with pytest.raises(UnweaveError, match="was annotated in SAE bbbbbbbbbbbb"):
        Person("y").walk(tmp_path / "a.jsonl", 1)


def test_a_circuits_latents_come_strongest_first_and_once() -> None:
    nodes = [
        Node(SITE, 3, 0, 0.2, False),
        Node(SITE, 9, 0, 5.0, True),
        Node(SITE, 4, 1, -0.9, False),
        Node(SITE, 3, 2, 0.5, False),
    ]
    assert in_circuit(nodes) == {(SITE, 4): [(1, -0.9)], (SITE, 3): [(2, 0.5), (0, 0.2)]}


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, text/, an autoencoder and a circuit that names it."""
    folder = tmp_path_factory.mktemp("home")
    build_tiny("llama").save_pretrained(folder / "model")
    build_tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text").mkdir()
    lines = [json.dumps({"text": f"the keys to cabinet {i} are near the door {i % 7}"}) for i in range(200)]
    (folder / "text" / "a.jsonl").write_text("\n".join(lines))
    data = DataSpec(
        sources=(Source(path=str(folder / "text")),), pack=PackSpec(context=48), tokens=3000, heldout_tokens=300
    )
    sae = ReLUSpec(expansion=2, tokens=2000, batch=64)
    stream = StreamSpec(chunk_tokens=1000, buffer_tokens=2000)
    spec = TrainSpec(model=str(folder / "model"), sites=(str(SITE),), data=data, sae=sae, stream=stream, device="cpu")
    run = train.run(spec, folder / "runs")
    effects = torch.zeros(3, 65)
    effects[0, 5], effects[1, 6], effects[2, 6], effects[2, 64] = 0.5, -0.9, 0.1, 0.4
    Circuit({SITE: effects}, {}, True, 4).save(folder / "found" / "circuit.safetensors")
    asked = {"spec": OfSAEsSpec(saes=(str(run.path / "sae"),), device="cpu").to_dict()}
    (folder / "found" / "spec.json").write_text(json.dumps(asked))
    (folder / "sae").symlink_to(run.path / "sae")
    return folder


def command(
    home: Path, answers: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.stdin", None if answers is None else io.StringIO(answers))
    capsys.readouterr()
    status = main(["annotate", *words, "--runs", str(home / "runs"), "--tokens", "1500"])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_command_walks_through_a_circuit_and_passes_over_what_is_done(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine.jsonl"
    words = (str(home / "found"), "--out", str(out))
    status, text, _ = command(home, "keys\n90\n\ny\n\n:quit\n", monkeypatch, capsys, *words)
    assert status == 0 and "1 latents annotated, 0 had answers already, 1 are left" in text
    assert text.index(f"{SITE}/6") < text.index(f"{SITE}/5")
    assert "-0.9 at position 1, +0.1 at position 2" in text and "fires on" in text and "raises" in text
    said = notes.load(out)[f"{SITE}/6"]
    assert (said.annotation, said.relevant, said.interpretability) == ("keys", True, 90)
    status, text, _ = command(home, "doors\n:q\n", monkeypatch, capsys, *words, "--json")
    assert status == 0 and json.loads(text) == {"out": str(out), "annotated": 1, "known": 1, "left": 0}
    assert notes.load(out)[f"{SITE}/5"].annotation == "doors"
    status, text, _ = command(home, "x\n", monkeypatch, capsys, *words)
    assert status == 0 and "0 latents annotated, 2 had answers already, 0 are left" in text
    status, text, _ = command(home, "\n\n\n\nseen twice\n", monkeypatch, capsys, *words, "--again", "--top", "1")
    assert notes.load(out)[f"{SITE}/6"].notes == "seen twice" and "so far: keys" in text


def test_the_command_takes_an_autoencoder_and_latents(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--saes", str(home / "sae"), "--latents", "3", f"{SITE}/12", "--out", str(tmp_path / "a.jsonl"))
    status, _, _ = command(home, "a\n\n\n\n\nb\n", monkeypatch, capsys, *words)
    assert status == 0
    assert {n: a.annotation for n, a in notes.load(tmp_path / "a.jsonl").items()} == {
        f"{SITE}/3": "a",
        f"{SITE}/12": "b",
    }


def test_of_a_classifiers_circuit_come_the_latents_that_its_run_judges(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    support = torch.zeros(1, 65)
    support[0, [5, 6, 7, 8, 64]] = torch.tensor([0.5, -0.9, 0.1, 0.3, 0.7])
    about = About("which label", of="classifier", judged=Judged(0.05, 2))
    Circuit({SITE: support}, {}, False, 4, about).save(tmp_path / "circuit-0.safetensors")
    neurons = replace(about, neurons=True)
    Circuit({SITE: support}, {}, False, 4, neurons).save(tmp_path / "neurons-0.safetensors")
    known = json.loads((home / "found" / "spec.json").read_text())["spec"]
    (tmp_path / "spec.json").write_text(json.dumps({"spec": known}))

    def asked(*words: str) -> list[str]:
        out = str(tmp_path / "none.jsonl")
        status, text, _ = command(
            home, ":s\n" * 9, monkeypatch, capsys, str(tmp_path / "circuit-0.safetensors"), "--out", out, *words
        )
        assert status == 0
        return re.findall(rf"{SITE}/(\d+) ", text)

    assert asked() == ["5", "8"] and asked("--top", "9") == ["5", "8", "7"] and asked("--threshold", "0.4") == ["5"]
    for file, words, says in (
        ("circuit-0", ("--threshold", "0.6"), "no latent supports the label by more than 0.6"),
        ("neurons-0", (), "this circuit is of neurons"),
    ):
        path = str(tmp_path / f"{file}.safetensors")
        status, _, err = command(home, "x\n", monkeypatch, capsys, path, *words, "--out", str(tmp_path / "a.jsonl"))
        assert status == 2 and says in err


@pytest.mark.parametrize(
    ("answers", "words", "says"),
    [
        (None, ("{found}",), "no terminal to ask in"),
        ("", ("{found}",), "no answers are piped in"),
        ("x\n", (), "there is nothing to annotate"),
        ("x\n", ("{sae}",), "this is an SAE, not a circuit"),
        ("x\n", ("{found}", "--latents", "3"), "a circuit and latents are both named"),
        ("x\n", ("{found}", "--threshold", "9"), "no latent's effect is above 9"),
        ("x\n", ("--saes", "{sae}"), "no latents are named"),
        ("x\n", ("--saes", "{sae}", "--latents", "64"), "latent 64 does not exist"),
        ("x\n", ("--saes", "{sae}", "--latents", "resid_post.1/error"), "is an error"),
        ("x\n", ("--saes", "{sae}", "--latents", "3", "--threshold", "1"), "a threshold needs a circuit"),
        ("x\n", ("{found}", "--top", "0"), "must be at least 1; 0 was given"),
    ],
)
def test_what_the_command_refuses(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answers: str | None,
    words: tuple[str, ...],
    says: str,
) -> None:
    given = [word.format(found=home / "found", sae=home / "sae") for word in words]
    status, _, err = command(home, answers, monkeypatch, capsys, *given, "--out", str(tmp_path / "a.jsonl"))
    assert status == 2 and says in err
    assert not (tmp_path / "a.jsonl").exists()


def test_a_picture_with_annotations_and_contexts(home: Path, tmp_path: Path) -> None:
    """The run's question finds the autoencoders again; annotations of others are refused, with contexts or without."""
    (sae,) = open_saes(OfSAEsSpec(saes=(str(home / "sae"),), device="cpu")).saes.values()
    path = tmp_path / "a.jsonl"
    notes.append(path, Annotation(f"{SITE}/6", "harbours", relevant=True, sae=sae.digest()))
    notes.append(path, Annotation(f"{SITE}/error", "what is left"))
    spec = CircuitDrawSpec(circuit=home / "found", annotations=path, contexts=True, tokens=1500, device="cpu")
    run = draw.run(spec, home / "runs")
    page = (run.path / "circuit.html").read_text(encoding="utf-8")
    assert run.result.labelled == 3 and run.result.errors == 1  # a latent at both of its positions, the error
    assert page.count("fires on") == 3 and page.count("relevant to the task") == 2
    notes.append(path, Annotation(f"{SITE}/5", "x", sae="b" * 12))
    for contexts in (True, False):
        asked = CircuitDrawSpec(circuit=home / "found", annotations=path, contexts=contexts)
        with pytest.raises(UnweaveError, match="was annotated in SAE bbbbbbbbbbbb"):
            draw.run(asked, tmp_path)
