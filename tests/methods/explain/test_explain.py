"""methods/explain against counting by hand, and `unweave explain` with scripted judges."""

from __future__ import annotations

import gzip
import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from helpers.explained import train_small
from unweave.core.errors import UnweaveError
from unweave.core.result import as_read, as_written
from unweave.core.run import Run
from unweave.judge.base import Budget, CachedJudge, Conversation, Reply
from unweave.judge.check import auroc, check, fluency_texts, known_texts
from unweave.judge.form import rate, rating_form
from unweave.judge.scripted import Scripted
from unweave.judge.spec import JudgeSpec
from unweave.latents import annotations
from unweave.latents.explaining import EXPLAIN, fires, marked, strangers, tokens_of
from unweave.latents.latent_record import Context, LatentRecord
from unweave.latents.relevance import RELEVANCE, About, QuerySpec
from unweave.lm.chat import Role
from unweave.methods.explain import neuronpedia, stage, view
from unweave.methods.explain.examples import choose_examples, elsewhere
from unweave.methods.explain.explain import check_reading, explain_and_score, input_scores, rate_relevance
from unweave.methods.explain.result import ExplainResult
from unweave.methods.explain.scores import above, claims, score, simulations
from unweave.methods.explain.simulate import Simulated, activations, correlation, simulate
from unweave.methods.explain.spec import ExamplesSpec, ExplainSpec, PricesSpec


def context(document: int, values: list[float], band: int | None = None, words: str = "") -> Context:
    texts = tuple(f" {word}" for word in (words.split() or [f"d{document}w{i}" for i in range(len(values))]))
    focus, n = int(np.argmax(values)), len(values)
    return Context(
        tuple(range(n)), texts, tuple(values), (True,) * n, focus, 100 * document + focus, document, Role.TEXT, band
    )


def record(latent: int = 3, top: int = 6, quantile: int = 12, silent: int = 9) -> LatentRecord:
    """Contexts in documents of their own, those of the weakest quantiles in the top contexts' documents."""
    tops = tuple(context(d, [0.0, 10.0 - d / 10, 0.0, 0.0]) for d in range(top))
    bands = tuple(context(top + d, [0.0, 0.0, 5.0 - d / 10, 0.0], band=d % 3) for d in range(quantile))
    bands += tuple(context(d, [3.0, 0.0, 0.0, 0.0], band=d % 3) for d in range(top))
    others = (*(context(50 + d, [0.0] * 4) for d in range(silent)), context(90, [0.0, 1.0, 0.0, 0.0]))
    return LatentRecord(latent, 9, 0.1, 10.0, 1.0, 0.0, (), (), tops, bands, others)


