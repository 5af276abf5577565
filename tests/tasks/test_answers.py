"""Single inputs: what is read, what is left out and counted, batches, and both metrics."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from unweave.core.errors import UnweaveError
from unweave.lm.model import LM
from unweave.tasks import answers
from unweave.tasks.answers import AnswerLoss, Input


def test_lines_lists_of_tokens_and_the_paper_s_form_are_read(tmp_path: Path) -> None:
    lines, whole = tmp_path / "a.jsonl", tmp_path / "a.json"
    one = {"context": ["The", " key"], "answer": " is", "document": 3}
    lines.write_text(json.dumps(one) + "\n\n" + json.dumps({"context": "Ä b", "answer": " c"}) + "\n")
    wanted = [Input("The key", " is"), Input("Ä b", " c")]
    assert answers.load(lines) == wanted
    whole.write_text(json.dumps({"3": one, "7": {"context": "Ä b", "answer": " c"}}))
    assert answers.load(whole) == wanted
    answers.save(tmp_path / "b.jsonl", wanted)
    assert answers.load(tmp_path / "b.jsonl") == wanted
    lines.write_text(json.dumps(one))  # a single line is no object of the paper's form
    assert answers.load(lines) == wanted[:1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"context": "a", "answer": " b"}\n{"context": 3, "answer": " b"}', "line 2"),
        ('{"context": ["a", 1], "answer": " b"}', "line 1"),
        ('{"context": "a"}', "line 1"),
        ('{"7": {"context": "a"}}', "entry 7"),
        ("[1]\n", "line 1"),
        ("nonsense", "not JSON"),
        ("\n", "no inputs"),
    ],
)
def test_bad_files_name_the_place(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(UnweaveError, match=words):
        answers.load(path)
    with pytest.raises(UnweaveError, match="cannot read"):
        answers.load(tmp_path / "nowhere")


def test_what_does_not_suit_is_counted(tiny_lm: Callable[..., LM]) -> None:
    lm = tiny_lm()
    good = [Input("ab", "c"), Input("a b c", "d")]
    kept, skipped = answers.usable(lm, [*good, Input("ab", "cd"), Input("ab", ""), Input("", "c")])
    assert kept == good
    assert skipped == {"the answer is not a single token": 2, "the context has no tokens": 1}
    with pytest.raises(UnweaveError, match="input 1"):
        answers.batches(lm, [good[0], Input("ab", "cd")])


class Merging:
    """A tokenizer whose answer swallows the context's last token."""

    bos_token_id = None

    def __call__(self, texts: list[str], verbose: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1, 2] if text == "ab" else [1, 3, 4] for text in texts]}


def test_contexts_that_tokenise_apart_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unweave.lm.chat.special_ids", lambda tokenizer: frozenset())
    assert answers.usable(Merging(), [Input("ab", "c")]) == (
        [],
        {"the context is tokenised differently once the answer follows it": 1},
    )


@pytest.mark.parametrize("pad", [False, True])
def test_batches_hold_every_input_with_its_answer(pad: bool, tiny_lm: Callable[..., LM]) -> None:
    lm = tiny_lm()
    inputs = [Input("abc", "d"), Input("xy", "z"), Input("efg", "h"), Input("12345", "6"), Input("ij", "k")]
    found = answers.batches(lm, inputs, metric="neg-logit", pad=pad, max_rows=2)
    assert [tokens.mask.sum(1).tolist() for tokens, _, _ in found] == [[2, 2], [3, 3], [5]]
    mixed = answers.batches(lm, inputs, pad=True, max_rows=3)
    assert [tokens.mask.sum(1).tolist() for tokens, _, _ in mixed] == [[2, 2, 3], [3, 5]]
    assert mixed[0][0].mask[0].tolist() == [True, True, False]
    seen = {}
    for tokens, patch, metric in found:
        assert patch is None and metric.kind == "neg-logit"
        for row, mask, answer in zip(tokens.ids, tokens.mask, metric.answers, strict=True):
            seen[lm.decode(row[mask])] = lm.decode([answer])
    assert seen == {given.context: given.answer for given in inputs}


def test_metrics_are_what_they_say() -> None:
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    ids, rows = torch.tensor([2, 5]), torch.tensor([1, 0, 1])
    for place, (row, kind) in enumerate(zip(rows, ("neg-logit", "neg-log-p", "neg-logit"), strict=True)):
        value = AnswerLoss(ids, kind)(logits, rows)[place]  # type: ignore[arg-type]
        p = logits[place].exp() / logits[place].exp().sum()
        wanted = -p[ids[row]].log() if kind == "neg-log-p" else -logits[place, ids[row]]
        torch.testing.assert_close(value, wanted)
    with pytest.raises(UnweaveError, match="neg-log-p"):
        AnswerLoss(ids, "log-p")  # type: ignore[arg-type]
