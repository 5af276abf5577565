"""Texts, raters and comparisons, against forward passes row by row and cases whose answer is known."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from unweave.core.errors import UnweaveError
from unweave.core.intervals import Interval
from unweave.core.pieces import Pieces
from unweave.core.site import Site
from unweave.data.policy import TokenPolicy
from unweave.judge.scripted import Scripted
from unweave.latents.annotations import Pair, ScoredLabel
from unweave.methods.axbench.checks import check, detect, known_cases
from unweave.methods.axbench.compare import Experiment, Ratings, judge
from unweave.methods.axbench.directions import Direction, difference_of_means, sae_of, token_activations
from unweave.methods.axbench.forms import FORMS, Case, ChatRater, spoken, template_prompt, written_prompts
from unweave.methods.axbench.generate import Handle, Setting, draw_instructions
from unweave.methods.axbench.handles import LEARNT, find_handles
from unweave.methods.axbench.result import RATINGS
from unweave.methods.axbench.scores import repeated_folds
from unweave.methods.axbench.spec import LearningSpec, ReftSpec, SteeringSpec
from unweave.methods.axbench.texts import ConceptTexts, Texts, WordClassifier
from unweave.methods.axbench.truth import TruthRater, likelihoods
from unweave.sae.activations import ReLU
from unweave.sae.module import SAE
from unweave.sae.steered import prompt_tokens
from unweave.tasks.tagged.spec import TaggedSpec
from unweave.tasks.tagged.texts import open_tagged

SITE = Site("resid_post", 1)


def pair(latent: int, label: str, score: float = 0.5) -> Pair:
    scored = ScoredLabel(label=label, threshold=0, score=score, support=9, maximum=1)
    return Pair(SITE, latent, scored, None)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    """Every third text is about fish; every other of the rest mentions one all the same."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    with open(path, "w") as out:
        for i in range(240):
            about = ["cod perch trout", "stone cod hill", "road hill stone"][i % 3]
            out.write(json.dumps({"text": f"{about} number {i}", "tags": ["fish" if i % 3 == 0 else "land"]}) + "\n")
    return Texts(open_tagged(TaggedSpec(source=str(path))), examples=10, heldout=8)


def test_texts_to_learn_on_and_held_out_are_apart_and_hard_ones_look_like_the_concept(texts: Texts) -> None:
    fish = texts.of("fish")
    out = {texts.tagged.text(i): bool(texts.tagged.heldout[i]) for i in range(len(texts.tagged))}
    assert not any(out[text] for text in (*fish.train_with, *fish.train_without))
    assert all(out[text] for text in (*fish.positive, *fish.negative, *fish.hard))
    assert all("perch" in text for text in (*fish.train_with, *fish.positive))
    assert not any("perch" in text for text in (*fish.train_without, *fish.negative, *fish.hard))
    assert all("cod" in text for text in fish.hard) and not set(fish.hard) & set(fish.negative)
    assert len(fish.train_with) == 10 and len(fish.hard) == len(fish.negative) == 8
    assert texts.of("fish").positive == fish.positive
    assert set(texts.sample(5, heldout=True)) <= {text for text, held in out.items() if held}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_texts_likelihood_is_that_of_its_tokens_after_the_prompt(tiny_lm: Any, name: str) -> None:
    lm = tiny_lm(name)
    prompts, answers = ["say it", "a", "say it", "b"], ["abcab", "x", "", "long answer"]
    found = likelihoods(lm, prompts, answers, most=6)
    for prompt, answer, mean in zip(prompts, answers, found, strict=True):
        frame = prompt_tokens(lm, [prompt], None).ids[0].tolist()
        ids = lm.tokenizer(answer, add_special_tokens=False)["input_ids"][:6]
        logits = torch.log_softmax(lm(torch.tensor([frame + ids]))[0].float(), -1)
        each = [float(logits[len(frame) + i - 1, token]) for i, token in enumerate(ids)]
        assert mean == pytest.approx(np.mean(each), abs=1e-4) if each else np.isnan(mean)


