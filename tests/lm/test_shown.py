"""Tokens as pieces of text, against the tokenizer's own decoding and against texts cut by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave.core.codes import Codes
from unweave.core.site import Site
from unweave.latents.records import Records, RecordsSpec, build
from unweave.latents.view import entry_of
from unweave.lm.model import LM
from unweave.lm.shown import pieces
from unweave.methods.explain.rubric import rubric
from unweave.methods.shift import relevance
from unweave.methods.shift.spec import RuleOptions
from unweave.methods.steer.themes import themes
from unweave.sae.activations import ReLU
from unweave.sae.module import SAE
from unweave.show.pieces import context_html

STORY = "Once upon a time, there was a little girl named Lily. She loved the sea and the big red boat."
CORPUS = [STORY, "He said: the sea is big, and she was there once more.", "Lily and her mother went to the sea again."]
EMOJI = ["👨‍👩‍👧 ok", "🏴\U000e0067\U000e0062"]
STRANGE = [*EMOJI, "你好，世界", "مرحبا بالعالم", "e\u0301a\u0308 na\u00efve", "한국어", "a\ufffdb", "Ω≈ç√"]


def _trained(kind: str) -> Any:
    """A tiny tokenizer of one of the kinds that models ship: SentencePiece with bytes, Metaspace, byte-level."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<s>", "</s>"]
    sentence = kind.startswith("sentencepiece")
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=sentence))
    alphabet: list[str] = []
    if sentence:
        specials += [f"<0x{byte:02X}>" for byte in range(256)]
        core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        core.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
        parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        core.decoder = decoders.Sequence(parts)
    elif kind == "metaspace":
        core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    texts = CORPUS + (STRANGE if kind == "metaspace" else [])
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    if sentence:  # bytes are ordinary entries of the vocabulary, of which no text is made
        state = json.loads(core.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
        core = Tokenizer.from_str(json.dumps(state))
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials[:3]])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


