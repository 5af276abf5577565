"""The stages end to end: a small model in a folder, text in a folder, and everything that can go wrong on the way."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from helpers.jobs import long_spec_of, spec_of
from helpers.models import build_tiny, build_tiny_tokenizer
from helpers.paths import TESTS
from unweave.core.errors import UnweaveError, UnweaveWarning
from unweave.core.files import read_json
from unweave.core.run import Run
from unweave.core.writing import write_json
from unweave.data.corpus import Source
from unweave.data.pack import PackSpec
from unweave.data.spec import DataSpec, StreamSpec
from unweave.latents import stage as latents
from unweave.latents.spec import LatentsSpec
from unweave.methods.evaluate import stage as evaluation
from unweave.methods.evaluate.spec import EvalSpec
from unweave.methods.report import stage as report
from unweave.methods.report.spec import ReportSpec
from unweave.methods.steer.spec import SteerSpec
from unweave.methods.trace.spec import TraceSpec
from unweave.methods.train import doctor
from unweave.methods.train import stage as train
from unweave.methods.train.result import Training
from unweave.methods.train.spec import DoctorSpec, TrainSpec
from unweave.methods.train.trainer import SAETrainer
from unweave.sae.module import SAE


def weights(run: Run) -> bytes:
    return (run.path / "sae" / "sae_weights.safetensors").read_bytes()


def test_training_makes_an_sae_that_knows_where_it_comes_from(trained: Run, home: Path, runs: Path) -> None:
    sae = SAE.load(trained.path / "sae")
    assert (str(sae.read), sae.d_in, sae.d_sae, sae.kind) == ("resid_post.1", 32, 128, "topk")
    about = sae.provenance
    assert TrainSpec.from_dict(about["train"]) == spec_of(home)
    assert about["reference"]["l0"] == pytest.approx(4, abs=0.1)
    assert 0 < about["reference"]["unexplained_variance"] < 0.9
    assert set(sae.policy.exclude_ids) == {0, 1, 2, 3} and sae.policy.max_norm is not None
    curve = [e["fvu"] for e in trained.events("train")]
    assert curve[-1] < 0.6 * curve[0]
    assert not list(trained.path.glob("checkpoint*"))
    again = train.run(spec_of(home), runs)
    assert again.path == trained.path and again.reused


def test_every_stage_runs_on_it_and_the_report_shows_them(trained: Run, runs: Path) -> None:
    folder = trained.path / "sae"
    measured = evaluation.run(EvalSpec(sae=folder, tokens=1500, device="cpu"), runs)
    assert 0 < measured.result.metrics.unexplained_variance < 1
    assert measured.result.metrics.unexplained_variance == pytest.approx(
        SAE.load(folder).provenance["reference"]["unexplained_variance"], rel=0.5
    )
    found = latents.run(LatentsSpec(sae=folder, tokens=3000, device="cpu"), runs)
    assert found.result.only.latents == 128 and found.result.only.alive > 10
    made = report.run(ReportSpec(sae=folder), runs)
    assert made.result.not_run == ("trace", "steer")
    page = (made.path / made.result.report).read_text()
    assert "unweave trace" in page and "resid_post.1" in page
    assert report.run(ReportSpec(sae=folder), runs).reused
    few = report.run(ReportSpec(sae=folder, latents=5), runs)
    short = (few.path / few.result.report).read_text()
    assert "These are 5 of 128 latents" in short and len(short) < len(page) / 2 and "of 128 latents, the" not in page


def test_finished_questions_load_nothing(home: Path, trained: Run, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = trained.path / "sae"
    asked = (
        lambda: train.run(spec_of(home), runs),
        lambda: evaluation.run(EvalSpec(sae=folder, tokens=1500, device="cpu"), runs),
        lambda: latents.run(LatentsSpec(sae=folder, tokens=3000, device="cpu"), runs),
    )
    first = [ask() for ask in asked]

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(SAE, "load", fail)
    monkeypatch.setattr("unweave.inputs.saes.load_lm", fail)
    monkeypatch.setattr(train, "load_lm", fail)
    again = [ask() for ask in asked]
    assert all(run.reused for run in again) and [run.result for run in again] == [run.result for run in first]


def test_several_sites_share_every_forward_pass(home: Path, tmp_path: Path) -> None:
    spec = spec_of(home, sites=("mlp_add.1", "resid_post.0"))
    run = train.run(spec, tmp_path)
    for site in spec.sites:
        assert str(SAE.load(run.path / "sae" / site).read) == site
    assert {one.label for one in run.result.saes} == set(spec.sites)


def test_variants_by_pattern_share_a_stream_and_equal_runs_of_their_own(home: Path, tmp_path: Path) -> None:
    """Two sites x (relu, topk with two seeds): each SAE has the bytes of the run that trains it alone."""
    variants = ({"kind": "relu"}, {"kind": "topk", "seed": [0, 1], "k": 3})
    spec = spec_of(home, sites=("resid_post.{0,1}",), variants=variants)
    run = train.run(spec, tmp_path)
    names = {one.name for one in run.result.saes}
    settings = ("relu", "topk-seed0-k3", "topk-seed1-k3")
    assert names == {f"resid_post.{i}/{setting}" for i in (0, 1) for setting in settings}
    alone = spec_of(home, sites=("resid_post.{0,1}",), sae=replace(spec.sae, kind="topk", seed=1, k=3))
    other = train.run(alone, tmp_path)
    for site in ("resid_post.0", "resid_post.1"):
        one = run.path / "sae" / site / "topk-seed1-k3" / "sae_weights.safetensors"
        assert one.read_bytes() == (other.path / "sae" / site / "sae_weights.safetensors").read_bytes()
        assert SAE.load(one.parent).provenance["train"]["sae"]["seed"] == 1
    shown = {row[0] for row in run.result.rows()}
    assert names <= shown
    first, second = (run.path / "sae/resid_post.0" / f"topk-seed{i}-k3" / "sae_weights.safetensors" for i in (0, 1))
    assert first.read_bytes() != second.read_bytes()


@pytest.mark.parametrize(
    ("variants", "says"),
    [
        (({"kindd": "relu"},), "did you mean 'kind'"),
        (({"seed": [0, 0]},), "two variants are the same"),
        (({"tokens": 7},), "share one stream"),
        (({},), "changes nothing"),
    ],
)
def test_variants_that_make_no_sense(home: Path, tmp_path: Path, variants: tuple, says: str) -> None:
    with pytest.raises(UnweaveError, match=says):
        train.run(spec_of(home, variants=variants), tmp_path)


def test_going_on_with_a_trained_sae(home: Path, trained: Run, tmp_path: Path) -> None:
    """With hardly any learning the SAE stays what it was; another site's SAE is refused."""
    base = spec_of(home)
    still = replace(base, start=trained.path / "sae", sae=replace(base.sae, tokens=64, lr=1e-9))
    again = SAE.load(train.run(still, tmp_path).path / "sae")
    before = SAE.load(trained.path / "sae")
    x = torch.randn(50, before.d_in, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again.encode(x), before.encode(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(UnweaveError, match=r"is of resid_post\.1, not of resid_post\.0"):
        train.run(replace(still, sites=("resid_post.0",)), tmp_path)
    with pytest.raises(UnweaveError, match="no SAE to start from"):
        train.run(replace(still, start=home), tmp_path)


def test_a_transcoder_reads_one_site_and_writes_another(home: Path, tmp_path: Path) -> None:
    run = train.run(spec_of(home, sites=("mlp_in.*->mlp_add.*",)), tmp_path)
    assert len(run.result.saes) == 3
    sae = SAE.load(run.path / "sae" / "mlp_in.1-mlp_add.1")
    assert (str(sae.read), str(sae.write)) == ("mlp_in.1", "mlp_add.1")
    assert 0 < run.result.sae("mlp_in.1-mlp_add.1").reference.unexplained_variance < 1


def test_training_end_to_end_keeps_the_predictions(home: Path, tmp_path: Path) -> None:
    base = spec_of(home)
    run = train.run(replace(base, objective="end-to-end", sae=replace(base.sae, tokens=10_000)), tmp_path)
    kl = [event["kl"] for event in run.events("train")]
    assert kl[-1] < kl[0]


TWO_RANKS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from helpers.jobs import spec_of
from unweave.methods.train import stage as train
train.run(spec_of(Path(sys.argv[2]), sites=tuple(sys.argv[4:])), Path(sys.argv[3]))
"""


def in_two_processes(home: Path, runs: Path, *sites: str, killed_after: float | None = None) -> None:
    """torchrun's environment, without its launcher's second and more of start-up."""
    port = str(random.SystemRandom().randint(20_000, 60_000))
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TWO_RANKS, str(TESTS), str(home), str(runs), *sites]
    ranks = [
        subprocess.Popen(command, env={**os.environ, **common, "RANK": str(i)}, stderr=subprocess.PIPE) for i in (0, 1)
    ]
    if killed_after is not None:
        deadline = time.monotonic() + 60
        while not list(runs.glob("train-*/checkpoint.json")) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(killed_after)
        ranks[1].send_signal(signal.SIGKILL)
        time.sleep(0.1)
        ranks[0].send_signal(signal.SIGKILL)  # as torchrun does when one of its processes is gone
    errors = [rank.communicate(timeout=120)[1].decode() for rank in ranks]
    assert killed_after is not None or [rank.returncode for rank in ranks] == [0, 0], errors


def test_two_processes_divide_the_sites(home: Path, trained: Run, tmp_path: Path) -> None:
    in_two_processes(home, tmp_path, "resid_post.{0,1}")
    (path,) = tmp_path.glob("train-*")
    two, one = Run.at(path, Training), train.run(spec_of(home, sites=("resid_post.{0,1}",)), tmp_path / "one")
    assert two.result.processes == 2
    for site in ("resid_post.0", "resid_post.1"):  # whole batches, one owner each: the same arithmetic
        a, b = (run.path / "sae" / site / "sae_weights.safetensors" for run in (two, one))
        assert a.read_bytes() == b.read_bytes()


def test_two_processes_share_one_sae_and_resume_after_a_kill(home: Path, trained: Run, tmp_path: Path) -> None:
    """The same global batches: the loss trace of one process to float32 rounding, dead latents included (trap 29)."""
    in_two_processes(home, tmp_path, "resid_post.1", killed_after=0.1)
    in_two_processes(home, tmp_path, "resid_post.1")
    (path,) = tmp_path.glob("train-*")
    run = Run.at(path, Training)
    assert run.events("resumed") and run.result.processes == 2
    ours = {event["tokens"]: event["loss"] for event in run.events("train")}
    for event in trained.events("train"):
        assert ours[event["tokens"]] == pytest.approx(event["loss"], rel=2e-3)
    assert run.result.sae().reference.unexplained_variance == pytest.approx(
        trained.result.sae().reference.unexplained_variance, rel=1e-2
    )


KILLER = """
import os, random, signal, sys, time
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from helpers.jobs import long_spec_of
from unweave.methods.train import stage as train
spec, rng, kills, runs = long_spec_of(Path(sys.argv[2])), random.Random(1), 0, Path(sys.argv[3])
def written():
    return [p.stat().st_mtime_ns for p in runs.glob("train-*/checkpoint.json")]
while kills < 20:
    child, before = os.fork(), written()
    if child == 0:
        train.run(spec, runs)
        os._exit(0)
    if rng.random() < 0.7:  # at a random moment after a checkpoint, else at one after the start
        deadline = time.monotonic() + 60
        while written() == before and time.monotonic() < deadline and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
        time.sleep(rng.random() * 0.05)
    else:
        time.sleep(rng.random() * 0.3)
    os.kill(child, signal.SIGKILL)
    if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
        kills += 1
    else:
        break
print(kills)
"""


def test_trap_26_killed_at_twenty_random_moments_it_ends_with_the_same_bytes(home: Path, tmp_path: Path) -> None:
    """kill -9 again and again, from before the first checkpoint on; then let it finish. Forks spare Python's start."""
    command = [sys.executable, "-c", KILLER, str(TESTS), str(home), str(tmp_path / "killed")]
    child = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert child.stdout.strip() == "20", child.stderr
    resumed = train.run(long_spec_of(home), tmp_path / "killed")
    assert len(resumed.events("resumed")) >= 5
    straight = train.run(long_spec_of(home), tmp_path / "straight")
    for site in ("resid_post.0", "resid_post.1"):
        one, other = (run.path / "sae" / site / "sae_weights.safetensors" for run in (resumed, straight))
        assert one.read_bytes() == other.read_bytes()


def test_an_interrupted_run_loses_nothing_finished(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = SAETrainer.step, []

    def interrupted(self: SAETrainer, *args: torch.Tensor) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(SAETrainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.run(spec_of(home), tmp_path)
    chunks = sorted(tmp_path.glob("activations-*/*"))
    before = [p.stat().st_mtime_ns for p in chunks]
    assert chunks
    train.run(spec_of(home), tmp_path)
    assert [p.stat().st_mtime_ns for p in chunks] == before


def test_nan_in_training_is_one_clear_error(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = SAETrainer.step

    def poisoned(self: SAETrainer, x: torch.Tensor, target: None = None) -> dict[str, float]:
        if self.steps == 3:
            x = x.clone()
            x[0, 0] = float("nan")
        return step(self, x, target)

    monkeypatch.setattr(SAETrainer, "step", poisoned)
    with pytest.raises(UnweaveError, match="NaN"):
        train.run(spec_of(home), tmp_path)
    assert not list(tmp_path.glob("train-*/DONE"))


def test_trap_10_too_little_text(home: Path, tmp_path: Path) -> None:
    spec = spec_of(home)
    with pytest.raises(UnweaveError, match=r"epochs"):
        train.run(replace(spec, sae=replace(spec.sae, tokens=200_000)), tmp_path)
    with pytest.raises(UnweaveError, match="tokens"):
        train.run(replace(spec, data=replace(spec.data, tokens=10_000_000)), tmp_path)
    (tmp_path / "empty").mkdir()
    empty = DataSpec(sources=(Source(path=str(tmp_path / "empty")),), pack=PackSpec(context=48))
    with pytest.raises(UnweaveError, match="empty"):
        train.run(replace(spec, data=empty), tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "no/such/folder/anywhere"}, "no/such/folder"),
        ({"sites": ("resid_post.7",)}, r"resid_post\.7"),
        ({"sites": ("resid_past.1",)}, "resid_past"),
        ({"data": DataSpec(sources=(Source(path="no-such-file.jsonl"),), pack=PackSpec(context=48))}, "no-such-file"),
    ],
)
def test_what_does_not_exist_is_named(home: Path, tmp_path: Path, changes: dict, says: str) -> None:
    with pytest.raises(UnweaveError, match=says):
        train.run(spec_of(home, **changes), tmp_path)


def test_conversations_need_a_chat_template(home: Path, tmp_path: Path) -> None:
    build_tiny("llama").save_pretrained(tmp_path / "base")
    build_tiny_tokenizer(chat_template=None).save_pretrained(tmp_path / "base")
    with pytest.raises(UnweaveError, match="template"):
        train.run(spec_of(home, model=str(tmp_path / "base")), tmp_path / "runs")


def test_trap_06_other_text_warns_of_drift(trained: Run, home: Path, runs: Path, tmp_path: Path) -> None:
    noise = random.Random(3)
    rows = [json.dumps({"text": "".join(noise.choices("QZXJ{}|@#0189", k=40))}) for _ in range(200)]
    (tmp_path / "noise.jsonl").write_text("\n".join(rows))
    other = replace(spec_of(home).data, sources=(Source(path=str(tmp_path / "noise.jsonl")),))
    with pytest.warns(UnweaveWarning, match="unexplained variance"):
        run = evaluation.run(EvalSpec(sae=trained.path / "sae", data=other, tokens=800, device="cpu"), runs)
    assert run.result.drift


def test_trap_25_another_model_is_refused_unless_accepted_and_then_recorded(
    trained: Run, home: Path, runs: Path, tmp_path: Path
) -> None:
    build_tiny("llama", seed=3).save_pretrained(tmp_path / "other")
    build_tiny_tokenizer().save_pretrained(tmp_path / "other")
    spec = EvalSpec(sae=trained.path / "sae", model=str(tmp_path / "other"), tokens=800, device="cpu")
    with pytest.raises(UnweaveError, match="trained on"):
        evaluation.run(spec, runs)
    with pytest.warns(UnweaveWarning):
        run = evaluation.run(replace(spec, accept_mismatch="to compare"), runs)
    assert run.result.subject.accepted["resid_post.1"]["reason"] == "to compare"
    assert run.result.subject.accepted["resid_post.1"]["distance"] > 0.01


def test_an_sae_folder_is_asked_for_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnweaveError, match="no such SAE folder or file"):
        evaluation.run(EvalSpec(sae=tmp_path / "nothing"), tmp_path)


def test_changed_text_is_another_question(home: Path, tmp_path: Path) -> None:
    spec = spec_of(home)
    first = train.run.inputs(spec)
    file = home / "text" / "a.jsonl"
    content = file.read_bytes()
    os.utime(file, ns=(1, 1))
    assert train.run.inputs(spec) == first, "by content, not by time"
    file.write_bytes(content.replace(b"a", b"b", 1))
    assert train.run.inputs(spec) != first
    file.write_bytes(content)  # other tests ask about the same text
    assert train.run.inputs(spec) == first


def test_more_tokens_than_there_are_for_the_records(trained: Run, runs: Path) -> None:
    with pytest.raises(UnweaveError, match="6,000"):
        latents.run(LatentsSpec(sae=trained.path / "sae", tokens=50_000, device="cpu"), runs)
    found = latents.run(LatentsSpec(sae=trained.path / "sae", device="cpu"), runs)
    assert 4000 < found.result.only.tokens <= 6000


@pytest.mark.parametrize(
    "make",
    [
        lambda: StreamSpec(chunk_tokens=0),
        lambda: DataSpec(sources=()),
        lambda: DataSpec.from_dict({"tokens": 10}),  # other text that is not named
        lambda: TraceSpec(sae=Path("x"), top=0),
        lambda: SteerSpec(sae=Path("x"), max_new_tokens=0),
        lambda: LatentsSpec(sae=Path("x"), tokens=0),
        lambda: TrainSpec(sites=()),
    ],
)
def test_numbers_that_make_no_sense(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UnweaveError, match=r"must be|needs 'sources'"):
        make()


def test_rows_longer_than_the_model_s_positions(home: Path, tmp_path: Path) -> None:
    spec = spec_of(home)
    with pytest.raises(UnweaveError, match="64 positions"):
        train.run(replace(spec, data=replace(spec.data, pack=PackSpec(context=100))), tmp_path)


def test_trap_08_longer_rows_than_trained_on_warn(trained: Run, home: Path, runs: Path) -> None:
    longer = replace(spec_of(home).data, pack=PackSpec(context=60))
    with pytest.warns(UnweaveWarning, match="rows of up to 60"):
        evaluation.run(EvalSpec(sae=trained.path / "sae", data=longer, tokens=900, device="cpu"), runs)


def test_a_kill_while_tokenising_is_got_over(home: Path, tmp_path: Path) -> None:
    """What a dead process left half-written is cleared away."""
    child = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    spec = spec_of(home)
    run = train.run(spec, tmp_path)
    (store,) = (p for p in tmp_path.glob("tokens-*") if read_json(p / "spec.json")["spec"]["split"] == "train")
    (store / "DONE").unlink()
    (store / "store").rename(store / f".store.{child.stdout.strip()}.tmp")
    (run.path / "DONE").unlink()
    assert weights(train.run(spec, tmp_path)) == weights(run)


def test_two_equal_runs_have_equal_bytes(home: Path, tmp_path: Path) -> None:
    """Time and memory are in files of their own; a page that shows times is made of these too."""
    found = []
    for root in (tmp_path / "one", tmp_path / "other"):
        sae = train.sae_folder(train.run(spec_of(home), root))
        evaluation.run(EvalSpec(sae=sae, tokens=1500, device="cpu"), root)
        latents.run(LatentsSpec(sae=sae, tokens=3000, device="cpu"), root)
        apart = ("log.jsonl", "costs.json", ".lock")
        files = [p for p in root.rglob("*") if p.is_file() and p.name not in apart]
        here = str(root).encode()  # where the SAE lies is part of what was asked
        found.append({str(p.relative_to(root)): p.read_bytes().replace(here, b"") for p in files})
        assert all(Run.at(p.parent).seconds > 0 for p in root.rglob("DONE"))
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    assert [name for name in found[0] if found[0][name] != found[1][name]] == []


@pytest.mark.parametrize("lost", ["sae/sae_weights.safetensors", "sae/cfg.json", "result.json"])
@pytest.mark.parametrize("how", ["deleted", "cut", "emptied"])
def test_a_finished_run_that_lost_something_is_made_anew(
    trained: Run,
    home: Path,
    runs: Path,
    lost: str,
    how: str,
) -> None:
    before, path = weights(trained), trained.path / lost
    content = path.read_bytes()
    path.unlink()
    if how != "deleted":
        path.write_bytes(content[: len(content) // 2] if how == "cut" else b"")
    with pytest.raises(UnweaveError, match=f"damaged: {lost}") as caught:
        Run.at(trained.path, Training).result  # noqa: B018
    assert "run the same command again" in caught.value.remedy
    with pytest.warns(UnweaveWarning, match="is made anew"):
        again = train.run(spec_of(home), runs)
    assert not again.reused and weights(again) == before and path.read_bytes() == content
    assert train.run(spec_of(home), runs).reused


def test_a_lost_question_is_written_anew(trained: Run, home: Path, runs: Path) -> None:
    path = trained.path / "spec.json"
    content = path.read_bytes()
    for damage in (None, b"[1]", b'{"spec": 3}', b"\xff"):
        path.unlink()
        if damage is not None:
            path.write_bytes(damage)
        assert train.run(spec_of(home), runs).reused and path.read_bytes() == content


def test_a_damaged_checkpoint_is_named(home: Path, tmp_path: Path) -> None:
    spec = spec_of(home)
    run = train.run(spec, tmp_path)
    (run.path / "DONE").unlink()
    (run.path / "checkpoint-64-0.pt").write_bytes(b"not a checkpoint")
    write_json(run.path / "checkpoint.json", {"tokens": 64, "files": ["checkpoint-64-0.pt"]})
    with pytest.raises(UnweaveError, match="checkpoint is damaged"):
        train.run(spec, tmp_path)


def test_doctor_says_that_there_is_too_little_text(home: Path, tmp_path: Path) -> None:
    base = spec_of(home, data=replace(spec_of(home).data, tokens=10_000_000))
    spec = DoctorSpec(**{f: getattr(base, f) for f in (field.name for field in fields(TrainSpec))})
    assert any("train text has only" in p for p in doctor.run(spec, tmp_path).result.problems)


def test_doctor_counts_the_cost_and_names_every_problem(home: Path, tmp_path: Path) -> None:
    spec = DoctorSpec(**{f: getattr(spec_of(home), f) for f in (field.name for field in fields(TrainSpec))})
    found = doctor.run(spec, tmp_path).result
    assert found.problems == () and found.cost is not None
    assert found.cost.latents == 128 and found.cost.train_tokens_per_second > 0 and found.cost.minutes >= 0
    bad = replace(spec, sites=("resid_post.1", "resid_post.9"), data=replace(spec.data, pack=PackSpec(context=4096)))
    problems = doctor.run(bad, tmp_path).result.problems
    assert any("resid_post.9" in p for p in problems) and any("4096" in p for p in problems)
    assert not list(tmp_path.iterdir())
    missing = doctor.run(replace(spec, model="no/such/model"), tmp_path).result.problems
    assert any("no/such/model" in p for p in missing)


def test_env_and_spec_are_stored_without_secrets(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(p.read_text() for p in trained.path.glob("*.json*"))
    for name, value in os.environ.items():
        if any(word in name for word in ("TOKEN", "KEY", "SECRET", "PASSWORD")) and len(value) > 6:
            assert value not in text
    assert {"python", "torch"} <= set(read_json(trained.path / "env.json"))


def test_packing_stands_for_the_paper_s_rows() -> None:
    sources = [{"path": "x"}]
    whole = DataSpec.from_dict({"sources": sources, "packing": "documents"})
    assert whole.pack == PackSpec(packing="documents", context=8192)
    blocks = DataSpec.from_dict({"sources": sources, "packing": "blocks", "pack": {"bos": "never"}})
    assert blocks.pack == PackSpec(packing="blocks", context=2048, bos="never")
    shorter = TrainSpec.from_dict({"data": {"packing": "documents", "pack": {"context": 512}}})
    assert (shorter.data.pack.context, shorter.data.sources) == (512, TrainSpec().data.sources)
    with pytest.raises(UnweaveError, match=r"not a known packing[\s\S]*data\.packing[\s\S]*documents or blocks"):
        TrainSpec.from_dict({"data": {"packing": "rows"}})