def test_scripted_truth_reads_the_concept_and_repetition(texts: Texts, tiny_lm: Any) -> None:
    fish, lm = texts.of("fish"), tiny_lm("llama")
    fluent = [f"words {chr(97 + i)}{chr(98 + i)} of all sort" for i in range(20)]
    rater = TruthRater(lm, {"fish": fish}, fluent, ["ask a", "ask b", "ask c"], most=20)
    cases = [Case("fish", "ask a", text) for text in ("perch and trout", "stone road", "", "aaaaaaaaaaaaaaaaaaaa")]
    values, _ = rater.rate(cases)
    assert values[0, 0] == 2 and values[1, 0] == 0 and list(values[2]) == [0, 0, 0] and values[3, 2] == 0
    own = likelihoods(lm, ["ask a", "ask b", "ask c"], ["perch and trout"] * 3, 20).tolist()
    assert values[0, 1] == (own[0] > own[1]) + (own[0] > own[2])
    (concept, *_) = check(
        rater, known_cases({"fish": fish}, fluent, [("ask a", "x y"), ("ask b", "z")], any_concept=False)
    )
    assert (
        concept.form == "concept"
        and concept.reads
        and concept.asked == 16
        and concept.aurocs == {"without the tag": 1.0}
    )


def test_a_chat_models_last_rating_counts_and_anything_else_is_a_failure() -> None:
    replies = iter(["Rating: [[0]] no, Rating: [[2]]", "Rating: [[3]]", None] * 3)
    values, said = ChatRater(Scripted(lambda _: next(replies))).rate([Case("sea", "ask", t) for t in "abc"])
    assert values[0].tolist() == [2, 2, 2] and np.isnan(values[1:]).all()
    assert said[0][0].endswith("[[2]]") and said[2] == ["scripted failure"] * 3
    shown = {name: form.messages(Case("sea", "ask", "text"))[0]["content"] for name, form in FORMS.items()}
    assert {name: ("sea" in text, "ask" in text) for name, text in shown.items()} == {
        "concept": (True, False), "instruction": (False, True), "fluency": (False, False),
    }  # fmt: skip
    known = known_cases({}, ["a b c d e f"], [], any_concept=True)
    (concept, *_) = check(ChatRater(Scripted(lambda asked: f"Rating: [[{len(asked[0]['content']) % 3}]]")), known)
    assert concept.asked == 32 and set(concept.aurocs) == {"near miss", "unrelated"}
    assert template_prompt("works-with::the_sea").count("works with the sea") == 2 and spoken("c++") == "c++"
    assert written_prompts(Scripted([" talk of it "]), ["sea"]) == ["talk of it"]


def test_learnt_directions_are_read_and_added_where_they_were_learnt(tiny_lm: Any) -> None:
    """The latent is a transcoder's: it reads the MLP's input and writes to what the MLP adds."""
    lm, reads, writes = tiny_lm("llama"), Site("mlp_in", 1), Site("mlp_add", 1)
    g = torch.Generator().manual_seed(3)
    tensors = [torch.randn(shape, generator=g) for shape in ((32, 6), (6,), (6, 32), (32,))]
    transcoder = SAE(*tensors, ReLU(), read=reads, write=writes, policy=TokenPolicy((), 100.0))
    sets = [tuple(some) for some in (["xyx yx", "yxyx x"], ["abc ab", "b c abc"])]
    concept = ConceptTexts("xy", *sets, *sets, (), WordClassifier(["x"], ["a"]), (0.0, 1.0))
    one = Pair(reads, 2, pair(0, "xy").label, None)
    setting = Setting(lm, {reads: transcoder}, [one], {"xy": concept})
    learning = LearningSpec(tokens=9, reft=ReftSpec(epochs=1))
    handles = find_handles(setting, ["abab"], ("sae", *LEARNT), SteeringSpec(), learning, Pieces(None))
    x, owner = token_activations(lm, writes, TokenPolicy(), concept.train[0], 9)
    expected = difference_of_means(x, owner < 2)
    torch.testing.assert_close(handles["diffmean"][0].sae.W_dec[0], expected.w)
    both = torch.cat([x, token_activations(lm, writes, TokenPolicy(), ["abab"], 9)[0]])
    largest = float((both[torch.cat([owner < 2, torch.ones(len(both) - len(x), dtype=bool)])] @ expected.w).max())
    assert handles["diffmean"][0].maximum == pytest.approx(largest + expected.b, rel=1e-4)
    for method in LEARNT:
        sae = handles[method][0].sae
        assert sae.read == sae.write == writes and sae.policy == TokenPolicy()
    assert handles["sae"][0].sae is transcoder


