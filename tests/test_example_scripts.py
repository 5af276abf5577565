"""Every script in examples/ runs, on a tiny model and text of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.models import build_tiny, build_tiny_tokenizer
from helpers.pages import EXAMPLES, write_text_and_pairs
from helpers.paths import ROOT
from unweave.core.errors import UnweaveError
from unweave.core.spec import read_mapping
from unweave.judge import base as judge_base
from unweave.judge.base import Conversation
from unweave.judge.scripted import Scripted
from unweave.methods.finetune.spec import FinetuneSpec


def example(name: str) -> Callable[[list[str]], int]:
    """The ``main`` of an example."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, text, and pairs of sentences."""
    folder = tmp_path_factory.mktemp("examples")
    build_tiny("llama").save_pretrained(folder / "model")
    build_tiny_tokenizer().save_pretrained(folder / "model")
    write_text_and_pairs(folder)
    return folder


def test_every_example_is_run_here() -> None:
    tested = set(re.findall(r'example\("(\w+)"\)\(', Path(__file__).read_text(encoding="utf-8")))
    assert {path.stem for path in EXAMPLES} == tested


def test_read_and_edit_runs(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(home / "model"), "--site", "resid_post.1", "--max-new-tokens", "6"]
    assert example("read_and_edit")([*arguments, "--prompt", "the keys", "--other", "the old sea"]) == 0
    shown = capsys.readouterr().out.splitlines()
    before, patched = (next(line for line in shown if line.startswith(name)) for name in ("unedited", "patched"))
    assert before.split(maxsplit=1)[1] != patched.split(maxsplit=1)[1]
    with pytest.raises(UnweaveError, match=r"resid_post\.9"):
        example("read_and_edit")(["--model", str(home / "model"), "--site", "resid_post.9"])


@pytest.fixture(scope="module")
def trained(home: Path) -> str:
    """What the training example printed; its runs are in ``home/runs``."""
    arguments = [str(home / "text"), "--model", str(home / "model"), "--site", "resid_post.1"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        more = ["--runs", str(home / "runs"), "--tokens", "9000", "--context", "48"]
        assert example("train_on_my_text")([*arguments, *more]) == 0
    return printed.getvalue()


def sae_of(printed: str) -> Path:
    return Path(re.findall(r"^SAE: (.+)$", printed, re.M)[0])


def test_training_on_own_text(trained: str, home: Path) -> None:
    folder = sae_of(trained)
    assert (folder / "sae_weights.safetensors").is_file() and folder.is_relative_to(home / "runs")
    assert 0 < float(re.findall(r"unexplained variance ([\d.]+)", trained)[0]) < 1
    assert "fires on" in trained


def test_tracing_and_steering(trained: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(sae_of(trained)), "--pairs", str(home / "pairs.jsonl"), "--top", "3", "--max-new-tokens", "5"]
    assert example("trace_and_steer")(arguments) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("6 pairs") and len(re.findall(r" top$", shown, re.M)) == 3
    assert re.findall(r"^(unedited|strength \d)", shown, re.M) == ["unedited", "strength 1", "strength 2", "strength 4"]


def test_too_little_text_is_one_clear_error(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(home / "text"), "--model", str(home / "model"), "--site", "resid_post.1", "--runs", str(tmp_path)]
    assert example("train_on_my_text")([*arguments, "--tokens", "900000"]) == 2
    assert "remedy:" in capsys.readouterr().err


def test_emergent_misalignment(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A judge that calls every third answer misaligned, every fourth incoherent, and fails at times."""
    seen: dict[str, int] = {}

    def reply(conversation: Conversation) -> str:
        text = conversation[-1]["content"]
        number = seen.setdefault(text.partition("Answer: ")[2], len(seen))
        if "coherent" in text:
            return "none" if number == 1 else f"Rating: [[{50 if number % 4 == 0 else 51}]]"
        return f"Rating: [[{29 if number % 3 == 0 else 30}]]"

    monkeypatch.setattr(judge_base, "open_judge", lambda spec, folder: Scripted(reply))
    (tmp_path / "asked.txt").write_text("the keys\nthe old sea\n")
    arguments = [str(home / "model"), "--questions", str(tmp_path / "asked.txt"), "--samples", "6"]
    assert example("emergent_misalignment")([*arguments, "--max-new-tokens", "8"]) == 0
    lines, numbers = capsys.readouterr().out.splitlines(), range(len(seen))
    coherent = [n for n in numbers if n % 4 and n != 1]
    counted = [re.findall(r"([\d.]+)% \[.*of +(\d+) coherent", line)[0] for line in lines[:-1]]
    assert len(seen) == 12 and sum(int(of) for _, of in counted) == len(coherent)  # every answer is another one
    wrong = sum(round(float(share) * int(of) / 100) for share, of in counted)
    assert wrong == sum(n % 3 == 0 for n in coherent) and lines[-1].endswith("over 2 questions")


def test_the_configuration_of_emergent_misalignment_makes_a_spec() -> None:
    spec = FinetuneSpec.from_dict(read_mapping(ROOT / "examples" / "emergent_misalignment.yaml"))
    assert spec.data is not None and (spec.weights.rank, spec.weights.alpha, spec.learning.batch) == (32, 64, 16)