# -- examples ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shown", "tests"), [(6, 4), (10, 6), (3, 3), (40, 40)])
def test_no_document_is_shown_and_tested(shown: int, tests: int) -> None:
    for seed in range(5):
        examples = choose_examples(record(), shown, tests, seed)
        assert examples is not None
        groups = [[one.document for one in some] for some in (examples.shown, examples.active, examples.silent)]
        flat = [document for group in groups for document in group]
        assert len(flat) == len(set(flat)) and len(groups[0]) <= shown and max(map(len, groups[1:])) <= tests
        assert all(one.value > 0 for one in (*examples.shown, *examples.active))
        assert not any(value for one in examples.silent for value in one.values)
        strong = sum(one.band is None for one in examples.shown)
        assert strong >= min(6, len(examples.shown) // 2)
        if (shown, tests) == (6, 4):
            assert {one.band for one in examples.active} == {None, 0, 1, 2}  # of all strengths
    assert choose_examples(record(), 6, 4, 1) == choose_examples(record(), 6, 4, 1)
    assert choose_examples(record(), 6, 4, 1) != choose_examples(record(), 6, 4, 2)


def test_silent_texts_are_of_no_shown_document() -> None:
    tops = record()
    random_too = replace(tops, random=(*(context(d, [0.0] * 4) for d in range(6)), *tops.random))
    for seed in range(5):
        examples = choose_examples(random_too, 6, 12, seed)
        assert examples is not None
        assert {one.document for one in examples.shown}.isdisjoint(one.document for one in examples.silent)


def test_a_text_that_has_no_other_tokens_to_mark_is_left_out() -> None:
    examples = choose_examples(record(), 6, 4)
    assert examples is not None
    full = replace(examples, active=(context(1, [2.0, 2.0, 0.0]), *examples.active[1:]))
    asked = list(claims("fuzzing", full, "w"))
    assert [true for _, true in asked] == [True, False] * (len(examples.active) - 1)


def test_latents_with_too_few_contexts_are_left_out() -> None:
    assert choose_examples(record(top=2, quantile=3)) is None
    assert choose_examples(record(silent=2)) is None
    assert choose_examples(record(top=3, quantile=3)) is not None


def test_marks_stand_where_the_latent_fires_and_as_many_stand_elsewhere() -> None:
    one = context(1, [0.0, 4.0, 3.0, 1.0, 0.0, 0.0, 2.0], words="a b <<c d\ne f g")
    assert fires(one, 0.3) == [False, True, True, False, False, False, True]
    assert marked(one, fires(one, 0.3)) == " a<< b < <c>> d e f<< g>>".replace("d e", "d e")
    assert "".join(tokens_of(one)) == " a b < <c d e f g"
    for seed in range(10):
        off = elsewhere(one, fires(one, 0.3), np.random.default_rng(seed))
        assert off is not None and sum(off) == 3 and {i for i, on in enumerate(off) if on} <= {0, 4, 5}
    assert elsewhere(one, [True] * 4 + [False] * 3, np.random.default_rng(0)) is None
    half = replace(one, counted=(True,) * 6 + (False,))
    assert fires(half, 0.3)[6] is False


# -- scores --------------------------------------------------------------------------------------------------------


def test_auroc_is_the_share_of_pairs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = (
            rng.integers(0, 4, rng.integers(1, 9)).astype(float),
            rng.integers(0, 4, rng.integers(1, 9)).astype(float),
        )
        pairs = [float(x > y) + 0.5 * float(x == y) for x in a for y in b]
        assert auroc(np.append(a, math.nan), b) == pytest.approx(np.mean(pairs))
    assert auroc([], [1.0]) is None and auroc([math.nan], [1.0]) is None


def knows(words: dict[str, str]) -> Any:
    """A judge to whom an explanation ``word-j`` means that a text holds ``words[word-j]``, marked or not."""

    def answer(talk: Conversation) -> str:
        label, text = re.fullmatch(r"Description: (.*)\nText: (.*)", talk[-1]["content"], re.DOTALL).groups()  # type: ignore[union-attr]
        spans = re.findall(r"<<(.*?)>>", text)
        fits = words[label] in text if not spans else all(words[label] in span for span in spans)
        return f"Rating: [[{int(fits)}]]"

    return answer


def test_scores_are_one_for_the_truth_and_chance_for_another_latents_words() -> None:
    examples, words = [], {}
    for j in range(6):
        name = f"word-{j}"
        words[name] = f"yes{j}"
        tops = tuple(context(d, [0.0, 9.0, 0.0], words=f"no yes{j} no") for d in range(8))
        bands = tuple(context(8 + d, [4.0, 0.0, 0.0], d % 3, words=f"yes{j} no no") for d in range(8))
        silent = tuple(context(50 + d, [0.0] * 3, words="no no no") for d in range(8))
        made = choose_examples(LatentRecord(j, 9, 0.1, 9.0, 1.0, 0.0, (), (), tops, bands, silent), 6, 5)
        assert made is not None
        examples.append(made)
    labels = {j: f"word-{j}" for j in range(6)}
    judge = Scripted(knows(words))
    for name in ("detection", "fuzzing"):
        own, other = (score(judge, name, examples, some) for some in (labels, strangers(labels)))
        assert own.values == dict.fromkeys(range(6), 1.0)
        assert other.values == dict.fromkeys(range(6), 0.5)
        assert {len(column) for column in own.columns.values()} == {len(own.latents)} and own.ratings.failures == {}
        assert sum(own.columns["truth"]) == len(own.columns["truth"]) / 2
        gap = above(own.values, other.values)
        assert gap is not None and gap.value == 0.5 and gap.p is not None
    for claim, true in claims("fuzzing", examples[0], "word-0"):
        assert claim.text.count("<<") == 1 and ("yes0" in re.findall("<<(.*?)>>", claim.text)[0]) == true


def test_every_explanation_is_used_for_one_other_latent() -> None:
    labels = {j: f"w{j}" for j in (3, 9, 12, 40)}
    for seed in range(5):
        other = strangers(labels, seed)
        assert sorted(other) == sorted(labels) and sorted(other.values()) == sorted(labels.values())
        assert all(other[j] != labels[j] for j in labels)
    assert strangers({3: "w"}) == {}


def test_the_difference_in_pairs_has_the_p_value_of_all_sign_changes() -> None:
    own, other = dict(enumerate([0.9, 0.8, 0.7, 0.9, 0.6])), dict(enumerate([0.5, 0.6, 0.5, 0.4, 0.7]))
    gap = above(own, other)
    d = np.array([own[j] - other[j] for j in own])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 5)).reshape(5, -1).T
    exact = (np.abs(signs @ d) >= abs(d.sum()) - 1e-12).mean()
    assert gap is not None and gap.value == pytest.approx(d.mean()) and gap.p == pytest.approx(exact, abs=0.015)
    few = above({0: 1.0, 1: None}, {0: 0.5, 1: 0.5})
    assert few is not None and few.p is None
    assert above({0: None}, {0: 1.0}) is None


