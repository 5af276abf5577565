"""``unweave circuit shift`` from end to end on a tiny model: every judge, interruptions, refusals, what it writes."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import build_tiny, build_tiny_tokenizer
from unweave.circuits.graph import Circuit
from unweave.core.errors import UnweaveError, UnweaveWarning
from unweave.core.files import read_json
from unweave.core.run import Run
from unweave.core.site import Site
from unweave.data.corpus import Source
from unweave.data.pack import PackSpec
from unweave.data.policy import TokenPolicy
from unweave.data.spec import DataSpec
from unweave.judge.scripted import Scripted
from unweave.judge.spec import JudgeSpec
from unweave.lm.model import LM
from unweave.methods.shift import judge as shift_judge
from unweave.methods.shift import stage as shift
from unweave.methods.shift import view as shift_table
from unweave.methods.shift.spec import CircuitShiftSpec
from unweave.sae.module import SAE, ReLU

SITES = ("embed", "mlp_add.1", "resid_post.1")
FILES = {"table.md", "accuracies.svg", "accuracies.png", "biographies.jsonl", "verdicts.json", "result.json"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shift")
    build_tiny("llama").save_pretrained(folder / "model")
    build_tiny_tokenizer().save_pretrained(folder / "model")
    lm = LM.load(str(folder / "model"))
    g = torch.Generator().manual_seed(0)
    for site in SITES:
        enc, dec = torch.randn(32, 16, generator=g) * 0.3, torch.randn(16, 32, generator=g) * 0.3
        biases = torch.randn(16, generator=g) * 0.1, torch.randn(32, generator=g) * 0.1
        SAE(enc, biases[0], dec, biases[1], ReLU(), read=lm.site(site)).save(folder / "saes" / site)
    rng = random.Random(0)
    lines = [json.dumps({"text": " ".join(rng.choices(["she", "he", "the", "sea"], k=12))}) for _ in range(80)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    (folder / "all.jsonl").write_text(
        "\n".join(json.dumps({"name": f"{s}/{j}", "relevant": j % 2 == 0}) for s in SITES for j in range(16))
    )
    return folder


def spec_of(home: Path, **changes: Any) -> CircuitShiftSpec:
    base = CircuitShiftSpec(
        saes=(str(home / "saes"),),
        model=str(home / "model"),
        device="cpu",
        pool=12,
        train=16,
        test=6,
        max_length=40,
        examples=8,
        steps=2,
        top=12,
        judge="file",
        annotations=home / "all.jsonl",
        random=1,
        seeds=2,
    )
    return replace(base, **changes)


def data(home: Path) -> DataSpec:
    return DataSpec(sources=(Source(path=str(home / "text.jsonl")),), pack=PackSpec(context=48), tokens=1000)


def quietly(spec: CircuitShiftSpec, runs: Path) -> Run:
    """The task says nothing on a random model, and warns of that in some of these runs."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnweaveWarning)
        return shift.run(spec, runs)