def test_what_is_never_active_has_its_labels_maximum_or_adds_nothing(
    tiny_lm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, said = tiny_lm("llama"), []
    silent = SAE(torch.zeros(32, 6), -torch.ones(6), torch.randn(6, 32), torch.zeros(32), ReLU(), read=SITE)
    sets = [("xyx yx", "yxyx x"), ("abc ab", "b c abc")]
    concept = ConceptTexts("xy", *sets, *sets, (), WordClassifier(["x"], ["a"]), (0.0, 1.0))
    setting = Setting(lm, {SITE: silent}, [pair(2, "xy")], {"xy": concept})
    monkeypatch.setattr("unweave.methods.axbench.handles.say", said.append)
    dead = Direction(torch.eye(32)[0], -1e9, relu=True)
    monkeypatch.setattr("unweave.methods.axbench.directions.reft_r1", lambda *_, **__: dead)
    methods, learning = ("sae", "reft"), LearningSpec(tokens=9)
    handles = find_handles(setting, ["abab"], methods, SteeringSpec(), learning, Pieces(None))
    assert handles["sae"][0].maximum == setting.pairs[0].label.maximum == 1
    assert handles["reft"][0].steered(2.0)[0].value == 0 and "it adds nothing" in said[0]
    with pytest.raises(UnweaveError, match="random: nothing for"):
        find_handles(setting, ["abab"], ("sae", "random"), SteeringSpec(), learning, Pieces(None))


def test_a_direction_that_tells_the_concept_detects_it(tiny_lm: Any) -> None:
    lm = tiny_lm("llama")
    sets = {"positive": ["xyx yx", "yxyx x"], "negative": ["abc ab", "b c abc"], "hard": ["aaa bb", "cc cb"]}
    with_concept, _ = token_activations(lm, SITE, TokenPolicy(), sets["positive"], 9)
    others, _ = token_activations(lm, SITE, TokenPolicy(), sets["negative"] + sets["hard"], 9)
    w = torch.nn.functional.normalize(with_concept.mean(0) - others.mean(0), dim=0)
    words = WordClassifier(["x"], ["a"])
    concept = ConceptTexts("xy", (), (), *(tuple(sets[name]) for name in sets), words, (0.0, 1.0))
    sae = sae_of([Direction(w), Direction(-w)], SITE, TokenPolicy())
    handles = {name: [Handle(sae, j, 1.0, "add", "all")] for j, name in enumerate(("sae", "random"))}
    found = detect(Setting(lm, {}, [pair(0, "xy")], {"xy": concept}), handles, 9)
    assert found["sae"][0, 0] == 1 and found["random"][0, 0] == 0 and found["sae"].shape == (1, 3)


def test_instructions_are_drawn_without_replacement() -> None:
    drawn = draw_instructions([str(i) for i in range(9)], 50, 9, seed=1)
    assert all(sorted(row) == list(range(9)) for row in drawn) and len({tuple(row) for row in drawn}) == 50


def test_labelled_latents_are_compared_with_random_ones_pair_by_pair() -> None:
    """Six pairs of three concepts whose latents work at one strength each; random ones never do."""
    pairs = [pair(j, "abc"[j % 3], score=j / 10) for j in range(6)]
    pool = list("stuvwxyz")
    experiment = Experiment(
        pairs=pairs, methods=("unedited", "sae", "random"), factors=(1.0, 2.0), pool=pool, prompts=[""] * 6,
        instructions=draw_instructions(pool, 6, 8, seed=0),
    )  # fmt: skip
    saes = sae_of([Direction(torch.eye(12)[j]) for j in range(12)], SITE, TokenPolicy())
    handles = {
        name: [Handle(saes, j + 6 * i, 2.0, "add", "all") for j in range(6)] for i, name in enumerate(("sae", "random"))
    }
    jobs = experiment.jobs(handles)
    assert len(jobs) == experiment.n_texts == 6 * 8 * (1 + 2 + 2 + 3)

    def rating(job: Any) -> list[float]:
        works = job.block == "sae" and job.row[1] == job.row[0] % 2  # pair p works at strength p mod 2
        left = {"suppress-prompt": 2, "suppress-latent": 1, "suppress-span": 0, "random": 1}.get(job.block, 2 * works)
        return [left, 2, 1 + (job.row[0] >= 3)]

    values = np.array([rating(job) for job in jobs], dtype=float)
    rater: Any = ChatRater(Scripted([]))
    scores = [{"calibrated F1": one.label.score, "unknown": None} for one in pairs]
    judged = judge(experiment, jobs, Ratings(rater, values, []), repeated_folds(8), scores, ())
    by = {score.method: score for score in judged.scores}
    assert list(by) == ["unedited", "sae", "random"]
    assert by["sae"].rating.value == pytest.approx((3 / (0.5 + 0.5 + 1) + 2) / 2)  # fluency 1, then 2
    assert by["random"].rating.value == pytest.approx((3 / (1 + 0.5 + 1) + 3 / (1 + 0.5 + 0.5)) / 2)
    assert by["sae"].above_random.value == pytest.approx(1.75 - 1.35) and by["sae"].concept_above_random.low == 1
    assert by["unedited"].rating.value == 0 and by["unedited"].above_random.value == pytest.approx(-1.35)
    assert [one.strength for one in judged.rated if one.method == "sae"] == [1.0, 2.0] * 3
    assert {(p.method, p.factor): p.parts[0] for p in judged.points}[("sae", 2.0)] == 1.0
    (selection,) = judged.selection
    assert selection.score == "calibrated F1" and selection.pairs == 3
    assert selection.rating.value == pytest.approx(2) and selection.others.value == pytest.approx(1.5)
    assert [one.parts[0].value for one in judged.suppression] == [2, 1, 0] and judged.suppression[2].less.value == 2
    assert judged.suppression[0].less is None and len(RATINGS) == 3


def test_differences_to_random_latents_are_taken_pair_by_pair() -> None:
    """Concept ratings differ from pair to pair, their differences to random latents' do not: no width is left."""
    pairs, pool = [pair(j, "abcd"[j]) for j in range(4)], list("stuv")
    experiment = Experiment(
        pairs=pairs, methods=("sae", "random"), factors=(1.0,), pool=pool, prompts=[""] * 4, suppression=False,
        instructions=draw_instructions(pool, 4, 4, seed=0),
    )  # fmt: skip
    saes = sae_of([Direction(torch.eye(8)[j]) for j in range(8)], SITE, TokenPolicy())
    handles = {
        name: [Handle(saes, j + 4 * i, 2.0, "add", "all") for j in range(4)] for i, name in enumerate(("sae", "random"))
    }
    jobs = experiment.jobs(handles)
    values = np.array([[(job.block == "sae") + job.row[0] % 2, 2, 2] for job in jobs], dtype=float)
    values[[i for i, job in enumerate(jobs) if job.block == "random" and job.row[0] == 3]] = np.nan  # a failed pair
    judged = judge(experiment, jobs, Ratings(Scripted([]), values, []), repeated_folds(4), [{}] * 4, ())
    above = judged.scores[0].concept_above_random
    assert above == Interval(1, 1, 1)
    assert [one.failed for one in judged.rated] == [0] * 7 + [4]
