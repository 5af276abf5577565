"""Automated interpretability: planted words, judges that know them, and SAEBench's accuracy counted by hand."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from helpers.models import build_tiny_tokenizer
from unweave.core.errors import UnweaveError
from unweave.data.pack import Row
from unweave.data.tokens import TokenStore
from unweave.judge.base import CachedJudge
from unweave.judge.form import rate
from unweave.judge.scripted import Scripted
from unweave.latents.explaining import EXPLAIN, SELECT, Selection, strangers
from unweave.methods.saebench import autointerp
from unweave.methods.saebench.spec import AutointerpSpec, SaebenchSpec
from unweave.methods.saebench.stage import run

SPEC = {form: SaebenchSpec(saes=("x",), form=form, seeds=2) for form in ("correct", "compatible")}
WORDS = ("sea", "old", "key")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Documents of letters in which words stand; latent j fires on word j's letters, more on later ones."""
    tokenizer, rng = build_tiny_tokenizer(), np.random.default_rng(0)
    rows, firings, token = [], {j: ([], []) for j in range(len(WORDS))}, 0
    for document in range(300):
        words = rng.choice([*WORDS, "in", "it", "at", "on", "up"], 12).tolist()
        if document % 3:
            words = [word for word in words if word not in WORDS] * 2
        line = " ".join(words)
        ids = tokenizer(line, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(line), "a token for each letter"
        rows.append(Row(ids, [0] * len(ids), document))
        for j, word in enumerate(WORDS):
            for match in re.finditer(word, line):
                for i in range(3):
                    firings[j][0].append(token + match.start() + i)
                    firings[j][1].append(float(1 + i + rng.random()))
        token += len(ids)
    store = TokenStore.write(tmp_path_factory.mktemp("store"), rows, None, {}, unit="documents")
    arrays = {j: (np.array(at), np.array(values, np.float32)) for j, (at, values) in firings.items()}
    return autointerp.Text(store, tokenizer, np.arange(token), arrays)


def knowing(talk):
    """A judge who sees the word that is marked everywhere, and finds it."""
    asked = talk[-1]["content"]
    texts = re.findall(r"^Text \d+: (.*)$", asked, re.MULTILINE)
    if "Description: " not in asked:
        return f"explanation: [[{max(WORDS, key=lambda word: sum(f'<<{word}>>' in one for one in texts))}]]"
    word = re.search("Description: (.*)", asked)[1]
    return f"Texts: [[{', '.join(str(i) for i, one in enumerate(texts, 1) if word in one) or 'none'}]]"


@pytest.mark.parametrize("form", ["correct", "compatible"])
def test_a_judge_who_knows_the_words_finds_them(text, form):
    cases = [autointerp.case_of(j, text, SPEC[form]) for j in range(len(WORDS))]
    judge = Scripted(knowing)
    labels = {row.case.latent: row.words for row in rate(judge, EXPLAIN, cases).rows}
    assert labels == dict(enumerate(WORDS))
    own = autointerp.selected(judge, cases, labels, form)
    for one in cases:
        assert len(one.marked) == 15 and len(one.texts) == 14 and sum(one.fires) == 4
        assert all(f"<<{WORDS[one.latent]}>>" in window for window in one.marked)
        right = [(WORDS[one.latent] in window) == on for window, on in zip(one.texts, one.fires, strict=True)]
        assert own[one.latent] == pytest.approx(1.0 if form == "correct" else np.mean(right))
    if form == "correct":
        other = autointerp.selected(judge, cases, strangers(labels), form)
        assert np.mean(list(other.values())) < 0.85, "another word's windows are no more likely to hold this one"
    else:
        assert min(own.values()) < 1, "random windows with the word count as silent there"


def test_naming_nothing_has_chance_in_the_correct_form_alone(text):
    cases = [autointerp.case_of(0, text, SPEC["correct"])]
    nothing = Scripted(lambda talk: "Texts: [[none]]")
    assert autointerp.selected(nothing, cases, {0: "x"}, "correct") == {0: 0.5}
    assert autointerp.selected(nothing, cases, {0: "x"}, "compatible") == {0: pytest.approx(10 / 14)}
    assert autointerp.selected(Scripted(["no idea"]), cases, {0: "x"}, "correct") == {0: None}
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth, named = (rng.random(9) < 0.4).tolist(), sorted({*rng.integers(1, 10, 4).tolist()})
        said = [i + 1 in named for i in range(9)]
        hits = [a == b for a, b in zip(said, truth, strict=True)]
        assert autointerp.accuracy(truth, named, "compatible") == pytest.approx(np.mean(hits))
        sides = [[hit for hit, on in zip(hits, truth, strict=True) if on == side] for side in (True, False)]
        if all(sides):
            assert autointerp.accuracy(truth, named, "correct") == pytest.approx(np.mean([np.mean(s) for s in sides]))


def test_windows_share_no_document_and_are_drawn_by_the_square(text):
    tokens, values = text.firings[1]
    seen = []
    for seed in range(40):
        spec = replace(SPEC["correct"], seed=seed)
        one = autointerp.case_of(1, text, spec)
        assert len({*one.marked, *one.texts}) == 29 or len({*one.texts}) >= 13
        keys = np.log(np.random.default_rng(seed).random(len(tokens))) / values.astype(np.float64) ** 2
        seen += autointerp._picked(np.argsort(-keys), 1, np.ones(len(tokens), bool), lambda i: tokens == tokens[i])
    drawn, weights = np.mean(values[seen]), values.astype(np.float64) ** 2
    assert drawn == pytest.approx(float((weights * values).sum() / weights.sum()), abs=0.35)
    documents = text.document(tokens)
    assert (documents == np.searchsorted(text.starts, tokens, side="right") - 1).all()
    rare = autointerp.Text(text.store, text.tokenizer, text.counted, {0: (tokens[:6], values[:6])})
    assert autointerp.case_of(0, rare, SPEC["correct"]) is None


@pytest.mark.parametrize(
    ("reply", "values"),
    [("Texts: [[2, 1]]", (1, 2)), ("texts: [3]", (3,)), ("Texts: [[none]]", ()), ("Texts: [[4]]", None),
     ("1, 2", None), ("Texts: [[1 2]]", None)],
)  # fmt: skip
def test_a_list_of_texts_is_read_as_it_is_asked_for(reply, values):
    (row,) = rate(Scripted([reply]), SELECT, [Selection("x", ("a", "b", "c"))]).rows
    assert (row.answer.values if row.answer else None) == values and bool(row.failure) == (values is None)


def test_the_judge_is_checked_on_known_texts():
    def reads(talk):
        asked = talk[-1]["content"]
        texts = re.findall(r"^Text \d+: (.*)$", asked, re.MULTILINE)
        known = {one.text: one.right for one in autointerp.known_texts() if one.concept in asked}
        return f"Texts: [[{', '.join(str(i) for i, one in enumerate(texts, 1) if known[one]) or 'none'}]]"

    assert autointerp.check_selecting(Scripted(reads)).auroc == 1
    everything = autointerp.check_selecting(Scripted(lambda talk: "Texts: [[1, 2, 3, 4]]"))
    assert everything.auroc == 0.5 and not everything.reads
    assert autointerp.check_selecting(Scripted(lambda talk: "yes")).failed == 32


def test_the_task_runs_with_controls_and_refuses_what_it_cannot(trained, runs, monkeypatch):
    judge = CachedJudge(Scripted(lambda talk: "explanation: [[letters]]" if "Description: " not in talk[-1]["content"]
                                 else "Texts: [[1, 5]]"))  # fmt: skip
    monkeypatch.setattr(autointerp, "open_judge", lambda *_: judge)
    monkeypatch.setattr(autointerp, "check_judge", lambda *_: None)
    spec = SaebenchSpec(saes=(str(trained.path / "sae"),), tasks=("autointerp",), seeds=2, device="cpu",
                        autointerp=AutointerpSpec(latents=4, tokens=4000))  # fmt: skip
    done = run(spec, runs)
    (scores,) = done.result.scores
    (headline,) = [m for m in scores.measures if m.better]
    assert {gap.baseline for gap in headline.gaps} == {"random directions", "other latents' explanations"}
    assert headline.untold, "a judge who answers always alike tells nothing apart"
    assert "not shown to read" in " ".join(scores.notes)
    file = json.loads((done.path / scores.file).read_text())
    assert file["eval_result_metrics"]["autointerp"].keys() == {"autointerp_score", "autointerp_std_dev"}
    assert len(file["eval_result_details"]) == 4
    with pytest.raises(UnweaveError, match="latents fire in 19 windows"):
        run(replace(spec, autointerp=AutointerpSpec(latents=500, tokens=4000)), runs)
    with pytest.raises(UnweaveError, match="leave none for some of 5 seeds"):
        SaebenchSpec(saes=("x",), tasks=("autointerp",), autointerp=AutointerpSpec(latents=4))
