"""The command from its spec to its folder: reloaded in plain transformers, killed, refused, shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.models import build_tiny
from helpers.paths import TESTS
from unweave.cli.app import main
from unweave.core.errors import UnweaveError, UnweaveWarning
from unweave.core.site import Site
from unweave.data.corpus import Source
from unweave.data.pack import PackSpec
from unweave.data.spec import DataSpec
from unweave.inputs.inputs import load_lm
from unweave.latents.selection import Chosen, Selection, SiteChoice, write
from unweave.lm.model import LM
from unweave.methods.finetune import loop, weights
from unweave.methods.finetune.evaluate import evaluate
from unweave.methods.finetune.loop import Plan
from unweave.methods.finetune.result import Finetuned
from unweave.methods.finetune.rows import ChoiceRows
from unweave.methods.finetune.spec import ChecksSpec, ConditionSpec, FinetuneSpec, LearningSpec, WeightsSpec
from unweave.methods.finetune.stage import run
from unweave.methods.finetune.view import section
from unweave.sae.activations import ReLU
from unweave.sae.module import SAE
from unweave.tasks.choices.choices import open_choices
from unweave.tasks.choices.encode import encode_choices
from unweave.tasks.choices.spec import ChoiceSpec

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks for it
TASK = ChoiceSpec(task="gender", train=10, evaluation=6)


def spec_of(home: Path, **changes: Any) -> FinetuneSpec:
    base = FinetuneSpec(
        model=str(home / "model"), device="cpu", task=TASK, learning=LearningSpec(lr=3e-3, batch=4, epochs=2),
        weights=WeightsSpec(train="blocks", first_block=1), checks=ChecksSpec(per_epoch=1, items=4),
        checkpoint_seconds=0.0,
    )  # fmt: skip
    return replace(base, **changes)


@pytest.fixture(scope="module")
def selected(home: Path) -> Path:
    """Three latents at resid_post.1, in a file beside their SAE."""
    g = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(40, 32, generator=g), dim=1)
    sae = SAE(rows.T.clone(), torch.zeros(40), rows, torch.zeros(32), ReLU(), read=Site("resid_post", 1))
    folder = sae.save(home / "sae")
    chosen = SiteChoice(
        Site("resid_post", 1), (Chosen(1), Chosen(2), Chosen(30)), str(folder), SAE.load(folder).digest()
    )
    return write(home / "chosen.json", Selection("chosen", "latents", (chosen,), "tiny", 40, "rule"))


def test_the_folder_answers_in_plain_transformers_as_reported(home: Path, selected: Path, tmp_path: Path) -> None:
    """Every kind of weights; the loaded model's logits are those of the trained one to the last bit."""
    held: list[torch.Tensor] = []
    save = weights.Trainable.save
    ids = torch.randint(8, 90, (3, 12), generator=torch.Generator().manual_seed(0))

    def kept(self: weights.Trainable, folder: Path) -> None:
        with torch.no_grad():
            held.append(self.lm.model(input_ids=ids).logits)
        save(self, folder)

    kinds = (WeightsSpec(), WeightsSpec(train="blocks", first_block=1), WeightsSpec(train="lora", first_block=1))
    for trained in kinds:
        train = trained.train
        spec = spec_of(home, weights=trained, selection=selected,
                       condition=ConditionSpec(kind="zero"))  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(weights.Trainable, "save", kept)
            done = run(spec, tmp_path)
        folder = done.path / done.result.folder
        model = AutoModelForCausalLM.from_pretrained(home / "model" if train == "lora" else folder)
        if train == "lora":
            model = PeftModel.from_pretrained(model, folder).eval()
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, held[-1])
        lm = LM(model.get_base_model() if train == "lora" else model, AutoTokenizer.from_pretrained(folder))
        choices = open_choices(TASK)
        for split in done.result.splits:
            encoded = encode_choices(lm, choices.splits[split.name])
            score, _ = evaluate(lm, ChoiceRows(encoded))
            assert score.accuracy == split.tuned.accuracy and split.edited is not None
            assert split.items == len(choices.splits[split.name])
        card = (folder / "README.md").read_text()
        assert card.startswith("---\nbase_model:") and "3 at resid_post.1" in card and "seed 0" in card
        tried = done.result.diagnosis
        assert tried is not None and tried.items == 10 and [one.edit for one in tried.edits] == ["zero"]
        assert done.result.weights.begins == (None if train == "all" else Site("resid_post", 0))
    base = dict(build_tiny("llama").named_parameters())
    cached = load_lm(str(home / "model"), "float32", "cpu").model  # what later stages of the process get
    assert all(torch.equal(weight, base[name]) for name, weight in cached.named_parameters())


