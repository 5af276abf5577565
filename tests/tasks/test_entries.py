"""Files of examples in every form, and what is said of those that are wrong; annotations read by the same rules."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from unweave.core.errors import UnweaveError
from unweave.latents import annotations
from unweave.latents.annotations import Annotation
from unweave.tasks import agreement, answers
from unweave.tasks.agreement import Pair
from unweave.tasks.answers import Input
from unweave.tasks.entries import entries

ODD = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\x1dh\x1ei\rj\tk"
PAIRS = [Pair(f"The {ODD}", f"The {ODD}s", " is", " are", "singular"), Pair("A", "B", " c", " d", "")]
INPUTS = [Input(f"See {ODD}", " is"), Input("\ufeffÄ b", " c")]


def written(values: list[Any], form: str) -> bytes:
    if form == "array":
        text = json.dumps(values, ensure_ascii=False)
    elif form == "indented":
        text = "\n" + json.dumps(values, ensure_ascii=False, indent=2) + "\n"
    else:
        text = ("\r\n" if form == "crlf" else "\n").join(json.dumps(v, ensure_ascii=False) for v in values)
    return (b"\xef\xbb\xbf" if form == "bom" else b"") + text.encode()


@pytest.mark.parametrize("form", ["lines", "crlf", "bom", "array", "indented"])
def test_examples_are_read_in_every_form(tmp_path: Path, form: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(written([asdict(pair) for pair in PAIRS], form))
    assert agreement.load(path) == PAIRS
    path.write_bytes(written([asdict(given) for given in INPUTS], form))
    assert answers.load(path) == INPUTS
    named = {str(i): asdict(given) for i, given in enumerate(INPUTS)}
    path.write_bytes(json.dumps(named, ensure_ascii=False, indent=1 if form == "indented" else None).encode())
    assert answers.load(path) == INPUTS


def test_objects_come_as_lines_or_as_one_array(tmp_path: Path) -> None:
    odd = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg"
    values = [{"text": odd}, {"text": "second"}, {"text": ""}]
    as_lines, as_array, empty = (tmp_path / name for name in ("lines", "array", "empty"))
    as_lines.write_bytes("\n".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values).encode())
    as_array.write_bytes(("\n " + json.dumps(values, indent=1, ensure_ascii=False)).encode())
    empty.write_bytes(b"\n\n")
    for path in (as_lines, as_array):
        assert [value for _, value in entries(path, "texts", ["text"])] == values
    assert [where for where, _ in entries(as_lines, "texts", ["text"])][1] == f"{as_lines}, line 3"
    with pytest.raises(UnweaveError, match="holds no texts"):
        entries(empty, "texts", ["text"])


def test_what_is_saved_is_read_again_whatever_its_characters(tmp_path: Path) -> None:
    path = tmp_path / "a"
    agreement.save(path, PAIRS)
    assert agreement.load(path) == PAIRS
    answers.save(path, INPUTS)
    assert answers.load(path) == INPUTS
    said = Annotation("resid_post.3/7", ODD, ODD, 1, 2, True, "0123456789ab")
    annotations.append(tmp_path / "b", said)
    assert annotations.load(tmp_path / "b") == {said.name: said}


GOOD = asdict(PAIRS[1])


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (GOOD | {"clean_prefix": 3}, "clean_prefix is a number, not text"),
        (GOOD | {"patch_prefix": None, "case": None}, "patch_prefix is null, not text, case is null, not text"),
        (GOOD | {"clean_answer": [" a"]}, "clean_answer is a list, not text"),
        (GOOD | {"patch_answer": {"a": "b"}}, "patch_answer is an object, not text"),
        (GOOD | {"patch_answer": True}, "patch_answer is true or false, not text"),
        ({"clean_prefix": "a"}, "patch_prefix is missing, clean_answer is missing"),
        ([GOOD], "there is a list in place of an object"),
        (None, "there is null in place of an object"),
        ("words", "there is text in place of an object"),
    ],
)
def test_what_is_wrong_is_named_with_its_place_and_field(tmp_path: Path, value: Any, says: str) -> None:
    path = tmp_path / "a"
    for content, place in (
        ("\n" + json.dumps(GOOD) + "\n" + json.dumps(value), "line 3"),
        (json.dumps([GOOD, value], indent=1), "entry 1"),
    ):
        path.write_text(content)
        with pytest.raises(UnweaveError, match=says) as caught:
            agreement.load(path)
        assert caught.value.where == f"{path}, {place}" and caught.value.remedy


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"context": null, "answer": " b"}', "context is null, not text"),
        (b'{"context": [], "answer": " b"}', "context is a list, not text"),
        (b'{"context": "a", "answer": [" b"]}', "answer is a list, not text"),
        (b'[{"context": "a", "answer": " b"}] junk', "not JSON"),
        (b'[{"context": "a", "answer": " b"}\n] junk', "not JSON"),
        (b'{"context": "a", "context": "b", "answer": " b"}', "the key 'context' appears twice"),
        (b'{"context": "\\ud800", "answer": " b"}', "half a surrogate pair"),
        (b"[" * 5000 + b"]" * 5000, "nested deeper"),
        (b'{"context":' * 5000 + b"1" + b"}" * 5000, "nested deeper"),
        (b"\xff\xfe{\0}\0", "UTF-16"),
        (b"\xfe\xff\0{\0}", "UTF-16"),
        (b'{"context": "\xff", "answer": " b"}', "not UTF-8"),
        (b"[]", "holds no inputs"),
        (b"{}", "context is missing, answer is missing"),
        (b"\xef\xbb\xbf\n \n", "holds no inputs"),
        (b"", "holds no inputs"),
        (b"3", "there is a number"),
    ],
)
def test_files_of_inputs_that_are_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)
    with pytest.raises(UnweaveError, match=says) as caught:
        answers.load(path)
    assert str(path) in caught.value.where and caught.value.remedy


def test_an_empty_prefix_is_a_problem_with_a_name(tiny_lm: Any) -> None:
    lm = tiny_lm()
    kept, left_out = agreement.usable(lm, [Pair("", "", " a", " b", ""), Pair("a", "", "c", "d", "")])
    assert not kept and left_out == {"a prefix has no tokens": 2}
    with pytest.raises(UnweaveError, match="a prefix has no tokens"):
        agreement.batches(lm, [Pair("", "", "a", "b", "")])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"name": "resid_post.3/7", "name": "resid_post.3/8"}', "appears twice"),
        (b'{"name": "resid_post.3/7", "annotation": 0}', "annotation is 0, not text"),
        (b'{"name": "resid_post.3/7", "notes": []}', r"notes is \[\], not text"),
        (b'{"name": "resid_post.3/7", "interpretability": NaN}', "interpretability is nan"),
        (b'{"name": "resid_post.3/' + b"9" * 5000 + b'"}', "names no latent"),
        ('{"name": "resid_post.3/٣"}'.encode(), "names no latent"),
        (b"[" * 5000, "nested deeper"),
        (b'{"name": "\\udc80"}', "surrogate"),
        (b"\xff", "not UTF-8"),
        (b"\xff\xfe{\0}\0", "UTF-16"),
    ],
)
def test_annotations_that_are_refused(tmp_path: Path, line: bytes, says: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(line)
    with pytest.raises(UnweaveError, match=says):
        annotations.load(path)
