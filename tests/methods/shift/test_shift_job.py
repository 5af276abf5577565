"""``unweave circuit shift`` from end to end on a tiny model: every judge, interruptions, refusals, what it writes."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.models import build_tiny, build_tiny_tokenizer
from unweave.circuits.graph import Circuit
from unweave.core.errors import UnweaveError, UnweaveWarning
from unweave.core.result import as_read, as_written
from unweave.core.run import Run
from unweave.core.site import Site
from unweave.data.corpus import Source
from unweave.data.pack import PackSpec
from unweave.data.policy import TokenPolicy
from unweave.data.spec import DataSpec
from unweave.judge.scripted import Scripted
from unweave.judge.spec import JudgeSpec
from unweave.latents.stage import records_of
from unweave.lm.model import LM
from unweave.methods.shift import biographies, view
from unweave.methods.shift import judge as shift_judge
from unweave.methods.shift import shift as algorithm
from unweave.methods.shift import stage as shift
from unweave.methods.shift.result import MEASURES, METHODS, Accuracies, Method, Seed, ShiftResult
from unweave.methods.shift.spec import CircuitShiftSpec, ClassifierOptions, RuleOptions, ShiftOptions, SupportOptions
from unweave.sae.module import SAE, ReLU

SITES = ("embed", "mlp_add.1", "resid_post.1")
FILES = {"table.md", "accuracies.svg", "accuracies.png", "biographies.jsonl", "result.json"}
TEXT = ClassifierOptions(train=16, max_length=40)
FEW = SupportOptions(examples=8, steps=2, top=12)


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
        test=6,
        classifier=TEXT,
        circuit=FEW,
        judge="file",
        annotations=home / "all.jsonl",
        random=1,
        seeds=2,
    )
    return replace(base, **changes)


def data(home: Path) -> DataSpec:
    return DataSpec(sources=(Source(path=str(home / "text.jsonl")),), pack=PackSpec(context=48), tokens=1000)


def quietly(spec: CircuitShiftSpec, runs: Path) -> Run[ShiftResult]:
    """The task says nothing on a random model, and warns of that in some of these runs."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnweaveWarning)
        return shift.run(spec, runs)


def reached(seed: Seed) -> dict[Method, Accuracies]:
    """What each method reaches, the first draw of random latents."""
    return {method: seed.of(method)[0] for method in METHODS}


