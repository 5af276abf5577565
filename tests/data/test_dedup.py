"""Deduplication: the paper's algorithm against a set of tuples, whatever the memory, the batches and the process."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave.cli.app import main
from unweave.core.errors import UnweaveError
from unweave.data.corpus import Document, Source, read
from unweave.data.dedup import Deduplicated, Deduplicator, write_deduplicated
from unweave.data.hashset import HashSet
from unweave.data.pack import PackSpec, pack
from unweave.data.splits import SplitDocuments
from unweave.data.tokens import TokenStore
from unweave.data.words import gram_hashes, word_hashes


def chat(*contents: str, index: int = 0) -> Document:
    messages = tuple({"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents))
    return Document(None, messages, "log", index)


def text(content: str, index: int = 0) -> Document:
    return Document(content, None, "here", index)


def grams(document: Document, n: int) -> set[tuple[str, ...]]:
    """The oracle's n-grams: within each message, by slicing."""
    contents = [document.text or ""] if document.messages is None else [m["content"] for m in document.messages]
    split = [content.split() for content in contents]
    return {tuple(words[i : i + n]) for words in split for i in range(len(words) - n + 1)}


def naive(documents: list[Document], n: int) -> tuple[list[bool], list[int]]:
    """The paper's algorithm with a set."""
    seen: set[tuple[str, ...]] = set()
    kept, new = [], []
    for document in documents:
        own = grams(document, n)
        kept.append(not own & seen)
        new.append(len(own) if kept[-1] else 0)
        seen |= own if kept[-1] else set()
    return kept, new


def random_documents(rng: random.Random, count: int, vocabulary: int) -> list[Document]:
    found: list[Document] = []
    for i in range(count):
        parts = [" ".join(str(rng.randrange(vocabulary)) for _ in range(rng.randrange(60))) for _ in range(3)]
        if found and rng.random() < 0.3:
            earlier = rng.choice(found)
            parts[rng.randrange(3)] += " " + (earlier.text or (earlier.messages or ({"content": ""},))[-1]["content"])
        found.append(text(parts[0], i) if rng.random() < 0.3 else chat(*parts, index=i))
    return found


def words(start: int, count: int) -> str:
    return " ".join(f"w{i}" for i in range(start, start + count))


@pytest.mark.parametrize("memory", [64, 4096, 1 << 24])
@pytest.mark.parametrize(("n", "vocabulary"), [(1, 1000), (2, 30), (3, 30), (5, 30), (7, 2), (20, 3), (20, 1000)])
def test_decisions_are_those_of_a_set_of_tuples(tmp_path: Path, memory: int, n: int, vocabulary: int) -> None:
    rng = random.Random(f"{n} {vocabulary}")
    documents = random_documents(rng, 250, vocabulary)
    wanted = naive(documents, n)
    judge = Deduplicator(n, memory_bytes=memory, folder=tmp_path)
    kept: list[bool] = []
    new: list[int] = []
    at = 0
    while at < len(documents):
        size = rng.randrange(1, 60)
        keep, brought = judge.keep(documents[at : at + size])
        kept, new, at = kept + keep.tolist(), new + brought.tolist(), at + size
    assert (kept, new) == wanted
    assert len(judge.seen) == sum(new) and 0 < sum(kept) < len(documents)
    assert (judge.seen.spilled > 0) == (memory < 8 * 4 * sum(new))
    assert list(tmp_path.iterdir()) == []  # the files have no names


def test_one_call_one_by_one_and_streamed_are_the_same() -> None:
    documents = random_documents(random.Random(1), 300, 30)
    wanted, new = naive(documents, 4)
    assert Deduplicator(4).keep(documents)[0].tolist() == wanted
    alone = Deduplicator(4)
    assert [bool(alone.keep([d])[0][0]) for d in documents] == wanted
    streamed = Deduplicated(documents, 4)
    assert list(streamed) == [d for d, keep in zip(documents, wanted, strict=True) if keep]
    kept = sum(wanted)
    assert streamed.report() == {"n": 4, "documents": 300, "kept": kept, "dropped": 300 - kept, "grams": sum(new)}


def test_order_decides_which_of_two_is_kept() -> None:
    short, long = text(words(0, 25)), text(words(5, 60))
    assert list(Deduplicated([short, long])) == [short]
    assert list(Deduplicated([long, short])) == [long]
    # what was dropped is not remembered: the end of `long`, which `short` does not have, is still free
    assert list(Deduplicated([short, long, text(words(40, 25), 2)])) == [short, text(words(40, 25), 2)]


