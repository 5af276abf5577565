"""`unweave runs`: what lies in a folder of runs, and removal that breaks nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from unweave.cli.app import main
from unweave.core.errors import UnweaveError
from unweave.core.result import Result
from unweave.core.run import Run
from unweave.core.runs import changes, chosen, entries, remove
from unweave.core.spec import Spec
from unweave.methods.labels.spec import LabelsSpec, MatchSpec


@dataclass(frozen=True)
class Asked(Spec):
    text: str = ""


@dataclass(frozen=True)
class Answer(Result):
    number: int


def make(root: Path, stage: str, text: str = "", finish: bool = True) -> Path:
    with Run.open(root, stage, Asked(text), kind=Answer) as run:
        (run.path / "out.bin").write_bytes(b"x" * 1000)
        if finish:
            run.finish(Answer(1))
    return run.path


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """A run, one that builds on it, an unfinished one, one that lost an output, a shared folder, and somebody's own."""
    root = tmp_path / "runs"
    first = make(root, "train")
    paths = {"first": first, "second": make(root, "eval", str(first / "sae"))}
    paths |= {"half": make(root, "labels", finish=False), "broken": make(root, "steer")}
    (paths["broken"] / "out.bin").unlink()
    paths["shared"] = root / "activations-0123456789ab"
    for folder in (paths["shared"], root / "notes"):
        folder.mkdir()
        (folder / "a.bin").write_bytes(b"x" * 50)
    return paths


def test_runs_are_listed_with_their_state_and_what_builds_on_them(folders: dict[str, Path]) -> None:
    root = folders["first"].parent
    by = {entry.path: entry for entry in entries(root)}
    assert set(by) == set(folders.values())
    states = {name: by[path].state for name, path in folders.items()}
    assert states == {"first": "done", "second": "done", "half": "unfinished", "broken": "damaged", "shared": "shared"}
    assert by[folders["first"]].used_by == (folders["second"].name,) and "out.bin" in by[folders["broken"]].problem
    assert by[folders["second"]].uses == (folders["first"].name,)
    assert by[folders["shared"]].size == 50 and by[folders["first"]].size > 1000
    with Run.at(folders["half"]):
        (working,) = chosen(entries(root), [folders["half"].name])
        assert working.state == "at work"
        with pytest.raises(UnweaveError, match="another process"):
            remove([working])
    with pytest.raises(UnweaveError, match="no such folder"):
        entries(root / "nowhere")


def test_a_refused_question_leaves_no_folder(tmp_path: Path) -> None:
    def ask(text: str, works: bool, error: Exception) -> bool:
        with pytest.raises(type(error)), Run.open(tmp_path, "train", Asked(text), kind=Answer) as run:
            if works:
                run.log("begun")
            raise error
        return run.path.exists()

    refusal = UnweaveError("no such site")
    assert not ask("a", False, refusal)
    assert ask("b", True, refusal) and ask("c", False, KeyError("our fault"))


def test_removal_refuses_what_others_need(folders: dict[str, Path]) -> None:
    root = folders["first"].parent
    every = entries(root)
    with pytest.raises(UnweaveError, match="builds on this run"):
        remove(chosen(every, ["train-"]))
    with pytest.raises(UnweaveError, match="no run of this name"):
        chosen(every, ["nothing"])
    with pytest.raises(UnweaveError, match="begin with this name"):
        chosen(every, [""])
    assert all(path.exists() for path in folders.values())
    assert remove(chosen(every, ["train-", str(folders["second"]), "activations"])) > 2000
    assert [path.exists() for path in folders.values()] == [False, False, True, True, False]
    assert (root / "notes").exists()


def test_the_command_asks_before_it_deletes(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, name = str(folders["first"].parent), folders["half"].name
    assert main(["runs", "--runs", root]) == 0
    shown = capsys.readouterr().out
    assert all(path.name in shown for path in folders.values()) and "used by 1 run" in shown
    assert main(["runs", name, "--runs", root, "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["runs"]
    assert (told["name"], told["state"], told["used_by"]) == (name, "unfinished", [])
    assert main(["runs", name, "--runs", root, "--remove"]) == 2  # nobody can be asked
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: "n")
    assert main(["runs", name, "--runs", root, "--remove"]) == 0 and folders["half"].exists()
    assert main(["runs", name, "--runs", root, "--remove", "--yes"]) == 0 and not folders["half"].exists()
    assert main(["runs", "--runs", root, "--remove"]) == main(["runs", "--runs", root, "--yes"]) == 2


def test_only_what_differs_from_the_defaults_is_told() -> None:
    spec: Any = LabelsSpec(saes=("a", "b"), match=MatchSpec(top=7))
    assert changes(spec) == {"saes": ("a", "b"), "match.top": 7}
