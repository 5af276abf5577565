"""The stages end to end: a small model in a folder, text in a folder, and everything that can go wrong on the way."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import build_tiny, build_tiny_tokenizer
from unweave.core.errors import UnweaveError, UnweaveWarning
from unweave.core.run import Run, read_json
from unweave.data.corpus import Source
from unweave.data.pack import PackSpec
from unweave.jobs import doctor, latents, report, train
from unweave.jobs import eval as evaluation
from unweave.jobs.specs import (
    DataSpec,
    DoctorSpec,
    EvalSpec,
    LatentsSpec,
    ReportSpec,
    SteerSpec,
    StreamSpec,
    TraceSpec,
    TrainSpec,
)
from unweave.sae.module import SAE
from unweave.sae.spec import SAESpec
from unweave.sae.train import SAETrainer

WORDS = [
    "the",
    "keys",
    "to",
    "cabinet",
    "are",
    "on",
    "a",
    "table",
    "near",
    "old",
    "door",
    "and",
    "she",
    "was",
    "reading",
    "about",
    "sea",
    "while",
    "it",
    "rained",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ and text/ with a few hundred short documents."""
    folder = tmp_path_factory.mktemp("home")
    build_tiny("llama").save_pretrained(folder / "model")
    build_tiny_tokenizer().save_pretrained(folder / "model")
    rng = random.Random(0)
    (folder / "text").mkdir()
    lines = [json.dumps({"text": " ".join(rng.choices(WORDS, k=rng.randint(4, 11)))}) for _ in range(400)]
    (folder / "text" / "a.jsonl").write_text("\n".join(lines))
    talk = [{"role": "user", "content": "where are the keys"}, {"role": "assistant", "content": "on the table"}]
    (folder / "text" / "b.jsonl").write_text(
        "\n".join(json.dumps({"messages": talk + talk[: i % 3]}) for i in range(60))
    )
    return folder


