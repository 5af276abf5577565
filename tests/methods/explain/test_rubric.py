"""methods/explain/rubric against counting by hand, and `unweave rubric` with a scripted judge on a tiny model's SAE."""

from __future__ import annotations

import base64
import json
import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.explained import train_small
from helpers.raw_server import KEY, Raw, completion, http, leaks
from unweave.cli.app import main
from unweave.core.codes import Codes
from unweave.core.errors import UnweaveError
from unweave.core.intervals import Interval
from unweave.core.result import as_read, as_written
from unweave.core.run import Run
from unweave.judge.base import Budget, CachedJudge, Conversation, Reply
from unweave.judge.form import Answer, Rating, rate
from unweave.judge.scripted import Scripted
from unweave.judge.spec import JudgeSpec
from unweave.latents import stage as latents
from unweave.latents.contexts import RecordsSpec, find_contexts
from unweave.latents.records import Records
from unweave.latents.spec import LatentsSpec
from unweave.lm.model import LM
from unweave.methods.explain.rubric import rubric as rules
from unweave.methods.explain.rubric import stage as rubric
from unweave.methods.explain.rubric import view
from unweave.methods.explain.rubric.result import Difference, RatedLatent, RubricResult
from unweave.methods.explain.rubric.rubric import FORM, Item, difference, eligible, parse, question, summarise
from unweave.methods.explain.rubric.spec import COMMAND, RubricSpec
from unweave.sae.module import SAE
from unweave.show.pieces import bounded

# -- records of known latents --------------------------------------------------------------------------------------

DOCUMENTS, LENGTH, LATENTS = 12, 9, 30


@dataclass
class Store:
    ids: np.ndarray
    roles: np.ndarray
    starts: np.ndarray
    documents: np.ndarray


@pytest.fixture(scope="module")
def f() -> torch.Tensor:
    """Latents [N, F] on 12 documents of 9 tokens; latent j fires in some tokens of j % 9 documents only."""
    generator = torch.Generator().manual_seed(3)
    values = torch.rand(DOCUMENTS, LENGTH, LATENTS, generator=generator) * (1 + torch.arange(LATENTS))
    values *= torch.rand(values.shape, generator=generator) < 0.4
    for j in range(LATENTS):
        documents = torch.randperm(DOCUMENTS, generator=generator)[: j % 9]
        silent = torch.ones(DOCUMENTS, dtype=torch.bool)
        silent[documents] = False
        values[silent, :, j] = 0
    return values.reshape(-1, LATENTS)


@pytest.fixture(scope="module")
def records(f: torch.Tensor) -> Records:
    n = len(f)
    store: Any = Store(np.arange(n), np.zeros(n), np.arange(0, n + 1, LENGTH), np.arange(DOCUMENTS))
    spec = RecordsSpec(left=2, right=2)
    codes = Codes.from_dense(f)
    return Records(
        n_tokens=n,
        count=codes.counts().numpy(),
        maximum=codes.maxima().clamp(min=0).numpy(),
        mean_active=np.zeros(LATENTS, np.float32),
        contexts=find_contexts(codes, np.arange(n), store, spec),
        written=None,
        token_texts={i: f" w{i}" for i in range(n)},
        spec=spec,
    )


def alive(f: torch.Tensor) -> list[int]:
    """Latents that fire in five documents or more, counted by hand."""
    fires = (f.reshape(DOCUMENTS, LENGTH, LATENTS) > 0).any(1).sum(0)
    return [j for j in range(LATENTS) if fires[j] >= 5]


def test_only_latents_that_fire_in_all_five_contexts_are_drawn(records: Records, f: torch.Tensor) -> None:
    assert 5 < len(alive(f)) < LATENTS and (f == 0).all(0).any()
    assert eligible(records).tolist() == alive(f)
    items = rules.real_items(records, 1000)
    assert sorted(item.latents[0] for item in items) == alive(f)
    for item in items:
        (j,) = set(item.latents)
        assert item.kind == "real" and item.latent == j and item.largest == (records.maximum[j],) * 5
        best = f[:, j].reshape(DOCUMENTS, LENGTH).amax(1).sort(descending=True).values[:5]
        assert [context.value for context in item.contexts] == pytest.approx(best.tolist()) and best.min() > 0
        assert len({context.document for context in item.contexts}) == 5