def test_texts_shorter_than_n_words_are_never_dropped() -> None:
    short = [chat(words(0, 19), words(0, 19)), text(words(0, 19)), chat("hi", "ho")]
    assert list(Deduplicated(short * 3)) == short * 3
    assert list(Deduplicated([text(words(0, 20))] * 3)) == [text(words(0, 20))]


def test_one_shared_boilerplate_passage_drops_a_dialogue() -> None:
    boilerplate = words(1000, 20)
    first = chat(words(0, 40), f"{words(50, 30)} {boilerplate}")
    second = chat(f"{boilerplate} {words(200, 90)}", words(300, 90))
    almost = chat(f"{words(1000, 19)} {words(400, 90)}", words(500, 90))
    assert list(Deduplicated([first, second, almost])) == [first, almost]


def test_grams_do_not_cross_messages_or_documents() -> None:
    whole = text(words(0, 30))
    halves = [chat(words(0, 15), words(15, 15)), text(words(0, 15)), text(words(15, 15))]
    assert list(Deduplicated([*halves, whole])) == [*halves, whole]
    assert list(Deduplicated([whole, *halves])) == [whole, *halves]


def test_a_document_does_not_drop_itself() -> None:
    again = chat(words(0, 30), words(0, 30), "a " * 50)
    assert list(Deduplicated([again, again])) == [again]


def test_case_matters_and_roles_and_blanks_do_not() -> None:
    said = words(0, 20)
    assert len(list(Deduplicated([text(said), text(said.upper())]))) == 2
    assert len(list(Deduplicated([text(said), chat("", said), text(said.replace(" ", "\u3000\n"))]))) == 1


def test_reading_is_lazy() -> None:
    def documents() -> Iterator[Document]:
        yield from (text(words(i * 50, 30), i) for i in range(3000))
        raise AssertionError("read too far")

    assert next(Deduplicated(documents())).index == 0


def test_n_must_make_sense() -> None:
    with pytest.raises(UnweaveError, match="0 words"):
        Deduplicated([], 0)


# ---------------------------------------------------------------- words


@given(st.lists(st.text(alphabet="ab\n\t \x1c\x85\xa0\u2003\u3000\u200bé漢\x00", max_size=40), min_size=1, max_size=6))
@settings(max_examples=300)
def test_words_are_those_of_split(texts: list[str]) -> None:
    hashes, counts = word_hashes(texts)
    split = [t.split() for t in texts]
    assert counts.tolist() == [len(part) for part in split]
    flat = [word for part in split for word in part]
    assert len(hashes) == len(flat)
    named = dict(zip(flat, hashes.tolist(), strict=True))
    assert [named[word] for word in flat] == hashes.tolist()  # equal words, equal hashes, wherever they stand
    assert len(set(named.values())) == len(named)


def test_every_white_space_of_split_separates() -> None:
    blanks = [chr(code) for code in range(0x110000) if chr(code).isspace()]
    assert word_hashes([f"a{blank}b" for blank in blanks])[1].tolist() == [2] * len(blanks)


def test_long_words_and_those_of_every_length_differ() -> None:
    lengths = [*range(1, 40), 511, 512, 513, 514, 5000]
    variants = ["a" * n for n in lengths] + ["b" + "a" * (n - 1) for n in lengths] + ["a" * n + "b" for n in lengths]
    distinct = set(variants)
    hashes, _ = word_hashes([" ".join(distinct)])
    assert len(set(hashes.tolist())) == len(distinct)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 20, 33])
def test_gram_hashes_are_different_for_different_grams(n: int) -> None:
    rng = random.Random(n)
    sequence = [rng.randrange(3) for _ in range(4000)]
    letters, _ = word_hashes(["zero one two"])
    hashes = gram_hashes(letters[sequence], n)
    assert len(hashes) == len(sequence) - n + 1
    by_hash: dict[int, tuple[int, ...]] = {}
    for i, value in enumerate(hashes.tolist()):
        assert by_hash.setdefault(value, tuple(sequence[i : i + n])) == tuple(sequence[i : i + n])
    assert len(set(by_hash.values())) == len(by_hash)
    assert len(gram_hashes(letters[[0] * (n - 1)], n)) == 0


def test_words_in_another_order_make_another_gram() -> None:
    letters, _ = word_hashes(["a b c d e"])
    orders = list(itertools.permutations(range(5)))
    assert len({int(gram_hashes(letters[list(order)], 5)[0]) for order in orders}) == len(orders)


