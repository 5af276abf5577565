"""Reading files of unknown origin: each oddity has one rule."""

import time

import pytest

from unweave.core import files
from unweave.core.errors import UnweaveError

ODD = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg"


def write(tmp_path, content, name="file"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_at_newlines_alone(tmp_path, end):
    path = write(tmp_path, f"\ufeff{ODD}{end}{end}second\ufeff{end}last")
    assert list(files.lines(path)) == [(1, ODD), (2, ""), (3, "second\ufeff"), (4, "last")]


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert files.read_text(write(tmp_path, b"\xef\xbb\xbfhello")) == "hello"
    assert files.read_json(write(tmp_path, b'\xef\xbb\xbf{"a": 1}')) == {"a": 1}
    assert files.read_yaml(write(tmp_path, b"\xef\xbb\xbfa: 1")) == {"a": 1}
    assert files.read_toml(write(tmp_path, b"\xef\xbb\xbfa = 1")) == {"a": 1}


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "appears twice"),
        ('{"a": NaN}', "not a number"),
        ('{"a": -Infinity}', "not a number"),
        ('{"a": 1e999}', "too large"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ("[" * 5000 + "]" * 5000, "deeper than 100"),
        ("[" * 102 + "]" * 102, "deeper than 100"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "deeper than 100"),
        ('{"a": "\\ud800"}', "surrogate"),
        ('{"\\udc00b": 1}', "surrogate"),
        ("[1, 2] junk", "not valid JSON"),
        ("", "not valid JSON"),
    ],
)
def test_json_that_is_refused(tmp_path, text, words):
    with pytest.raises(UnweaveError, match=words) as caught:
        files.read_json(write(tmp_path, text, "config.json"))
    assert caught.value.where.endswith("config.json") and caught.value.remedy


def test_json_that_is_taken():
    assert files.parse_json("[" * 99 + "]" * 99, "") is not None
    assert files.parse_json('"\\ud83d\\ude00"', "") == "\U0001f600"
    assert files.parse_json('{"score": NaN, "a": 1e999}', "", finite=False)["a"] == float("inf")


def test_yaml_aliases_cost_what_they_expand_to(tmp_path):
    lists = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
    )
    merges = "a0: &a0 {k: 1}\n" + "".join(
        f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
    )
    for bomb in (lists, merges):
        start = time.process_time()
        with pytest.raises(UnweaveError, match="aliases expand"):
            files.read_yaml(write(tmp_path, bomb))
        assert time.process_time() - start < 2
    assert files.parse_yaml("base: &b {k: 1}\nother:\n  <<: *b\n  l: 2", "")["other"] == {"k": 1, "l": 2}


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: 1\nb: 2\na: 3", "appears twice"),
        ("a: &a [*a]", "holds itself"),
        ("[" * 5000, "deeper than 100"),
        ("[" * 200 + "]" * 200, "deeper than 100"),
        ("a: [1, 2", "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("? [a]\n: 1", "not valid YAML"),
        ("a: " + "9" * 5000, "not valid YAML"),
    ],
)
def test_yaml_that_is_refused(tmp_path, text, words):
    with pytest.raises(UnweaveError, match=words):
        files.read_yaml(write(tmp_path, text))


def test_dates_stay_text():
    assert files.parse_yaml("a: 2026-01-02", "") == {"a": "2026-01-02"}


def test_other_failures_name_the_file(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path in (tmp_path / "missing", tmp_path, loop, tmp_path / ("n" * 300), tmp_path / "a\0b", tmp_path / "\udc80"):
        for reader in (files.read_text, files.read_json, files.read_yaml, lambda p: list(files.lines(p))):
            with pytest.raises(UnweaveError):
                reader(path)
    with pytest.raises(UnweaveError, match=r"0xff at 3"):
        files.read_text(write(tmp_path, b"abc\xff"))
    with pytest.raises(UnweaveError, match=r"line 2"):
        try:
            list(files.lines(write(tmp_path, b"abc\n\xff")))
        except UnweaveError as error:
            raise UnweaveError(error.where) from error
    with pytest.raises(UnweaveError, match="more than 4 bytes"):
        files.read_text(write(tmp_path, "12345"), at_most=4)
    with pytest.raises(UnweaveError, match="TOML"):
        files.read_toml(write(tmp_path, "a = 1\na = 2"))