def test_the_draw_is_seeded_and_more_latents_are_the_same_and_more(records: Records) -> None:
    few, many = ([i.latent for i in rules.real_items(records, n, seed=4)] for n in (3, 8))
    assert many[:3] == few and len(set(many)) == 8
    assert [i.latent for i in rules.real_items(records, 8, seed=5)] != many


def test_trap_39_shuffled_items_hold_five_latents_in_the_same_order_of_strength(records: Records) -> None:
    items = rules.shuffled_items(records, 40, seed=1)
    known = set(eligible(records).tolist())
    assert len(items) == 40 and len({item.latents for item in items}) > 30
    for item in items:
        assert item.kind == "shuffled" and item.latent is None
        assert len(set(item.latents)) == 5 and set(item.latents) <= known
        for rank, (j, context) in enumerate(zip(item.latents, item.contexts, strict=True)):
            assert context == records.latent(j).top[rank] and item.largest[rank] == records.maximum[j]
    assert rules.shuffled_items(records, 0) == []


def test_too_few_latents_are_refused(records: Records) -> None:
    silent = replace(records, contexts=replace(records.contexts, value=np.zeros_like(records.contexts.value)))
    with pytest.raises(UnweaveError, match="0 of 30 latents fire in 5 documents"):
        rules.real_items(silent, 3)
    kept = np.isin(records.contexts.latent, eligible(records)[:4]) * records.contexts.value
    four = replace(records, contexts=replace(records.contexts, value=kept))
    assert len(rules.real_items(four, 9)) == 4
    with pytest.raises(UnweaveError, match=r"4 of 30 latents .* at least 5 needed"):
        rules.shuffled_items(four, 1)


# -- the question --------------------------------------------------------------------------------------------------


def test_the_prompt_holds_every_token_and_value(records: Records, f: torch.Tensor) -> None:
    item = rules.real_items(records, 1)[0]
    (j,) = set(item.latents)
    content = question(item)[-1]["content"]
    lines = content.split("\n")
    assert [line.split(":")[0] for line in lines] == [f"Text {i}" for i in range(1, 6)]
    for line, context in zip(lines, item.contexts, strict=True):
        shown = re.findall(r" w(\d+)(?:\{([\d.]+)\})?", line.split(": ", 1)[1])
        assert [int(token) for token, _ in shown] == list(context.ids)
        wanted = 10 * f[list(context.ids), j] / f[:, j].max()
        assert [float(value or 0) for _, value in shown] == pytest.approx(wanted.tolist(), abs=0.051)
        assert [bool(value) for _, value in shown] == (wanted > 0).tolist()
    assert "{10}" in lines[0]


def test_the_task_gives_the_scale_and_examples_that_parse(records: Records) -> None:
    turns = question(rules.real_items(records, 1)[0])
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 3 + ["user"]
    for score, meaning in rules.SCALE.items():
        assert f"{score}: {meaning}" in turns[0]["content"]
    assert sorted(parse(turn["content"]).values[0] for turn in turns[1::2]) == [1, 3, 5]
    assert all(turn["content"].count("Text ") == 5 for turn in turns[::2])


def test_unmeasured_tokens_and_line_breaks_are_shown_as_such(records: Records) -> None:
    item = rules.real_items(records, 1)[0]
    first = item.contexts[0]
    n = len(first.ids)
    texts = ("a\n", "\r", *["x"] * (n - 2))
    changed = replace(first, texts=texts, values=(0.0,) * n, counted=(True, False, *[True] * (n - 2)))
    content = question(replace(item, contexts=(changed, *item.contexts[1:])))[-1]["content"]
    assert content.split("\n")[0] == "Text 1: a\\n\\r{?}" + "x" * (n - 2)


