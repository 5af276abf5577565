"""Models in the llama2.c layout (stories15M) as Hugging Face folders.

The file is a header of seven int32 (width, hidden width, layers, heads, key-value heads, vocabulary, context), float32
weights, and then the tokenizer: int32 longest piece, and per piece float32 score, int32 length, bytes.

llama2.c rotates neighbouring pairs of a head's coordinates, transformers pairs coordinate i with i + half; so the rows
of the query and key matrices are put in the other order. Pieces are merged best score first, which a BPE model with
the merges sorted by score does as well.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.lm.fetch import building, cache_dir

_FIRST_BYTE = 3
"""Ids 0, 1, 2 are unknown, BOS, EOS; then come the 256 single bytes."""


@dataclass(frozen=True)
class Shape:
    """The header of a llama2.c file."""

    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int


def converted(path: Path) -> Path:
    """The Hugging Face folder made from a llama2.c file with its tokenizer; made on the first call.

    Raises UnweaveError when the file is cut short or its parts do not add up.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        digest.update(handle.read(1 << 20))
    folder = cache_dir() / "converted" / f"{path.stem}-{digest.hexdigest()[:12]}"
    with building(folder) as work:
        if work is not None:
            shape, tensors, rest = read_weights(path)
            _save(work / "out", shape, tensors, read_pieces(rest, shape.vocab, str(path)))
    return folder


def _damaged(where: str) -> UnweaveError:
    return UnweaveError("the llama2.c file is damaged or cut short", where=where, remedy="get the file again")


def read_weights(path: Path) -> tuple[Shape, dict[str, Tensor], bytes]:
    """The header, the weights under their Hugging Face names, and the bytes after them."""
    data = path.read_bytes()
    if len(data) < 28:
        raise _damaged(str(path))
    shape = Shape(*struct.unpack("<7i", data[:28]))
    numbers = (shape.width, shape.hidden, shape.layers, shape.heads, shape.kv_heads, shape.context)
    if min(numbers) <= 0 or shape.vocab <= 0 or shape.width % shape.heads:  # a negative vocabulary means an own head
        raise _damaged(str(path))
    if shape.heads % shape.kv_heads or shape.width // shape.heads % 2:
        raise _damaged(str(path))
    d, n, head = shape.width, shape.layers, shape.width // shape.heads
    kv = shape.kv_heads * head
    layout = {
        "embed_tokens": (shape.vocab, d),
        "input_layernorm": (n, d),
        "self_attn.q_proj": (n, d, d),
        "self_attn.k_proj": (n, kv, d),
        "self_attn.v_proj": (n, kv, d),
        "self_attn.o_proj": (n, d, d),
        "post_attention_layernorm": (n, d),
        "mlp.gate_proj": (n, shape.hidden, d),
        "mlp.down_proj": (n, d, shape.hidden),
        "mlp.up_proj": (n, shape.hidden, d),
        "norm": (d,),
        "rotation": (2, shape.context, head // 2),
    }
    tensors: dict[str, Tensor] = {}
    at = 28
    for name, size in layout.items():
        end = at + 4 * math.prod(size)  # NumPy's product would wrap around
        if end > len(data):
            raise _damaged(str(path))
        block = torch.from_numpy(np.frombuffer(data[at:end], dtype="<f4").reshape(size).astype(np.float32))
        at = end
        if name == "rotation":  # a table of sines and cosines, which transformers computes itself
            continue
        if not bool(torch.isfinite(block).all()):
            raise UnweaveError(f"{name} holds NaN or infinity", where=str(path), remedy="get the file again")
        if block.ndim == 1 or name == "embed_tokens":
            tensors[f"model.{name}.weight"] = block
            continue
        for layer, weight in enumerate(block):
            if name.endswith(("q_proj", "k_proj")):
                weight = _half_split(weight, head)
            tensors[f"model.layers.{layer}.{name}.weight"] = weight.clone()
    return shape, tensors, data[at:]


def _half_split(weight: Tensor, head: int) -> Tensor:
    """Rows [heads * head, D] from pairs (0,1), (2,3), ... to all first members, then all second ones, per head."""
    return weight.view(-1, head // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def read_pieces(data: bytes, vocab: int, where: str) -> list[tuple[str, float]]:
    """The tokenizer's pieces and scores in id order; single bytes are written <0x41>, blanks as U+2581."""
    pieces: list[tuple[str, float]] = []
    at = 4
    try:
        for index in range(vocab):
            score, length = struct.unpack_from("<fi", data, at)
            raw = data[at + 8 : at + 8 + length]
            if length < 0 or len(raw) != length:
                raise _damaged(where)
            at += 8 + length
            byte = index - _FIRST_BYTE
            text = f"<0x{byte:02X}>" if 0 <= byte < 256 else raw.decode("utf-8").strip("\n" if index < 3 else "")
            pieces.append((text.replace(" ", "\u2581"), score))
    except (struct.error, UnicodeDecodeError):
        raise _damaged(where) from None
    return pieces


def build_tokenizer(pieces: list[tuple[str, float]], context: int) -> Any:
    """A fast tokenizer that merges the pair whose union has the best score, and falls back on bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {text: index for index, (text, _) in enumerate(pieces)}
    merges: list[tuple[float, int, int, tuple[str, str]]] = []
    for text, score in pieces[_FIRST_BYTE + 256 :]:
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                merges.append((-score, ids[left], ids[right], (left, right)))
    merges.sort()
    core = Tokenizer(
        models.BPE(
            vocab=ids, merges=[pair for *_, pair in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def _save(folder: Path, shape: Shape, tensors: dict[str, Tensor], pieces: list[tuple[str, float]]) -> None:
    from safetensors.torch import save_file

    build_tokenizer(pieces, shape.context).save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape.width,
        "intermediate_size": shape.hidden, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocab, "max_position_embeddings": shape.context,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "bos_token_id": 1,
        "eos_token_id": 2, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
