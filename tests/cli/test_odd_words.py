"""What the command line makes of words that are no text, and of foreign text that it prints."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from unweave.cli import annotate, output
from unweave.cli.app import main
from unweave.cli.progress import PlainTask
from unweave.core.errors import UnweaveError
from unweave.data.corpus import Source, read
from unweave.methods.steer.spec import SteerSpec
from unweave.methods.train.spec import TrainSpec
from unweave.sae import steered as sweep
from unweave.tasks import agreement, answers

BAD = "a\udcff"
FOREIGN = "\x1b]0;title\x07\x1b[31mred\x9b2J\u202egnp.exe\r\ud800"


def unseen(text: str) -> set[str]:
    return {c for c in text if ord(c) < 32 and c not in "\t\n"} | (set(text) & {"\x7f", "\x9b", "\u202e", "\ud800"})


@pytest.mark.parametrize(
    "tokens",
    [
        ["train", BAD],
        ["train", f"{BAD}.yaml"],
        ["train", "--model", BAD],
        ["train", "--sites", BAD],
        ["train", "--data.sources", BAD],
        ["train", "--data.sources", f"[{{path: {BAD}}}]"],
        ["train", "--preset", BAD],
        ["steer", "--sae", BAD],
        ["steer", "--sae", "x", "--prompts", BAD],
        ["trace", "--sae", BAD, "--json"],
        ["rubric", "--sae", "x", "--judge.model", BAD],
        ["rubric", "--sae", "x", "--judge.base-url", f"http://{BAD}/v1", "--judge.model", "m"],
        ["circuit", "find", "--saes", BAD, "--pairs", BAD],
        ["circuit", "find", "--saes", "x", "--inputs", BAD],
        ["circuit", BAD],
        ["doctor", "--model", BAD],
        ["dedup", BAD, "--out", "out"],
        ["convert", BAD, "--to", "saelens"],
        ["models", BAD],
        [BAD],
        ["--json", BAD],
    ],
)
def test_words_that_are_no_text_are_the_users_mistake(
    tokens: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(tokens) == 2
    said = capsys.readouterr()
    assert (said.err + said.out).encode() and "fault" not in said.err


def test_specs_hold_what_can_be_written(tmp_path: Path) -> None:
    for values in ({"model": BAD}, {"sites": [BAD]}, {"data": {"sources": [{"path": BAD}]}}):
        with pytest.raises(UnweaveError, match="is not text in UTF-8"):
            TrainSpec.from_dict(values)


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "[1, 2]", "word", "3", "data: [1]", "data: word", "sae: [a]", "data: {sources: {a: b}}"),
        *("data: {sources: [[1]]}", "data: {sources: [3]}", "sites: {a: b}", "model: [a]", "model: {a: b}"),
        *("sae: null", "data: null", "model: null", "tokens: {}", "1: 2", "null: 3", "[a]: 3", "seed: []"),
        *("model: a\nmodel: b", "sae: {tokens: [1, 2]}", "data: {pack: 3}"),
    ],
)
@pytest.mark.parametrize("overrides", [{}, {"data.tokens": "5", "sae.kind": "topk"}])
def test_configurations_of_the_wrong_shape(tmp_path: Path, content: str, overrides: dict[str, str]) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(content)
    with pytest.raises(UnweaveError) as caught:
        TrainSpec.from_file(path, overrides)
    assert caught.value.what and (caught.value.where or caught.value.remedy)


def test_numbers_that_are_too_large_or_long(tmp_path: Path) -> None:
    assert SteerSpec.from_dict({"sae": "x", "latent": "9007199254740993"}).latent == 2**53 + 1
    assert SteerSpec.from_dict({"sae": "x", "latent": "1e6"}).latent == 10**6
    for value in (10**400, -(10**400), 2**63, "9" * 400, "9" * 5000, 10**5000, "1e999", "nan", 1.5, "1.5", "٣x"):
        for field in ("latent", "max_new_tokens"):
            with pytest.raises(UnweaveError, match="is not a whole number") as caught:
                SteerSpec.from_dict({"sae": "x", field: value})
            assert len(str(caught.value)) < 500
    for value in (10**400, "1e999", "-inf", float("nan")):
        with pytest.raises(UnweaveError, match="is not a number"):
            SteerSpec.from_dict({"sae": "x", "strengths": [value]})


@pytest.mark.parametrize("path", ["", " ", "a\0b"])
def test_sources_without_a_name(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text of somebody else")
    with pytest.raises(UnweaveError, match="no text"):
        list(read(Source(path=path)))


@pytest.mark.parametrize("prompts", [(), ("",), ("fine", " \n\u2003")])
def test_prompts_without_words(prompts: tuple[str, ...], tiny_lm: Any) -> None:
    with pytest.raises(UnweaveError, match="prompts"):
        SteerSpec(sae="x", prompts=prompts)
    with pytest.raises(UnweaveError, match=r"there are no prompts|prompt \d holds no words"):
        sweep.sweep(tiny_lm(), SimpleNamespace(), 0, prompts, (1.0,), maximum=1.0)  # type: ignore[arg-type]


def test_foreign_text_does_not_reach_the_terminal_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    result = SimpleNamespace(rows=lambda: [("name", FOREIGN, FOREIGN), (FOREIGN, 1, "")], report=Path(FOREIGN))
    outcome = SimpleNamespace(path=Path(f"runs/{BAD}"), result=result)
    output.show_outcome("rubric", outcome)  # type: ignore[arg-type]
    PlainTask(FOREIGN, 1, FOREIGN, 0).note(FOREIGN)
    task = PlainTask(FOREIGN, 1, FOREIGN, 0)
    task.note(FOREIGN)
    task.close()
    said = capsys.readouterr()
    assert "\\x1b]0;title" in said.out and "\\u202egnp" in said.out and "red" in said.err
    assert not unseen(said.out) and not unseen(said.err)


def test_errors_and_json_are_plain_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(tokens: list[str]) -> Any:
        raise UnweaveError(FOREIGN, where=FOREIGN, remedy=FOREIGN)

    monkeypatch.setattr("unweave.cli.app._dispatch", fails)
    assert main(["train"]) == 2
    assert not unseen(capsys.readouterr().err)
    assert main(["train", "--json"]) == 2
    said = capsys.readouterr().err
    assert not unseen(said) and json.loads(said)["error"]["what"] == FOREIGN
    output.print_json({"name": FOREIGN})
    said = capsys.readouterr().out
    assert not unseen(said) and json.loads(said) == {"name": FOREIGN}


def test_answers_that_are_piped_in_end_at_line_feeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffa\u2028b\x0bc\r\n\nlast", newline=""))
    ask = annotate._asker()
    assert [ask(""), ask(""), ask("")] == ["a\u2028b\x0bc", "", "last"]
    with pytest.raises(EOFError):
        ask("")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    with pytest.raises(UnweaveError, match="the answers are no text"):
        annotate._asker()


def test_half_a_character_has_no_tokens(tiny_lm: Any) -> None:
    lm = tiny_lm()
    for asked in (
        lambda: lm.tokenize("a\ud800b"),
        lambda: lm.tokenize(["fine", "a\udcffb"]),
        lambda: lm.chat([[{"role": "user", "content": "a\ud800b"}]]),
        lambda: lm.generate("\udfff", max_new_tokens=2),
        lambda: agreement.usable(lm, [agreement.Pair("a\ud800", "b", "c", "d", "")]),
        lambda: answers.usable(lm, [answers.Input("a", "\ud800")]),
    ):
        with pytest.raises(UnweaveError, match="half a surrogate pair"):
            asked()
    assert lm.tokenize("a\U0001f600b").n_tokens
