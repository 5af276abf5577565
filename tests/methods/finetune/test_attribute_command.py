"""The command from its words to its files, on a small model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from unweave.cli.app import main
from unweave.latents import annotations
from unweave.lm.model import LM
from unweave.methods.finetune.attribute import view
from unweave.methods.finetune.attribute.result import attribution_at


@pytest.fixture(scope="module")
def choices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "choices.jsonl"
    words = ["the keys are", "she was reading", "a table near", "old door and", "it rained on", "while the sea"]
    items = [
        {"prompt": f"{word} {i}", "correct": "ab"[i % 2], "incorrect": "ba"[i % 2]} for i in range(4) for word in words
    ]
    path.write_text("\n".join(map(json.dumps, items)))
    return path


@pytest.fixture(scope="module")
def adapter(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import peft

    lm, folder = LM.load(str(home / "model")), tmp_path_factory.mktemp("adapter")
    config = peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that is going
        torch.manual_seed(0)
        peft.get_peft_model(lm.model, config).save_pretrained(folder)
    return folder


def asked(runs: Path, trained: Any, *options: str) -> Any:
    sae = str(trained.path / "sae")
    assert main(["finetune", "attribute", "--saes", sae, "--runs", str(runs), "--json", *options]) == 0
    return sorted(runs.glob("finetune-attribute-*"), key=lambda path: path.stat().st_mtime)[-1]


def test_the_command_writes_candidates(runs: Path, trained: Any, choices: Path, tmp_path: Path) -> None:
    folder = asked(tmp_path, trained, "--task.task", str(choices), "--top", "7", "--sign", "either")
    result = attribution_at(folder).result
    assert len(result.candidates) == 7 and result.examples > 10 and result.directions is None
    sizes = [abs(one.score) for one in result.candidates]
    assert sizes == sorted(sizes, reverse=True)
    (site,) = result.sites
    lines = annotations.load(folder / "candidates.jsonl")
    assert [one.latent for one in lines.values()] == [one.number for one in result.candidates]
    assert {one.sae for one in lines.values()} == {site.digest}
    assert site.total == pytest.approx(sum(one.score for one in result.candidates)) and site.candidates == 7
    assert "in deviations" in view.section(result).body.lower() and len(result.rows()) > 8


def test_the_command_reads_conversations(home: Path, trained: Any, tmp_path: Path) -> None:
    source = json.dumps([{"path": str(home / "text" / "b.jsonl")}])
    text = ("--data.sources", source, "--data.tokens", "400", "--data.pack.context", "48")
    folder = asked(tmp_path, trained, *text, "--examples", "8")
    result = attribution_at(folder).result
    assert result.metric == "effect on log p of the assistant's tokens" and result.examples == 8


def test_the_command_compares_models(
    home: Path, trained: Any, choices: Path, adapter: Path, tmp_path: Path, capsys: Any
) -> None:
    task = ("--task.task", str(choices), "--tuned", str(adapter))
    folder = asked(tmp_path, trained, *task, "--by", "components", "--components", "3")
    result = attribution_at(folder).result
    assert [one.number for one in result.candidates] == [0, 1, 2] and result.sites[0].digest is None
    assert {view.spread(one) for one in result.candidates} == {"n/a"} and "± 0" not in view.section(result).body
    (rows,) = load_file(folder / str(result.directions)).values()
    torch.testing.assert_close(rows @ rows.T, torch.eye(3))
    folder = asked(tmp_path, trained, *task, "--by", "difference", "--top", "4")
    differing = attribution_at(folder).result
    assert len(differing.candidates) == 4 and all(one.size is not None for one in differing.candidates)
    same = ("--task.task", str(choices), "--tuned", str(home / "model"), "--by", "difference", "--runs", str(tmp_path))
    assert main(["finetune", "attribute", "--saes", str(trained.path / "sae"), *same]) == 2
    assert "no latent has a score of sign positive" in capsys.readouterr().err
