"""Texts as users have them: links, marks, odd line ends, rows that are wrong; and files damaged at random."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unweave.core.contents import tree_of
from unweave.core.errors import UnweaveError
from unweave.core.shown import plain
from unweave.data.corpus import Document, Source, TextCounts, read
from unweave.latents import annotations
from unweave.methods.shift import biographies
from unweave.tasks import agreement, answers

ODD = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\x1dh\x1ei\rj"


def texts(path: Path, **options: Any) -> list[str | None]:
    return [document.text for document in read(Source(path=str(path), **options))]


# -- folders -------------------------------------------------------------------------------------------------------


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    for name in ("texts/own", "elsewhere/deeper"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "texts/own/a.txt").write_text("one")
    (tmp_path / "elsewhere/b.txt").write_text("two")
    (tmp_path / "elsewhere/deeper/c.jsonl").write_text('{"text": "three"}')
    root = tmp_path / "texts"
    before = tree_of(root)
    (root / "first").symlink_to(tmp_path / "elsewhere")
    (root / "second").symlink_to("../elsewhere")
    (root / "third").symlink_to(tmp_path / "elsewhere/deeper")
    (root / "file.txt").symlink_to(tmp_path / "elsewhere/b.txt")
    (root / ".#lock.txt").symlink_to("user@host.1234")  # an editor's, which leads nowhere
    assert sorted(filter(None, texts(root))) == ["one", "three", "two", "two"]
    assert len({before, tree_of(root)}) == 2
    after = tree_of(root)
    (tmp_path / "elsewhere/b.txt").write_text("other words")
    assert tree_of(root) != after


@pytest.mark.parametrize("target", [".", "..", "../..", "../../texts", "loop"])
def test_links_that_lead_back_are_named(tmp_path: Path, target: str) -> None:
    inner = tmp_path / "texts" / "inner"
    inner.mkdir(parents=True)
    (inner / "a.txt").write_text("one")
    (inner / "loop").symlink_to(target)
    with pytest.raises(UnweaveError, match="a link leads") as caught:
        texts(tmp_path / "texts")
    assert caught.value.where == str(inner / "loop") and caught.value.remedy


def test_folders_that_hold_one_another_by_links_end(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "t.txt").write_text(name)
    (tmp_path / "a" / "x").symlink_to("../b")
    (tmp_path / "b" / "y").symlink_to("../a")
    assert sorted(filter(None, texts(tmp_path))) == ["a", "b"]


# -- characters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_marks_are_no_text_and_lines_end_at_line_feeds(tmp_path: Path, mark: bytes, end: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_bytes(mark + f"{ODD}{end}{end}two{end}".encode())
    assert texts(folder) == [f"{ODD}\n\ntwo\n"]
    assert texts(folder / "a.txt") == [ODD, "two"]
    rows = [{"text": ODD}, {"text": "\ufefftwo"}]
    (tmp_path / "a.jsonl").write_bytes(mark + end.join(json.dumps(r, ensure_ascii=False) for r in rows).encode())
    (tmp_path / "a.json").write_bytes(mark + json.dumps(rows, ensure_ascii=False, indent=1).replace("\n", end).encode())
    assert texts(tmp_path / "a.jsonl") == texts(tmp_path / "a.json") == [ODD, "\ufefftwo"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_other_encodings_are_refused(tmp_path: Path, name: str, encoding: str) -> None:
    content = '\ufeff{"text": "é"}' if encoding == "utf-16-be" else '{"text": "é"}'
    (tmp_path / name).write_bytes(content.encode(encoding))
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(UnweaveError, match="UTF-8") as caught:
            texts(path)
        assert str(tmp_path / name) in caught.value.where


def test_halves_of_pairs_are_replaced(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", '{"text": "a\\ud800b"}'), ("a.json", '[{"text": "a\\ud800b"}]')):
        (tmp_path / name).write_text(content)
        assert texts(tmp_path / name) == ["a\ufffdb"]


# -- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says", "where"),
    [
        ('[{"text": "a"}] junk', "something follows the array", "behind row 1"),
        ('[{"text": "a"}]\n[{"text": "b"}]', "something follows the array", "behind row 1"),
        ('[{"text": "a"}]]', "something follows the array", "behind row 1"),
        ('[{"text": "a"} {"text": "b"}]', "a comma or a bracket is missing", "behind row 1"),
        ('[{"text": "a"},, {"text": "b"}]', "not JSON", "row 2"),
        ('[{"text": "a"},]', "not JSON", "row 2"),
        ('[{"text": "a"}', "ends before the array does", "behind row 1"),
        ('[{"text": "a"},', "not JSON", "row 2"),
        ('[{"text": "a", "text": "b"}]', "appears twice", "row 1"),
        ('{"text": "a", "text": "b"}', "appears twice", "line 1"),
        ('[{"text": ' + "[" * 5000 + "]" * 5000 + "}]", "nested", "row 1"),
        ('{"text": ' + "[" * 5000 + "]" * 5000 + "}", "nested", "line 1"),
        ('{"other": ' + "[" * 200 + "]" * 200 + ', "text": "a"}', "nested", "line 1"),
        ('{"text": null, "id": 3}', "no text in 'text': it is null", "line 1"),
        ('{"text": ["a"]}', "no text in 'text': it is a list", "line 1"),
        ('{"messages": []}', "'messages' is not a list of messages but an empty one", "line 1"),
        ('{"messages": [{"role": ["user"], "content": "a"}]}', "has the role", "line 1"),
        ('{"messages": [null]}', "message 0 of 'messages' is not an object", "line 1"),
        ('{"instruction": "a", "input": 3, "output": "b"}', "'input' is not text", "line 1"),
        ('"just text"', "a row is a str", "line 1"),
    ],
)
def test_rows_that_are_wrong(tmp_path: Path, content: str, says: str, where: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(UnweaveError) as caught:
        texts(path)
    assert says in caught.value.what and caught.value.where.endswith(where) and caught.value.remedy
    assert "fields as text_field or messages_field: text" not in caught.value.remedy


def test_a_broken_row_does_not_draw_the_rest_of_the_file_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unweave.data import rows

    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, {text: "b"}, ' + '{"text": "c"}, ' * 9999 + "{}]")
    monkeypatch.setattr(rows, "_READ_BYTES", 1024)
    read_so_far = []
    more = rows._Ahead._more
    monkeypatch.setattr(rows._Ahead, "_more", lambda self: (more(self), read_so_far.append(len(self.text)))[0])
    with pytest.raises(UnweaveError, match="not JSON"):
        texts(path)
    assert sum(read_so_far) <= 2048


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
@pytest.mark.parametrize("content", ["", "\n", " \t\r\n\n", "\ufeff", "\ufeff\n "])
def test_files_without_text(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8", newline="\n")
    with pytest.raises(UnweaveError, match="there is no text here"):
        texts(tmp_path / name)


def test_blank_rows_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"text": ""}\n{"text": " \\u2003\\n"}\n{"text": "a"}\n{"messages": [{"role": "user", "content": " "}]}'
    )
    counts = TextCounts()
    found = list(read(Source(path=str(tmp_path / "a.jsonl")), counts))
    assert found == [Document("a", None, str(tmp_path / "a.jsonl"), 2)] and counts.blank == 3


# -- damaged files -------------------------------------------------------------------------------------------------

ROWS = [{"text": f"text {i} é \u2028", "n": i, "more": [None, {"a": 1.5}]} for i in range(5)]
CHATS = [
    {"messages": [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": "ho"}]} for i in range(3)
]
PAIRS = [
    {"clean_prefix": f"The key {i}", "patch_prefix": "The keys", "clean_answer": " is", "patch_answer": " are"}
    for i in range(3)
]
INPUTS = [{"context": f"The capital {i}", "answer": " of"} for i in range(3)]
SAID = [
    {"name": f"resid_post.3/{i}", "annotation": "words", "interpretability": 80, "relevant": True} for i in range(3)
]
BIOS = [{"hard_text": f"She works {i}", "profession": 13, "gender": 1} for i in range(3)]


def as_lines(values: list[Any]) -> bytes:
    return "\n".join(json.dumps(value, ensure_ascii=False) for value in values).encode()


def as_array(values: list[Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False, indent=1).encode()


def as_parquet(values: list[Any]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(values), sink)
    return sink.getvalue().to_pybytes()


def read_all(path: Path) -> None:
    for document in read(Source(path=str(path))):
        document.content.encode()


def read_biographies(path: Path) -> None:
    for row, where in biographies._rows(str(path), "train"):
        biographies._biography(row, where)


KINDS: dict[str, tuple[str, bytes, Callable[[Path], Any]]] = {
    "text": (".txt", f"one\n{ODD}\n\ntwo é\r\n".encode(), read_all),
    "lines": (".jsonl", as_lines([*ROWS, *CHATS]), read_all),
    "array": (".json", as_array([*ROWS, *CHATS]), read_all),
    "parquet": (".parquet", as_parquet(ROWS), read_all),
    "chats": (".parquet", as_parquet(CHATS), read_all),
    "pairs": (".jsonl", as_lines(PAIRS), agreement.load),
    "array of pairs": (".json", as_array(PAIRS), agreement.load),
    "inputs": (".jsonl", as_lines(INPUTS), answers.load),
    "named inputs": (".json", json.dumps(dict(enumerate(INPUTS))).encode(), answers.load),
    "annotations": (".jsonl", as_lines(SAID), annotations.load),
    "biographies": (".jsonl", as_lines(BIOS), read_biographies),
    "parquet of biographies": (".parquet", as_parquet(BIOS), read_biographies),
}


def damaged(content: bytes, rng: random.Random) -> bytes:
    """One to three of: bytes changed, cut out, doubled, exchanged for what means something in JSON, or the end lost."""
    pieces = [
        b'"',
        b"[",
        b"]",
        b"{",
        b"}",
        b",",
        b":",
        b"\\",
        b"null",
        b"1e999",
        b"NaN",
        b"\n",
        b"\xff",
        b"\0",
        b"\\ud800",
    ]
    for _ in range(rng.randint(1, 3)):
        at, size = rng.randrange(len(content) + 1), rng.choice([1, 1, 2, 9, 60])
        change = rng.choice([b"", rng.randbytes(size), content[at : at + size] * 2, rng.choice(pieces)])
        content = content[:at] + (b"" if rng.random() < 0.1 else change + content[at + size :])
    return content


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_refused_or_read(tmp_path: Path, kind: str) -> None:
    suffix, content, reader = KINDS[kind]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    reader(path)
    refused = 0
    rng = random.Random(kind)
    for _ in range(150):
        path.write_bytes(damaged(content, rng))
        try:
            reader(path)
        except UnweaveError as error:
            refused += 1
            assert error.what and error.where and len(str(error)) < 2000
            plain(str(error)).encode()
    assert refused > 10 or kind == "text"


@pytest.mark.parametrize(
    "fields",
    [
        {"profession": 1.5},
        {"profession": float("inf")},
        {"profession": float("nan")},
        {"profession": "nurse"},
        {"profession": None},
        {"gender": 2},
        {"gender": 0.5},
        {"gender": True},
        {"gender": []},
        {"hard_text": None},
        {"hard_text": ["a"]},
    ],
)
def test_rows_that_are_no_biographies(tmp_path: Path, fields: dict[str, Any]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_lines([BIOS[0], BIOS[0] | fields]))
    with pytest.raises(UnweaveError, match="this row is no biography") as caught:
        read_biographies(path)
    assert caught.value.where == f"{path}, line 2"


def test_numbers_of_biographies_may_be_text_or_floats(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"hard_text": "a\\ud800b", "profession": "13", "gender": 1.0}')
    ((row, where),) = biographies._rows(str(path), "train")
    assert biographies._biography(row, where) == biographies.Biography("a\ufffdb", 1, 1)


def test_a_table_of_other_columns_is_no_biographies(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(as_parquet([{"body": "a"}]))
    with pytest.raises(UnweaveError, match="none of the columns") as caught:
        read_biographies(tmp_path / "a.parquet")
    assert caught.value.remedy == "rename its columns to hard_text, profession, gender: body"
