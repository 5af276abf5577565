"""Where runs live: folders that cannot hold them, disks that cannot be written, and processes that share them."""

from __future__ import annotations

import builtins
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.jobs import spec_of
from helpers.paths import TESTS
from helpers.plain_result import Plain
from unweave.circuits.opened import _moved
from unweave.cli.app import main
from unweave.core.contents import tree_of
from unweave.core.errors import UnweaveError
from unweave.core.lock import remove_stale
from unweave.core.place import usable
from unweave.core.run import Run
from unweave.core.spec import Spec
from unweave.data.stream import ActivationSource
from unweave.inputs.saes import named_saes, split_name
from unweave.latents import stage as latents
from unweave.latents.spec import LatentsSpec
from unweave.methods.evaluate import stage as evaluation
from unweave.methods.evaluate.spec import EvalSpec
from unweave.methods.report import stage as report
from unweave.methods.report.spec import ReportSpec
from unweave.methods.train import stage as train
from unweave.methods.train.spec import TrainSpec

LATIN_1 = os.fsdecode(b"caf\xe9")


def _loop(folder: Path) -> Path:
    (folder / "a").symlink_to(folder / "b")
    (folder / "b").symlink_to(folder / "a")
    return folder / "a"


def _file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file"


def _latin(folder: Path) -> Path:
    (folder / LATIN_1).mkdir()
    return folder / LATIN_1


PLACES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a loop of links": (_loop, "too many levels of symbolic links"),
    "below a loop": (lambda folder: _loop(folder) / "runs", "too many levels of symbolic links"),
    "a file": (_file, "not a folder"),
    "below a file": (lambda folder: _file(folder) / "deep" / "runs", "not a folder"),
    "a device": (lambda _: Path("/dev/null"), "not a folder"),
    "a long name": (lambda folder: folder / ("x" * 300), "a name of 300 bytes"),
    "a long name in two-byte letters": (lambda folder: folder / "new" / ("é" * 150), "a name of 300 bytes"),
    "a long path": (lambda folder: folder.joinpath(*["y" * 200] * 25), "a path of 5,"),
    "half a surrogate pair": (lambda folder: folder / "\ud800", "not UTF-8 text"),
    "a Latin-1 name": (_latin, "not UTF-8 text"),
    "a new Latin-1 name": (lambda folder: folder / LATIN_1 / "runs", "not UTF-8 text"),
    "a null byte": (lambda folder: folder / "a\0b", "null byte"),
    "where no folder can be made": (lambda _: Path("/proc/nothing/runs"), "no folder can be made here"),
}


@pytest.mark.parametrize("place", PLACES)
def test_folders_that_can_hold_no_runs_are_one_clear_error(place: str, tmp_path: Path) -> None:
    make, says = PLACES[place]
    with pytest.raises(UnweaveError, match=says) as caught:
        Run.open(make(tmp_path), "s", Spec())
    assert "cannot write here" in caught.value.what and caught.value.remedy
    str(caught.value).encode()  # it can be printed anywhere