# -- answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("score: [[4]], name: [[months of the year]]", (4, "months of the year")),
        ("All react to months.\nScore: [[ 5 ]] , Name: [[ names (of) months! ]]\n", (5, "names (of) months!")),
        ("score:[[1]],name:[[7]]", (1, "7")),
    ],
)
def test_answers_of_the_form_asked_for_are_read(text: str, wanted: tuple[int, str]) -> None:
    answer = parse(text)
    assert (*answer.values, answer.words) == wanted and text[answer.places[0]] == str(wanted[0])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "form"),
        ("5", "form"),
        ("score: 5, name: months", "form"),
        ("score: [5], name: [months]", "form"),
        ("name: [[months]], score: [[5]]", "form"),
        ("score: [[5]]", "form"),
        ("score: [[5, name: [[months]]", "form"),
        ("score: [[5]], name: [[months", "form"),
        ("score: [[0]], name: [[months]]", "whole number from 1 to 5"),
        ("score: [[6]], name: [[months]]", "whole number from 1 to 5"),
        ("score: [[4.5]], name: [[months]]", "whole number from 1 to 5"),
        ("score: [[5/5]], name: [[months]]", "whole number from 1 to 5"),
        ("score: [[٣]], name: [[months]]", "whole number from 1 to 5"),
        ("score: [[number]], name: [[months]]", "whole number from 1 to 5"),
        ("score: [[]], name: [[months]]", "whole number from 1 to 5"),
        ("score: [[5]], name: [[ ]]", "no name"),
        ("score: [[5]], name: [[...]]", "no name"),
        ("score: [[5]], name: [[a few words]]", "no name"),
        ("score: [[5]], name: [[a]]\nscore: [[1]], name: [[b]]", "more than one"),
        ("score: [[5]], name: [[a]]\nscore: [[5]], name: [[a]]", "more than one"),
    ],
)
def test_anything_else_is_no_answer(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse(text)


def test_scored_and_failed_are_all_that_was_asked(records: Records) -> None:
    items = rules.real_items(records, 6)
    good = "They fit. score: [[4]], name: [[numbers]]"
    answers = [good, "no idea", None, "score: [[9]], name: [[x]]", "score: [[2]], name: [[words]]", "score"]
    ratings = rate(Scripted(answers), FORM, items).rows
    assert [r.answer and r.value for r in ratings] == [4, None, None, None, 2, None]
    assert [r.case for r in ratings] == items and ratings[0].words == "numbers"
    scores = summarise(ratings)
    assert (scores.asked, scores.scored, scores.failed) == (6, 2, 4)
    assert scores.failures == {
        "no answer of the form asked for": 2,
        "scripted failure": 1,
        "the score is no whole number from 1 to 5": 1,
    }
    assert scores.distribution == (0, 1, 0, 1, 0) and scores.mean is not None
    assert scores.mean.value == 3.0


def test_a_reply_that_was_cut_says_so(records: Records) -> None:
    class Cut(Scripted):
        def ask(self, conversations: Any, until: str = "") -> list[Reply]:
            return [replace(reply, cut=True) for reply in super().ask(conversations)]

    (rating,) = rate(Cut(["They all"]), FORM, rules.real_items(records, 1)).rows
    assert rating.failure == "no answer of the form asked for, cut at the length allowed"


# -- the numbers ---------------------------------------------------------------------------------------------------


def rated(*scores: int | None) -> list[Rating[Item]]:
    item = Item("real", (), (), ())
    return [Rating(item, [], Reply("x"), Answer((s,)) if s else None, "" if s else "failed", ()) for s in scores]


def test_measures_are_those_computed_by_hand() -> None:
    scores = summarise(rated(5, 5, 4, 3, 2, 1, 1, None))
    assert scores.distribution == (2, 1, 1, 1, 2)
    assert scores.mean is not None and scores.high is not None and scores.low is not None
    assert scores.mean.value == pytest.approx(3.0)
    assert scores.high.value == pytest.approx(3 / 7) and scores.low.value == pytest.approx(3 / 7)
    assert sum(scores.distribution) == scores.scored == scores.asked - scores.failed == 7


def test_the_bootstrap_interval_is_that_of_the_exact_distribution() -> None:
    """The share of 4s and 5s of n resampled items is binomial; the mean's interval tends to the normal one."""
    values = [5] * 30 + [2] * 70
    scores = summarise(rated(*values), seed=1)
    assert scores.high is not None and scores.mean is not None
    for q, found in ((0.025, scores.high.low), (0.975, scores.high.high)):
        below = np.cumsum([math.comb(100, k) * 0.3**k * 0.7 ** (100 - k) for k in range(101)])
        assert found == pytest.approx(int(np.argmax(below >= q)) / 100, abs=0.011)
    half = 1.96 * np.std(values) / 10
    assert scores.mean.low == pytest.approx(scores.mean.value - half, abs=0.03)
    assert scores.mean.high == pytest.approx(scores.mean.value + half, abs=0.03)
    assert summarise(rated(*values), seed=1) == scores


def test_few_scores_have_no_interval() -> None:
    nothing = summarise(rated(None, None))
    assert (nothing.mean, nothing.high, nothing.low, nothing.scored, nothing.failed) == (None, None, None, 0, 2)
    assert summarise(rated(4)).mean == Interval(4.0, None, None)
    assert summarise([]).asked == 0
    assert difference(rated(4), rated(None)) is None
    assert difference(rated(4), rated(3, 1)) == Difference(2.0, None, None, None)


def test_the_difference_is_that_of_the_means_with_a_wider_interval() -> None:
    a, b = [5, 4, 4, 3] * 20, [3, 2, 2, 1] * 20
    found = difference(rated(*a), rated(*b))
    assert found is not None and found.low is not None and found.high is not None
    half = 1.96 * np.sqrt(np.var(a) / 80 + np.var(b) / 80)
    assert found.value == pytest.approx(2.0)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), abs=0.03)


