"""Choices as tokens: the answer's token under every kind of tokenizer, padding, chat templates, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from helpers.models import build_tiny, build_tiny_tokenizer
from unweave.core.errors import UnweaveError
from unweave.lm.model import LM
from unweave.tasks.choices.encode import encode_choices
from unweave.tasks.choices.items import Item

ITEMS = (
    Item("Pick. The nurse left because", "she", "him", "him"),
    Item("Pick. A long way home because the nurse saw a long way home, and the doctor saw that", "he", "her", "he"),
    Item("A) he\nB) her\n\nAnswer:", "A", "B"),
)
TEXT = "Pick The nurse left because A long way home the doctor saw that he she him her A B Answer : ) . <s>"


def byte_bpe(bos: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([TEXT] * 9, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", pad_token="<s>")


def sentencepiece(bos: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", *("▁" + word for word in TEXT.split()), *map(chr, range(33, 127)), "▁", "\n", "he", "er"]
    vocabulary = [(piece, -1.0 if len(piece) > 1 else -5.0) for piece in dict.fromkeys(pieces)]
    core = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Metaspace()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>", pad_token="<s>")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("make", [byte_bpe, sentencepiece])
def test_what_follows_the_prompt_is_the_answer(make: Callable[[bool], Any], bos: bool, side: Any) -> None:
    tokenizer = make(bos)
    lm = LM(build_tiny("llama", vocab_size=len(tokenizer)), tokenizer)
    encoded = encode_choices(lm, ITEMS, side=side)
    assert encoded.skipped == {} and encoded.items == ITEMS
    for i, item in enumerate(ITEMS):
        ids = encoded.tokens.ids[i][encoded.tokens.mask[i]].tolist()
        assert ids == tokenizer(item.prompt)["input_ids"] and (ids[0] == tokenizer.bos_token_id) == bos
        for answer, token in ((item.correct, encoded.correct[i]), (item.incorrect, encoded.incorrect[i])):
            assert tokenizer(f"{item.prompt} {answer}")["input_ids"] == [*ids, int(token)]
        assert encoded.tokens.ids[i, encoded.last[i]] == ids[-1]
    assert encoded.cue.tolist() == [int(encoded.incorrect[0]), int(encoded.correct[1]), -1]


def test_rows_keep_their_logits_and_lose_their_padding() -> None:
    tokenizer = byte_bpe(True)
    lm = LM(build_tiny("llama", vocab_size=len(tokenizer)), tokenizer)
    alone = [lm(lm.tokenize(item.prompt))[0, -1] for item in ITEMS]  # type: ignore[index]
    for side in ("left", "right"):
        encoded = encode_choices(lm, ITEMS, side=side)
        part = encoded.at([2, 0])
        assert part.items == (ITEMS[2], ITEMS[0]) and len(part) == 2
        assert part.tokens.ids.shape[1] == max(len(tokenizer(ITEMS[i].prompt)["input_ids"]) for i in (0, 2))
        assert part.tokens.ids.shape[1] < encoded.tokens.ids.shape[1]
        for row, i in enumerate((2, 0)):
            logits = lm(part.tokens)[row, part.last[row]]  # type: ignore[index]
            torch.testing.assert_close(logits, alone[i], rtol=1e-4, atol=1e-4)
            assert part.correct[row] == encoded.correct[i] and part.cue[row] == encoded.cue[i]


def test_no_space_where_no_word_has_one(tiny_lm: Callable[..., LM]) -> None:
    lm = tiny_lm()  # one token a character
    encoded = encode_choices(lm, [Item("Answer:", "A", "B", "A")])
    assert lm.decode(encoded.correct) == "A" and lm.decode(encoded.incorrect) == "B"


def test_chat_puts_the_answer_at_the_beginning_of_the_turn() -> None:
    lm = LM(build_tiny("llama"), build_tiny_tokenizer(add_bos=True))
    encoded = encode_choices(lm, [Item("A or B?", "A", "B")], chat=True)
    assert lm.tokenizer.decode(encoded.tokens.ids[0]) == (
        "<|im_start|>user\nA or B?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert lm.decode(encoded.correct) == "A"
    spaced = (
        "{% for m in messages %}{{ '[I] ' + m.content + ' [J]' if m.role == 'user' else ' ' + m.content }}{% endfor %}"
    )
    tokenizer = byte_bpe(False)
    tokenizer.chat_template = spaced
    lm = LM(build_tiny("llama", vocab_size=len(tokenizer)), tokenizer)
    encoded = encode_choices(lm, [Item("he or her?", "he", "her")], chat=True)
    assert lm.token_strings(encoded.correct) == [" he"] and lm.decode(encoded.tokens.ids[0]) == "[I] he or her? [J]"
    plain = LM(build_tiny("llama"), build_tiny_tokenizer(chat_template=None))
    with pytest.raises(UnweaveError, match="no chat template"):
        encode_choices(plain, [Item("A or B?", "A", "B")], chat=True)


def test_what_has_no_single_token_is_refused_or_counted(tiny_lm: Callable[..., LM]) -> None:
    lm = tiny_lm()
    items = [Item("a", "b", "c"), Item("a", "he", "c"), Item("a", "b", "b"), Item("", "b", "c")]
    with pytest.raises(UnweaveError, match="an answer is not a single token") as error:
        encode_choices(lm, items)
    assert "item 1 of 4" in error.value.where
    encoded = encode_choices(lm, items, skip=True)
    assert encoded.items == (items[0],) and encoded.correct.shape == (1,)
    assert encoded.skipped == {
        "an answer is not a single token": 1,
        "both answers are the same token": 1,
        "the prompt has no tokens": 1,
    }
    with pytest.raises(UnweaveError, match="2 such items"):
        encode_choices(lm, [items[1], items[2]], skip=True)
    with pytest.raises(UnweaveError, match="no items"):
        encode_choices(lm, [])


def test_a_prompt_that_the_answer_changes_is_refused() -> None:
    tokenizer = byte_bpe(False)
    lm = LM(build_tiny("llama", vocab_size=len(tokenizer)), tokenizer)
    with pytest.raises(UnweaveError, match="tokenised differently"):
        encode_choices(lm, [Item("The nurse left because ", "he", "her")])