@pytest.mark.parametrize("command", [["eval", "--sae"], ["report", "--sae"], ["circuit", "draw", "--circuit"]])
@pytest.mark.parametrize("place", [p for p in PLACES if p != "where no folder can be made"])
def test_they_are_refused_before_any_work(
    command: list[str], place: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The autoencoder and the circuit that are named are not there: whoever looks for them has begun the work."""
    make, says = PLACES[place]
    assert main([*command, str(tmp_path / "nothing"), "--runs", str(make(tmp_path)), "--json"]) == 2
    told = json.loads(capfd.readouterr().err)["error"]
    assert says in told["what"] and "--runs" in told["remedy"]


def test_folders_that_can_hold_runs(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "not yet")
    for name in ("deep/er", "caf\u00e9", "link", "a=b", "x" * 255, "."):
        assert Run.open(tmp_path / name, "s", Spec()).path.parent == (tmp_path / name).resolve()
    assert usable("runs") == Path.cwd() / "runs" and not Path("runs-of-nobody").exists()


def test_what_is_no_run_is_named_whatever_its_path(tmp_path: Path) -> None:
    for place in (_loop(tmp_path), _file(tmp_path), tmp_path / ("x" * 300), tmp_path / "a\0b", tmp_path / "\ud800"):
        with pytest.raises(UnweaveError, match="not a run directory"):
            Run.at(place)


# -- reading needs no writing ---------------------------------------------------------------------------------------


def _read_only(monkeypatch: pytest.MonkeyPatch, below: Path) -> list[str]:
    """Whatever would write below a folder fails as on a read-only disk; what was tried is in the list."""
    tried: list[str] = []

    def refuse(path: Any) -> None:
        if not isinstance(path, int) and str(path).startswith(str(below)):
            tried.append(str(path))
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    plain_open, plain_os_open = builtins.open, os.open

    def guarded(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if set(mode) & set("wax+"):
            refuse(path)
        return plain_open(path, mode, *rest, **more)

    def guarded_os(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            refuse(path)
        return plain_os_open(path, flags, *rest, **more)

    monkeypatch.setattr(builtins, "open", guarded)
    monkeypatch.setattr("io.open", guarded)
    monkeypatch.setattr(os, "open", guarded_os)
    for name in ("mkdir", "unlink", "remove", "rmdir", "rename", "replace", "utime", "symlink"):
        monkeypatch.setattr(os, name, _guarded(getattr(os, name), refuse))
    return tried


def _guarded(real: Callable[..., Any], refuse: Callable[[Any], None]) -> Callable[..., Any]:
    def function(path: Any, *rest: Any, **more: Any) -> Any:
        refuse(path)
        return real(path, *rest, **more)

    return function


def test_finished_runs_are_read_from_a_read_only_disk(
    home: Path,
    trained: Run,
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sae = trained.path / "sae"

    def ask() -> list[Run]:
        return [
            train.run(spec_of(home), runs),
            evaluation.run(EvalSpec(sae=sae, device="cpu"), runs),
            latents.run(LatentsSpec(sae=sae, tokens=1500, device="cpu"), runs),
            report.run(ReportSpec(sae=sae), runs),
        ]

    first = ask()
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    tried = _read_only(monkeypatch, runs)
    again = ask()
    assert all(run.reused for run in again) and [r.path for r in again] == [r.path for r in first]
    assert [run.result for run in again] == [run.result for run in first]
    assert {Path(path).name for path in tried} <= {".lock"}
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before
    with pytest.raises(UnweaveError, match="cannot write here: read-only file system"):
        evaluation.run(EvalSpec(sae=sae, tokens=500, device="cpu"), runs)


# -- several processes ----------------------------------------------------------------------------------------------

_HOLD = """
import sys, time
from pathlib import Path
from unweave.core.run import Run
from unweave.core.spec import Spec
sys.path.insert(0, sys.argv[3])
from helpers.plain_result import Plain
with Run.open(Path(sys.argv[1]), "part", Spec()) as run:
    print("held", flush=True)
    sys.stdin.readline()
    if sys.argv[2] == "finish":
        run.finish(Plain({"found": 1}))
    print("finished", flush=True)
    sys.stdin.readline()
"""


def _holder(folder: Path, way: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(folder), way, str(TESTS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def _say(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "finished\n"


def _end(process: subprocess.Popen[str]) -> None:
    process.communicate("\n", timeout=20)
    assert process.returncode == 0


def test_a_finished_run_is_read_while_another_process_is_still_in_it(tmp_path: Path) -> None:
    process = _holder(tmp_path, "finish")
    with pytest.raises(UnweaveError, match="another process is working"), Run.open(tmp_path, "part", Spec()):
        pass
    _say(process)
    with Run.open(tmp_path, "part", Spec(), kind=Plain) as run:
        assert run.reused and run.result == Plain({"found": 1})
    _end(process)


@pytest.mark.parametrize("way", ["finish", "give up"])
def test_a_part_that_another_process_makes_is_waited_for(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside another run; then it is used, or made here where the other process ended without it."""
    process, said = _holder(tmp_path, way), []

    class Shown:
        def advance(self, amount: float = 1) -> None:
            if len(said) == 1:
                said.append("advanced")
                _say(process)
                _end(process)

        def note(self, text: str) -> None: ...

        def close(self) -> None:
            said.append("closed")

    monkeypatch.setattr("unweave.core.progress._display", lambda name, *_: (said.append(name), Shown())[1])
    with Run.open(tmp_path, "whole", Spec()), Run.open(tmp_path, "part", Spec()) as part:
        assert part.reused == (way == "finish")
    assert said[0].startswith(f"waiting for {part.path.name}") and said[1:] == ["advanced", "closed"]


def test_a_run_is_not_waited_for_by_its_own_process(tmp_path: Path) -> None:
    with (
        Run.open(tmp_path, "s", Spec()),
        pytest.raises(UnweaveError, match="another process"),
        Run.open(tmp_path, "s", Spec()),
    ):
        pass


_TRAIN = """
import sys
from pathlib import Path
import torch
from unweave.cli.progress import show_progress
from unweave.core.spec import Spec
from unweave.data.stream import ActivationSource
from unweave.methods.train import stage as train
from unweave.methods.train.spec import TrainSpec
torch.set_num_threads(1)
computed = []
plain = ActivationSource._harvest
ActivationSource._harvest = lambda self, index: (computed.append(index), plain(self, index))[1]
with show_progress(False):
    run = train.run(TrainSpec.from_file(Path(sys.argv[1])), Path(sys.argv[2]))
print(run.path, len(computed))
"""


def test_two_questions_at_once_share_tokens_and_activations(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both finish, find what each finds alone, and no chunk of the shared activations is computed twice."""
    plain = spec_of(home)
    places = []
    for k in (3, 4):
        places.append(tmp_path / f"{k}.json")
        spec = spec_of(home, sae=plain.sae.from_dict(plain.sae.to_dict() | {"k": k, "tokens": 6000}))
        places[-1].write_text(json.dumps(spec.to_dict()))

    def start(place: Path, folder: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _TRAIN, str(place), str(tmp_path / folder)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def ended(process: subprocess.Popen[str]) -> tuple[Path, int]:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        path, computed = out.splitlines()[-1].rsplit(" ", 1)
        return Path(path), int(computed)

    together = [ended(process) for process in [start(place, "both") for place in places]]
    computed: list[int] = []
    plain_harvest = ActivationSource._harvest
    monkeypatch.setattr(
        ActivationSource, "_harvest", lambda self, index: (computed.append(index), plain_harvest(self, index))[1]
    )
    for place, one in zip(places, together, strict=True):
        alone = train.run(TrainSpec.from_file(place), tmp_path / f"alone-{place.stem}")
        weights = [(path / "sae" / "sae_weights.safetensors").read_bytes() for path in (one[0], alone.path)]
        assert weights[0] == weights[1]
    chunks = len(list(next((tmp_path / "both").glob("activations-*")).glob("*.safetensors")))
    heldout = len(computed) - 2 * chunks  # these are not kept
    assert chunks > 3 and sum(number for _, number in together) == chunks + heldout
    assert not list((tmp_path / "both").rglob("*.safetensors.lock"))


def test_temporaries_of_a_killed_process_are_removed_wherever_they_lie(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    deep = tmp_path / "records" / "resid_post.1"
    (deep / f".store.{gone.pid}.tmp").mkdir(parents=True)
    (deep / f".a.parquet.{gone.pid}.tmp").write_text("half")
    (tmp_path / f".b.{gone.pid}.tmp").write_text("half")
    (deep / f".c.{os.getppid()}.tmp").write_text("of a process that is alive")
    (deep / ".named.tmp").write_text("of nobody")
    remove_stale(tmp_path)
    left = {path.name for path in tmp_path.rglob("*") if path.is_file() or path.suffix == ".tmp"}
    assert left == {f".c.{os.getppid()}.tmp", ".named.tmp"}


def test_chunks_that_a_kill_cut_short_leave_nothing(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    plain, left = ActivationSource._harvest, []

    def harvest(self: ActivationSource, index: int) -> Any:
        if self.cache is not None and not left:
            left.append(self.cache / f".00000.safetensors.{gone.pid}.tmp")
            left[0].write_text("half")
        return plain(self, index)

    monkeypatch.setattr(ActivationSource, "_harvest", harvest)
    train.run(spec_of(home), tmp_path)
    assert left and not left[0].exists()


# -- names of autoencoders --------------------------------------------------------------------------------------------


def test_a_path_with_an_equals_sign_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs/lr=1e-3/sae", "resid_post.1=odd"):
        Path(name).mkdir(parents=True)
        (Path(name) / "cfg.json").write_text("{}")
    assert named_saes(("runs/lr=1e-3",)) == [(None, "runs/lr=1e-3/sae")]
    assert named_saes(("resid_post.1=odd",)) == [(None, "resid_post.1=odd")]
    placed = named_saes(("resid_post.1=runs/lr=1e-3/sae", "path.model.norm@in = somewhere/else"))
    assert [(str(site), name) for site, name in placed] == [
        ("resid_post.1", "runs/lr=1e-3/sae"),
        ("path.model.norm@in", "somewhere/else"),
    ]


@pytest.mark.parametrize(
    "name", ["runs/lr=1e-3/sae", "a=b=c", "=x", "resid_pots.1=x", "resid_post.*=x", "a\0=b", "\ud800=b"]
)
def test_a_path_with_an_equals_sign_that_is_not_there(name: str) -> None:
    with pytest.raises(UnweaveError, match="there is no such folder") as caught:
        split_name(name)
    str(caught.value).encode()


def test_an_autoencoder_is_named_after_the_site() -> None:
    with pytest.raises(UnweaveError, match="no SAE is given for resid_post"):
        split_name("resid_post.1= ")


def test_relative_names_with_equals_signs_are_found_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lr=1e-3" / "sae").mkdir(parents=True)
    folder = tmp_path / "runs" / "circuit-find-0"
    folder.mkdir(parents=True)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    there = str(tmp_path / "lr=1e-3" / "sae")
    assert _moved("lr=1e-3/sae", folder) == there
    assert _moved("resid_post.1=lr=1e-3/sae", folder) == f"resid_post.1={there}"
    assert _moved(there, folder) == there and _moved("lr=2/sae", folder) == "lr=2/sae"


# -- names of anything ------------------------------------------------------------------------------------------------

NAMES = ("x" * 300, "a\0b", "\ud800", LATIN_1, "~nobody-at-all/x", "/dev/null", "loop")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "command", [["eval", "--sae"], ["report", "--sae"], ["circuit", "find", "--saes"], ["circuit", "draw", "--circuit"]]
)
def test_names_that_cannot_be_files_are_named(
    command: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    more = ["--task", "simple"] if command[1] == "find" else []
    assert main([*command, name, *more, "--json"]) == 2
    assert json.loads(capfd.readouterr().err.splitlines()[-1])["error"]["what"]


def test_what_is_no_file_has_no_content_and_only_other_bytes_change_it(tmp_path: Path) -> None:
    assert [tree_of(name) for name in NAMES if name != "/dev/null"] == [""] * (len(NAMES) - 1)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "gone").symlink_to("nowhere")
    before = tree_of(tmp_path)
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    assert before and tree_of(tmp_path) == before
    (tmp_path / "a.txt").write_text("b")
    assert tree_of(tmp_path) not in ("", before)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.txt").rename(tmp_path / "c.txt")
    assert tree_of(tmp_path) not in ("", before), "names count inside a folder"
