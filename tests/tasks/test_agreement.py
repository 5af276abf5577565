"""Subject-verb agreement pairs: what they promise, for a tokenizer of words, one of characters, and the real one."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from unweave.core.errors import UnweaveError
from unweave.lm.model import LM
from unweave.tasks import agreement
from unweave.tasks.agreement import STRUCTURES, Pair


def word_tokenizer(multi: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """One token per word with its leading space; the words in ``multi`` have no token of their own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = {"that", "the", *agreement.DETERMINERS, *agreement.PREPOSITIONS}
    for group in (*agreement.PEOPLE, *agreement.THINGS, *agreement.TRANSITIVE, *agreement.VERBS):
        words |= set(group)
    pieces = [piece for word in sorted(words - set(multi)) for piece in (word, "▁" + word)]
    vocab = {token: i for i, token in enumerate(["<unk>", *"▁abcdefghijklmnopqrstuvwxyz", *pieces])}
    core = Tokenizer(models.WordPiece(vocab, unk_token="<unk>", continuing_subword_prefix=""))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    core.decoder = decoders.Metaspace(prepend_scheme="never")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", clean_up_tokenization_spaces=False)


def prefixes(pairs: list[Pair]) -> set[str]:
    return {prefix for pair in pairs for prefix in (pair.clean_prefix, pair.patch_prefix)}


@pytest.mark.parametrize("structure", ["within_rc", "across_rc", "across_pp"])
def test_train_and_test_share_no_prefix(structure: Any) -> None:
    tokenizer = word_tokenizer()
    train = agreement.pairs(tokenizer, structure, 1000, split="train")
    test = agreement.pairs(tokenizer, structure, 1000, split="test", seed=1)
    assert not prefixes(train) & prefixes(test)
    assert len(set(train)) == len(set(test)) == 1000


def test_all_simple_pairs_are_drawn_once_and_their_splits_share_no_prefix() -> None:
    form = agreement._FORMS["simple"]
    train, test = (list(agreement._drawn("simple", split, random.Random(0), form)) for split in ("train", "test"))
    total = len(form.slots[0]) * len(form.slots[1]) * 2 * len(form.answers)
    assert len({*train, *test}) == len(train) + len(test) == total
    assert not prefixes(train) & prefixes(test)
    assert 0.15 < len(test) / total < 0.25


@pytest.mark.parametrize("structure", STRUCTURES)
def test_pairs_differ_in_the_subject_alone(structure: Any) -> None:
    for pair in agreement.pairs(word_tokenizer(), structure, 200):
        clean, patch = pair.clean_prefix.split(), pair.patch_prefix.split()
        assert len(clean) == len(patch)
        (at,) = [i for i, (a, b) in enumerate(zip(clean, patch, strict=True)) if a != b]
        subject = {"simple": 1, "within_rc": 4, "across_rc": 1, "across_pp": 1}[structure]
        assert at == subject
        number = pair.case.split("_")[0]
        assert clean[at].endswith("s") == (number == "plural")
        assert patch[at].endswith("s") != (number == "plural")
        form = 0 if number == "singular" else 1
        verbs = agreement.TRANSITIVE if structure == "within_rc" else agreement.VERBS
        answers = (pair.clean_answer.strip(), pair.patch_answer.strip())
        assert (answers[form], answers[1 - form]) in verbs
        assert pair.clean_answer.startswith(" ") and pair.patch_answer.startswith(" ")


def test_the_verb_inside_a_relative_clause_agrees_with_the_distractor() -> None:
    for pair in agreement.pairs(word_tokenizer(), "across_rc", 100):
        _, _, _, _, distractor, verb = pair.clean_prefix.split()
        _, number = pair.case.split("_")
        assert distractor.endswith("s") == (number == "plural")
        assert verb.endswith("s") == (number == "singular")


def test_pairs_are_the_same_for_the_same_seed_and_others_for_another() -> None:
    tokenizer = word_tokenizer()
    one, two, three = (agreement.pairs(tokenizer, "across_pp", 50, seed=s) for s in (3, 3, 4))
    assert one == two
    assert one != three


