"""The recipe of concept ablation: what it runs at each scale, its rule, its figures over seeds, and all of it, tiny."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.jobs import spec_of
from helpers.models import build_tiny, build_tiny_tokenizer
from unweave.attribute.runner import Runner
from unweave.core.errors import UnweaveError
from unweave.core.result import as_read, as_written
from unweave.core.site import Site
from unweave.lm.model import LM
from unweave.methods.finetune.select.spec import FinetuneSelectSpec
from unweave.methods.finetune.spec import FinetuneSpec
from unweave.papers.concept_ablation import claims, cue, plan, recipe, view
from unweave.papers.concept_ablation.plan import CONDITIONS, Plan, line_of, plan_of
from unweave.papers.concept_ablation.result import NAMES, ConceptAblation, Spread
from unweave.papers.concept_ablation.spec import ConceptAblationSpec
from unweave.sae.activations import ReLU
from unweave.sae.module import SAE
from unweave.tasks.choices.choices import open_choices
from unweave.tasks.choices.encode import encode_choices
from unweave.tasks.choices.spec import COMBINATIONS, ChoiceSpec

PAPER = {"scale": "paper", "judge": {"model": "llama"}}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNWEAVE_CACHE", str(tmp_path / "cache"))


def test_the_smoke_scale_has_five_tasks_and_every_condition() -> None:
    found = plan_of(ConceptAblationSpec())
    assert found.training is not None and len(found.tasks) == 5 and found.seeds == 3
    assert all(task.answers == "words" for task in found.tasks.values())
    assert set(NAMES) == {*found.conditions, "none", "both"}  # these two are measured in others' trainings


def test_the_paper_scale_has_the_papers_settings() -> None:
    found = plan_of(ConceptAblationSpec.from_dict(PAPER))
    assert len(found.saes) == 26 and found.saes[0].endswith("layer_0/width_16k/average_l0_105")
    assert found.saes[25].endswith("layer_25/width_16k/average_l0_116") and found.saes[3].endswith("average_l0_59")
    assert len(found.tasks) == 25 and found.seeds == 5 and set(found.queries) == set(found.tasks)
    assert "sports" in found.queries["*pronouns* | sports"] and "number" in found.queries["verbs | *sentiment*"]
    spec = FinetuneSpec.from_dict({"model": found.model, **found.tuning, "task": found.tasks["gender"].to_dict()})
    learning = spec.learning
    assert (learning.lr, learning.warmup, learning.epochs, learning.batch) == (5e-6, 0.5, 4.0, 16)
    select = FinetuneSelectSpec.from_dict(
        {"attribution": "x", **found.select, "query": {**found.select["query"], "text": "x"}}
    )
    assert select.judge.model == "llama" and select.query.by == "judge" and select.controls.random == found.seeds


@pytest.mark.parametrize(
    ("asked", "says"), [({"scale": "paper"}, "none is given"), ({"judge": {"model": "x"}}, "by a rule")]
)
def test_what_a_scale_needs_is_refused_at_once(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(UnweaveError, match=says):
        ConceptAblationSpec.from_dict(asked)


@pytest.mark.parametrize("answers", ["letters", "words"])
def test_the_unintended_part_of_a_prompt(answers: str) -> None:
    """Of double multiple choice the question whose answers are the cue's; the other one lies outside."""
    gender = ChoiceSpec.from_dict({"task": "gender", "answers": answers, "train": 8, "evaluation": 4})
    for item in open_choices(gender).splits["train"]:
        assert {item.prompt[a:b] for a, b in cue.spans(gender, item.prompt)} <= {"doctor", "nurse"}
        assert cue.spans(gender, item.prompt)
    for first, second, intended in COMBINATIONS[::5]:
        fields = {"task": "double", "first": first, "second": second, "intended": intended, "answers": answers}
        task = ChoiceSpec.from_dict({**fields, "train": 8, "evaluation": 4})
        mark = {"pronouns": " ", "sports": "known for playing", "sentiment": "The sentiment of", "verbs": "The "}
        for item in open_choices(task).splits["train"]:
            ((start, end),) = cue.spans(task, item.prompt)
            part, rest = item.prompt[start:end], item.prompt[:start] + item.prompt[end:]
            assert mark[second if intended == "first" else first] in part and "Options" not in part
            assert mark[first if intended == "first" else second] in rest
        assert {"first": "second", "second": "first"}[intended] in line_of(task)