KINDS = ("sentencepiece", "metaspace", "byte-level")


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    return {kind: _trained(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def default_tokenizer(default_lm: LM) -> Any:
    return default_lm.tokenizer


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _check(tokenizer: Any, ids: list[int], signs: int) -> None:
    """``signs``: how often the replacement sign itself stands in the text."""
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids)
    text, whole = "".join(piece.text for piece in found), tokenizer.decode(ids)
    if "\ufffd" in whole:  # bytes without their character, or the sign itself
        assert text.count("\ufffd") <= signs
    else:
        assert text == whole
    assert all(piece.text == "" for piece in found if piece.goes_on)


TEXTS = st.lists(st.sampled_from([*STRANGE, *CORPUS, " ", "  ", "\n\n", "'s", "x"]) | st.text(max_size=6), max_size=5)


@pytest.mark.parametrize("kind", [*KINDS, "default"])
@given(parts=TEXTS, first=st.integers(0, 40), length=st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_pieces_of_a_row_and_of_any_window_of_it_are_its_text(
    trained: dict[str, Any], default_tokenizer: Any, kind: str, parts: list[str], first: int, length: int
) -> None:
    tokenizer = default_tokenizer if kind == "default" else trained[kind]
    text = "".join(parts)
    ids = _ids(tokenizer, text)
    _check(tokenizer, ids, text.count("\ufffd"))
    _check(tokenizer, ids[first : first + length], text.count("\ufffd"))


@pytest.mark.parametrize("text", STRANGE)
def test_a_character_is_its_first_tokens_and_the_others_are_empty(default_tokenizer: Any, text: str) -> None:
    """By hand: each character's bytes lie in some tokens, found from the tokens' bytes one after the other."""
    ids = _ids(default_tokenizer, text)
    found = pieces(default_tokenizer, ids)
    assert "".join(piece.text for piece in found) == text
    sizes = [len(name) for name in default_tokenizer.convert_ids_to_tokens(ids)]  # a letter of the name is a byte
    owner = [place for place, size in enumerate(sizes) for _ in range(size)]  # of every byte
    expected, at = [""] * len(ids), 0
    for character in text:
        expected[owner[at]] += character
        at += len(character.encode())
    assert [piece.text for piece in found] == expected
    assert [piece.goes_on for piece in found] == [not piece for piece in expected]


def test_a_cut_through_a_character_shows_its_bytes(default_tokenizer: Any) -> None:
    ids = _ids(default_tokenizer, "你好")
    assert [piece.text for piece in pieces(default_tokenizer, ids[1:])] == ["<0xA0>", "好", ""]
    assert [piece.text for piece in pieces(default_tokenizer, ids[:3])] == ["你", "", "<0xE5><0xA5>"]


def test_sentencepiece_words_keep_their_spaces_and_bytes_their_character(trained: dict[str, Any]) -> None:
    tokenizer = trained["sentencepiece"]
    ids = _ids(tokenizer, "Once upon 你 a")
    found = [piece.text for piece in pieces(tokenizer, ids)]
    assert "".join(found) == "Once upon 你 a" and "你" in found and found.count("") == 2
    assert pieces(tokenizer, ids[1:])[0].text == "upon"  # a row begins there, as decode has it


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_on_their_own_keep_the_space_and_are_never_the_replacement_sign(
    tiny: Callable[..., Any], trained: dict[str, Any], kind: str
) -> None:
    lm = LM(tiny("llama", vocab_size=700), trained[kind])
    upon, byte = lm.tokenizer.convert_tokens_to_ids(["Ġsea" if kind == "byte-level" else "\u2581sea", "<0xE4>"])
    assert lm.token_strings([upon]) == [" sea"]
    every = lm.token_strings(range(len(lm.tokenizer)))
    assert not any(text == "" for text in every)
    assert kind == "metaspace" or not any("\ufffd" in text for text in every)
    if kind == "sentencepiece":
        assert lm.token_strings([byte]) == ["<0xE4>"]
    if kind == "byte-level":
        assert lm.token_strings(_ids(lm.tokenizer, "你")) == ["<0xE4>", "<0xBD>", "<0xA0>"]
    assert lm.token_strings([699]) == ["<699>"]  # rows of the embedding without a token


# -- what shows tokens ------------------------------------------------------------------------------------------------


def _records(lm: LM, texts: list[str], spec: RecordsSpec) -> tuple[Records, list[list[int]]]:
    """Latent 0 fires on every token, most of all on each text's last."""
    rows = [_ids(lm.tokenizer, text) for text in texts]
    ids = np.array([i for row in rows for i in row], dtype=np.int32)
    starts = np.cumsum([0] + [len(row) for row in rows])
    store: Any = SimpleNamespace(ids=ids, roles=np.full(len(ids), 4), starts=starts, documents=np.arange(len(rows)))
    values = torch.full((len(ids), 2), 0.5)
    values[torch.as_tensor(starts[1:] - 1), 0] = 3.0
    values[:, 1] = 0
    sae = _sae()
    return build(lm, sae, Codes.from_dense(values), np.arange(len(ids)), store, spec), rows


def _sae() -> SAE:
    g = torch.Generator().manual_seed(0)
    W_enc, W_dec = torch.randn(32, 2, generator=g), torch.randn(2, 32, generator=g)
    return SAE(W_enc, torch.zeros(2), W_dec, torch.zeros(32), ReLU(), read=Site("resid_post", 1))


@pytest.mark.parametrize("kind", [*KINDS])
def test_contexts_join_to_the_text_they_were_cut_from_after_reading_them_again_too(
    tiny: Callable[..., Any], trained: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    lm = LM(tiny("llama", vocab_size=700), trained[kind])
    texts = [STORY, CORPUS[1], "The sea 你好 and 👨‍👩‍👧 sea"]
    records, rows = _records(lm, texts, RecordsSpec(top=3, left=6, right=4, random=20))
    for found in (records, Records.load(records.save(tmp_path / kind))):
        record = found.latent(0)
        assert len(record.top) == 3
        for context in (*record.top, *record.quantile, *record.random):
            whole = lm.tokenizer.decode(list(context.ids))
            if "\ufffd" not in whole:
                assert "".join(context.texts) == whole and whole in lm.tokenizer.decode(rows[context.document])
            assert "\ufffd" not in "".join(context.texts)
            assert "".join(one.text for one in context.shown()) == "".join(context.texts)
            assert sum(one.focus for one in context.shown()) == 1
        known = lm.logit_lens(_sae().W_dec)[0, : len(lm.tokenizer)]
        assert [text for text, _ in record.promoted] == lm.token_strings(known.topk(8).indices)


def test_what_shows_a_context_shows_a_character_once_with_its_strongest_token(
    tiny: Callable[..., Any], trained: dict[str, Any]
) -> None:
    lm = LM(tiny("llama", vocab_size=700), trained["sentencepiece"])
    records, _ = _records(lm, ["the sea 你"], RecordsSpec(top=1))
    (context,) = records.latent(0).top
    assert context.texts[-3:] == ("你", "", "") and context.focus == len(context.ids) - 1
    assert str(context).endswith("the sea [你]'")
    shown = context.shown()
    assert shown[-1] == ("你", 3.0, True, True) and len(shown) == len(context.ids) - 2
    entry = entry_of(records.latent(0)).contexts[0]
    assert entry.tokens[-1] == "你" and entry.activations[-1] == 3.0 and entry.peak == len(entry.tokens) - 1
    html = context_html(entry, 3.0)
    assert html.count("你") == 2 and "uw-peak" in html and "∅" not in html  # once in the text, once in its title
    assert rubric._shown(context, 3.0).endswith(" {1.7}你{10}") or rubric._shown(context, 3.0).endswith("你{10}")
    assert relevance._marked(context, 3.0).endswith("the sea *你*")
    assert relevance.word_at(context) == "你"


@pytest.mark.parametrize("kind", KINDS)
def test_the_word_at_a_token_is_the_texts_word_and_not_its_neighbours_too(
    tiny: Callable[..., Any], trained: dict[str, Any], kind: str
) -> None:
    lm = LM(tiny("llama", vocab_size=700), trained[kind])
    texts = ["and he said to her mother", "to the girl that she", "Lily and her grandmothers"]
    records, _ = _records(lm, texts, RecordsSpec(top=3))
    found = sorted(relevance.word_at(context) for context in records.latent(0).top)
    assert found == ["grandmothers", "mother", "she"]
    (verdict,) = relevance.by_rule({(_sae().read, 0): records.latent(0)}, RuleOptions(promoted_share=1.0))  # type: ignore[dict-item]
    assert verdict.irrelevant and "'mother'" in verdict.why


class _Sized(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.count)


@pytest.mark.parametrize("kind", KINDS)
def test_themes_are_words_of_the_text_whatever_marks_the_space(
    tiny: Callable[..., Any], trained: dict[str, Any], kind: str
) -> None:
    """The latents but the first stand for the rest of the text, in which no theme's word may be common."""
    lm = LM(tiny("llama", vocab_size=700), trained[kind])
    texts = [" is the sea and", "\nthe sea.", " (the sea)", " she seas", " there was"] + [" a little girl"] * 40
    ids = [_ids(lm.tokenizer, text) for text in texts]
    n = len(texts)
    contexts = _Sized(
        latent=np.array([0] * 5 + [1] * (n - 5), dtype=np.int32),
        kind=np.zeros(n, np.uint8),
        document=np.array([*range(5), *[5] * (n - 5)]),
        offsets=np.cumsum([0] + [len(row) for row in ids]),
        ids=np.array([i for row in ids for i in row], dtype=np.int32),
        count=np.zeros(n),
    )
    counts = np.array([50] * 2 + [1] * 10)
    (found,) = themes(lm, _Sized(contexts=contexts, count=counts, n_tokens=10_000))  # type: ignore[arg-type]
    assert found.latent == 0 and found.words == ("sea",)
    assert {text.strip() for text in lm.token_strings(found.token_ids)} == {"sea"}