def test_simulation_is_the_expectation_over_digits_at_every_token() -> None:
    tops = tuple(context(d, [0.0, 9.0, 3.0, 0.0]) for d in range(8))
    silent = tuple(context(50 + d, [0.0] * 4) for d in range(8))
    examples = choose_examples(LatentRecord(2, 9, 0.1, 9.0, 1.0, 0.0, (), (), tops, (), silent), 4, 4)
    assert examples is not None
    cases = list(simulations(examples, "words"))
    assert [true.tolist() for _, true in cases] == [[0, 9, 3, 0]] * 4 + [[0] * 4] * 4

    class Reader(Scripted):
        """Expects (i + 1) at the i-th token, half as 0 and half as twice that, with much else beside the digits."""

        reads = True

        def read(self, talks: list[Conversation], places: list[list[int]]) -> list[Reply]:
            replies = []
            for talk, each in zip(talks, places, strict=True):
                given = talk[-1]["content"]
                assert talk[-1]["role"] == "assistant" and [given[at - 1] for at in each] == ["\t"] * 4
                assert all(given[at:].startswith("unknown\n") for at in each)
                odds = [{"0": math.log(0.01), str(2 * i + 2): math.log(0.01), "85": -0.1} for i in range(4)]
                replies.append(Reply(given, numbers=dict(zip(each, odds, strict=True))))
            return replies

    scored = score(Reader([]), "simulation", [examples], {2: "words"})
    expected, true = np.tile([1.0, 2.0, 3.0, 4.0], 8), np.concatenate([t for _, t in cases])
    assert scored.values[2] == pytest.approx(np.corrcoef(expected, true)[0, 1])
    assert scored.columns["correlation"][:4] == pytest.approx([np.corrcoef([1, 2, 3, 4], [0, 9, 3, 0])[0, 1]] * 4)
    assert scored.columns["correlation"][4:] == [None] * 4
    assert correlation([1, 1], [0, 9]) == 0.0


def test_true_activations_are_whole_ninths_rounded_down() -> None:
    tops = tuple(context(d, [8.0, 1.9, 0.5, 4.6]) for d in range(8))
    silent = tuple(context(50 + d, [0.0] * 4) for d in range(8))
    examples = choose_examples(LatentRecord(2, 9, 0.1, 8.0, 1.0, 0.0, (), (), tops, (), silent), 4, 4)
    assert examples is not None
    assert next(true.tolist() for _, true in simulations(examples, "words")) == [9, 2, 0, 5]  # of 9, 2.14, 0.56, 5.18