def test_conversations_are_learnt(home: Path, tmp_path: Path) -> None:
    text = DataSpec(sources=(Source(path=str(home / "text" / "b.jsonl")),), pack=PackSpec(context=60), tokens=900,
                    heldout=0.3, heldout_tokens=200)  # fmt: skip
    spec = spec_of(home, task=ChoiceSpec(), data=text, weights=WeightsSpec())
    result = run(spec, tmp_path).result
    (heldout,) = result.splits
    assert heldout.tuned.accuracy is None and heldout.tuned.loss < 0.8 * heldout.base.loss
    assert result.history[-1].scores["heldout"].loss < result.history[0].scores["heldout"].loss
    shown = section(result)
    assert "Fine-tuning" in shown.heading and "Losses are" in shown.body and "Accuracy" not in shown.body
    (folder,) = tmp_path.glob("finetune-run-*/model")
    for words in (shown.body, (folder / "README.md").read_text(), str(result.rows())):
        assert f"{heldout.base.loss:.4f}" in words and f"{heldout.tuned.loss:.4f}" in words


def test_conversations_without_an_answer_are_refused(home: Path, tmp_path: Path) -> None:
    data: dict[str, Any] = {"sources": (Source(path=str(home / "text" / "b.jsonl")),), "heldout": 0.3}
    silent = DataSpec(pack=PackSpec(context=9, min_tokens=2), tokens=300, heldout_tokens=60, **data)
    with pytest.raises(UnweaveError, match="none of 34 rows has an assistant's answer"):
        run(spec_of(home, task=ChoiceSpec(), data=silent), tmp_path)


# Forks that are killed at random moments, each going on where the last was; then one may finish.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from test_finetune_stage import run, long_spec
home, runs = Path(sys.argv[2]), Path(sys.argv[3])
rng, kills = random.Random(0), 0
steps = lambda: [p.read_text() for p in runs.glob("finetune-run-*/checkpoint.json")]
while kills < 3:
    child, before = os.fork(), steps()
    if child == 0:
        run(long_spec(home), runs)
        os._exit(0)
    deadline = time.monotonic() + 120
    while steps() == before and time.monotonic() < deadline and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.001)
    time.sleep(rng.random() * 0.05)
    os.kill(child, signal.SIGKILL)
    if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
        kills += 1
    else:
        break