def test_few_scores_that_are_all_alike_are_not_certain() -> None:
    """A bootstrap of two equal scores has no width, whichever they are."""
    for n, m in ((2, 2), (4, 40), (40, 4)):
        found = difference(rated(*[5] * n), rated(*[1] * m))
        assert found is not None and (found.value, found.low, found.p, found.shown) == (4.0, 4.0, None, False)
    found = difference(rated(*[5] * 5), rated(*[1] * 5))
    assert found is not None and found.p == pytest.approx(2 / 252, abs=0.004) and found.shown


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([5, 4, 4, 3, 5], [2, 4, 1, 3, 3, 2]),
        ([5, 1, 5, 1, 5, 2], [3, 3, 2, 4, 3]),
        ([2, 1, 1, 2, 1, 1], [3, 4, 5, 2, 4]),
        ([3] * 5, [3] * 6),
    ],
)
def test_the_p_value_is_that_of_every_relabelling(a: list[int], b: list[int]) -> None:
    pooled, n, m = a + b, len(a), len(b)
    apart = [
        abs(Fraction(sum(chosen), n) - Fraction(sum(pooled) - sum(chosen), m)) for chosen in combinations(pooled, n)
    ]
    exact = sum(x >= abs(Fraction(sum(a), n) - Fraction(sum(b), m)) for x in apart) / len(apart)
    found = difference(rated(*a), rated(*b))
    assert found is not None and found.p == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 10_000) + 1e-4)
    assert found.shown == (exact < 0.05 and sum(a) * m > sum(b) * n)
    assert difference(rated(*a), rated(*b)) == found


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def trained(home: Path) -> Run:
    return train_small(home)