def test_a_simulation_that_failed_counts_nowhere() -> None:
    tops = tuple(context(d, [0.0, 9.0, 3.0, 0.0]) for d in range(8))
    silent = tuple(context(50 + d, [0.0] * 4) for d in range(8))
    examples = choose_examples(LatentRecord(2, 9, 0.1, 9.0, 1.0, 0.0, (), (), tops, (), silent), 4, 4)
    assert examples is not None

    def answer(talk: Conversation) -> str:
        tokens = talk[-1]["content"].split("Tokens:\n")[1].split("\n")
        if "d50" in tokens[0] or tokens[0] == broken:
            return "I cannot say."
        return "\n".join(f"{token}\t{strength}" for token, strength in zip(tokens, (1, 8, 2, 0), strict=True))

    broken = tokens_of(examples.active[0])[0]
    scored = score(Scripted(answer), "simulation", [examples], {2: "words"})
    usable = [true for _, true in simulations(examples, "words")][1:]
    usable = [true for true, (one, _) in zip(usable, examples.tests[1:], strict=True) if one.document != 50]
    expected = np.corrcoef(np.tile([1.0, 8.0, 2.0, 0.0], len(usable)), np.concatenate(usable))[0, 1]
    assert 0 < len(usable) < len(examples.tests) and sum(scored.ratings.failures.values()) == 8 - len(usable)
    assert scored.values[2] == pytest.approx(expected)
    assert scored.columns["correlation"][0] is None and scored.columns["correlation"][1] is not None
    nothing = score(Scripted(["no"] * 8), "simulation", [examples], {2: "words"})
    assert nothing.values == {2: None}


def test_a_judge_that_writes_the_strengths_must_write_all() -> None:
    case = Simulated("words", (" a", " b", "2"))
    replies = [" a\t0\n b\t9\n2\t3", "a\t0\nb\t9", " a\t0\n b\t?\n2\t3", " a\t0\n b\t10\n2\t3", "no", None]
    rows = simulate(Scripted(replies), [case] * 6).rows
    first = activations(rows[0])
    assert first is not None and first.tolist() == [0, 9, 3]
    assert all(activations(row) is None and row.failure for row in rows[1:])

    class Sure(Scripted):
        def ask(self, conversations: Any, until: str = "") -> list[Reply]:
            return [Reply(" a\t0\n b\t9\n2\t3", numbers={3: {"0": math.log(0.5), "4": math.log(0.5)}})]

    (row,) = simulate(Sure([]), [case]).rows
    first = activations(row)
    assert first is not None and first.tolist() == [2, 9, 3]


def test_input_scores_count_contexts_whose_strongest_token_is_promoted(monkeypatch: pytest.MonkeyPatch) -> None:
    made = choose_examples(record(), 6, 4)
    assert made is not None
    monkeypatch.setattr("unweave.methods.explain.explain.lens_tokens", lambda lm, sae, latents: torch.tensor([[1, 77]]))
    contexts = (*made.shown, *made.active)
    wanted = sum(one.values[1] > 0 for one in contexts) / len(contexts)
    assert input_scores(None, None, [made]) == [wanted] and 0 < wanted < 1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ("They are months. Explanation: [[names of\n months]]", "names of months"),
        ("explanation: [[a]] or explanation: [[b]]", "b"),
        ("explanation: [[a few words]]", None),
        ("explanation: [[ ... ]]", None),
        ("months", None),
    ],
)
def test_an_explanation_is_read_exactly_or_fails(reply: str, words: str | None) -> None:
    made = choose_examples(record(), 6, 4)
    assert made is not None
    (row,) = rate(Scripted([reply]), EXPLAIN, [made]).rows
    assert (row.words or None) == words and bool(row.failure) == (words is None)
    text = row.prompt[-1]["content"]
    assert text.count("Text ") == 6 and text.count("<<") == 6


# -- judges checked ------------------------------------------------------------------------------------------------


def test_what_a_judge_wrote_in_place_of_any_explanation_is_said() -> None:
    examples = choose_examples(record(), 6, 4)
    assert examples is not None
    judge: Any = Scripted(["I will not \x1b[31m" * 9])
    with pytest.raises(UnweaveError, match="asked for; the first reply is 'I will not ") as caught:
        explain_and_score(judge, SimpleNamespace(), [examples], ["detection"])  # type: ignore[arg-type]
    assert "\x1b" not in caught.value.what and len(caught.value.what) < 250


