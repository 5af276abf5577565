"""Long texts in pieces: the same token ids and rows as tokenised whole, for every kind of tokenizer, and no more work
than the rows need."""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from helpers.models import build_tiny_tokenizer
from unweave.data import pack as module
from unweave.data.corpus import Document
from unweave.data.pack import PackSpec, pack
from unweave.lm import pieces
from unweave.lm.chat import encode_text
from unweave.lm.pieces import encode_pieces

SPECIALS = ["<unk>", "<s>", "</s>", "<pad>"]
PHRASE = "the old man and his children did not see them, for it rained again; naïve café façade 漢字 \t 12345 😀"
WORDS = PHRASE.split(" ")


def prose(n: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice([" ", " ", " ", "\n", "  "]) for _ in range(n))


def trained(kind: str) -> Any:
    """A small tokenizer as models have them: bytes (GPT-2), no words at all (Llama 2), unigram (T5), word pieces;
    and bytes of which some are in no token, and dropped."""
    how: dict[str, Any] = {"special_tokens": SPECIALS, "show_progress": False}
    if kind in ("bytes", "gaps"):
        whole = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else []
        core, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer(vocab_size=500, initial_alphabet=whole, **how)
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif kind == "wordless":
        core, trainer = Tokenizer(models.BPE(unk_token="<unk>")), trainers.BpeTrainer(vocab_size=300, **how)
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "unigram":
        core = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", **how)
        core.normalizer, core.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    else:
        core = Tokenizer(models.WordPiece(unk_token="<unk>"))
        trainer = trainers.WordPieceTrainer(vocab_size=300, **how)
        core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    core.train_from_iterator([prose(2000, seed=5)], trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


KINDS = ("bytes", "gaps", "wordless", "unigram", "words", "characters")


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {kind: build_tiny_tokenizer() if kind == "characters" else trained(kind) for kind in KINDS}


def texts() -> dict[str, str]:
    rng = random.Random(1)
    mixed = (
        rng.choice([prose(40, i), " " * rng.randrange(900), "x" * rng.randrange(999), "😀" * 60]) for i in range(60)
    )
    noise = "".join(rng.choice("abc é漢😀\n\t</s>01") for _ in range(9000))
    return {
        "prose": prose(2500), "spaces": "a" + " " * 9000, "one letter": "a" * 9000, "two letters": "ab" * 4500,
        "one word": "".join(chr(0x4E00 + rng.randrange(2000)) for _ in range(9000)), "mixed": "".join(mixed),
        "noise": noise, "with BOS": prose(800) + "<s>" + prose(800), "ends in spaces": prose(1500) + " " * 700,
        "with EOS": prose(800) + "</s>" + prose(800), "short": "the old man", "empty": "",
    }  # fmt: skip


@pytest.mark.parametrize("size", [10, 2500, 5001])
@pytest.mark.parametrize("name", texts())
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_the_whole(kind: str, name: str, size: int, tokenizers: dict[str, Any]) -> None:
    text = texts()[name]
    found = list(encode_pieces(tokenizers[kind], text, size))
    ids, roles = encode_text(tokenizers[kind], text)
    assert [i for piece in found for i in piece.ids] == ids
    assert [r for piece in found for r in piece.roles] == roles
    assert found[-1].end == len(text) and [p.end for p in found] == sorted({p.end for p in found})
    if name == "prose" and size < 5000:
        assert len(found) > 2


def test_what_does_not_continue_is_tokenised_whole(tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_after", lambda window, end, tail: None if tail else 0)
    text = prose(2500)
    found = list(encode_pieces(tokenizers["bytes"], text, 3000))
    assert len(found) == 2
    assert [i for piece in found for i in piece.ids] == encode_text(tokenizers["bytes"], text)[0]


def watched(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of all texts that are tokenised from now on."""
    seen, call = [], type(tokenizer).__call__

    def counted(self: Any, text: Any, *args: Any, **how: Any) -> Any:
        seen.extend(map(len, [text] if isinstance(text, str) else text))
        return call(self, text, *args, **how)

    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    return seen


@pytest.mark.parametrize("bos", ["tokenizer", "always", "never"])
@pytest.mark.parametrize("packing", ["documents", "blocks"])
@pytest.mark.parametrize("kind", ["bytes", "wordless", "characters"])
def test_rows_are_those_of_documents_tokenised_whole(
    kind: str, packing: Any, bos: Any, tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = [prose(30, 1), prose(4000, 2), "", prose(3000, 3) + "</s>", "a" * 9000, prose(1500) + "<s> again", "x"]
    docs = [Document(text, None, "here", i) for i, text in enumerate(contents)]
    spec = PackSpec(packing=packing, context=48, min_tokens=4, bos=bos)
    whole = pack(docs, tokenizers[kind], spec)
    monkeypatch.setattr(module, "_PIECE", (1 << 30, 1))
    wanted = list(whole)
    monkeypatch.setattr(module, "_PIECE", (2500, 4))
    cut = pack(docs, tokenizers[kind], spec)
    assert list(cut) == wanted
    one, other = asdict(whole.counts), asdict(cut.counts)
    if packing == "documents":  # what is behind a row is not tokenised, but said
        assert one.pop("truncated_tokens") > other.pop("truncated_tokens") and one.pop("unread_characters") == 0
        assert 0 < other.pop("unread_characters") < sum(map(len, contents))
    assert one == other


def test_a_long_document_costs_what_its_row_needs(tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, text = tokenizers["bytes"], prose(700_000)
    seen = watched(tokenizer, monkeypatch)
    packed = pack([Document(text, None, "here", 0)], tokenizer, PackSpec(context=48))
    (row,) = packed
    assert len(text) > 3_000_000 and sum(seen) < 60_000
    assert row.ids == encode_text(tokenizer, text[:5000])[0][:48]
    assert packed.counts.truncated_documents == 1 and "characters behind them not tokenised" in packed.in_words()
    del seen[:]
    packed = pack([Document(text, None, "here", 0)], tokenizer, PackSpec(packing="blocks", context=48))
    taken = [next(packed).ids for _ in range(100)]
    assert sum(seen) < 60_000
    stream = encode_text(tokenizer, text[:60_000])[0][1:]
    assert [i for ids in taken for i in ids[1:]] == stream[:4700]