def test_shares_of_effects_are_those_of_a_dense_computation() -> None:
    lm = LM(build_tiny("llama"), build_tiny_tokenizer(chat_template=None))
    task = ChoiceSpec.from_dict({"task": "gender", "train": 8, "evaluation": 4})
    encoded = encode_choices(lm, open_choices(task).splits["train"])
    marked = cue.cue_tokens(lm, task, encoded)
    for item, ids, here in zip(encoded.items, encoded.tokens.ids, marked, strict=True):
        words = "".join(lm.pieces(ids[here]))
        assert words and words == "".join(word for word in item.prompt.split() if word.strip(".,") in (words, ""))
    g, site = torch.Generator().manual_seed(0), Site("resid_post", 1)
    sae = SAE(torch.randn(32, 48, generator=g), torch.zeros(48), torch.randn(48, 32, generator=g), torch.zeros(32),
              ReLU(), read=site)  # fmt: skip
    parts = list(cue.marked_batches(lm, task, encoded))
    assert len(parts) > 1
    shares = cue.effect_shares(lm, {site: sae}, parts, {site: [5, 40]})[site]
    whole, inside = torch.zeros(2), torch.zeros(2)
    for (tokens, _, metric), here in parts:
        gradients, values = Runner(lm, tokens, metric, 10**6).gradients([site], ())
        keep = sae.policy.keep(values[site], tokens.ids, tokens.mask).unsqueeze(-1)
        effects = (sae.encode(values[site]) * (gradients[site] @ sae.W_dec.T) * keep)[..., [5, 40]]
        whole, inside = whole + effects.sum((0, 1)), inside + effects[here].sum(0)
    torch.testing.assert_close(shares.float(), inside / whole, rtol=1e-4, atol=1e-5)


def test_a_spread_is_students() -> None:
    from scipy import stats

    some = Spread((0.5, 0.7, 0.9))
    low, high = stats.t.interval(0.95, 2, loc=0.7, scale=stats.sem([0.5, 0.7, 0.9]))
    assert some.interval == (pytest.approx(low), pytest.approx(high)) and some.words() == "70.0 ± 11.5"
    assert Spread((0.5,)).interval is None and Spread((0.5,)).words() == "50.0"
    assert [claims._above(one) for one in (Spread((0.5, 0.51, 0.49)), some, Spread((-0.1, 0.0, -0.2)), None)] == [
        "as claimed", "as claimed", "not as claimed", "not measured"
    ]  # fmt: skip
    assert claims._above(Spread((0.0, 0.1, 0.0))) == "partly"


def tiny_plan(home: Path) -> Plan:
    """A random model, letters, one double combination, two seeds."""
    model = build_tiny("llama")
    model.config.max_position_embeddings = 512
    model.save_pretrained(home / "model")
    build_tiny_tokenizer(chat_template=None).save_pretrained(home / "model")
    (home / "text").mkdir()
    with open(home / "text" / "plain.jsonl", "w") as out:
        for i in range(300):
            out.write(json.dumps({"text": f"The doctor and the nurse said {i} that she was late, he was not."}) + "\n")
    base = spec_of(home, sites=("resid_post.{0,1}",))
    given = {"train": 12, "evaluation": 6}
    return Plan(
        model=str(home / "model"),
        training=replace(base, sae=replace(base.sae, tokens=2048)),
        saes=(),
        tasks={"gender": ChoiceSpec(task="gender", **given), **plan._doubles(COMBINATIONS[:1], **given)},
        seeds=2,
        conditions={name: CONDITIONS[name] for name in ("test", "zero", "random", "inoculate", "skyline")},
        tuning={
            "weights": {"train": "blocks", "first_block": 1},
            "learning": {"lr": 1e-2, "epochs": 1.0, "batch": 4},
            "checks": {"per_epoch": 1, "items": 6},
        },
        attribute={"top": 20, "sign": "either"},
        select={"by": "annotations", "items": 4, "controls": {"random": 2, "directions": 0}},
        splits=("validation", "ambiguous", "ood"),
    )


def test_the_recipe_end_to_end_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    small = tiny_plan(tmp_path / "home")
    monkeypatch.setattr(recipe, "plan_of", lambda spec: small)
    done = recipe.run(ConceptAblationSpec(device="cpu"), tmp_path / "runs")
    result = done.result
    assert not done.reused and {one.part for one in result.runs} == {"train", "attribute", "cue", "select", "trials"}
    assert [task.name for task in result.tasks] == list(small.tasks)
    for task in result.tasks:
        assert {one.condition for one in task.trials} == {*small.conditions, "none", "both"}
        assert 0 < task.chosen < task.candidates and sum(one.chosen for one in task.sites) == task.chosen
        plain, edited = task.of("none"), task.of("test")
        assert [one.finetuned for one in plain] == [one.finetuned for one in edited]
        for one in plain:
            (ood,) = [split for split in one.finetuned.splits if split.name == "ood"]
            assert one.score("ood") == ood.tuned and ood.edited is not None
        assert task.of("zero")[0].finetuned.selection != task.of("random")[0].finetuned.selection
        assert {one.finetuned.data.endswith("skyline") for one in task.of("skyline")} == {True}
    html, told = (done.path / "report.html").read_text(), (done.path / "claims.md").read_text()
    for claim in claims.claims(result):
        assert claim.verdict in html and claim.verdict in told
    before = next(one.base for one in plain[0].finetuned.splits if one.name == "ood").accuracy
    assert before is not None and result.tasks[-1].before("ood") == before.between.value and "Before training" in html
    assert html.count("<svg") >= 6 and "default-src 'none'" in html
    assert "| gender | plain fine-tuning |" in (done.path / "table.md").read_text()
    assert result.rows() and view.section(result).tiles
    assert as_read(ConceptAblation, json.loads(json.dumps(as_written(result))), "") == result

    monkeypatch.setattr(recipe, "open_saes", lambda *args, **options: pytest.fail("something was loaded"))
    again = recipe.run(ConceptAblationSpec(device="cpu"), tmp_path / "runs")
    assert again.reused and again.result == result