def test_cases_are_balanced() -> None:
    cases = [pair.case for pair in agreement.pairs(word_tokenizer(), "across_pp", 400)]
    for case in ("singular_singular", "singular_plural", "plural_singular", "plural_plural"):
        assert 60 < cases.count(case) < 140


def test_words_of_several_tokens_are_left_out() -> None:
    """An answer in two pieces, and a noun whose plural is longer than its singular."""
    tokenizer = word_tokenizer(multi=("seems", "keys"))
    text = " ".join(
        f"{p.clean_prefix} {p.patch_prefix} {p.clean_answer}" for p in agreement.pairs(tokenizer, "simple", 2000)
    )
    words = set(text.split())
    assert "seem" not in words and "key" not in words and "is" in words and "cabinets" in words


def test_too_few_pairs_is_an_error_with_both_numbers(tiny_tokenizer: Any) -> None:
    with pytest.raises(UnweaveError, match=r"7 simple pairs were asked for, but only 0 qualify"):
        agreement.pairs(tiny_tokenizer, "simple", 7)  # characters: no answer is a single token
    with pytest.raises(UnweaveError, match=r"100000 simple pairs were asked for, but only [1-9]\d* qualify"):
        agreement.pairs(word_tokenizer(), "simple", 100_000)


@pytest.mark.parametrize("wrong", [{"structure": "across"}, {"split": "dev"}, {"n": 0}])
def test_wrong_requests_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UnweaveError):
        agreement.pairs(word_tokenizer(), **({"structure": "simple", "n": 3} | wrong))


def test_json_lines_round_trip_with_the_papers_keys(tmp_path: Path) -> None:
    pairs = agreement.pairs(word_tokenizer(), "within_rc", 20)
    path = tmp_path / "rc.jsonl"
    agreement.save(path, pairs)
    assert agreement.load(path) == pairs
    keys = {"clean_prefix", "patch_prefix", "clean_answer", "patch_answer", "case"}
    assert all(set(json.loads(line)) == keys for line in path.read_text().splitlines())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"clean_prefix": "The key"}\n', r"patch_prefix.*missing"),
        ("not json\n", r"(?s)not JSON.*line 1"),
        ("[1]\n", r"not JSON|missing"),
        ("", "no pairs"),
    ],
)
def test_bad_files_of_pairs_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    with pytest.raises(UnweaveError, match=message):
        agreement.load(path)
    with pytest.raises(UnweaveError, match="cannot read"):
        agreement.load(tmp_path / "missing.jsonl")


def test_users_pairs_that_do_not_fit_are_counted_or_refused(tiny: Any) -> None:
    tokenizer = word_tokenizer(multi=("seems",))
    good = Pair("The key", "The keys", " is", " are", "singular")
    longer = Pair("The key", "The old keys", " is", " are", "")
    pieces = Pair("The key", "The keys", " seems", " seem", "")
    kept, left_out = agreement.usable(tokenizer, [good, longer, pieces])
    assert kept == [good]
    assert left_out == {"the prefixes have different numbers of tokens": 1, "an answer is not a single token": 1}
    lm = LM(tiny("llama", vocab_size=len(tokenizer)), tokenizer)
    with pytest.raises(UnweaveError, match=r"(?s)not a single token.*pair 1"):
        agreement.batches(lm, [good, pieces])


def test_a_prefix_that_tokenises_apart_is_left_out() -> None:
    """With characters and a merge over the border, an answer changes the prefix's own tokens."""
    from tokenizers import Tokenizer, models

    vocab = {c: i for i, c in enumerate("abe ")} | {"b ": 4, " a": 5}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[("b", " "), (" ", "a")], unk_token="e"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="e")
    problem = agreement.problem_of(tokenizer, Pair("aab", "bab", " a", " a", ""))
    assert problem == "a prefix is tokenised differently once an answer follows it"