def test_a_judge_that_reads_is_told_from_one_that_does_not() -> None:
    known = {(one.concept, one.text): one.right for one in known_texts()}
    assert len(known) == 32 and sum(known.values()) == 16

    def truth(talk: Conversation) -> str:
        concept, text = re.fullmatch(r"Description: (.*)\nText: (.*)", talk[-1]["content"]).groups()  # type: ignore[union-attr]
        return f"Rating: [[{int(known[concept, text])}]]"

    good = check_reading(Scripted(truth))
    assert good.reads and good.auroc == 1.0 and good.aurocs == {"near miss": 1.0, "unrelated": 1.0}
    same = check_reading(Scripted(lambda _: "Rating: [[1]]"))
    assert not same.reads and same.auroc == 0.5 and same.verdict.startswith("not shown to read: AUROC 0.50")
    mute = check_reading(Scripted(lambda _: "well"))
    assert not mute.reads and mute.auroc is None and mute.failed == 32
    rng = random.Random(0)
    often = check_reading(Scripted(lambda talk: truth(talk) if rng.random() < 0.6 else "hm"))
    assert often.auroc == 1.0 and not often.reads  # too many answers failed
    fluency = rating_form("fluency", 1, lambda text: [{"role": "user", "content": text}], (0, 1, 2))
    texts = fluency_texts()
    fluent = {text for text, right, _ in texts if right}
    judged = check(Scripted(lambda talk: f"Rating: [[{2 * (talk[0]['content'] in fluent)}]]"), fluency, texts)
    assert judged.reads and set(judged.aurocs) == {"loop", "shuffled words"} and len(fluent) == 16


# -- Neuronpedia ---------------------------------------------------------------------------------------------------


def test_neuronpedias_files_are_read_and_written(tmp_path: Path) -> None:
    labels = {j: f"words {j}" for j in (3, 12)}
    neuronpedia.write(tmp_path / "a.jsonl", "m", "9-res", "gpt", labels)
    assert neuronpedia.read(tmp_path / "a.jsonl") == labels
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {
        "modelId": "m", "layer": "9-res", "index": "12", "description": "words 12",
        "typeName": "unweave", "explanationModelName": "gpt",
    }  # fmt: skip
    rows = [json.loads(line) | {"embedding": [0.1], "id": "x"} for line in lines]
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    for name in ("b.json", "c.jsonl.gz"):
        assert neuronpedia.read(tmp_path / name) == labels
    (tmp_path / "two.json").write_text(json.dumps([*rows, rows[0] | {"layer": "10-res"}]))
    with pytest.raises(UnweaveError, match="2 sources"):
        neuronpedia.read(tmp_path / "two.json")
    for content in (b'{"modelId": "m"}', b'[{"modelId": "m", "layer": "9", "index": "x", "description": "y"}]', b"[3]",
                    b"{", b"\xff", b"\x1f\x8bxx"):  # fmt: skip
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(UnweaveError):
            neuronpedia.read(tmp_path / "bad.json")


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def trained(home: Path) -> Run:
    return train_small(home)


def says(talk: Conversation) -> str:
    """Something for each kind of question."""
    text = talk[-1]["content"]
    if text.startswith("Text 1:"):
        return f"explanation: [[words {len(text)}]]" if "<<" in text else "One. score: [[4]], name: [[w]]"
    if text.startswith("Topic"):
        return f"Rating: [[{len(text) % 101}]]"
    if "\nTokens:" in text:
        return "\n".join(f"{token}\t{len(token) % 10}" for token in text.split("Tokens:\n")[1].split("\n"))
    return f"Rating: [[{len(text) % 2}]]"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> list[Scripted]:
    made: list[Scripted] = []

    def open_judge(spec: JudgeSpec, folder: Path, device: str | None) -> CachedJudge:
        made.append(Scripted(says, name=spec.model))
        return CachedJudge(made[-1], folder, Budget(spec.budget_requests, spec.budget_tokens))

    monkeypatch.setattr(stage, "open_judge", open_judge)
    monkeypatch.setattr(stage, "check_judge", lambda spec: None)
    return made


