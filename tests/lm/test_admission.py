"""What is no causal language model, and tokens that have no place in one, are refused by name before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from unweave.core.errors import UnweaveError
from unweave.lm.model import LM, Tokens

_SIZE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
_GPT2: dict[str, Any] = {
    "vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 20, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 2,
}  # fmt: skip
_T5: dict[str, Any] = {"vocab_size": 97, "d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8}
_VIT: dict[str, Any] = {key: value for key, value in _SIZE.items() if "_id" not in key and key != "vocab_size"}

NOT_CAUSAL: dict[str, tuple[Callable[[], Any], str]] = {
    "a bare GPT-2": (lambda: hf.GPT2Model(hf.GPT2Config(**_GPT2)), "no language-model head"),
    "a bare Llama": (lambda: hf.LlamaModel(hf.LlamaConfig(**_SIZE)), "no language-model head"),
    "a bare GPT-NeoX": (lambda: hf.GPTNeoXModel(hf.GPTNeoXConfig(**_SIZE)), "no language-model head"),
    "a classifier": (lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**_SIZE)), "no language-model head"),
    "a tagger": (lambda: hf.GPT2ForTokenClassification(hf.GPT2Config(**_GPT2)), "no language-model head"),
    "a bare BERT": (
        lambda: hf.BertModel(hf.BertConfig(**_SIZE)),
        "known for the model family 'bert'|head",
    ),
    "no text model": (lambda: hf.ViTModel(hf.ViTConfig(**_VIT)), "known for the model family 'vit'|head"),
    "a T5": (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5)), "encoder with a decoder"),
}


@pytest.mark.parametrize("which", NOT_CAUSAL)
@pytest.mark.parametrize("loaded", [False, True])
def test_models_that_are_no_causal_language_model(which: str, loaded: bool, tmp_path: Path) -> None:
    make, says = NOT_CAUSAL[which]
    model = make().eval()
    if not loaded:
        with pytest.raises(UnweaveError, match=says):
            LM(model, None)
        return
    model.save_pretrained(tmp_path)
    if which.startswith("a bare GPT-2"):  # its unembedding is its embedding: nothing is missing
        with torch.no_grad():
            wanted = model(input_ids=torch.arange(5)[None]).last_hidden_state @ model.wte.weight.T
        logits = LM.load(str(tmp_path))(torch.arange(5))
        assert logits is not None
        torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
        return
    with pytest.raises(UnweaveError, match=says) as caught:
        LM.load(str(tmp_path))
    assert "again" not in caught.value.remedy  # the files are whole


@pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), None, "gpt2"])
def test_things_that_are_no_model_of_transformers(thing: Any) -> None:
    with pytest.raises(UnweaveError, match="not a transformers model"):
        LM(thing, None)


def test_weights_that_are_not_there(tiny: Callable[..., Any]) -> None:
    with torch.device("meta"):
        nowhere = hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZE))
    with pytest.raises(UnweaveError, match="meta device"):
        LM(nowhere, None)
    partly = tiny("llama")
    partly.model.layers[1].mlp.to("meta")
    with pytest.raises(UnweaveError, match="3 of the") as caught:
        LM(partly, None)
    assert "layers.1.mlp" in caught.value.where


def test_outputs_that_are_tuples(tiny: Callable[..., Any], family: str) -> None:
    ids = torch.arange(4, 12)
    wanted = LM(tiny(family), None)(ids)
    model = tiny(family)
    model.config.return_dict = False
    lm = LM(model, None)
    assert torch.equal(lm(ids), wanted)  # type: ignore[arg-type]
    assert lm.generate_ids(Tokens.of(ids), max_new_tokens=2).shape[0] == 1

    own = model.forward
    model.forward = lambda **named: own(**named).to_tuple()
    assert torch.equal(LM(model, None)(ids), wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [97, 5000, -1])
def test_ids_without_an_embedding(tiny: Callable[..., Any], family: str, wrong: int) -> None:
    lm = LM(tiny(family), None)
    row = Tokens.of(torch.tensor([[5, wrong, 7]]))
    for work in (lm, lm.generate_ids):
        with pytest.raises(UnweaveError, match=f"there is no token {wrong}: the model's ids are 0 to 96"):
            work(row)  # type: ignore[operator]


def test_rows_longer_than_a_table_of_positions() -> None:
    lm = LM(hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2)).eval(), None)
    lm.model.generation_config.eos_token_id = lm.model.config.eos_token_id = None
    assert lm(torch.arange(20)) is not None
    with pytest.raises(UnweaveError, match=r"a row of 21 tokens does not fit: .* table of 20 positions"):
        lm(torch.arange(21))
    rows = Tokens.of(torch.arange(4, 14))
    assert lm.generate_ids(rows, max_new_tokens=11).shape == (1, 11)  # the last token is never read
    with pytest.raises(UnweaveError, match="a row of 10 tokens and 12 new tokens does not fit"):
        lm.generate_ids(rows, max_new_tokens=12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_takes_no_places_in_a_table_of_positions(side: Any) -> None:
    """18 tokens in a row of 30 columns fit into 20 positions."""
    lm = LM(hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2)).eval(), None)
    lm.model.generation_config.eos_token_id = lm.model.config.eos_token_id = None
    rows = [list(range(4, 22)), list(range(30, 37))]
    wide = Tokens.pad([*((row, [1] * len(row)) for row in rows), ([5] * 30, [1] * 30)], 2, side).rows(slice(0, 2))
    logits = lm(wide)
    assert logits is not None
    for row, mask, mine in zip(rows, wide.mask, logits, strict=True):
        with torch.no_grad():
            wanted = lm.model(input_ids=torch.tensor([row])).logits[0]
        torch.testing.assert_close(mine[mask], wanted, atol=1e-5, rtol=1e-5)
    if side == "left":
        alone = [lm.generate_ids(Tokens.of(torch.tensor(row)), max_new_tokens=3)[0].tolist() for row in rows]
        assert lm.generate_ids(wide, max_new_tokens=3).tolist() == alone


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_computed_positions_have_no_end(tiny: Callable[..., Any], family: str) -> None:
    """The tiny models were made for 64 positions; theirs are no table, so longer rows run."""
    assert LM(tiny(family), None)(torch.arange(4, 80)).shape == (1, 76, 97)  # type: ignore[union-attr]