def spec_of(home: Path, **changes) -> TrainSpec:  # type: ignore[no-untyped-def]
    base = TrainSpec(
        model=str(home / "model"),
        sites=("resid_post.1",),
        data=DataSpec(
            sources=(Source(path=str(home / "text")),),
            pack=PackSpec(context=48),
            tokens=6000,
            heldout=0.3,
            heldout_tokens=2000,
        ),
        stream=StreamSpec(chunk_tokens=1000, buffer_tokens=2000, batch_tokens=512),
        sae=SAESpec(expansion=4, k=4, tokens=20_000, batch=64, k_aux=16, dead_after=3000),
        device="cpu",
        checkpoint_seconds=0.05,
    )
    return replace(base, **changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def trained(home: Path, runs: Path) -> Iterator[Run]:
    yield train.run(spec_of(home), runs)


def weights(run: Run) -> bytes:
    return (run.path / "sae" / "sae_weights.safetensors").read_bytes()


def test_training_makes_an_sae_that_knows_where_it_comes_from(trained: Run, home: Path, runs: Path) -> None:
    sae = SAE.load(trained.path / "sae")
    assert (str(sae.read), sae.d_in, sae.d_sae, sae.kind) == ("resid_post.1", 32, 128, "topk")
    about = sae.provenance
    assert about["train"] == spec_of(home).to_dict()
    assert about["reference"]["l0"] == pytest.approx(4, abs=0.1)
    assert 0 < about["reference"]["unexplained_variance"] < 0.9
    assert set(sae.policy.exclude_ids) == {0, 1, 2, 3} and sae.policy.max_norm is not None
    curve = [e["fvu"] for e in trained.events("train")]
    assert curve[-1] < 0.6 * curve[0]
    assert not (trained.path / "checkpoint.pt").exists()
    again = train.run(spec_of(home), runs)
    assert again.path == trained.path and again.reused


def test_every_stage_runs_on_it_and_the_report_shows_them(trained: Run, runs: Path) -> None:
    folder = trained.path / "sae"
    measured = evaluation.run(EvalSpec(sae=folder, tokens=1500, device="cpu"), runs)
    assert 0 < measured.result["unexplained_variance"] < 1
    assert measured.result["unexplained_variance"] == pytest.approx(
        SAE.load(folder).provenance["reference"]["unexplained_variance"], rel=0.5
    )
    found = latents.run(LatentsSpec(sae=folder, tokens=3000, device="cpu"), runs)
    assert found.result["latents"] == 128 and found.result["alive"] > 10
    made = report.run(ReportSpec(sae=folder), runs)
    assert made.result["not_run"] == ["trace", "steer"]
    page = Path(made.result["report"]).read_text()
    assert "unweave trace" in page and "resid_post.1" in page
    assert report.run(ReportSpec(sae=folder), runs).reused


def test_several_sites_share_every_forward_pass(home: Path, tmp_path: Path) -> None:
    spec = spec_of(home, sites=("mlp_add.1", "resid_post.0"))
    run = train.run(spec, tmp_path)
    for site in spec.sites:
        assert str(SAE.load(run.path / "sae" / site).read) == site


CHILD = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from test_jobs import spec_of
from unweave.jobs import train
train.run(spec_of(Path(sys.argv[2])), Path(sys.argv[3]))
"""


def test_trap_26_killed_at_random_moments_it_ends_with_the_same_bytes(home: Path, trained: Run, tmp_path: Path) -> None:
    """kill -9 again and again, from before the first checkpoint to after the last; then let it finish."""
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(home), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    rng = random.Random(1)
    kills = 0
    while kills < 4:
        child = subprocess.Popen(command, env=environment)
        checkpoints = list(tmp_path.glob("train-*/checkpoint.pt"))
        seen = checkpoints[0].stat().st_mtime_ns if checkpoints else 0
        deadline = time.monotonic() + 60
        while child.poll() is None and time.monotonic() < deadline:
            now = list(tmp_path.glob("train-*/checkpoint.pt"))
            if now and now[0].stat().st_mtime_ns != seen:
                break
            time.sleep(0.002)
        time.sleep(rng.random() * 0.2)
        if child.poll() is not None:
            break
        child.send_signal(signal.SIGKILL)
        child.wait()
        kills += 1
    assert kills >= 1
    resumed = train.run(spec_of(home), tmp_path)
    assert resumed.events("resumed")
    assert weights(resumed) == weights(trained)


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

    def poisoned(self: SAETrainer, x: torch.Tensor) -> dict[str, float]:
        if self.steps == 3:
            x = x.clone()
            x[0, 0] = float("nan")
        return step(self, x)

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
    assert run.result["drift"]


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
    assert run.result["accepted"]["reason"] == "to compare" and run.result["accepted"]["distance"] > 0.01


def test_an_sae_folder_is_asked_for_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnweaveError, match="not an SAE folder"):
        evaluation.run(EvalSpec(sae=tmp_path / "nothing"), tmp_path)


def test_changed_text_is_another_question(home: Path, tmp_path: Path) -> None:
    spec = spec_of(home)
    first = train.stamps(spec.model, spec.data)
    file = home / "text" / "a.jsonl"
    os.utime(file, ns=(1, 1))
    assert train.stamps(spec.model, spec.data) != first


def test_more_tokens_than_there_are_for_the_records(trained: Run, runs: Path) -> None:
    with pytest.raises(UnweaveError, match="6,000"):
        latents.run(LatentsSpec(sae=trained.path / "sae", tokens=50_000, device="cpu"), runs)
    found = latents.run(LatentsSpec(sae=trained.path / "sae", device="cpu"), runs)
    assert 4000 < found.result["tokens"] <= 6000


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
    with pytest.raises(UnweaveError, match=r"makes no sense|needs 'sources'"):
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


def test_a_damaged_checkpoint_is_named(home: Path, tmp_path: Path) -> None:
    spec = spec_of(home)
    run = train.run(spec, tmp_path)
    (run.path / "DONE").unlink()
    (run.path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UnweaveError, match="checkpoint is damaged"):
        train.run(spec, tmp_path)


def test_doctor_says_that_there_is_too_little_text(home: Path, tmp_path: Path) -> None:
    base = spec_of(home, data=replace(spec_of(home).data, tokens=10_000_000))
    spec = DoctorSpec(**{f: getattr(base, f) for f in TrainSpec.__dataclass_fields__})
    assert any("train text has only" in p for p in doctor.run(spec, tmp_path).result["problems"])


def test_doctor_counts_the_cost_and_names_every_problem(home: Path, tmp_path: Path) -> None:
    spec = DoctorSpec(**{f: getattr(spec_of(home), f) for f in TrainSpec.__dataclass_fields__})
    found = doctor.run(spec, tmp_path).result
    assert found["problems"] == ["none found"]
    assert found["latents"] == 128 and found["train_tokens_per_second"] > 0 and found["minutes"] >= 0
    bad = replace(spec, sites=("resid_post.1", "resid_post.9"), data=replace(spec.data, pack=PackSpec(context=4096)))
    problems = doctor.run(bad, tmp_path).result["problems"]
    assert any("resid_post.9" in p for p in problems) and any("4096" in p for p in problems)
    assert not list(tmp_path.iterdir())
    missing = doctor.run(replace(spec, model="no/such/model"), tmp_path).result["problems"]
    assert any("no/such/model" in p for p in missing)


def test_env_and_spec_are_stored_without_secrets(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(p.read_text() for p in trained.path.glob("*.json*"))
    for name, value in os.environ.items():
        if any(word in name for word in ("TOKEN", "KEY", "SECRET", "PASSWORD")) and len(value) > 6:
            assert value not in text
    assert {"python", "torch"} <= set(read_json(trained.path / "env.json"))