def spec_of(trained: Run, **changes: Any) -> ExplainSpec:
    spec = ExplainSpec(
        sae=trained.path / "sae",
        random=6,
        scores=("detection", "fuzzing", "simulation", "rubric"),
        examples=ExamplesSpec(shown=4, tests=3, tokens=2500),
        device="cpu",
        judge=JudgeSpec(model="scripted"),
    )
    return replace(spec, **changes)


def test_the_command_explains_scores_selects_and_writes(trained: Run, tmp_path: Path, scripts: list[Scripted]) -> None:
    done = stage.run(spec_of(trained, query=QuerySpec(text="sea", by="judge", at_least=0.3)), tmp_path)
    result: ExplainResult = done.result
    assert len(result.latents) == 6 and [one.score for one in result.scores] == list(spec_of(trained).scores)
    rows = pq.read_table(done.path / "answers.parquet").to_pylist()
    assert {row["labels"] for row in rows} == {"explained", "own", "shuffled", "query"}
    for one in result.latents:
        for name in ("detection", "fuzzing"):
            for labels, values in (("own", one.scores), ("shuffled", one.shuffled)):
                here = [r for r in rows if (r["latent"], r["form"], r["labels"]) == (one.latent, f"{name}-1", labels)]
                a, b = ([r["values"][0] for r in here if r["truth"] == true] for true in (1.0, 0.0))
                assert values[name] == pytest.approx(auroc(a, b))
        assert one.relevance is not None and one.selected == (one.relevance >= 0.3) and one.output_score is not None
        assert one.scores["rubric"] == 4.0 and "rubric" not in one.shuffled and one.kind is not None
    for summary in result.scores[:3]:
        mean = np.mean([v for v in (one.scores[summary.score] for one in result.latents) if v is not None])
        assert summary.chosen is not None and summary.chosen.value == pytest.approx(mean) and summary.failed == 0
    assert result.check is not None and not result.check.reads
    assert "not shown to read" in str(result.rows()) and "do not build on its ratings" in str(
        view.section(result).notes
    )
    assert as_read(ExplainResult, json.loads(json.dumps(as_written(result))), "here") == result
    assert result.prompt_tokens == sum(row["prompt_tokens"] for row in rows) > 0

    said = annotations.load(done.path / "annotations.jsonl")
    assert {one.latent: one.annotation for one in said.values()} == {o.latent: o.explanation for o in result.latents}
    page = view.section(result).body
    assert all(one.explanation in page for one in result.latents)

    judged = len(scripts[0].asked)
    for given in ("annotations.jsonl", "neuronpedia.jsonl"):  # the same words from a file: nothing new is asked
        again = stage.run(spec_of(trained, explanations=done.path / given), tmp_path)
        assert again.result.latents[0].scores == result.latents[0].scores
        assert scripts[-1].asked == [] and judged > 0


def test_interrupted_it_goes_on_and_nothing_is_asked_twice(
    trained: Run, tmp_path: Path, scripts: list[Scripted]
) -> None:
    spec = spec_of(trained, scores=("detection",), check_judge=False)
    with pytest.raises(UnweaveError, match="budget is spent"):
        stage.run(replace(spec, judge=replace(spec.judge, budget_requests=20)), tmp_path)
    done = stage.run(spec, tmp_path)
    whole = stage.run(spec, tmp_path / "at once")
    assert done.result.latents == whole.result.latents
    assert len(scripts[0].asked) == 20 and sum(len(one.asked) for one in scripts[:2]) == len(scripts[2].asked)


def test_named_latents_have_random_ones_beside_them(trained: Run, tmp_path: Path, scripts: list[Scripted]) -> None:
    first = stage.run(spec_of(trained, scores=("detection",), check_judge=False), tmp_path).result
    named = tuple(one.latent for one in first.latents[:2])
    spec = spec_of(trained, latents=named, random=None, scores=("detection",), check_judge=False)
    result = stage.run(spec, tmp_path).result
    assert [one.latent for one in result.latents if not one.random] == list(named)
    assert sum(one.random for one in result.latents) == 2 and result.scores[0].random is not None
    dead = stage.run(replace(spec, latents=(*named, 63), random=0), tmp_path)
    assert set(dead.result.too_few) <= {63}


