"""tasks/tagged: every source, what is refused, equal and nearly equal texts, and the split."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from unweave.core.errors import UnweaveError
from unweave.core.stage import contents_of
from unweave.tasks.tagged import sets, stackexchange
from unweave.tasks.tagged.spec import TaggedSpec
from unweave.tasks.tagged.texts import TaggedTexts, open_tagged


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNWEAVE_CACHE", str(tmp_path / "cache"))


def as_pairs(texts: TaggedTexts) -> list[tuple[str, list[str]]]:
    return [(texts.text(i), [texts.names[label] for label in texts.labels(i)]) for i in range(len(texts))]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rows_are_read_once_each_with_the_labels_of_their_equals(tmp_path: Path) -> None:
    rows = [
        {"text": "one día", "tags": ["b", "a"]},
        {"text": "  \n", "tags": ["a"]},
        {"text": "two\nlines", "tags": []},
        {"text": "one día", "tags": ["c"]},
        {"text": "three", "tags": "x|a"},
    ]
    expected = [("one día", ["a", "b", "c"]), ("two\nlines", []), ("three", ["a", "x"])]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    texts = open_tagged(TaggedSpec(source=str(file)))
    assert as_pairs(texts) == expected and texts.names == ("a", "b", "c", "x")
    assert texts.support(np.array([0, 2])).tolist() == [2, 1, 1, 1]
    assert texts.support(np.array([], dtype=int)).tolist() == [0, 0, 0, 0]
    lists = [{"body": row["text"], "labels": row["tags"] if row["tags"] != "x|a" else ["x", "a"]} for row in rows]
    pq.write_table(pa.Table.from_pylist(lists), tmp_path / "rows.parquet")
    spec = TaggedSpec(source=str(tmp_path / "rows.parquet"), text_field="body", tags_field="labels")
    assert as_pairs(open_tagged(spec)) == expected
    before = contents_of(TaggedSpec(source=str(file)))
    write_rows(file, rows[:3])
    assert contents_of(TaggedSpec(source=str(file))) != before, "the file's bytes are part of what is asked"
    assert len(open_tagged(TaggedSpec(source=str(file)))) == 2


def test_near_duplicates_fall_on_one_side_whatever_the_seed_and_the_draw_is_of_the_content(tmp_path: Path) -> None:
    draw = random.Random(0)
    words = [f"word{i}" for i in range(5000)]
    rows = []
    for i in range(200):
        own = draw.choices(words, k=60)
        rows += [{"text": " ".join(own), "tags": ["x"]}, {"text": " ".join([*own[:50], f"end{i}"]), "tags": ["y"]}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    for seed in range(3):
        texts = open_tagged(TaggedSpec(source=str(file), seed=seed))
        sides = texts.heldout.reshape(-1, 2)
        assert (sides[:, 0] == sides[:, 1]).mean() > 0.98  # MinHash misses a few: 0.17 ** 4
        assert 0.2 < texts.heldout.mean() < 0.4
    few = open_tagged(TaggedSpec(source=str(file), texts=50))
    assert len(few) == 50
    whole = open_tagged(TaggedSpec(source=str(file)))
    side_of = {whole.text(i): bool(whole.heldout[i]) for i in range(len(whole))}
    assert all(side_of[few.text(i)] == few.heldout[i] for i in range(50))
    draw.shuffle(rows)  # another order of the same rows: the same texts are drawn
    again = open_tagged(TaggedSpec(source=str(write_rows(tmp_path / "other.jsonl", rows)), texts=50))
    assert {again.text(i) for i in range(50)} == {few.text(i) for i in range(50)}


def test_a_split_that_near_duplicates_decide_is_told(tmp_path: Path) -> None:
    start = "every text begins with the same nine words and ends"
    file = write_rows(tmp_path / "rows.jsonl", [{"text": f"{start} {i}", "tags": ["x"]} for i in range(40)]
                      + [{"text": f"another {i}", "tags": []} for i in range(40)])  # fmt: skip
    texts = open_tagged(TaggedSpec(source=str(file)))
    assert texts.alike == 40 and "40 of the 80 texts are near duplicates" in texts.notes[0]
    few = open_tagged(TaggedSpec(source=str(file), texts=2))
    assert few.alike <= 2


# -- Stack Exchange ---------------------------------------------------------------------------------------------------


def dump(folder: Path, posts: list[dict[str, str]], comments: list[dict[str, str]]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, rows in (("posts", posts), ("comments", comments)):
        lines = ["<row " + " ".join(f"{k}={quoteattr(v, {chr(10): '&#xA;'})}" for k, v in row.items()) + " />"
                 for row in rows]  # fmt: skip
        body = "\n".join(f"  {line}" for line in lines)
        text = f'\ufeff<?xml version="1.0" encoding="utf-8"?>\n<{name}>\n{body}\n</{name}>\n'
        (folder / f"{name.capitalize()}.xml").write_text(text, encoding="utf-8")
    return folder


POSTS = [
    {"Id": "1", "PostTypeId": "1", "Title": "Sort & search?", "Tags": "<list><sorting>",
     "Body": "<p>How <b>fast</b>?</p>\n<pre><code>x &lt; y\n</code></pre><ul><li>one</li><li>two</li></ul>"},
    {"Id": "2", "PostTypeId": "2", "Body": "<p>An answer has no tags.</p>"},
    {"Id": "7", "PostTypeId": "1", "Title": "Newer form", "Tags": "|list|", "Body": "<p>Sure</p><script>f()</script>"},
]  # fmt: skip
COMMENTS = [
    {"Id": "1", "PostId": "7", "Text": "first of seven"},
    {"Id": "2", "PostId": "1", "Text": "of one, with `code` & é"},
    {"Id": "3", "PostId": "2", "Text": "of an answer"},
    {"Id": "4", "PostId": "7", "Text": "second of seven"},
]


def test_a_dump_becomes_questions_with_their_comments_and_code_where_it_is_wanted(tmp_path: Path) -> None:
    folder = dump(tmp_path / "forum", POSTS, COMMENTS)
    assert as_pairs(open_tagged(TaggedSpec(source=str(folder)))) == [
        ("Sort & search?\nHow fast?\n\nx < y\n\none\ntwo\nof one, with `code` & é", ["list", "sorting"]),
        ("Newer form\nSure\nfirst of seven\nsecond of seven", ["list"]),
    ]
    bare = open_tagged(TaggedSpec(source=str(folder), code_blocks="drop", comments=False))
    assert bare.text(0) == "Sort & search?\nHow fast?\n\none\ntwo" and bare.text(1) == "Newer form\nSure"
    import py7zr

    with py7zr.SevenZipFile(tmp_path / "forum.7z", "w") as archive:
        for name in ("Posts.xml", "Comments.xml"):
            archive.write(folder / name, name)
        archive.writestr("never", "Outside.xml")
    packed = open_tagged(TaggedSpec(source=str(tmp_path / "forum.7z")))
    assert packed.text(1) == "Newer form\nSure\nfirst of seven\nsecond of seven"
    assert not list(tmp_path.rglob("Outside.xml"))


BOMB = '<!DOCTYPE posts [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]>\n'


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: text.replace("</posts>", ""), "the file ends before </posts>"),
        (lambda text: text[: len(text) // 2], "not a row of XML"),
        (lambda text: text.replace("<posts>", BOMB + "<posts>"), "is not a row of <posts>"),
        (lambda text: text.replace("<row ", BOMB.strip() + "<row "), "is not a row of <posts>"),
        (lambda text: text.replace('Title="Newer', 'Title="&b;'), "undefined entity"),
        (lambda text: text.replace("\n", " "), "is not a row of <posts>"),
        (lambda text: text.replace("<posts>", "<html>"), "is not a row of <posts>"),
        (lambda text: text.replace("Newer", "x" * (1 << 24)), "more than 16,777,216 bytes"),
        (lambda text: "", "the file ends before </posts>"),
        (lambda text: text.replace("<list><sorting>", "").replace("&lt;list&gt;&lt;sorting&gt;", "")
         .replace("|list|", ""), "the source holds 0 texts"),
    ],
)  # fmt: skip
def test_broken_huge_and_malicious_dumps_are_refused(tmp_path: Path, change: Callable[[str], str], reason: str) -> None:
    folder = dump(tmp_path / "forum", POSTS, COMMENTS)
    posts = folder / "Posts.xml"
    posts.write_text(change(posts.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(UnweaveError, match=reason.replace("(", r"\(")):
        open_tagged(TaggedSpec(source=str(folder)))
    assert not list((tmp_path / "cache").rglob("about.json")), "nothing half read is kept"


def test_archives_that_are_none_and_missing_parts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.7z").write_bytes(b"PK\x03\x04 this is another kind")
    with pytest.raises(UnweaveError, match="not a 7z archive"):
        open_tagged(TaggedSpec(source=str(tmp_path / "a.7z")))
    import py7zr

    with py7zr.SevenZipFile(tmp_path / "b.7z", "w") as archive:
        archive.writestr("no dump", "Readme.txt")
    with pytest.raises(UnweaveError, match=r"no Posts\.xml"):
        open_tagged(TaggedSpec(source=str(tmp_path / "b.7z")))
    folder = dump(tmp_path / "forum", POSTS, COMMENTS)
    with py7zr.SevenZipFile(tmp_path / "c.7z", "w") as archive:
        archive.write(folder / "Posts.xml", "Posts.xml")
    content = (tmp_path / "c.7z").read_bytes()
    (tmp_path / "c.7z").write_bytes(content[: len(content) // 2])
    with pytest.raises(UnweaveError, match="not a 7z archive"):
        open_tagged(TaggedSpec(source=str(tmp_path / "c.7z")))
    for name, kinds in (("locked", {}), ("closed", {"header_encryption": True})):
        with py7zr.SevenZipFile(tmp_path / f"{name}.7z", "w", password="s", **kinds) as archive:
            archive.write(folder / "Posts.xml", "Posts.xml")
        with pytest.raises(UnweaveError, match="it has a password"):
            open_tagged(TaggedSpec(source=str(tmp_path / f"{name}.7z"), comments=False))
    with py7zr.SevenZipFile(tmp_path / "d.7z", "w") as archive:
        archive.write(folder / "Posts.xml", "Posts.xml")
    content = bytearray((tmp_path / "d.7z").read_bytes())
    for place in range(32, 64):  # within the compressed stream
        damaged = content.copy()
        damaged[place] ^= 0x55
        (tmp_path / "d.7z").write_bytes(damaged)
        with pytest.raises(UnweaveError, match="not a 7z archive"):
            open_tagged(TaggedSpec(source=str(tmp_path / "d.7z"), comments=False))
    (folder / "Comments.xml").unlink()
    with pytest.raises(UnweaveError, match="comments: false"):
        open_tagged(TaggedSpec(source=str(folder)))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnweaveError, match=r"unweave\[label\]"):
        open_tagged(TaggedSpec(source=str(folder), comments=False))


def test_numbers_of_posts_that_are_none_have_no_comments(tmp_path: Path) -> None:
    posts = [POSTS[0] | {"Id": number, "Title": number} for number in ("9" * 30, "\u00b2", "\u0661", "1")]
    comments = [{"PostId": post["Id"], "Text": "a comment"} for post in posts]
    texts = open_tagged(TaggedSpec(source=str(dump(tmp_path / "forum", posts, comments))))
    assert ["a comment" in texts.text(i) for i in range(4)] == [False, False, False, True]


def test_html_is_text_without_what_is_loaded_or_run() -> None:
    assert stackexchange.plain('<a href="file:///etc/passwd">x</a><img src="http://h/p.png">') == "x"
    assert stackexchange.plain("<!-- nothing -->") == "" and stackexchange.plain("") == ""
    assert stackexchange.plain("a<br>b &amp; &#99; &unknown;") == "a\nb & c &unknown;"
    assert stackexchange.plain("<div>" * 5000 + "deep") in ("", "deep")


# -- other sources ----------------------------------------------------------------------------------------------------


def test_package_descriptions_have_the_tags_of_all_packages_they_describe(tmp_path: Path) -> None:
    folder = tmp_path / "lists"
    folder.mkdir()
    (folder / "main_Packages").write_text(
        "Package: a\nDescription-md5: m1\nTag: role::program, works-with::{text,\n image:raster}\n\n"
        "Package: b\nDescription-md5: m1\nTag: use::editing\n\nPackage: c\nDescription-md5: m2\n\n"
        "Package: d\nDescription-md5: m3\nTag: role::data\n", encoding="utf-8"
    )  # fmt: skip
    with pytest.raises(UnweaveError, match="Translation-en"):
        open_tagged(TaggedSpec(source=str(folder)))
    (folder / "main_Translation-en").write_text(
        "Package: a\nDescription-md5: m1\nDescription-en: an editor\n It edits.\n .\n  - and more\n\n"
        "Package: c\nDescription-md5: m2\nDescription-en: without tags\n\n"
        "Package: d\nDescription-md5: m3\nDescription-en: data\n", encoding="utf-8"
    )  # fmt: skip
    texts = open_tagged(TaggedSpec(source=str(folder)))
    assert as_pairs(texts) == [
        ("an editor\nIt edits.\n\n- and more",
         ["role::program", "use::editing", "works-with::image:raster", "works-with::text"]),
        ("data", ["role::data"]),
    ]  # fmt: skip
    (folder / "main_Packages").write_text("Package: a\nnot a field\n", encoding="utf-8")
    with pytest.raises(UnweaveError, match="a line has no field"):
        open_tagged(TaggedSpec(source=str(folder)))


def test_a_labelled_set_uses_the_named_class_and_counts_a_text_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = {
        "158_code_C": [("int x;", 1), ("<p>", 0)],
        "159_code_Python": [("def f(): pass", 1), ("int x;", 0), ('a,\n"b"', 1)],
        "160_code_HTML": [("<p>", 1), ("<p>", 1)],
        "92_glue_sst2": [("dull", 0), ("grand", 1)],
        "111_yelp_data": [("cold soup", 1), ("so so", 2), ("warm bread", 3)],
        "157_amazon_5star": [("broke", 0)],
    }
    for name, rows in tables.items():
        table = pa.table({"prompt": [row[0] for row in rows], "target": [row[1] for row in rows]})
        with pa.CompressedOutputStream(str(tmp_path / f"{name}.csv.zst"), "zstd") as out:
            pyarrow.csv.write_csv(table, out)
    monkeypatch.setattr(sets, "fetch_package", lambda entry: tmp_path)
    texts = open_tagged(TaggedSpec(source="code"))
    assert as_pairs(texts) == [("int x;", ["C code"]), ("def f(): pass", ["Python code"]),
                               ('a,\n"b"', ["Python code"]), ("<p>", ["HTML code"])]  # fmt: skip
    assert "licence" in texts.notes[0]
    assert as_pairs(open_tagged(TaggedSpec(source="reviews"))) == [
        ("dull", ["film review", "negative"]), ("grand", ["film review", "positive"]),
        ("cold soup", ["negative", "restaurant review"]), ("so so", ["restaurant review"]),
        ("warm bread", ["positive", "restaurant review"]), ("broke", ["negative", "product review"]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"text": "a", "tags": ["x"]}, {"text": "b"}], "list of tags in 'tags'"),
        ([{"text": 3, "tags": ["x"]}], "has no text in 'text'"),
        ([{"text": "a", "tags": ["x", 3]}], "list of tags in 'tags'"),
        (["a text"], "not an object"),
        ([{"text": "a", "tags": []}, {"text": "b", "tags": []}], "no text with a tag"),
        ([{"text": " ", "tags": ["x"]}, {"text": "b", "tags": ["x"]}], "1 texts"),
    ],
)
def test_rows_without_text_or_tags_are_refused(tmp_path: Path, rows: list[Any], reason: str) -> None:
    with pytest.raises(UnweaveError, match=reason):
        open_tagged(TaggedSpec(source=str(write_rows(tmp_path / "rows.jsonl", rows))))


def test_an_option_of_another_source_and_no_source_at_all_are_refused(tmp_path: Path) -> None:
    for wrong in ({"code_blocks": "drop"}, {"comments": False}, {"text_field": "body"}):
        with pytest.raises(UnweaveError, match="would have no effect"):
            TaggedSpec(source="debtags", **wrong)  # type: ignore[arg-type]
    with pytest.raises(UnweaveError, match="no tagged texts 'debtag'"):
        open_tagged(TaggedSpec(source="debtag"))
    (tmp_path / "folder.jsonl").mkdir()
    for nothing in ("missing.jsonl", "missing.7z", "folder.jsonl"):
        with pytest.raises(UnweaveError, match="there is no such file"):
            open_tagged(TaggedSpec(source=str(tmp_path / nothing)))
    with pytest.raises(UnweaveError, match="no tagged texts"):
        contents_of(TaggedSpec(source=str(tmp_path)))