class Panel:
    """Scripted judges in place of real ones; what each was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answer: Any = lambda conversation: "score: [[3]], name: [[some]]"
        self.scripts: list[Scripted] = []
        monkeypatch.setattr(rubric, "open_judge", self.open)
        monkeypatch.setattr(rubric, "check_judge", lambda spec: None)

    def open(self, spec: JudgeSpec, folder: Path, device: str | None) -> CachedJudge:
        del device
        self.scripts.append(Scripted(self.answer, name=spec.model))
        return CachedJudge(self.scripts[-1], folder, Budget(spec.budget_requests, spec.budget_tokens))


@pytest.fixture
def panel(monkeypatch: pytest.MonkeyPatch) -> Panel:
    return Panel(monkeypatch)


def lines_of(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "ratings.jsonl").read_text(encoding="utf-8").splitlines()]


def spec_of(trained: Run, **changes: Any) -> RubricSpec:
    spec = RubricSpec(
        sae=trained.path / "sae",
        latents=7,
        shuffled=5,
        latents_tokens=2500,
        device="cpu",
        judge=JudgeSpec(model="scripted"),
    )
    return replace(spec, **changes)


def value(interval: Interval | None) -> float:
    assert interval is not None
    return interval.value


def one_latent(conversation: Conversation) -> str:
    """A score and a name that depend on nothing but the texts, so that they can be told again from the prompt."""
    text = conversation[-1]["content"]
    return f"Seen.\nscore: [[{1 + len(text) % 5}]], name: [[length {len(text)}]]"


def test_the_command_scores_latents_and_controls(
    trained: Run, tmp_path: Path, panel: Panel, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    panel.answer = one_latent
    made = rubric.run(spec_of(trained), tmp_path)
    result, lines = made.result, lines_of(made)
    assert [line["kind"] for line in lines] == ["real"] * 7 + ["shuffled"] * 5
    for line in lines:
        score = 1 + len(line["prompt"][-1]["content"]) % 5
        assert line["score"] == score and f"[[{score}]]" in line["reply"] and line["failure"] == ""
    assert result.shuffled is not None and result.above_shuffled is not None
    for kind, found in (("real", result.real), ("shuffled", result.shuffled)):
        scores = [line["score"] for line in lines if line["kind"] == kind]
        counts = Counter(scores)
        assert found.distribution == tuple(counts[s] for s in range(1, 6))
        assert value(found.mean) == pytest.approx(np.mean(scores))
        assert found.scored + found.failed == found.asked == len(scores)
    wanted = value(result.real.mean) - value(result.shuffled.mean)
    assert result.above_shuffled.value == pytest.approx(wanted)
    assert result.judge.model == "scripted" and "scripted answers" in str(view.notes(result.judge))
    assert as_read(RubricResult, json.loads(json.dumps(as_written(result))), "here") == result
    argv = ["rubric", "--runs", str(tmp_path), "--sae", str(trained.path / "sae"), "--latents", "7", "--shuffled", "5"]
    assert main([*argv, "--latents_tokens", "2500", "--device", "cpu", "--judge.model", "scripted"]) == 0
    shown = capsys.readouterr().out
    assert f"run directory (reused): {made.path}" in shown and "latents: mean score" in shown
    assert len(panel.scripts) == 1


@pytest.mark.parametrize("machine", [True, False])
def test_no_part_of_a_servers_key_is_in_any_file_or_word(
    trained: Run,
    tmp_path: Path,
    machine: bool,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A server that repeats the key whole, in part and packed, in replies, errors, headers and its address."""
    caplog.set_level("DEBUG")
    monkeypatch.setenv("JUDGE_TEST_KEY", KEY)
    server = Raw()
    packed = base64.b64encode(f"user:{KEY}".encode()).decode()
    answers = [
        http("200 OK", completion(f"score: [[3]], name: [[\x1b[31m{KEY[:9]} {packed}]]"), f"X-Echo: Bearer {KEY}"),
        http("400 No", json.dumps({"error": {"message": "y" * 285 + KEY}}).encode()),
        http("200 OK", b"x" * 90 + KEY.encode()),
        http(f"503 {KEY}", b"", f"Retry-After: {KEY}"),
        http("200 OK", completion("", usage=KEY)),
    ]
    asked = iter(range(10**6))
    server.says = lambda n, sock: answers[next(asked) % len(answers)]
    argv = ["rubric", "--runs", str(tmp_path), "--sae", str(trained.path / "sae"), "--latents", "6", "--shuffled", "5"]
    argv += ["--latents-tokens", "2500", "--device", "cpu", "--judge.model", "m", "--judge.at-once", "1"]
    argv += ["--judge.base-url", server.url, "--judge.api-key-env", "JUDGE_TEST_KEY"]
    try:
        assert main([*argv, *(["--json"] if machine else [])]) == 0
    finally:
        server.close()
    said = capfd.readouterr()
    assert f"Bearer {KEY}" in server.requests[0].decode() and len(server.requests) > 5
    assert not leaks(said.out) and not leaks(said.err) and not leaks(caplog.text)
    assert "\x1b[31m" not in said.out + said.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        content = path.read_bytes().decode("latin-1")
        assert not leaks(content) and packed[8:24] not in content, path


