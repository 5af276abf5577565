"""lm/embed.py against each text by itself, without padding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from helpers.models import build_tiny_tokenizer
from unweave.core.errors import UnweaveError
from unweave.lm.embed import embed

TEXTS = ["a cat", "the old key of the door", "x"]


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    BertModel(config).save_pretrained(tmp_path / "encoder")
    build_tiny_tokenizer().save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.mark.parametrize("pooling", [None, "pooling_mode_mean_tokens", "pooling_mode_cls_token"])
def test_texts_are_pooled_as_if_alone(encoder: Path, pooling: str | None) -> None:
    from transformers import AutoModel, AutoTokenizer

    if pooling is not None:
        (encoder / "1_Pooling").mkdir()
        modes = {"word_embedding_dimension": 16, "pooling_mode_max_tokens": False, pooling: True}
        (encoder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    vectors = embed(TEXTS, str(encoder))
    model, tokenizer = AutoModel.from_pretrained(encoder).eval(), AutoTokenizer.from_pretrained(encoder)
    for text, vector in zip(TEXTS, vectors, strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        pooled = hidden[0] if pooling == "pooling_mode_cls_token" else hidden.mean(0)
        torch.testing.assert_close(vector, pooled / pooled.norm())


def test_other_poolings_and_what_is_no_encoder_are_refused(encoder: Path, tmp_path: Path) -> None:
    (encoder / "1_Pooling").mkdir()
    (encoder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(UnweaveError, match="pools by pooling_mode_max_tokens"):
        embed(TEXTS, str(encoder))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(UnweaveError, match="no encoder can be loaded"):
        embed(TEXTS, str(tmp_path / "empty"))
    with pytest.raises(UnweaveError, match="no model"):
        embed(TEXTS, "all-minilm")