def test_hashes_are_the_same_in_every_process() -> None:
    code = (
        "from unweave.data.words import *\nw, _ = word_hashes(['the cat sat on the mat é'])\n"
        "print(w.tolist(), gram_hashes(w, 3).tolist())"
    )
    found = []
    for seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": seed}
        found.append(subprocess.run([sys.executable, "-c", code], stdout=-1, text=True, check=True, env=env).stdout)
    hashes, _ = word_hashes(["the cat sat on the mat é"])
    assert found == [f"{hashes.tolist()} {gram_hashes(hashes, 3).tolist()}\n"] * 2
    assert hashes[0] == hashes[4] and len(set(hashes.tolist())) == 6


# ---------------------------------------------------------------- the set


@pytest.mark.parametrize("memory", [64, 2048, 1 << 20])
def test_hash_set_is_a_set(tmp_path: Path, memory: int) -> None:
    rng = np.random.default_rng(memory)
    held = HashSet(memory, tmp_path)
    truth: set[int] = {0, 2**64 - 1}
    held.add(np.array(sorted(truth), dtype=np.uint64))
    for _ in range(60):
        new = np.unique(rng.integers(0, 2**64, int(rng.integers(1, 400)), dtype=np.uint64))
        some = rng.choice(np.array(sorted(truth), dtype=np.uint64), 50)
        asked = np.unique(np.concatenate([new, some, some + np.uint64(1)]))
        assert held.contains(asked).tolist() == [value in truth for value in asked.tolist()]
        held.add(new[~held.contains(new)])
        truth |= set(new.tolist())
        assert len(held) == len(truth)
        assert sum(map(len, held._memory)) <= max(1, memory // 32)
    assert held.in_files == (memory < 1 << 20) and list(tmp_path.iterdir()) == []
    held.close()
    assert len(held) == 0


def test_files_are_merged_and_each_block_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unweave.data.hashset._BLOCK", 8)
    rng = np.random.default_rng(0)
    every = np.unique(rng.integers(0, 2**64, 20_000, dtype=np.uint64))
    held = HashSet(32 * 100, tmp_path)
    for part in np.array_split(rng.permutation(every), 180):
        held.add(np.sort(part))
    assert len(held._files) < 15 and max(run.tier for run in held._files) >= 2
    assert held.contains(every).all() and len(held) == len(every)
    others = np.setdiff1d(every + np.uint64(1), every)
    assert not held.contains(others).any()
    for run in held._files:
        content = run.read(0, run.length)
        assert (np.diff(content) > 0).all() and (run.fences == content[::8]).all()


def test_full_disk_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    held = HashSet(64, tmp_path)
    with pytest.raises(UnweaveError, match="disk is full") as caught:
        held.add(np.arange(9, dtype=np.uint64))
    assert str(tmp_path) in caught.value.where


# ---------------------------------------------------------------- splits and stores


def dialogues(path: Path, count: int = 400) -> Path:
    """Conversations, three in ten of which share a passage with an earlier one, and some plain texts."""
    rng = random.Random(0)
    rows: list[Any] = []
    passages: list[str] = []
    for i in range(count):
        said = words(1000 * i, 30)
        if passages and rng.random() < 0.3:
            said = f"{said} {rng.choice(passages)}"
        passages.append(said)
        pair = [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": said}]
        rows.append({"text": said} if i % 5 == 0 else {"messages": pair})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def split(path: Path, name: str, dedup: int, **fields: Any) -> SplitDocuments:
    return SplitDocuments([Source(path=str(path))], name, **{"heldout": 0.3, "seed": 0, "dedup": dedup, **fields})


def test_heldout_text_shares_no_gram_with_training_text(tmp_path: Path) -> None:
    path = dialogues(tmp_path / "a.jsonl")

    def shared(dedup: int, **fields: Any) -> set[tuple[str, ...]]:
        sides = [split(path, name, dedup, **fields) for name in ("train", "heldout")]
        found = [set().union(*(grams(d, 20) for d in side)) for side in sides]
        assert all(found)
        return found[0] & found[1]

    assert shared(0)  # without deduplication there is something to find
    assert not shared(20)


def test_both_splits_decide_the_same_whatever_the_memory(tmp_path: Path) -> None:
    path = dialogues(tmp_path / "a.jsonl")
    sides = {name: split(path, name, 20) for name in ("train", "heldout")}
    taken = {name: list(side) for name, side in sides.items()}
    train, heldout = (sides[name].report() for name in ("train", "heldout"))
    assert train["dedup"] == heldout["dedup"] and train["dedup"]["dropped"] > 50
    assert train["text"] == {
        "blank": 0,
        "taken": len(taken["train"]),
        "other_split": len(taken["heldout"]),
        "other_part": 0,
    }
    assert len(taken["train"]) + len(taken["heldout"]) == train["dedup"]["kept"]
    small = split(path, "train", 20, memory_bytes=1000, folder=tmp_path)
    assert list(small) == taken["train"] and small.report() == train
    with pytest.raises(UnweaveError, match="unknown split 'test'"):
        split(path, "test", 0)


def test_counts_reach_the_token_store(tmp_path: Path, make_tokenizer: Callable[..., Any]) -> None:
    path = dialogues(tmp_path / "a.jsonl")
    docs = split(path, "train", 20)
    store = TokenStore.write(tmp_path / "s", pack(docs, make_tokenizer(), PackSpec(context=64)), 12_000, {})
    counts = TokenStore.open(tmp_path / "s").meta["counts"]
    assert counts["dedup"] == docs.report()["dedup"] and counts["dedup"]["dropped"] > 0
    assert counts["text"]["taken"] >= counts["packing"]["documents"] >= counts["packing"]["conversations"] > 0
    assert counts["packing"]["truncated_documents"] == store.n_rows  # every answer has more than 64 characters
    lost = sum(counts["packing"][name] for name in ("truncated_tokens", "short_tokens"))
    assert lost > 0 and store.n_tokens == counts["packing"]["row_tokens"]


def test_a_split_that_deduplication_empties_names_the_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{words(0, 20)} {i}"}) + "\n" for i in range(50)), encoding="utf-8")
    outcomes = []
    for name in ("train", "heldout"):
        try:
            outcomes.append(len(list(split(path, name, 20, heldout=0.5))))
        except UnweaveError as error:
            assert f"no document is left for the {name} split" in error.what and error.remedy
            assert "49 of 50 dropped for 20-grams seen before" in error.what and "1 of the other" in error.what
            outcomes.append(0)
    assert sorted(outcomes) == [0, 1]


def test_a_budget_over_the_deduplicated_text_names_the_counts(
    tmp_path: Path, make_tokenizer: Callable[..., Any]
) -> None:
    docs = split(dialogues(tmp_path / "a.jsonl", 40), "train", 20)
    with pytest.raises(UnweaveError, match=r"only [\d,]+ tokens, 10,000,000 were asked for") as caught:
        TokenStore.write(tmp_path / "s", pack(docs, make_tokenizer(), PackSpec()), 10_000_000, {})
    assert "of 40 dropped for 20-grams seen before" in caught.value.what


# ---------------------------------------------------------------- the command


def test_command_writes_what_is_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, out = dialogues(tmp_path / "a.jsonl"), tmp_path / "kept.jsonl"
    documents = list(read(Source(path=str(path))))
    wanted, new = naive(documents, 12)
    assert main(["dedup", str(path), "--out", str(out), "--n", "12", "--json"]) == 0
    answer = json.loads(capfd.readouterr().out)
    kept = [d for d, keep in zip(documents, wanted, strict=True) if keep]
    assert answer["counts"] == {
        "n": 12,
        "documents": 400,
        "kept": len(kept),
        "dropped": 400 - len(kept),
        "grams": sum(new),
    }
    written = list(read(Source(path=str(out))))
    assert [(d.text, d.messages) for d in written] == [(d.text, d.messages) for d in kept]
    assert main(["dedup", str(out), str(path), "--out", str(tmp_path / "b.jsonl"), "--n", "12"]) == 0
    assert f"{400 + len(kept):,} documents read, {len(kept):,} kept" in capfd.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "kept.jsonl"]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("dedup --out b.jsonl", "no text was named"),
        ("dedup a.jsonl --out a.jsonl", "would replace the text it reads"),
        ("dedup a.jsonl --out b.jsonl --n 0", "0 words are invalid"),
        ("dedup a.jsonl --out b.jsonl --memory-mb 0", "0 MB"),
        ("dedup nowhere --out b.jsonl", "no text 'nowhere'"),
        ("dedup a.jsonl", "--out"),
    ],
)
def test_command_refuses_nonsense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], line: str, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    dialogues(tmp_path / "a.jsonl", 5)
    assert main(line.split()) == 2
    assert what in capfd.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_writing_needs_a_source(tmp_path: Path) -> None:
    with pytest.raises(UnweaveError, match="no text was named"):
        write_deduplicated([], tmp_path / "out.jsonl")