def test_trap_39_the_judge_sees_latents_and_not_their_inputs(trained: Run, tmp_path: Path, panel: Panel) -> None:
    """The values in the prompts are the SAE's own, encoded anew from the model on the same tokens."""
    from unweave.data.tokens import TokenStore
    from unweave.lm.model import Tokens

    made = rubric.run(spec_of(trained, shuffled=0), tmp_path)
    assert made.result.shuffled is None and made.result.above_shuffled is None
    lm, sae = LM.load(SAE.load(trained.path / "sae").provenance["train"]["model"]), SAE.load(trained.path / "sae")
    (store_path,) = tmp_path.glob("tokens-*/store")
    store = TokenStore.open(store_path)
    starts = np.asarray(store.starts)
    records = latents.load(latents.run(LatentsSpec(sae=trained.path / "sae", tokens=2500, device="cpu"), tmp_path))
    for line in lines_of(made):
        (name,) = line["latents"]
        j = int(name.split("/")[1])
        for token, shown in zip(line["tokens"], line["prompt"][-1]["content"].split("\nText "), strict=True):
            row = int(np.searchsorted(starts, token, side="right")) - 1
            ids = torch.from_numpy(np.asarray(store.ids[starts[row] : starts[row + 1]]).astype(np.int64))
            with lm.taps(read=["resid_post.1"], stop="resid_post.1") as seen:
                lm(Tokens.of(ids))
            value = float(sae.encode(seen["resid_post.1"][0])[token - starts[row], j])
            wanted = 10 * value / float(records.maximum[j])
            values = [float(v) for v in re.findall(r"\{([\d.]+)\}", shown)]
            assert value > 0 and min(abs(v - wanted) for v in values) < 0.06


def test_trap_41_latents_are_named_by_the_sae_and_their_number(trained: Run, tmp_path: Path, panel: Panel) -> None:
    made = rubric.run(spec_of(trained), tmp_path)
    identity = SAE.load(trained.path / "sae").digest()
    assert made.result.subject.saes[0].digest == identity
    for line in lines_of(made):
        assert len(line["latents"]) == (1 if line["kind"] == "real" else 5)
        assert all(re.fullmatch(rf"{identity}/\d+", name) for name in line["latents"])
    assert [f"{identity}/{one.latent}" for one in made.result.latents] == [
        x for line in lines_of(made)[:7] for x in line["latents"]
    ]


def test_trap_39_a_judge_that_always_says_the_same_is_seen(trained: Run, tmp_path: Path, panel: Panel) -> None:
    panel.answer = lambda _: "score: [[5]], name: [[everything]]"
    always = rubric.run(spec_of(trained), tmp_path / "always").result
    assert value(always.real.mean) == 5 and value(always.above_shuffled) == 0
    assert "do not build on its scores" in always.rows()[-1][2]
    real = {line["prompt"][-1]["content"] for line in lines_of(Run.at(next(tmp_path.glob("always/rubric-*"))))[:7]}
    panel.answer = lambda talk: f"score: [[{5 if talk[-1]['content'] in real else 1}]], name: [[x]]"
    knows = rubric.run(spec_of(trained), tmp_path / "knows").result
    assert value(knows.above_shuffled) == 4
    assert knows.rows()[-1][2] == "the judge tells latents from shuffled contexts"
    assert always.above_shuffled is not None and knows.above_shuffled is not None
    assert always.above_shuffled.p == 1 and (knows.above_shuffled.p or 0) < 0.01
    assert str(knows.rows()[-1][1]).startswith("4.00 [4.00, 4.00], p = 0.00")
    few = rubric.run(spec_of(trained, latents=3, shuffled=4), tmp_path / "few").result
    assert value(few.above_shuffled) == 4 and few.above_shuffled is not None and few.above_shuffled.p is None
    assert few.rows()[-1][2] == "too few to tell"


