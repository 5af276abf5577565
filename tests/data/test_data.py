"""Text to documents to rows to stored tokens: nothing is lost uncounted, and bad input is refused by name."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave.core.errors import UnweaveError
from unweave.data.corpus import Document, Source, TextCounts, documents, is_heldout, read
from unweave.data.pack import Packed, PackSpec, Row, pack
from unweave.data.rows import chitchat_conversations, json_rows
from unweave.data.splits import SplitDocuments
from unweave.data.tokens import TokenStore
from unweave.lm.chat import Role, encode_text

BOS, EOS, PAD = 0, 1, 2
WORDS = st.text(alphabet="abcde ", min_size=1, max_size=30)
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def texts(contents: list[str]) -> list[Document]:
    return [Document(content, None, "here", i) for i, content in enumerate(contents)]


def chat(content: str = "hi", index: int = 0) -> Document:
    return Document(None, ({"role": "user", "content": content}, {"role": "assistant", "content": "ho"}), "log", index)


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def all_of(path: Path | str, **fields: str) -> list[Document]:
    return list(read(Source(path=str(path), **fields)))


# ---------------------------------------------------------------- corpus


def test_folder_of_texts_is_one_document_a_file(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("two\n\nstill two", encoding="utf-8")
    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "notes.md").write_text("not read", encoding="utf-8")
    lines(tmp_path / "c.jsonl", [{"text": "three"}])
    assert [d.text for d in all_of(tmp_path)] == ["one", "two\n\nstill two", "three"]


def test_lone_text_file_is_split_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\none\nstill one\n \n\ntwo", encoding="utf-8")
    assert [d.text for d in all_of(path)] == ["one\nstill one", "two"]
    path.write_text("".join(f"line {i} {'x' * 90}\n" for i in range(30_000)), encoding="utf-8")
    parts = [d.text or "" for d in all_of(path)]
    assert len(parts) == 4 and max(map(len, parts)) < 1_000_200
    assert "\n".join(parts) + "\n" == path.read_text(encoding="utf-8")


def test_json_lines_arrays_and_parquet_give_the_same_documents(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": f"text {i} ü", "other": i} for i in range(700)]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    wanted = [row["text"] for row in rows]
    for path in (lines(tmp_path / "a.jsonl", rows), lines(tmp_path / "b.json", rows), tmp_path / "a.json"):
        assert [d.text for d in all_of(path)] == wanted
    assert [d.text for d in all_of(tmp_path / "a.parquet")] == wanted
    assert [d.index for d in all_of(tmp_path / "a.parquet")] == list(range(700))


@given(
    rows=st.lists(st.one_of(st.integers(), st.text(max_size=9), st.lists(st.integers(), max_size=3)), max_size=9),
    size=st.integers(1, 7),
)
@settings(max_examples=60, deadline=None)
def test_arrays_are_parsed_right_wherever_the_reads_cut_them(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], size: int
) -> None:
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_text(" " * 5 + json.dumps(rows, indent=size % 3, ensure_ascii=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unweave.data.rows._READ_BYTES", size)
        assert [row for row, _ in json_rows(path)] == rows


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        {"messages": CHAT, "text": "ignored", "conversations": None},
        {"conversation": CHAT, "language": "English"},
        {"instruction": "hi", "input": "", "output": "ho"},
    ],
)
def test_chat_logs_of_every_common_shape(tmp_path: Path, row: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    assert [d.messages for d in all_of(lines(tmp_path / "a.jsonl", [row]))] == [tuple(CHAT)]
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert [d.messages for d in all_of(tmp_path / "a.parquet")] == [tuple(CHAT)]


def test_contents_given_in_parts(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    path = lines(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": parts}, CHAT[1]]}])
    assert [d.messages for d in all_of(path)] == [tuple(CHAT)]
    lines(path, [{"messages": [{"role": "user", "content": [*parts, {"type": "image"}]}]}])
    with pytest.raises(UnweaveError, match="no text"):
        all_of(path)


def test_fields_can_be_named(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"body": "one", "messages": CHAT, "log": CHAT[:1]}])
    assert all_of(path, text_field="body", messages_field="")[0].text == "one"
    assert all_of(path, messages_field="log")[0].messages == tuple(CHAT[:1])


def test_chitchat_package_layout(tmp_path: Path) -> None:
    def said(sender: str, *parts: str) -> list[dict[str, str]]:
        return [{"text": part, "sender": sender, "timestamp": ""} for part in parts]

    turns = [said("x", "hello", "you there?"), said("y", "yes"), said("y", "", "sure"), said("x", "good")]
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"a": {"messages": turns}, "b": {"messages": []}}), encoding="utf-8")
    roles = ["user", "assistant", "user"]
    contents = ["hello\nyou there?", "yes\nsure", "good"]
    wanted = tuple({"role": r, "content": c} for r, c in zip(roles, contents, strict=True))
    assert list(chitchat_conversations(path)) == [wanted]


def test_hub_datasets_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load(path: str, config: str | None, *, split: str, streaming: bool) -> Any:
        asked.append((path, config, split, streaming))
        if path == "org/gone":
            raise ConnectionError("no route to the hub")
        return iter([{"text": "one"}, {"text": "two"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [d.text for d in all_of("hub:org/name:small", split="test")] == ["one", "two"]
    assert asked == [("org/name", "small", "test", True)]
    with pytest.raises(UnweaveError, match="no route to the hub") as caught:
        all_of("hub:org/gone")
    assert "org/gone" in caught.value.where and "local files" in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "content", "what", "where"),
    [
        ("a.jsonl", '{"text": "one"}\n{"body": "two"}\n', "no text in 'text'", "line 2"),
        ("a.jsonl", '{"text": "one"}\n\n{"text": \n', "not JSON", "line 3"),
        ("a.jsonl", '{"text": 3}\n', "no text in 'text'", "line 1"),
        ("a.jsonl", "[1]\n3\n", "int", "row 1"),
        ("a.jsonl", '{"messages": "hi"}\n', "not a list of messages", "line 1"),
        ("a.jsonl", '{"messages": []}\n', "not a list of messages", "line 1"),
        ("a.jsonl", '{"messages": [{"role": "tool", "content": "x"}]}\n', "'tool'", "line 1"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}\n', "no text", "line 1"),
        ("a.json", '[{"text": "one"}, {"text"', "not JSON", "row 2"),
        ("a.jsonl", "", "no text here", "a.jsonl"),
        ("a.txt", "\n \n", "no text here", "a.txt"),
        ("a.parquet", "PAR1 nonsense", "Parquet", "a.parquet"),
        ("a.csv", "a,b", "unknown kind", "a.csv"),
    ],
)
def test_bad_files_are_named_with_the_place(tmp_path: Path, name: str, content: str, what: str, where: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UnweaveError) as caught:
        all_of(tmp_path / name)
    assert what in caught.value.what and where in caught.value.where and caught.value.remedy


def test_missing_text_wrong_columns_and_wrong_encoding_are_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pytest.raises(UnweaveError, match="no text 'nowhere'"):
        all_of("nowhere")
    with pytest.raises(UnweaveError, match="holds no text"):
        all_of(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UnweaveError, match="UTF-8"):
        all_of(tmp_path / "a.txt")
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UnweaveError, match="none of the columns") as caught:
        all_of(tmp_path / "a.parquet")
    assert "body" in caught.value.remedy
    with pytest.raises(UnweaveError, match="no text was named"):
        next(documents([], 0))
    with pytest.raises(UnweaveError, match="not above 0"):
        next(documents([Source(path="x", weight=0.0)], 0))


def test_order_is_deterministic_shuffled_and_weighted(tmp_path: Path) -> None:
    a = lines(tmp_path / "a.jsonl", [{"text": f"a{i}"} for i in range(3000)])
    b = lines(tmp_path / "b.jsonl", [{"text": f"b{i}"} for i in range(1000)])
    sources = [Source(path=str(a), weight=3.0), Source(path=str(b))]

    def order(seed: int) -> list[str]:
        return [d.text or "" for d in documents(sources, seed)]

    first = order(1)
    assert first == order(1) and first != order(2)
    assert Counter(first) == Counter([f"a{i}" for i in range(3000)] + [f"b{i}" for i in range(1000)])
    share = [sum(text[0] == "a" for text in first[i : i + 400]) for i in range(0, 4000, 400)]
    assert share == [300] * 10  # the sources end together: 3 to 1 all the way
    numbers = np.array([int(text[1:]) for text in first if text[0] == "a"])
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.9  # neighbours in the file are not neighbours here


def test_shares_hold_until_a_source_is_exhausted(tmp_path: Path) -> None:
    sizes = {"a": 600, "b": 100, "c": 400}
    weights = {"a": 2.0, "b": 1.0, "c": 0.5}
    sources = [
        Source(path=str(lines(tmp_path / f"{n}.jsonl", [{"text": f"{n}{i}"} for i in range(size)])), weight=weights[n])
        for n, size in sizes.items()
    ]
    order = [(d.text or "")[0] for d in documents(sources, 3)]
    taken: Counter[str] = Counter()
    left = set(sizes)
    for name in order:
        taken[name] += 1
        # everybody still there is as far as its weight says, up to the document it is about to give
        for one, other in ((x, y) for x in left for y in left):
            assert taken[one] / weights[one] <= (taken[other] + 1) / weights[other] + 1e-9
        left -= {n for n in left if taken[n] == sizes[n]}
    assert taken == Counter(sizes)
    assert Counter(order[:350]) == {"a": 200, "b": 100, "c": 50}


def test_blank_documents_and_conversations_are_left_out_and_counted(tmp_path: Path) -> None:
    silent = [{"role": "user", "content": " "}, {"role": "assistant", "content": ""}]
    rows = [{"text": "one"}, {"text": " \n"}, {"messages": silent}, {"messages": CHAT}, {"text": ""}]
    counts = TextCounts()
    found = list(documents([Source(path=str(lines(tmp_path / "a.jsonl", rows)))], 0, counts))
    assert sorted(d.index for d in found) == [0, 3] and counts.blank == 3
    with pytest.raises(UnweaveError, match="no text here"):
        all_of(lines(tmp_path / "a.jsonl", rows[1:3]))


def test_halves_of_surrogate_pairs_are_replaced(tmp_path: Path) -> None:
    half, pair = "bad \ud83d half", "good \ud83d\ude00 pair"
    rows = [{"text": half}, {"text": pair}, {"messages": [{"role": "user", "content": half}, CHAT[1]]}]
    rows.append({"instruction": half, "output": half})
    found = all_of(lines(tmp_path / "a.jsonl", rows))
    assert [d.text for d in found[:2]] == ["bad \ufffd half", "good \U0001f600 pair"]
    for document in found:
        assert "\\ud83d" not in ascii(document.content)
        is_heldout(document, 0.5, 0)  # which encodes it


def test_reading_is_lazy(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"text": f"a{i}"} for i in range(3000)] + [{"broken": 1}])
    stream = documents([Source(path=str(path))], 0)
    assert next(stream).text  # the broken row lies beyond what the shuffle holds


@given(contents=st.lists(WORDS, min_size=1, max_size=40), seed=st.integers(0, 9))
def test_heldout_split_is_disjoint_by_content(contents: list[str], seed: int) -> None:
    docs = texts(contents) + [chat(content) for content in contents]
    docs += [Document(d.text, d.messages, "elsewhere", i + 7) for i, d in enumerate(docs)]  # duplicates
    held = {d.content for d in docs if is_heldout(d, 0.5, seed)}
    kept = {d.content for d in docs if not is_heldout(d, 0.5, seed)}
    assert not held & kept and len(held | kept) == len({d.content for d in docs})
    assert not any(is_heldout(d, 0.0, seed) for d in docs) and all(is_heldout(d, 1.0, seed) for d in docs)


def test_heldout_fraction_and_seed() -> None:
    docs = texts([f"document {i}" for i in range(4000)])
    by_seed = [[is_heldout(d, 0.2, seed) for d in docs] for seed in (0, 1)]
    assert all(abs(sum(held) / 4000 - 0.2) < 0.025 for held in by_seed)
    assert by_seed[0] != by_seed[1]


def test_parts_of_a_split_share_no_document(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(2000)))

    def part(first: float, last: float) -> list[str]:
        found = SplitDocuments([Source(path=str(path))], "heldout", heldout=0.5, seed=1, part=(first, last))
        return [document.content for document in found]

    parts = [part(0.0, 0.25), part(0.25, 0.9), part(0.9, 1.0)]
    whole = part(0.0, 1.0)
    assert (
        sorted(content for one in parts for content in one) == sorted(whole) and 0.2 < len(parts[0]) / len(whole) < 0.3
    )


# ---------------------------------------------------------------- packing


@given(
    contents=st.lists(WORDS, min_size=1, max_size=20),
    chats=st.integers(0, 3),
    context=st.integers(4, 40),
    bos=st.sampled_from(["tokenizer", "always", "never"]),
    packing=st.sampled_from(["documents", "blocks"]),
    add_bos=st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_packing_loses_no_token_but_the_counted_ones(
    make_tokenizer: Callable[..., Any],
    contents: list[str],
    chats: int,
    context: int,
    bos: Any,
    packing: Any,
    add_bos: bool,
) -> None:
    tokenizer = make_tokenizer(add_bos=add_bos)
    docs = texts(contents) + [chat(index=i) for i in range(chats)]
    packed = pack(docs, tokenizer, PackSpec(packing=packing, context=context, min_tokens=4, bos=bos))
    rows = list(packed)
    n = packed.counts
    given_tokens = sum(len(encode_text(tokenizer, c)[0]) for c in contents) + chats * len(_chat_ids(tokenizer))
    left_out = n.truncated_tokens + n.short_tokens + n.remainder_tokens
    assert sum(len(row.ids) for row in rows) == n.row_tokens
    assert given_tokens + n.added_tokens - n.removed_bos == n.row_tokens + left_out
    assert n.documents == len(docs) and n.rows == len(rows)
    assert all(len(row.ids) == len(row.roles) and Role.PAD not in row.roles for row in rows)
    if packing == "blocks":
        assert all(len(row.ids) == context for row in rows) and n.remainder_tokens < context
    else:
        assert all(4 <= len(row.ids) <= context for row in rows)
        assert [row.document for row in rows] == sorted({row.document for row in rows})


def _chat_ids(tokenizer: Any) -> list[int]:
    return tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)


def test_blocks_hold_the_documents_in_order_with_separators(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(add_bos=True)
    contents = ["abc", "de", "fghijkl", "m"]
    stream = [i for c in contents for i in [*tokenizer(c).input_ids[1:], EOS]]
    for bos, head in (("tokenizer", [BOS]), ("always", [BOS]), ("never", [])):
        rows = list(pack(texts(contents), tokenizer, PackSpec(packing="blocks", context=5, min_tokens=1, bos=bos)))
        assert all(row.ids[: len(head)] == head for row in rows)
        joined = [i for row in rows for i in row.ids[len(head) :]]
        assert joined == stream[: len(joined)] and len(stream) - len(joined) < 5
        assert all((i in (BOS, EOS)) == (r == Role.SPECIAL) for row in rows for i, r in zip(*row[:2], strict=True))
    # the tokenizer itself adds none: neither do the blocks
    rows = list(pack(texts(contents), make_tokenizer(), PackSpec(packing="blocks", context=5, min_tokens=1)))
    assert not any(BOS in row.ids for row in rows)


def test_trap_04_no_bos_inside_a_block(make_tokenizer: Callable[..., Any]) -> None:
    rows = list(
        pack(texts(["abc", "de", "fgh"] * 9), make_tokenizer(add_bos=True), PackSpec(packing="blocks", context=8))
    )
    assert rows and all(row.ids.count(BOS) == 1 and row.ids[0] == BOS for row in rows)


def test_trap_05_bos_id_zero_is_a_bos(make_tokenizer: Callable[..., Any]) -> None:
    always, never = PackSpec(bos="always", min_tokens=1), PackSpec(bos="never", min_tokens=1)
    assert next(pack(texts(["ab"]), make_tokenizer(), always)).ids[0] == 0
    assert 0 not in next(pack(texts(["ab"]), make_tokenizer(add_bos=True), never)).ids
    # where the same token opens every turn of a conversation, it is part of the template and stays
    assert next(pack([chat()], make_tokenizer(), never)).ids == _chat_ids(make_tokenizer())


def test_trap_03_doubled_bos_is_refused(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(
        chat_template="{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(UnweaveError, match="two BOS") as caught:
        list(pack([chat(index=5)], tokenizer, PackSpec(min_tokens=1)))
    assert caught.value.where == "log, document 5"


def test_tokenizer_without_bos(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    assert next(pack(texts(["ab"]), tokenizer, PackSpec(min_tokens=1))).roles == [Role.TEXT] * 2
    with pytest.raises(UnweaveError, match="has none"):
        pack(texts(["ab"]), tokenizer, PackSpec(bos="always"))


PICKY = "{% for m in messages %}{{ raise_exception('bad') if m['content'] == 'bad' else m['content'] }}{% endfor %}"
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
)


def said(*turns: tuple[str, str], index: int = 0) -> Document:
    return Document(None, tuple({"role": role, "content": content} for role, content in turns), "log", index)


def test_roles_that_a_template_rejects_are_skipped_counted_and_named(make_tokenizer: Callable[..., Any]) -> None:
    good = said(("user", "hi"), ("assistant", "ho"), ("user", " hm "), index=3)
    system = said(("system", "be kind"), ("user", "hi"), ("assistant", "ho"), index=1)
    twice = said(("user", "hi"), ("user", "hi?"), ("assistant", "ho"), index=2)
    for packing in ("documents", "blocks"):
        packed = pack(
            [system, twice, good],
            make_tokenizer(chat_template=NO_SYSTEM),
            PackSpec(min_tokens=2, packing=packing, context=32),
        )
        rows = list(packed)
        assert len(rows) == 1 and packed.counts.rejected_conversations == 2 and packed.counts.conversations == 1
        assert "log, document 1" in packed.counts.first_rejected
        assert "System role not supported" in packed.counts.first_rejected
    again = pack([twice, good], make_tokenizer(chat_template=NO_SYSTEM), PackSpec())
    assert len(list(again)) == 1 and "must alternate" in again.report()["packing"]["first_rejected"]


def test_a_template_that_rejects_everything_is_an_error(
    tmp_path: Path, make_tokenizer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer(chat_template=NO_SYSTEM)
    system = said(("system", "be kind"), ("user", "hi"), ("assistant", "ho"), index=7)
    plain = texts(["some plain text"] * 3)
    with pytest.raises(UnweaveError, match="refuses all conversations, 2 so far") as caught:
        list(pack([*plain, system, system], tokenizer, PackSpec()))
    assert "log, document 7" in caught.value.what and caught.value.remedy
    # the budget is reached without reaching the end: still an error, and no store of something else than was asked
    with pytest.raises(UnweaveError, match="refuses all conversations"):
        TokenStore.write(tmp_path / "s", pack([system, *plain], tokenizer, PackSpec()), 20, {})
    assert not list(tmp_path.iterdir())
    # and nobody waits for the end of a large text
    monkeypatch.setattr("unweave.data.pack._PATIENCE", 600)

    def endless() -> Any:
        while True:
            yield system

    with pytest.raises(UnweaveError, match="600 so far"):
        list(pack(endless(), tokenizer, PackSpec()))


def test_rewritten_contents_are_rejected_too(make_tokenizer: Callable[..., Any]) -> None:
    template = "{% for m in messages %}{{ m['content'] | replace('secret', '***') }}|{% endfor %}"
    packed = pack([chat("a secret"), chat("fine")], make_tokenizer(chat_template=template), PackSpec(min_tokens=1))
    assert len(list(packed)) == 1 and "does not appear" in packed.counts.first_rejected


def test_conversations_without_an_answer(make_tokenizer: Callable[..., Any]) -> None:
    alone = [said(("user", "hello?"), index=4), said(("user", "hello?"), ("assistant", " \n"), index=5)]
    docs = [*alone, chat("hi", 6), *texts(["plain text"])]

    def packed(**fields: Any) -> Packed:
        return pack(docs, make_tokenizer(), PackSpec(min_tokens=1, **fields))

    skipping = packed()
    assert [row.document for row in skipping] == [2, 3]
    assert skipping.counts.unanswered_conversations == 2 and skipping.counts.documents == 4
    keeping = packed(unanswered="keep")
    assert [row.document for row in keeping] == [0, 1, 2, 3] and keeping.counts.unanswered_conversations == 0
    assert keeping.counts.empty_messages == 1 and keeping.counts.conversations == 3
    with pytest.raises(UnweaveError, match="no text from the assistant") as caught:
        list(packed(unanswered="refuse"))
    assert caught.value.where == "log, document 4"
    with pytest.raises(UnweaveError, match="none of the 2 conversations so far has an assistant turn") as caught:
        list(pack([*alone, docs[-1]], make_tokenizer(), PackSpec()))
    assert "unanswered" in caught.value.remedy


def test_documents_over_the_length_are_cut_and_counted(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    docs = [chat("x" * 100), *texts(["y" * 70, "z" * 64, "short text"])]
    packed = pack(docs, tokenizer, PackSpec(context=64))
    rows = list(packed)
    whole = tokenizer.apply_chat_template(list(docs[0].messages or ()), tokenize=True, return_dict=False)
    assert rows[0].ids == whole[:64] and [len(row.ids) for row in rows] == [64, 64, 64, 10]
    assert packed.counts.truncated_documents == 2 and packed.counts.truncated_tokens == len(whole) - 64 + 6
    assert [row.document for row in rows] == [0, 1, 2, 3]  # never two documents in a row


def test_blocks_of_conversations_are_their_renderings_end_to_end(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    docs = [chat("one " * (1 + i % 3), i) for i in range(12)]
    rendered = [tokenizer.apply_chat_template(list(d.messages or ()), tokenize=True, return_dict=False) for d in docs]
    stream = [i for ids in rendered for i in ids]
    alone = [role for row in pack(docs, tokenizer, PackSpec()) for role in row.roles]
    packed = pack(docs, tokenizer, PackSpec(packing="blocks", context=40))
    rows = list(packed)
    # the template ends every turn itself, so nothing is put between conversations; roles stay with their tokens
    assert [i for row in rows for i in row.ids] == stream[: 40 * len(rows)] and packed.counts.added_tokens == 0
    assert [r for row in rows for r in row.roles] == alone[: 40 * len(rows)]
    assert packed.counts.remainder_tokens == len(stream) - 40 * len(rows) < 40
    assert any(row.roles[0] in (Role.USER, Role.ASSISTANT) for row in rows)  # a block begins in mid-turn
    # plain text beside them is separated as ever
    mixed = pack([chat(), *texts(["abc"]), chat()], tokenizer, PackSpec(packing="blocks", context=10))
    ids = [i for row in mixed for i in row.ids]
    assert ids == [*rendered_of(tokenizer), *tokenizer("abc").input_ids, EOS, *rendered_of(tokenizer)][: len(ids)]


def rendered_of(tokenizer: Any) -> list[int]:
    return tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)


def test_conversations_need_a_template_and_bad_ones_are_named(make_tokenizer: Callable[..., Any]) -> None:
    with pytest.raises(UnweaveError, match="no chat template") as caught:
        list(pack([chat()], make_tokenizer(chat_template=None), PackSpec()))
    assert "instruction-tuned" in caught.value.remedy
    docs = [chat("good", 0), chat("bad", 1), *texts(["ab"]), chat("bad", 2), chat("good", 3)]
    packed = pack(docs, make_tokenizer(chat_template=PICKY), PackSpec(min_tokens=1))
    assert [row.document for row in packed] == [0, 2, 4]
    assert (packed.counts.documents, packed.counts.conversations, packed.counts.rejected_conversations) == (5, 2, 2)
    assert packed.counts.first_rejected.startswith("log, document 1: ") and "bad" in packed.counts.first_rejected


@pytest.mark.parametrize("fields", [{"context": 1}, {"min_tokens": 0}, {"context": 8, "min_tokens": 9}])
def test_impossible_rows_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(UnweaveError, match="must be"):
        PackSpec(**fields)


# ---------------------------------------------------------------- stored tokens


def rows_of(*lengths: int) -> list[Row]:
    return [Row(list(range(5, 5 + n)), [int(Role.TEXT)] * n, i) for i, n in enumerate(lengths)]


def test_store_gives_back_what_was_written(tmp_path: Path, make_tokenizer: Callable[..., Any]) -> None:
    packed = pack([*texts(["abcd efgh", "xyz uvw klm"]), chat()], make_tokenizer(), PackSpec(min_tokens=1, context=9))
    assert isinstance(packed, Packed)
    expected = list(pack([*texts(["abcd efgh", "xyz uvw klm"]), chat()], make_tokenizer(), packed.spec))
    store = TokenStore.write(tmp_path / "s", packed, 27, {"tokenizer": "abc", "note": "é"})
    again = TokenStore.open(tmp_path / "s")
    for found in (store, again):
        assert [(i.tolist(), r.tolist()) for i, r in map(found.row, range(3))] == [row[:2] for row in expected]
        assert found.documents.tolist() == [0, 1, 2] and found.n_rows == 3 and found.n_tokens == 27
        assert found.ids.dtype == np.uint32 and found.roles.dtype == np.uint8 and found.starts.dtype == np.int64
    assert again.meta["note"] == "é" and again.digest == store.digest
    counts = again.meta["counts"]
    assert counts["tokens"] == 27 and sum(counts["roles"].values()) == 27 and counts["roles"]["pad"] == 0
    assert counts["roles"]["special"] == sum(r == Role.SPECIAL for row in expected for r in row.roles)
    assert counts["packing"]["truncated_tokens"] == packed.counts.truncated_tokens > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]  # nothing temporary is left


def test_budget_stops_at_the_row_that_reaches_it(tmp_path: Path) -> None:
    store = TokenStore.write(tmp_path / "s", rows_of(4, 4, 4, 4), 9, {})
    assert store.n_tokens == 12 and store.n_rows == 3
    other = TokenStore.write(tmp_path / "s", rows_of(4, 5), 9, {})  # replaces what was there
    assert TokenStore.open(tmp_path / "s").n_tokens == 9 and other.digest != store.digest


def test_a_budget_of_documents_keeps_each_whole(tmp_path: Path) -> None:
    rows = [
        Row([5] * n, [int(Role.TEXT)] * n, document) for n, document in ((4, 0), (4, 0), (0, 1), (3, 2), (2, 7), (9, 8))
    ]
    store = TokenStore.write(tmp_path / "s", rows, 3, {}, unit="documents")
    assert store.documents.tolist() == [0, 0, 2, 7] and store.n_tokens == 13
    with pytest.raises(UnweaveError, match="only 4 documents, 5 were asked"):
        TokenStore.write(tmp_path / "s", rows, 5, {}, unit="documents")


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8), data=st.data())
@settings(max_examples=40, deadline=None)
def test_trap_01_both_padding_sides_give_the_same_tokens(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], data: st.DataObject
) -> None:
    rows = rows_of(*lengths)
    store = TokenStore.write(tmp_path_factory.mktemp("s") / "s", rows, sum(lengths), {})
    chosen = data.draw(st.lists(st.sampled_from(range(len(lengths))), min_size=1, max_size=6))
    found = {}
    for side in ("right", "left"):
        tokens, where = store.batch(chosen, PAD, side)
        # trap 2: what counts is what the mask says; padding has no place in the store and its own role
        assert ((where == -1) == ~tokens.mask).all() and (tokens.ids[~tokens.mask] == PAD).all()
        assert (tokens.roles[~tokens.mask] == int(Role.PAD)).all() and tokens.n_tokens == sum(
            lengths[i] for i in chosen
        )
        for b, row in enumerate(chosen):
            assert tokens.ids[b][tokens.mask[b]].tolist() == rows[row].ids
            assert where[b][tokens.mask[b]].tolist() == list(range(store.starts[row], store.starts[row + 1]))
        edge = 0 if side == "right" else -1
        assert tokens.mask[:, edge].all()
        found[side] = Counter(zip(tokens.ids[tokens.mask].tolist(), where[tokens.mask].tolist(), strict=True))
    assert found["left"] == found["right"]


def test_trap_02_padding_is_never_stored(tmp_path: Path) -> None:
    with pytest.raises(UnweaveError, match="2 padding tokens"):
        TokenStore.write(tmp_path / "s", [Row([5, PAD, PAD], [int(Role.TEXT), 5, 5], 0)], 3, {})
    assert not list(tmp_path.iterdir())


def test_trap_10_too_little_text_names_both_numbers(tmp_path: Path, shown_tasks: list[Any]) -> None:
    with pytest.raises(UnweaveError, match=r"only 8 tokens, 1,000 were asked for"):
        TokenStore.write(tmp_path / "s", rows_of(4, 4), 1000, {})
    with pytest.raises(UnweaveError, match="no tokens"):
        TokenStore.write(tmp_path / "s", [], 0, {})
    assert not list(tmp_path.iterdir())
    assert [task.end for task in shown_tasks] == ["stopped", "stopped"]


def test_trap_10_tokens_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    store = TokenStore.write(tmp_path / "s", rows_of(4), 4, {"tokenizer": "abc"})
    store.require_tokenizer("abc")
    with pytest.raises(UnweaveError, match="another tokenizer"):
        store.require_tokenizer("xyz")


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "meta", "rows", "none"])
def test_damaged_stores_are_refused(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "s"
    TokenStore.write(folder, rows_of(4, 4), 8, {})
    ids, meta = folder / "ids.bin", folder / "meta.json"
    if damage == "cut":
        ids.write_bytes(ids.read_bytes()[:-4])
    elif damage == "flip":
        ids.write_bytes(b"\xff" + ids.read_bytes()[1:])
    elif damage == "missing":
        (folder / "roles.bin").unlink()
    elif damage == "meta":
        meta.write_text(meta.read_text(encoding="utf-8")[:40], encoding="utf-8")
    elif damage == "rows":
        (folder / "starts.npy").write_bytes(b"nonsense")
    else:
        folder = tmp_path / "elsewhere"
    with pytest.raises(UnweaveError) as caught:
        TokenStore.open(folder)
    assert str(folder) in caught.value.where and "again" in caught.value.remedy


def test_unwritable_folder_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UnweaveError, match="cannot write"):
        TokenStore.write(tmp_path / "file" / "s", rows_of(4), 4, {})