print(kills)
"""


def long_spec(home: Path) -> FinetuneSpec:
    return spec_of(home, selection=home / "chosen.json", condition=ConditionSpec(kind="span", fade="out"),
                   learning=LearningSpec(lr=3e-3, batch=2, epochs=3, kl=0.1))  # fmt: skip


def test_killed_at_random_moments_it_ends_with_the_same_bytes(home: Path, selected: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLER, str(TESTS / "methods" / "finetune"), str(home), str(tmp_path / "killed")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.stdout.strip() == "3", child.stderr
    (path,) = (tmp_path / "killed").glob("finetune-run-*/checkpoint.json")
    assert json.loads(path.read_text())["step"] >= 3
    resumed, straight = (run(long_spec(home), tmp_path / name) for name in ("killed", "straight"))
    for name in ("result.json", "model/model.safetensors", "model/README.md"):
        assert (resumed.path / name).read_bytes() == (straight.path / name).read_bytes(), name
    assert not list(resumed.path.glob("checkpoint*"))


def test_stopped_after_any_step_it_ends_with_the_same_bytes(home: Path, tmp_path: Path) -> None:
    """Between the optimiser and the checkpoint as well, where a fork seldom is."""
    advance = loop._Training.advance
    spec, steps = spec_of(home), []

    def stopped(self: Any) -> None:
        advance(self)
        if self.step not in steps:
            steps.append(self.step)
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Training, "advance", stopped)
        while True:
            try:
                resumed = run(spec, tmp_path / "stopped")
                break
            except KeyboardInterrupt:
                continue
    assert steps == list(range(1, 7))
    straight = run(spec, tmp_path / "straight")
    names = ("result.json", "model/model.safetensors")
    assert all((resumed.path / name).read_bytes() == (straight.path / name).read_bytes() for name in names)


def test_refusals_come_before_the_work(home: Path, selected: Path, tmp_path: Path) -> None:
    for changes, words in (
        ({"data": DataSpec(sources=(Source(path="x"),))}, "task = .* would have no effect"),
        ({"saes": ("x",)}, "no effect without a selection"),
        ({"dtype": "bfloat16", "learning": LearningSpec(autocast=True)}, "autocast would have no effect"),
        ({"condition": ConditionSpec(kind="zero")}, "needs a selection"),
        ({"weights": WeightsSpec(train="blocks", first_block=9)}, "block 9 does not exist"),
    ):
        with pytest.raises(UnweaveError, match=words):
            run(spec_of(home, **changes), tmp_path)
    with pytest.raises(UnweaveError, match="first_block = 2 would have no effect"):
        WeightsSpec(first_block=2)
    with pytest.raises(UnweaveError, match="fade = 'in' would have no effect"):
        ConditionSpec(fade="in")
    about = json.loads(selected.read_text())
    about["sites"][0]["chosen"][0]["number"] = 99
    far = selected.with_name("far.json")
    far.write_text(json.dumps(about))
    with pytest.raises(UnweaveError, match="latent 99 does not exist"):
        run(spec_of(home, selection=far, condition=ConditionSpec(kind="zero")), tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unweave.methods.finetune.tune.disk_free", lambda path: 1000)
        with pytest.raises(UnweaveError, match="GB are free"):
            run(spec_of(home), tmp_path)
    lm = load_lm(str(home / "model"), "float32", "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm.model.config, "quantization_config", {"quant_method": "gptq"}, raising=False)
        with pytest.raises(UnweaveError, match="quantised") as caught:
            run(spec_of(home), tmp_path)
        assert "lora" in caught.value.remedy
    assert not any(weight.requires_grad for weight in lm.model.parameters()) and not lm.sessions


def test_a_task_without_a_split_is_trained_with_a_warning(home: Path, tmp_path: Path, monkeypatch: Any) -> None:
    opened = open_choices(TASK)

    def few(spec: ChoiceSpec) -> Any:
        del spec
        return replace(opened, splits={name: opened.splits[name] for name in ("train", "validation")})

    monkeypatch.setattr("unweave.methods.finetune.splits.open_choices", few)
    with pytest.warns(UnweaveWarning, match="no split ood"):
        result = run(spec_of(home), tmp_path).result
    assert [split.name for split in result.splits] == ["validation"]
    with pytest.raises(UnweaveError, match="no split skyline"):
        run(spec_of(home, split="skyline"), tmp_path)


def test_the_command_and_the_report_show_it(home: Path, selected: Path, tmp_path: Path, capsys: Any) -> None:
    options = f"--model {home / 'model'} --task.train 8 --task.evaluation 4 --selection {selected} --device cpu"
    options += f" --condition.kind span --learning.batch 4 --learning.epochs 1 --runs {tmp_path}"
    assert main(["finetune", "run", *options.split(), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["result"]["condition"] == "span"
    (path,) = tmp_path.glob("finetune-run-*")
    assert main(["report", str(path), "--runs", str(tmp_path)]) == 0
    page = next(tmp_path.glob("report-*/*.html")).read_text()
    for words in (
        "On the untrained model",
        "condition <b>span</b>",
        "Accuracy while the model learns",
        "selected directions",
        "Ablated at test",
    ):
        assert words in page
    assert json.loads((path / "result.json").read_text())["result"] == Finetuned.__name__


def test_a_plan_may_have_no_checks() -> None:
    assert Plan(4, LearningSpec(), checks=0).checked == frozenset()