@pytest.fixture(scope="module")
def judged(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Run[ShiftResult]:
    return quietly(spec_of(home), tmp_path_factory.mktemp("runs"))


def test_the_table_has_every_row_and_the_reasons_are_written_down(judged: Run[ShiftResult], home: Path) -> None:
    result = judged.result
    assert {path.name for path in judged.path.iterdir()} >= FILES and not (judged.path / "parts").exists()
    assert {row.method for seed in result.seeds for row in seed.rows} == set(METHODS)
    for method in METHODS:
        for measure in MEASURES:
            values = [seed.of(method)[0].share(measure).value for seed in result.seeds]
            assert result.mean(method, measure) == pytest.approx(sum(values) / 2)
            expected = float(torch.tensor(values, dtype=torch.float64).std())
            assert result.spread(method, measure) == pytest.approx(expected)
    assert result.gap == pytest.approx(result.mean("oracle", "worst") - result.mean("original", "worst"))
    verdicts = {verdict.name: verdict for verdict in result.judgement.verdicts}
    for seed, ablated in zip(result.seeds, result.ablated, strict=True):
        assert 0 < len(seed.circuit) <= 12
        assert sum(verdicts[latent.name].irrelevant is True for latent in seed.circuit) == ablated
        for latent in seed.circuit:
            assert verdicts[latent.name].irrelevant == (latent.latent % 2 == 1)
            assert latent.effect > 0
        assert {row.site for row in seed.sums} == {row.site for row in seed.neuron_sums} == set(map(Site.parse, SITES))
        of = {method: {share.of for share in one.groups} for method, one in reached(seed).items()}
        assert of == {method: {6} for method in METHODS} and seed.of("shift")[0].gender.of == 24
    assert result.judgement.by == "file" and "templated" in result.biographies_note
    shown = {name: (value, meaning) for name, value, meaning in result.rows()}
    assert shown["biographies"] == ("templated", result.biographies_note)
    assert shown["judgement"][0] == "file" and "irrelevant" in shown["judgement"][1]
    assert [meaning for name, _, meaning in result.rows() if name == "warning"] == view.warnings(result)
    table = (judged.path / "table.md").read_text()
    assert "| SHIFT + retrain | " in table and "templated" in table and table.count("\n|") == 9
    people = [json.loads(line) for line in (judged.path / "biographies.jsonl").read_text().splitlines()]
    assert len(people) == 4 * (12 + 6)
    nodes = Circuit.load(judged.path / "circuit-0.safetensors").nodes
    assert {str(site): tuple(values.shape) for site, values in nodes.items()} == dict.fromkeys(SITES, (1, 17))
    assert (judged.path / "accuracies.png").stat().st_size > 5_000


def test_the_result_is_read_back_and_shows_itself(judged: Run[ShiftResult]) -> None:
    result = judged.result
    assert as_read(ShiftResult, json.loads(json.dumps(as_written(result))), "here") == result
    html = result._repr_html_()
    for word in ("SHIFT + retrain", "templated", "accuracies", "<svg", "Seed 1: ", "not annotated", "annotated"):
        assert (word in html) == (word not in ("not annotated", "accuracies")), word
    assert all(latent.name in html for seed in result.seeds for latent in seed.circuit)
    low, high = result.seeds[0].of("shift")[0].profession.interval
    assert f"({100 * low:.0f}\u2013{100 * high:.0f})" in html


def test_a_finished_question_loads_nothing(
    judged: Run[ShiftResult], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_rule = spec_of(home, seeds=1, judge="rule", annotations=None, data=data(home), latents_tokens=900)
    quietly(by_rule, tmp_path)
    for kind in (LM, SAE):
        monkeypatch.setattr(kind, "load", None)
    assert shift.run(spec_of(home), judged.path.parent).reused
    assert shift.run(by_rule, tmp_path).reused


def test_it_works_in_a_notebook(judged: Run[ShiftResult], home: Path, tmp_path: Path) -> None:
    """Neither Spec nor runs folder: handles in, a result out, the same as the stage's."""
    lm = LM.load(str(home / "model"))
    saes = {lm.site(site): SAE.load(home / "saes" / site) for site in SITES}
    people = biographies.sets("templated", pool=12, test=6)
    judge = shift_judge.by_file(home / "all.jsonl", saes)
    options = ShiftOptions(classifier=TEXT, circuit=FEW, seeds=1)
    found = algorithm.shift(lm, saes, people, judge, options)
    assert found.seeds == judged.result.seeds[:1] and not list(tmp_path.iterdir())
    opened = shift.open_saes(spec_of(home))
    records = records_of(opened, data(home), 900, tmp_path)
    again = algorithm.shift(lm, saes, people, shift_judge.by_rule(shift_judge.of(records)), options)
    assert again.judgement.by == "rule" and again.seeds[0].circuit == found.seeds[0].circuit


def test_an_interrupted_run_goes_on_with_what_is_there(
    judged: Run[ShiftResult], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(view, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            shift.run(spec_of(home), tmp_path)
    (parts,) = tmp_path.glob("circuit-shift-*/parts")
    circuits, rows = sorted(parts.glob("circuits-*")), sorted(parts.glob("rows-*"))
    assert [path.name for path in circuits] == ["circuits-0.safetensors", "circuits-1.safetensors"] and len(rows) == 2
    rows[1].unlink()
    asked: list[int] = []
    measure = algorithm._Study._rows

    def measured(self: Any, seed: int, *rest: Any) -> Any:
        asked.append(seed)
        return measure(self, seed, *rest)

    monkeypatch.setattr(algorithm._Study, "_circuits", stopped)
    monkeypatch.setattr(algorithm._Study, "_rows", measured)
    again = quietly(spec_of(home), tmp_path)
    assert asked == [1] and not again.reused and not parts.exists()
    assert again.result == judged.result
    assert shift.run(spec_of(home), judged.path.parent).reused


def test_the_first_seed_is_the_same_however_many_follow(judged: Run[ShiftResult], home: Path, tmp_path: Path) -> None:
    one = quietly(spec_of(home, seeds=1), tmp_path)
    assert one.result.seeds[0] == judged.result.seeds[0]
    assert one.result.spread("oracle", "worst") is None
    assert "one seed" in (one.path / "table.md").read_text() and "±" not in (one.path / "table.md").read_text()
    assert judged.result.seeds[0].circuit != judged.result.seeds[1].circuit


def test_options_change_what_is_found(
    judged: Run[ShiftResult], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view, "save", lambda *_: None)  # drawing takes longer than everything else here
    base = judged.result.seeds[0]
    classifier: tuple[dict[str, Any], ...] = (
        {"skip_first": 0}, {"max_length": 30}, {"standardise": False}, {"lr": 0.1}, {"epochs": 3}, {"train": 12},
        {"site": "resid_post.2"},
    )  # fmt: skip
    circuit: tuple[dict[str, Any], ...] = (
        {"examples": 4}, {"steps": 5}, {"rule": "left"}, {"method": "attribution", "steps": SupportOptions.steps},
    )  # fmt: skip
    changes = [{"classifier": replace(TEXT, **one)} for one in classifier]
    changes += [{"circuit": replace(FEW, **one)} for one in circuit]
    for one in ({"seed": 1}, *changes):
        found = quietly(spec_of(home, seeds=1, **one), tmp_path).result
        assert found.seeds[0] != base, one
    few = quietly(spec_of(home, seeds=1, circuit=replace(FEW, top=3)), tmp_path).result
    assert few.seeds[0].circuit == base.circuit[:3]
    high = replace(FEW, threshold=base.circuit[4].effect)
    assert 3 <= len(quietly(spec_of(home, seeds=1, circuit=high), tmp_path).result.seeds[0].circuit) <= 5
    drawn = quietly(spec_of(home, seeds=1, random=3), tmp_path).result
    draws = drawn.seeds[0].of("random")
    assert len(draws) == 3 and draws[:1] == base.of("random")
    mean = sum(draw.profession.value for draw in draws) / 3
    assert drawn.mean("random", "profession") == pytest.approx(mean)


def test_the_rule_judges_by_records(home: Path, tmp_path: Path) -> None:
    spec = spec_of(home, seeds=1, judge="rule", annotations=None, data=data(home), latents_tokens=900)
    found = quietly(replace(spec, gender=RuleOptions(context_share=0.2)), tmp_path).result
    verdicts = found.judgement.verdicts
    assert {v.name for v in verdicts} == {latent.name for latent in found.seeds[0].circuit}
    assert all(v.why for v in verdicts) and any(v.irrelevant for v in verdicts)
    strict = quietly(replace(spec, gender=RuleOptions(context_share=1.0, promoted_share=1.0)), tmp_path).result
    assert strict.judgement.count(True) <= found.judgement.count(True)


def test_a_chat_model_judges(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(shift, "check_judge", asked.append)
    judge = Scripted(lambda talk: None if len(talk[-1]["content"]) % 5 == 0 else "answer: [[no]]")
    monkeypatch.setattr(shift_judge, "open_judge", lambda *_: judge)
    spec = spec_of(home, seeds=1, judge="chat", annotations=None, data=data(home), latents_tokens=900)
    with pytest.warns(UnweaveWarning) as caught:
        found = shift.run(spec, tmp_path).result
    assert any("nothing was ablated" in str(warning.message) for warning in caught)
    assert asked == [JudgeSpec()] and found.judgement.model == "scripted"
    failures = sum(len(talk[-1]["content"]) % 5 == 0 for talk in judge.asked)
    assert found.judgement.count(False) == len(judge.asked) - failures
    methods = reached(found.seeds[0])
    assert methods["shift"] == methods["original"] == methods["random"] == methods["features"]


def test_latents_without_a_verdict_are_counted_and_warned_of(
    judged: Run[ShiftResult], home: Path, tmp_path: Path
) -> None:
    names = [latent.name for latent in judged.result.seeds[0].circuit]
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join(json.dumps({"name": name, "relevant": i > 0}) for i, name in enumerate(names[:5])))
    with pytest.warns(UnweaveWarning) as caught:
        found = shift.run(spec_of(home, seeds=1, annotations=path), tmp_path)
    told = f"{len(names) - 5} of {len(names)} latents have no verdict and were kept"
    assert any(told in str(warning.message) for warning in caught)
    assert found.result.judgement.count(None) == len(names) - 5 and found.result.ablated == [1]
    table = (found.path / "table.md").read_text()
    assert f"1 irrelevant, 4 relevant, {len(names) - 5} without a verdict" in table and told in table
    assert any(told in row[2] for row in found.result.rows() if row[0] == "warning")


def test_a_kept_seed_belongs_to_its_verdicts(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat model that failed on some latents, and answers when the interrupted run goes on."""
    monkeypatch.setattr(shift, "check_judge", lambda _: None)
    spec = spec_of(home, seeds=1, judge="chat", annotations=None, data=data(home), latents_tokens=900)

    def answering(reply: Any) -> None:
        monkeypatch.setattr(shift_judge, "open_judge", lambda *_: Scripted(reply))

    seen: list[list[int]] = []

    def stopped(_folder: Path, result: ShiftResult) -> Any:
        seen.append(result.ablated)
        raise KeyboardInterrupt

    answering(lambda talk: None if len(talk[-1]["content"]) % 2 else "answer: [[yes]]")
    with monkeypatch.context() as patch:
        patch.setattr(view, "save", stopped)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                shift.run(spec, tmp_path)
            answering(lambda _: "answer: [[yes]]")
    (parts,) = tmp_path.glob("circuit-shift-*/parts")
    assert len(list(parts.glob("rows-0-*"))) == 2 and seen[0] < seen[1]
    found = quietly(spec, tmp_path).result
    assert found.ablated == seen[1] == [found.judgement.count(True)]


def test_a_changed_text_is_another_question(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_bytes((home / "text.jsonl").read_bytes())
    text = replace(data(home), sources=(Source(path=str(path)),))
    spec = spec_of(home, judge="rule", annotations=None, data=text)
    before = shift.run.inputs(spec)
    assert shift.run.inputs(spec) == before and str(path) in before
    path.write_text(path.read_text() + '\n{"text": "another"}')
    assert shift.run.inputs(spec) != before
    assert "text.jsonl" not in str(shift.run.inputs(spec_of(home)))
    people = tmp_path / "people.jsonl"
    people.write_text("{}")
    before = shift.run.inputs(spec_of(home, biographies=str(people)))
    people.write_text("[]")
    assert "biographies" in before and shift.run.inputs(spec_of(home, biographies=str(people))) != before


def test_an_easy_task_is_called_one(home: Path, tmp_path: Path) -> None:
    """Where the classifier never sees the text's own words, original and oracle are equally at a loss."""
    with pytest.warns(UnweaveWarning) as caught:
        found = shift.run(spec_of(home, seeds=1, classifier=replace(TEXT, max_length=3)), tmp_path).result
    assert any("too easy" in str(warning.message) for warning in caught)
    assert found.gap < 0.2 and any("too easy" in warning for warning in view.warnings(found))


def test_what_makes_no_sense_is_refused(home: Path, tmp_path: Path) -> None:
    for wrong, match in (
        (lambda: replace(TEXT, train=18), "train"),
        (lambda: spec_of(home, classifier=replace(TEXT, train=28)), "train"),
        (lambda: spec_of(home, circuit=replace(FEW, examples=20)), "examples"),
        (lambda: replace(TEXT, skip_first=40), "skip_first"),
        (lambda: spec_of(home, chat=JudgeSpec(max_new_tokens=5)), "no effect"),
        (lambda: spec_of(home, data=data(home)), "no effect"),
        (lambda: spec_of(home, gender=RuleOptions(context_share=0.5)), "no effect"),
        (lambda: replace(FEW, method="attribution", steps=SupportOptions.steps, rule="left"), "no effect"),
        (lambda: spec_of(home, annotations=None), "no file to judge by"),
        (lambda: spec_of(home, judge="rule"), "no effect"),
    ):
        with pytest.raises(UnweaveError, match=match):
            wrong()
    early = replace(TEXT, site="resid_post.0")
    with pytest.raises(UnweaveError, match="at or before"):
        shift.run(spec_of(home, sites=("resid_post.1",), classifier=early), tmp_path)
    with pytest.raises(UnweaveError, match="name the classifier's site"):
        shift.run(spec_of(home, sites=("embed",)), tmp_path)
    (home / "none.jsonl").write_text(json.dumps({"name": "embed/0", "annotation": "said nothing of it"}))
    with pytest.raises(UnweaveError, match="no annotation says"):
        shift.run(spec_of(home, annotations=home / "none.jsonl"), tmp_path)
    with pytest.raises(UnweaveError, match="no latent supports"):
        shift.run(spec_of(home, circuit=replace(FEW, threshold=1e6)), tmp_path)


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


def table_of(folder: Path, runs: Path, **changes: Any) -> ShiftResult:
    spec = CircuitShiftSpec(
        saes=(str(folder / "sae"),),
        model=str(folder / "model"),
        device="cpu",
        biographies=str(folder / "people.jsonl"),
        pool=60,
        test=50,
        classifier=ClassifierOptions(site="resid_post.1", train=120, epochs=40),
        circuit=SupportOptions(method="attribution"),
        judge="file",
        annotations=folder / "said.jsonl",
        random=2,
        seeds=1,
    )
    return quietly(replace(spec, **changes), runs).result


def test_every_row_of_the_table_of_a_planted_model(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view, "save", lambda *_: None)
    result = table_of(planted, tmp_path)
    row = reached(result.seeds[0])
    assert result.ablated == [1] and result.seeds[0].circuit[0].name == "embed/0" and result.biographies_note == ""
    original = row["original"]
    assert original.gender.value > 0.95 and original.worst.value < 0.2, "it says the gender"
    for draw in result.seeds[0].of("random"):
        assert draw.gender.value > 0.95 and draw.worst.value < 0.2
    assert row["shift"].gender.value < 0.7, "it no longer knows the gender"
    assert row["retrain"].worst.value > 0.95 and row["retrain"] != row["shift"]
    assert row["features"] == row["shift"], "the one latent for gender, which labels of gender find too"
    assert row["neurons"].gender.value < 0.7 and row["neurons"] != row["shift"], "to its mean, not to 0"
    assert row["oracle"].worst.value > 0.95 and row["oracle"].gender.value < 0.6
    back = {method: result.recovered(method) for method in METHODS}
    assert back["retrain"] is not None and back["retrain"] > 0.9
    assert back["random"] is not None and abs(back["random"]) < 0.2


def test_ablation_where_the_autoencoder_was_trained(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was not on the letter f, which goes on telling the gender; h does not any more."""
    monkeypatch.setattr(view, "save", lambda *_: None)
    everywhere, there = (table_of(planted, tmp_path, where=where) for where in ("all", "policy"))
    assert everywhere.seeds[0].circuit == there.seeds[0].circuit
    rows = [reached(found.seeds[0]) for found in (everywhere, there)]
    assert rows[1]["original"] == rows[0]["original"]
    assert rows[1]["retrain"].gender.value > 0.9 > 0.6 > rows[0]["retrain"].gender.value
