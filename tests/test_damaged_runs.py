"""Runs whose files were damaged after they had finished: every command that reads them says which file, or passes over
what nobody needs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import circuit_jobs
from helpers.jobs import spec_of
from helpers.report import steering, trace
from unweave.circuits.opened import open_circuit
from unweave.cli.app import main
from unweave.core.errors import UnweaveError
from unweave.core.pieces import Pieces
from unweave.core.run import Run
from unweave.inputs.identity import sae as sae_digest
from unweave.latents import stage as latents
from unweave.latents.spec import LatentsSpec
from unweave.methods.circuits import stage_find as find
from unweave.methods.circuits.result import Sweep
from unweave.methods.evaluate import stage as evaluation
from unweave.methods.evaluate.spec import EvalSpec
from unweave.methods.report.result import Report
from unweave.methods.steer.spec import SteerSpec
from unweave.methods.trace.spec import TraceSpec
from unweave.methods.train import stage as train
from unweave.methods.train.result import Training
from unweave.methods.train.stage import last_checkpoint
from unweave.methods.train.view import curve_of


def _other_types(content: bytes) -> bytes:
    return json.dumps(
        {key: [1, None] if isinstance(value, (str, dict)) else "x" for key, value in _read(content)}
    ).encode()


def _read(content: bytes) -> list[tuple[str, Any]]:
    found = json.loads(content)
    return list(found.items())


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "a list": lambda _: b"[1, 2]",
    "a number": lambda _: b"7",
    "null": lambda _: b"null",
    "no keys": lambda _: b"{}",
    "a key less": lambda content: json.dumps(dict(_read(content)[1:])).encode(),
    "other types": _other_types,
    "values are null": lambda content: json.dumps({key: None for key, _ in _read(content)}).encode(),
    "cut short": lambda content: content[: len(content) // 2],
    "empty": lambda _: b"",
    "binary": lambda _: bytes(range(256)) * 4,
    "not a number": lambda content: content.rstrip()[:-1] + b', "more": NaN}',
    "a key twice": lambda content: content.rstrip()[:-1] + b', "stage": 1, "stage": 2}',
    "deep": lambda _: b"[" * 5000 + b"]" * 5000,
}


@pytest.fixture(scope="module")
def finished(trained: Run, runs: Path) -> Path:
    """A runs folder in which every stage that a report reads has finished."""
    sae = trained.path / "sae"
    evaluation.run(EvalSpec(sae=sae, device="cpu", tokens=600), runs)
    latents.run(LatentsSpec(sae=sae, device="cpu", tokens=1500), runs)
    # The tiny model's words are no single tokens: what these two find is written down instead.
    for name, spec, result in (("trace", TraceSpec(sae=sae), trace()), ("steer", SteerSpec(sae=sae), steering())):
        with Run.open(runs, name, spec, inputs={"sae": sae_digest(sae)}, kind=type(result)) as run:
            run.finish(result)
    return runs


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The same, to be damaged; activations, which no report reads, are left out."""
    shutil.copytree(finished, tmp_path / "runs", ignore=shutil.ignore_patterns("activations-*", "tokens-*", "report-*"))
    return tmp_path / "runs"