def test_batches_and_metric_against_single_prompts(tiny: Any) -> None:
    tokenizer = word_tokenizer()
    lm = LM(tiny("llama", vocab_size=len(tokenizer)), tokenizer)
    pairs = agreement.pairs(lm, "across_pp", 9) + agreement.pairs(lm, "simple", 4)
    grouped = agreement.batches(lm, pairs, max_rows=6)
    assert [tuple(clean.ids.shape) for clean, _, _ in grouped] == [(4, 2), (6, 5), (3, 5)]
    expected = {}
    for pair in pairs:
        good, bad = (tokenizer.convert_tokens_to_ids("▁" + a.strip()) for a in (pair.clean_answer, pair.patch_answer))
        logits = lm(lm.tokenize(pair.clean_prefix))[0, -1]
        expected[pair] = float(logits[bad] - logits[good])
    found = torch.cat([m(lm(clean, keep_logits=1)[:, -1], torch.arange(len(clean))) for clean, _, m in grouped])
    ordered = sorted(pairs, key=lambda pair: len(pair.clean_prefix.split()))
    torch.testing.assert_close(found, torch.tensor([expected[pair] for pair in ordered]), rtol=1e-4, atol=1e-5)
    metric = grouped[1][2]
    logits = torch.randn(3, len(tokenizer))
    rows = torch.tensor([5, 0, 0])  # methods run examples in other groups, and several times
    by_hand = [float(logits[i, metric.patch[r]] - logits[i, metric.clean[r]]) for i, r in enumerate(rows.tolist())]
    assert metric(logits, rows).tolist() == pytest.approx(by_hand)


def test_accuracy_counts_by_hand(tiny: Any) -> None:
    tokenizer = word_tokenizer()
    lm = LM(tiny("gpt2", vocab_size=len(tokenizer)), tokenizer)
    pairs = agreement.pairs(lm, "simple", 10) + agreement.pairs(lm, "across_pp", 10)
    clean, patch, cases = 0, 0, {}
    for pair in pairs:
        ids = [tokenizer.convert_tokens_to_ids("▁" + a.strip()) for a in (pair.clean_answer, pair.patch_answer)]
        a, b = (lm(lm.tokenize(p))[0, -1][ids] for p in (pair.clean_prefix, pair.patch_prefix))
        clean, patch = clean + bool(a[0] > a[1]), patch + bool(b[1] > b[0])
        cases.setdefault(pair.case, []).extend([bool(a[0] > a[1]), bool(b[1] > b[0])])
    found = agreement.accuracy(lm, pairs, max_rows=4)
    assert (found.n, found.clean, found.patch) == (20, clean / 20, patch / 20)
    assert found.by_case == pytest.approx({case: sum(hits) / len(hits) for case, hits in cases.items()})


def test_a_model_that_guesses_does_not_do_the_task() -> None:
    for clean, patch in ((0.42, 0.5), (1.0, 0.0), (0.55, 0.55)):
        problem = agreement.Accuracy(100, clean, patch, {}).problem
        assert problem is not None and f"{clean:.0%}" in problem and "fails this task" in problem
    assert agreement.Accuracy(1, 1.0, 1.0, {}).problem is None and agreement.Accuracy(50, 0.9, 0.6, {}).problem is None


def test_the_default_model_knows_agreement(default_lm: Any) -> None:
    """The real tokenizer gives enough of every structure, and the model answers most of them right."""
    for structure in STRUCTURES:
        train = agreement.pairs(default_lm, structure, 150)
        test = agreement.pairs(default_lm, structure, 60, split="test")
        assert not prefixes(train) & prefixes(test)
        for pair in train + test:
            clean, patch = (default_lm.tokenizer(p)["input_ids"] for p in (pair.clean_prefix, pair.patch_prefix))
            assert len(clean) == len(patch)
            for answer in (pair.clean_answer, pair.patch_answer):
                assert len(default_lm.tokenizer(answer)["input_ids"]) == 1
    found = agreement.accuracy(default_lm, agreement.pairs(default_lm, "across_pp", 40))
    assert found.clean > 0.85 and found.patch > 0.85