def test_the_page_shows_scores_names_and_what_to_make_of_them(trained: Run, tmp_path: Path, panel: Panel) -> None:
    panel.answer = one_latent
    result = rubric.run(spec_of(trained), tmp_path).result
    section = view.section(result)
    assert type(result) is COMMAND.result and "uw-embed" in result._repr_html_()
    for one in result.latents:
        assert f">{one.latent}</td>" in section.body and one.name in section.body
    for part in ("<svg", "latents: mean score", view.verdict(result.above_shuffled), bounded(result.real.mean)):
        assert part.lower() in section.body.lower(), part
    assert any("scripted answers" in note for note in section.notes)


def test_asking_again_loads_nothing_and_asks_nobody(
    trained: Run, tmp_path: Path, panel: Panel, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = rubric.run(spec_of(trained), tmp_path)

    def fail(*args: Any, **options: Any) -> Any:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(LM, "load", fail)
    monkeypatch.setattr(SAE, "load", fail)
    monkeypatch.setattr(Panel, "open", fail)
    again = rubric.run(spec_of(trained), tmp_path)
    assert again.reused and again.result == first.result


def test_interrupted_ratings_go_on_reply_by_reply(trained: Run, tmp_path: Path, panel: Panel) -> None:
    spec = spec_of(trained)
    panel.answer = one_latent
    for have in (5, 10):
        with pytest.raises(UnweaveError, match=f"{have} of 12 replies"):
            rubric.run(replace(spec, judge=replace(spec.judge, budget_requests=5)), tmp_path)
    made = rubric.run(spec, tmp_path)
    assert [len(script.asked) for script in panel.scripts] == [5, 5, 2]
    whole = rubric.run(spec, tmp_path / "at once")
    assert lines_of(made) == lines_of(whole) and made.result.real == whole.result.real
    panel.scripts.clear()
    rubric.run(replace(spec, latents=9), tmp_path)
    assert len(panel.scripts[0].asked) == 2  # the first seven and the shuffled ones are known


def test_failures_are_counted_and_no_reply_at_all_is_an_error(trained: Run, tmp_path: Path, panel: Panel) -> None:
    counter = iter(range(100))
    panel.answer = lambda _: (None, "gibberish", "score: [[2]], name: [[b]]")[next(counter) % 3]
    result = rubric.run(spec_of(trained), tmp_path).result
    real = result.real
    assert (real.asked, real.scored, real.failed) == (7, 2, 5)
    assert real.failures == {"scripted failure": 3, "no answer of the form asked for": 2}
    assert [one.score for one in result.latents] == [None, None, 2, None, None, 2, None]
    assert all(isinstance(one, RatedLatent) for one in result.latents)
    assert "5 answers could not be used" in str(result.rows())
    panel.answer = lambda _: None
    with pytest.raises(UnweaveError, match="answered none of 3 prompts"):
        rubric.run(spec_of(trained, latents=2, shuffled=1, seed=3), tmp_path)


def test_a_tiny_local_judge_runs_from_end_to_end(trained: Run, tmp_path: Path, home: Path) -> None:
    """With real model calls; 64 positions are too few for the prompt, which is said."""
    spec = spec_of(trained, latents=2, shuffled=0, judge=JudgeSpec(model=str(home / "model"), max_new_tokens=4))
    with pytest.raises(UnweaveError, match="answered none of 2 prompts: prompt and reply need"):
        rubric.run(spec, tmp_path)


@pytest.mark.parametrize("change", [{"latents": 0}, {"shuffled": -1}, {"latents_tokens": 0}])
def test_counts_that_make_no_sense_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UnweaveError, match="must be at least"):
        RubricSpec(sae=Path("x"), **change)