@pytest.fixture(scope="module")
def judged(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return quietly(spec_of(home), tmp_path_factory.mktemp("runs"))


def test_the_table_has_every_row_and_the_reasons_are_written_down(judged: Run, home: Path) -> None:
    result = judged.result
    assert {path.name for path in judged.path.iterdir()} >= FILES
    assert list(result["table"]) == list(shift_table.METHODS)
    by_seed = [seed["methods"] for seed in result["seeds"]]
    for method, measures in result["table"].items():
        for measure, found in measures.items():
            values = torch.tensor([seed[method][measure] for seed in by_seed], dtype=torch.float64)
            assert found == pytest.approx({"mean": float(values.mean()), "std": float(values.std())})
    worst = {name: row["worst"]["mean"] for name, row in result["table"].items()}
    assert result["gap"] == pytest.approx(worst["oracle"] - worst["original"])
    for circuit, seed in zip(result["circuits"], result["seeds"], strict=True):
        assert 0 < len(circuit) <= 12
        assert sum(latent["irrelevant"] for latent in circuit) == seed["ablated"]
        for latent in circuit:
            assert latent["irrelevant"] == (int(latent["name"].split("/")[1]) % 2 == 1)
            assert latent["effect"] > 0
    assert result["judge"]["kind"] == "file" and "templated" in result["note"]
    shown = {name: (value, meaning) for name, value, meaning in result["summary"]}
    assert shown["biographies"] == ("templated", result["note"])
    assert shown["judgement"] == ("file", result["judged"]) and "irrelevant" in result["judged"]
    assert [meaning for name, _, meaning in result["summary"] if name == "warning"] == result["warnings"]
    table = (judged.path / "table.md").read_text()
    assert "| SHIFT + retrain | " in table and "templated" in table and table.count("\n|") == 9
    people = [json.loads(line) for line in (judged.path / "biographies.jsonl").read_text().splitlines()]
    assert len(people) == 4 * (12 + 6)
    nodes = Circuit.load(judged.path / "circuit-0.safetensors").nodes
    assert {str(site): tuple(values.shape) for site, values in nodes.items()} == dict.fromkeys(SITES, (1, 17))
    assert (judged.path / "accuracies.png").stat().st_size > 5_000


def test_an_interrupted_run_goes_on_with_what_is_there(judged: Run, home: Path, tmp_path: Path) -> None:
    before = judged.result
    (judged.path / "DONE").unlink()
    first, second = sorted(judged.path.glob("seed-*.json"))
    second.unlink()
    kept = {name: (judged.path / name).stat().st_mtime_ns for name in (first.name, "circuit-1.safetensors")}
    again = quietly(spec_of(home), judged.path.parent)
    assert again.path == judged.path and not again.reused
    assert {name: (again.path / name).stat().st_mtime_ns for name in kept} == kept
    assert again.result | {"seconds": 0} == before | {"seconds": 0}
    assert shift.run(spec_of(home), judged.path.parent).reused


def test_the_first_seed_is_the_same_however_many_follow(judged: Run, home: Path, tmp_path: Path) -> None:
    one = quietly(spec_of(home, seeds=1), tmp_path)
    assert one.result["seeds"][0] == judged.result["seeds"][0]
    assert one.result["table"]["oracle"]["worst"]["std"] is None
    assert "one seed" in (one.path / "table.md").read_text() and "±" not in (one.path / "table.md").read_text()
    assert judged.result["circuits"][0] != judged.result["circuits"][1]


def test_options_change_what_is_found(judged: Run, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shift_table, "save", lambda *_: [])  # drawing takes longer than everything else here
    base = judged.result["seeds"][0]
    circuit = judged.result["circuits"][0]
    for changes in (
        {"skip_first": 0},
        {"max_length": 30},
        {"standardise": False},
        {"lr": 0.1},
        {"epochs": 3},
        {"seed": 1},
        {"examples": 4},
        {"steps": 5},
        {"rule": "left"},
        {"method": "attribution", "steps": CircuitShiftSpec.steps},
        {"train": 12},
        {"probe": "resid_post.2"},
    ):
        found = quietly(spec_of(home, seeds=1, **changes), tmp_path).result
        assert (found["seeds"][0], found["circuits"][0]) != (base, circuit), changes
    few = quietly(spec_of(home, seeds=1, top=3), tmp_path).result
    assert [latent["name"] for latent in few["circuits"][0]] == [latent["name"] for latent in circuit[:3]]
    above = quietly(spec_of(home, seeds=1, threshold=circuit[4]["effect"]), tmp_path).result
    assert 3 <= len(above["circuits"][0]) <= 5
    drawn = quietly(spec_of(home, seeds=1, random=3), tmp_path).result["seeds"][0]
    assert len(drawn["random"]) == 3 and drawn["random"][0] == base["random"][0]
    mean = sum(draw["profession"] for draw in drawn["random"]) / 3
    assert drawn["methods"]["random latents"]["profession"] == pytest.approx(mean)


def test_the_rule_judges_by_records(home: Path, tmp_path: Path) -> None:
    spec = spec_of(home, seeds=1, judge="rule", annotations=None, data=data(home), latents_tokens=900)
    found = quietly(replace(spec, context_share=0.2), tmp_path)
    verdicts = read_json(found.path / "verdicts.json")
    assert {v["name"] for v in verdicts} == {latent["name"] for latent in found.result["circuits"][0]}
    assert all(v["why"] for v in verdicts) and any(v["irrelevant"] for v in verdicts)
    assert found.result["judge"]["irrelevant"] == sum(v["irrelevant"] for v in verdicts)
    strict = quietly(replace(spec, context_share=1.0, promoted_share=1.0), tmp_path).result
    assert strict["judge"]["irrelevant"] <= found.result["judge"]["irrelevant"]


def test_a_chat_model_judges(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(shift, "check_judge", asked.append)
    judge = Scripted(lambda talk: None if len(talk[-1]["content"]) % 5 == 0 else "answer: [[no]]")
    monkeypatch.setattr(shift_judge, "open_judge", lambda *_: judge)
    spec = spec_of(home, seeds=1, judge="chat", annotations=None, data=data(home), latents_tokens=900)
    with pytest.warns(UnweaveWarning) as caught:
        found = shift.run(spec, tmp_path).result
    assert any("nothing was ablated" in str(warning.message) for warning in caught)
    assert asked == [JudgeSpec()] and found["judge"]["model"] == "scripted"
    assert found["judge"]["relevant"] == len(judge.asked) - sum(found["judge"]["failures"].values())
    methods = found["seeds"][0]["methods"]
    assert methods["SHIFT"] == methods["original"] == methods["random latents"] == methods["feature skyline"]


def test_latents_without_a_verdict_are_counted_and_warned_of(judged: Run, home: Path, tmp_path: Path) -> None:
    names = [latent["name"] for latent in judged.result["circuits"][0]]
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join(json.dumps({"name": name, "relevant": i > 0}) for i, name in enumerate(names[:5])))
    with pytest.warns(UnweaveWarning) as caught:
        found = shift.run(spec_of(home, seeds=1, annotations=path), tmp_path)
    said = f"{len(names) - 5} of {len(names)} latents have no verdict and were kept"
    assert any(said in str(warning.message) for warning in caught)
    assert found.result["judge"]["unknown"] == len(names) - 5 and found.result["ablated"] == [1]
    table = (found.path / "table.md").read_text()
    assert f"1 irrelevant, 4 relevant, {len(names) - 5} without a verdict" in table and said in table
    assert any(said in row[2] for row in found.result["summary"] if row[0] == "warning")


def test_a_kept_seed_belongs_to_its_verdicts(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat model that failed on some latents, and answers when the interrupted run goes on."""
    monkeypatch.setattr(shift, "check_judge", lambda _: None)
    spec = spec_of(home, seeds=1, judge="chat", annotations=None, data=data(home), latents_tokens=900)

    def answering(reply: Any) -> None:
        monkeypatch.setattr(shift_judge, "open_judge", lambda *_: Scripted(reply))

    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    answering(lambda talk: None if len(talk[-1]["content"]) % 2 else "answer: [[yes]]")
    with monkeypatch.context() as patch:
        patch.setattr(shift_table, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            shift.run(spec, tmp_path)
    answering(lambda _: "answer: [[yes]]")
    found = quietly(spec, tmp_path)
    kept = [read_json(path)["ablated"] for path in found.path.glob("seed-*.json")]
    assert len(kept) == 2 and found.result["ablated"] == [max(kept)] and min(kept) < max(kept)
    assert found.result["ablated"][0] == sum(latent["irrelevant"] is True for latent in found.result["circuits"][0])


def test_a_changed_text_is_another_question(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_bytes((home / "text.jsonl").read_bytes())
    text = replace(data(home), sources=(Source(path=str(path)),))
    spec = spec_of(home, judge="rule", annotations=None, data=text)
    before = shift._inputs(spec)
    assert shift._inputs(spec) == before and str(path) in before
    path.write_text(path.read_text() + '\n{"text": "another"}')
    assert shift._inputs(spec) != before
    assert "text.jsonl" not in str(shift._inputs(spec_of(home)))


def test_an_easy_task_is_called_one(home: Path, tmp_path: Path) -> None:
    """Where the classifier never sees the text's own words, original and oracle are equally at a loss."""
    with pytest.warns(UnweaveWarning) as caught:
        found = shift.run(spec_of(home, seeds=1, max_length=3), tmp_path).result
    assert any("too easy" in str(warning.message) for warning in caught)
    assert found["gap"] < 0.2 and any("too easy" in warning for warning in found["warnings"])


def test_what_makes_no_sense_is_refused(home: Path, tmp_path: Path) -> None:
    for changes, match in (
        ({"train": 18}, "train"),
        ({"train": 28}, "train"),
        ({"examples": 20}, "examples"),
        ({"skip_first": 40}, "skip_first"),
        ({"chat": JudgeSpec(max_new_tokens=5)}, "no effect"),
        ({"data": data(home)}, "no effect"),
        ({"context_share": 0.5}, "no effect"),
        ({"method": "attribution", "steps": CircuitShiftSpec.steps, "rule": "left"}, "no effect"),
        ({"annotations": None}, "no file to judge by"),
        ({"judge": "rule"}, "no effect"),
    ):
        with pytest.raises(UnweaveError, match=match):
            spec_of(home, **changes)
    with pytest.raises(UnweaveError, match="at or before"):
        shift.run(spec_of(home, sites=("resid_post.1",), probe="resid_post.0"), tmp_path)
    with pytest.raises(UnweaveError, match="name the classifier's site"):
        shift.run(spec_of(home, sites=("embed",)), tmp_path)
    (home / "none.jsonl").write_text(json.dumps({"name": "embed/0", "annotation": "said nothing of it"}))
    with pytest.raises(UnweaveError, match="no annotation says"):
        shift.run(spec_of(home, annotations=home / "none.jsonl"), tmp_path)
    with pytest.raises(UnweaveError, match="no latent supports"):
        shift.run(spec_of(home, threshold=1e6), tmp_path)


# -- a case where every row of the table is known -----------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biographies of one letter for the profession (p, n) and two for the gender (m, f and k, h) among others.

    In the embedding, f is m and h is k with 2 more in coordinate 0, n is p with 1 more in coordinate 1, and nothing
    else has any of either; the letters between are much alike. Latents 0 and 1 are these coordinates. The autoencoder
    was not trained on f.
    """
    folder = tmp_path_factory.mktemp("planted")
    model, tokenizer = build_tiny("llama"), build_tiny_tokenizer()
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[:, :2] = 0
        first, *noise = (tokenizer.convert_tokens_to_ids(letter) for letter in "abcde")
        weight[noise] = weight[first] + 0.2 * (weight[noise] - weight[first])
        m, f, k, h, p, n = (tokenizer.convert_tokens_to_ids(letter) for letter in "mfkhpn")
        for one, other, size, coordinate in ((f, m, 2.0, 0), (h, k, 2.0, 0), (n, p, 1.0, 1)):
            weight[one] = weight[other]
            weight[one, coordinate] = size
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    others = torch.randn(32, 6, generator=torch.Generator().manual_seed(2)) * 0.03
    others[:2] = 0
    enc = torch.cat([torch.eye(32)[:, :2], others], 1)
    policy = TokenPolicy(exclude_ids=(f,))
    sae = SAE(enc, torch.zeros(8), enc.T.contiguous(), torch.zeros(32), ReLU(), read=Site("embed"), policy=policy)
    sae.save(folder / "sae")
    rng = random.Random(0)
    rows = []
    for i in range(1200):
        profession, gender = (i // 2) % 2, i % 2
        between = "".join(rng.choices("abcde", k=8))
        text = f"a{'mf'[gender]}{between[:4]}{'pn'[profession]}{between[4:]}{'kh'[gender]}"
        rows.append({"hard_text": text, "profession": (21, 13)[profession], "gender": gender})
    (folder / "people.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = [{"name": f"embed/{j}", "relevant": j != 0} for j in range(8)]
    (folder / "said.jsonl").write_text("\n".join(map(json.dumps, said)))
    return folder


def table_of(folder: Path, runs: Path, **changes: Any) -> dict[str, Any]:
    spec = CircuitShiftSpec(
        saes=(str(folder / "sae"),),
        model=str(folder / "model"),
        device="cpu",
        probe="resid_post.1",
        biographies=str(folder / "people.jsonl"),
        pool=60,
        train=120,
        test=50,
        epochs=40,
        examples=40,
        method="attribution",
        judge="file",
        annotations=folder / "said.jsonl",
        random=2,
        seeds=1,
    )
    return quietly(replace(spec, **changes), runs).result


def test_every_row_of_the_table_of_a_planted_model(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shift_table, "save", lambda *_: [])
    result = table_of(planted, tmp_path)
    row = result["seeds"][0]["methods"]
    assert result["ablated"] == [1] and result["circuits"][0][0]["name"] == "embed/0" and result["note"] == ""
    original = row["original"]
    assert original["gender"] > 0.95 and original["worst"] < 0.2, "it says the gender"
    assert row["random latents"]["gender"] > 0.95 and row["random latents"]["worst"] < 0.2
    assert row["SHIFT"]["gender"] < 0.7, "it no longer knows the gender"
    assert row["SHIFT + retrain"]["worst"] > 0.95 and row["SHIFT + retrain"] != row["SHIFT"]
    assert row["feature skyline"] == row["SHIFT"], "the one latent for gender, which labels of gender find too"
    assert row["neuron skyline"]["gender"] < 0.7 and row["neuron skyline"] != row["SHIFT"], "to its mean, not to 0"
    assert row["oracle"]["worst"] > 0.95 and row["oracle"]["gender"] < 0.6
    assert result["recovered"]["SHIFT + retrain"] > 0.9 and abs(result["recovered"]["random latents"]) < 0.2


def test_ablation_where_the_autoencoder_was_trained(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was not on the letter f, which goes on telling the gender; h does not any more."""
    monkeypatch.setattr(shift_table, "save", lambda *_: [])
    everywhere, there = (table_of(planted, tmp_path, where=where) for where in ("all", "policy"))
    assert [found["circuits"] for found in (everywhere, there)] == [everywhere["circuits"]] * 2
    rows = [found["seeds"][0]["methods"] for found in (everywhere, there)]
    assert rows[1]["original"] == rows[0]["original"]
    assert rows[1]["SHIFT + retrain"]["gender"] > 0.9 > 0.6 > rows[0]["SHIFT + retrain"]["gender"]
