"""SAEs in 8 or 4 bits: ``cfg.json`` as SAELens has it, and ``sae_weights_quantised.safetensors``.

    W_enc.codes  int8 [F, d_in]   (4 bits: uint8, two codes a byte)      W_enc.scales  float32 [F, groups]
    W_dec.codes  int8 [F, d_out]                                         W_dec.scales  float32 [F, groups]

A row holds a latent's encoder or decoder weights, rounded to nearest by groups (``core/rounding.py``); biases,
thresholds and a skip stay float32. ``load`` gives the SAE of the rounded weights; saving that writes the same bytes.
"""

from __future__ import annotations

from pathlib import Path

import torch

from unweave.core.errors import UnweaveError
from unweave.core.fields import Fields
from unweave.core.rounding import Rounded, pack, round_to_nearest, unpack
from unweave.sae.formats import saelens
from unweave.sae.formats.about import build_own, check_written
from unweave.sae.formats.saelens_config import modern
from unweave.sae.formats.source import Source
from unweave.sae.formats.tensors import Tensors, read_safetensors
from unweave.sae.module import SAE

NAME = "quantised"
WEIGHTS = "sae_weights_quantised.safetensors"
_GROUP = 64


def recognise(source: Source) -> bool:
    """A folder with ``sae_weights_quantised.safetensors``, or that file."""
    return source.file(WEIGHTS) is not None


def save(sae: SAE, folder: Path, bits: int, group: int | None = None) -> Path:
    """Writes ``folder`` with weights in 8 or 4 bits, ``group`` weights of a row to a scale (0: the whole row).

    By default groups of 64 where these divide the rows. Raises UnweaveError for groups that do not.
    """
    if group is None:
        group = 0 if sae.d_in % _GROUP or sae.d_out % _GROUP else _GROUP
    tensors, config = saelens.inference_form(sae)
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    for name, rows in (("W_enc", tensors.pop("W_enc").T), ("W_dec", tensors.pop("W_dec"))):
        rounded = round_to_nearest(rows, bits, group)
        tensors[f"{name}.codes"] = pack(rounded.codes) if bits == 4 else rounded.codes
        tensors[f"{name}.scales"] = rounded.scales
    config |= {"dtype": "float32", "quantised": {"bits": bits, "group": group}}
    return saelens.write(sae, folder / WEIGHTS, tensors, config)


def load(source: Source) -> SAE:
    """Reads a folder. Raises UnweaveError for whatever is missing, unused, mis-shaped or damaged."""
    raw = source.config(saelens.CONFIG)
    config = modern(Fields({k: v for k, v in raw.values.items() if k != "quantised"}, raw.where))
    own = config.metadata.mapping("unweave")
    tensors = read_safetensors(source.folder / WEIGHTS)
    check_written(own, raw, tensors)
    bits = raw.mapping("quantised").integer("bits")
    if bits not in (4, 8) or config.d_in is None:
        raise raw.error(f"quantised SAEs have 8 or 4 bits and a d_in, not {bits} and {config.d_in}", "restore the file")
    width = config.d_in if config.d_out is None else config.d_out
    for name, columns in (("W_enc", config.d_in), ("W_dec", width)):
        rows = _rows(tensors, name, bits, columns)
        tensors.values[name] = rows.T.contiguous() if name == "W_enc" else rows
    parts = saelens.parts_of(config, tensors)
    tensors.finish()
    return build_own(parts, own)


def _rows(tensors: Tensors, name: str, bits: int, columns: int) -> torch.Tensor:
    """One matrix as float32 [F, columns]."""
    codes, scales = (tensors.values.pop(f"{name}.{part}", None) for part in ("codes", "scales"))
    stored = (columns + 1) // 2 if bits == 4 else columns
    if (
        codes is None
        or scales is None
        or codes.dtype != (torch.uint8 if bits == 4 else torch.int8)
        or scales.dtype != torch.float32
        or codes.ndim != 2
        or scales.ndim != 2
        or codes.shape != (len(scales), stored)
        or scales.shape[1] == 0
        or columns % scales.shape[1]
    ):
        raise UnweaveError(f"the codes and scales of {name} are missing, or do not fit", where=tensors.where,
                           remedy="restore the file")  # fmt: skip
    return Rounded(unpack(codes, columns) if bits == 4 else codes, scales).weights()