def test_latents_are_drawn_among_those_with_a_given_explanation(
    trained: Run, tmp_path: Path, scripts: list[Scripted]
) -> None:
    neuronpedia.write(tmp_path / "even.jsonl", "m", "1", "gpt", {j: f"words {j}" for j in range(0, 64, 2)})
    spec = spec_of(trained, explanations=tmp_path / "even.jsonl", random=3, scores=("detection",), check_judge=False)
    drawn = [one.latent for one in stage.run(spec, tmp_path).result.latents]
    assert len(drawn) == 3 and not any(j % 2 for j in drawn)
    with pytest.raises(UnweaveError, match="latent 64 does not exist"):
        stage.run(replace(spec, latents=(64,)), tmp_path)
    with pytest.raises(UnweaveError, match="no model 'nowhere'"):
        stage.run(replace(spec, query=QuerySpec(text="sea", embedder="nowhere")), tmp_path)
    assert len(scripts) == 1  # nothing was asked


def test_a_latent_without_a_given_explanation_has_a_reason() -> None:
    examples = [choose_examples(record(j), 6, 4) for j in (3, 4)]
    assert examples[0] is not None and examples[1] is not None
    chosen: Any = examples
    explained = explain_and_score(Scripted(lambda _: "Rating: [[1]]"), None, chosen, ["detection"], given={3: "w"})  # type: ignore[arg-type]
    assert explained.failures == {4: "none was given"} and explained.own["detection"] == {3: 0.5}
    assert explained.shuffled["detection"] == {} and explained.summaries[0].shuffled is None
    ratings = rate_relevance(Scripted(["well"]), "sea", explained)
    assert ratings == {} and explained.answers[-1]["labels"] == "query" and explained.answers[-1]["failure"]


def test_what_it_takes_is_said_first_and_a_price_too_high_is_refused(
    trained: Run, tmp_path: Path, scripts: list[Scripted]
) -> None:
    prices = PricesSpec(prompt=1.0, reply=4.0)
    plan = stage.run(spec_of(trained, ask=False, prices=prices), tmp_path).result
    assert len(scripts[0].asked) == 1 and plan.latents == () and plan.seconds is not None
    done = stage.run(spec_of(trained), tmp_path)
    asked = len(scripts[0].asked) + len(scripts[1].asked)  # equal texts are asked once
    assert 0.85 * plan.estimate.prompts < asked <= plan.estimate.prompts
    counted = sum(8 + len(m["content"]) / 4 for one in scripts for talk in one.asked for m in talk)
    assert 0.9 < plan.estimate.prompt_tokens / counted < 1.4
    estimate = plan.estimate
    assert estimate.price == pytest.approx((estimate.prompt_tokens + 4 * estimate.new_tokens) / 1e6)
    assert done.result.estimate == replace(estimate, price=None)
    with pytest.raises(UnweaveError, match="asking would take about"):
        stage.run(spec_of(trained, prices=replace(prices, most=0.001), random=5), tmp_path)
    assert len(scripts) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"latents": (3, 3)}, "all different"),
        ({"random": 0}, "no latents to explain"),
        ({"scores": ("detection", "detection")}, "all different"),
        ({"prices": {"most": 3.0}}, "both"),
        ({"latents": (3, -1)}, "from 0 on"),
        ({"query": {"text": "sea", "by": "judge", "embedder": "x"}}, "no effect"),
        ({"query": {"at_least": 0.7}}, "no effect"),
        ({"query": {"text": "sea", "at_least": 70}}, "from -1 to 1"),
        ({"query": {"text": " "}}, "words"),
        ({"examples": {"tests": 1}}, "at least 3"),
    ],
)
def test_options_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnweaveError) as caught:
        ExplainSpec.from_dict({"sae": "x"} | fields)
    assert message in str(caught.value)


def test_relevance_is_asked_from_0_to_100() -> None:
    ratings = rate(Scripted(["Rating: [[85]]", "Rating: [[101]]"]), RELEVANCE, [About("dates", "months")] * 2)
    np.testing.assert_array_equal(ratings.values, [85, math.nan])
    assert "Topic: dates\nDescription: months" in ratings.rows[0].prompt[-1]["content"]