def _asked(copy: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str]]:
    """A report that is there already is reused: it needs nothing of what it was made of."""
    for made in copy.glob("report-*"):
        shutil.rmtree(made)
    sae = next(copy.glob("train-*")) / "sae"
    status = main(["report", "--sae", str(sae), "--runs", str(copy), "--json"])
    err = capfd.readouterr().err.splitlines()
    return status, json.loads(err[-1])["error"] if status else {}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_report_of_damaged_runs_names_the_run(
    damage: str, copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    status, _ = _asked(copy, capfd)
    assert status == 0
    harmless = {("env.json", "no keys"), ("env.json", "a key less")}
    for stage in ("train", "eval", "latents", "trace", "steer"):
        for name in ("spec.json", "result.json", "env.json", "DONE"):
            path = next(copy.glob(f"{stage}-*")) / name
            good = path.read_bytes()
            path.write_bytes(DAMAGE[damage](good))
            status, told = _asked(copy, capfd)
            if (name, damage) == ("DONE", "a key less"):  # that file is not promised any more; the result must be
                assert status in (0, 2)
            elif (name, damage) in harmless:
                assert status == 0
            else:
                assert (status, stage, name) == (2, stage, name), told
                assert path.parent.name in told["where"] and told["remedy"]
                assert name in told["what"] + told["where"]
            path.write_bytes(good)


@pytest.mark.parametrize("name", ["spec.json", "result.json", "DONE"])
def test_a_report_of_runs_that_lost_a_file(name: str, copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (next(copy.glob("train-*")) / "env.json").unlink()
    assert _asked(copy, capfd)[0] == 0
    path = next(copy.glob("eval-*")) / name
    path.unlink()
    status, told = _asked(copy, capfd)
    if name == "DONE":  # then it has not finished, and the page says so
        assert status == 0 and "eval" in Run.at(next(copy.glob("report-*")), Report).result.not_run
    else:
        assert status == 2 and path.parent.name in told["where"]


def test_damaged_lines_of_a_log_are_passed_over(finished: Path, copy: Path) -> None:
    """The curve is what the good lines say, whatever stands between them."""
    run = Run.at(next(copy.glob("train-*")), Training)
    sae, site = run.result.sae(), "resid_post.1"
    whole = curve_of(sae, run.path)
    assert whole is not None and len(whole.tokens) > 1
    log = run.path / "log.jsonl"
    lines = log.read_bytes().split(b"\n")
    base = {"event": "train", "site": site, "tokens": 5, "fvu": 0.5, "dead": 1}
    bad = [
        b"[1, 2]", b"7", b"null", b"{}", bytes(range(256)).replace(b"\n", b""), b"[" * 5000, b'{"event": ["train"]}',
        b"\xef\xbb\xbf{}", b'{"event": "train"', *[
            json.dumps({**base, key: value}).encode()
            for key in ("tokens", "fvu", "dead") for value in (None, "x", [1], {}, True, float("nan"), float("inf"))
        ],
    ]  # fmt: skip
    log.write_bytes(b"\n".join([*bad, *(line for good in lines for line in (good, *bad))]))
    assert curve_of(sae, run.path) == whole
    log.unlink()
    assert curve_of(sae, run.path) is None


# -- circuits ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def circuit_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("circuit")
    circuit_jobs.write_home(folder)
    return folder


@pytest.fixture(scope="module")
def circuit(circuit_home: Path) -> Path:
    return find.run(circuit_jobs.spec_of(circuit_home, edges=False), circuit_home / "runs").path


@pytest.mark.parametrize("command", ["draw", "evaluate"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_circuit_s_run_is_one_clear_error(
    damage: str, command: str, circuit: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / circuit.name
    shutil.copytree(circuit, folder)
    for name in ("spec.json", "result.json", "DONE"):
        path = folder / name
        if (name, damage) == ("DONE", "a key less"):  # that file is not promised any more
            continue
        good = path.read_bytes()
        path.write_bytes(DAMAGE[damage](good))
        line = ["circuit", command, "--circuit", str(folder), "--runs", str(tmp_path / "runs"), "--json"]
        assert main(line) == 2, name
        told = json.loads(capfd.readouterr().err.splitlines()[-1])["error"]
        assert str(folder) in told["where"] + told["what"] and told["remedy"]
        path.write_bytes(good)


@pytest.mark.parametrize(
    "values", [{"saes": [5, None]}, {"saes": {"a": 1}}, {"saes": 3.5e400}, {"model": [1]}, {"sites": [[1]]}]
)
def test_a_question_of_other_types_is_no_question(values: dict[str, Any], circuit: Path, tmp_path: Path) -> None:
    folder = tmp_path / circuit.name
    shutil.copytree(circuit, folder)
    asked = json.loads((folder / "spec.json").read_bytes())
    (folder / "spec.json").write_text(json.dumps(asked | {"spec": asked["spec"] | values}))
    with pytest.raises(UnweaveError):
        open_circuit(folder).saes_spec()


@pytest.mark.parametrize("damage", [d for d in DAMAGE if d != "a key twice"])
def test_pieces_of_unfinished_work_that_are_damaged_are_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "curve.json"
    path.write_bytes(DAMAGE[damage](b'{"rows": [{"threshold": 1}], "model": 1.0}'))
    with pytest.raises(UnweaveError) as caught:
        Pieces(tmp_path).value("curve", Sweep, lambda: pytest.fail("it is made anew"))
    assert str(path) in caught.value.where


@pytest.mark.parametrize("content", ["[]", "{}", '{"files": 3}', '{"files": [3]}', '{"files": ["../x"]}', "\0", "{"])
def test_a_damaged_list_of_checkpoints_is_named(content: str, home: Path, tmp_path: Path) -> None:
    with Run.open(tmp_path, "train", spec_of(home)) as run:
        (run.path / "checkpoint.json").write_text(content)
        with pytest.raises(UnweaveError) as caught:
            last_checkpoint(run.path, ["a"])
    assert "checkpoint.json" in caught.value.where


def test_the_files_of_a_run_that_are_read_are_those_that_it_wrote(circuit: Path, tmp_path: Path) -> None:
    """One byte of the same length: neither is the circuit drawn, nor are its texts taken for those it was found on."""
    for name in ("circuit.safetensors", "pairs.jsonl"):
        folder = tmp_path / name / circuit.name
        shutil.copytree(circuit, folder)
        content = bytearray((folder / name).read_bytes())
        content[-3] ^= 1
        (folder / name).write_bytes(content)
        with pytest.raises(UnweaveError, match=f"damaged: {name} is not what was written"):
            Run.at(folder).file(name)


def test_a_run_made_elsewhere_is_not_said_to_be_of_this_environment(trained: Run, tmp_path: Path, home: Path) -> None:
    folder = tmp_path / trained.path.name
    shutil.copytree(trained.path, folder)
    (folder / "env.json").unlink()
    assert train.run(spec_of(home), tmp_path).reused
    assert Run.at(folder).environment == {}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_circuit_beside_a_damaged_question(damage: str, circuit: Path, tmp_path: Path) -> None:
    """A circuit that was copied out has no DONE; what lies beside it is used, or named where it is damaged."""
    for name in ("circuit.safetensors", "spec.json"):
        shutil.copy(circuit / name, tmp_path / name)
    whole = open_circuit(tmp_path).saes_spec()
    assert whole is not None and whole.saes
    path = tmp_path / "spec.json"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    if damage in ("no keys", "a key less"):
        assert open_circuit(tmp_path).saes_spec() in (None, whole)
    else:
        with pytest.raises(UnweaveError) as caught:
            open_circuit(tmp_path)
        assert "spec.json" in caught.value.where
