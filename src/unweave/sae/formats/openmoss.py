"""Llama Scope (``hyperparams.json``, ``checkpoints/final.safetensors``) and the newer OpenMOSS layout (``config.json``,
``sae_weights.safetensors``).

    z = s x W_enc + b_enc,  s = sqrt(d) / (average norm of the data's activations)        x_hat = decode(f) / s

With ``sparsity_include_decoder_norm`` the activation looks at z |d|: a JumpReLU's threshold becomes threshold / |d|,
and TopK ranks by it. Llama Scope's one threshold is in units of raw activations, so it is multiplied by s; the newer
layout's logarithms of thresholds are in units of scaled ones.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from unweave.core.errors import UnweaveError
from unweave.sae.formats.about import build_foreign
from unweave.sae.formats.parts import Parts, agree, assemble, vector
from unweave.sae.formats.source import Source, tensor_names
from unweave.sae.formats.tensors import Tensors, read_safetensors
from unweave.sae.module import SAE

NAME = "llama_scope"
HYPERPARAMETERS, FINAL = "hyperparams.json", "checkpoints/final.safetensors"
CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
_NAMES = {
    "W_enc": ("encoder.weight", "W_E"),
    "b_enc": ("encoder.bias", "b_E"),
    "W_dec": ("decoder.weight", "W_D"),
    "b_dec": ("decoder.bias", "b_D"),
}
_LINEAR, _DIRECT = {"W_enc": "transposed", "W_dec": "transposed"}, {"W_enc": "as is", "W_dec": "as is"}
_NORM = "dataset_average_activation_norm"
_THRESHOLDS = ("log_jumprelu_threshold", "activation_function.log_jumprelu_threshold")


def recognise(source: Source) -> bool:
    """A folder with ``hyperparams.json``, or with ``config.json`` beside OpenMOSS's tensors; or one of its files."""
    folder = source.folder
    if source.path.is_file() and source.the_file(".safetensors") is None:
        return False
    if (folder / HYPERPARAMETERS).is_file() or (folder.parent / HYPERPARAMETERS).is_file():
        return True
    path = source.file(WEIGHTS)
    return path is not None and (folder / CONFIG).is_file() and bool({"W_E", "encoder.weight"} & tensor_names(path))


def load(source: Source) -> SAE:
    """Reads an SAE. Raises UnweaveError for cross-coders, GLU encoders, batch-wise scaling, and what does not fit."""
    old = source.config(HYPERPARAMETERS, f"../{HYPERPARAMETERS}")
    config = old or source.config(CONFIG)
    path = _weights(source) if old else source.file(WEIGHTS)
    assert path is not None
    where = str(path)
    _refuse(config, where)
    tensors = read_safetensors(path)
    norms = _norms(config, tensors)
    if "decoder.bias" not in tensors and "b_D" not in tensors and not config.get("use_decoder_bias", True):
        width = int(config.get("d_model", 0))
        tensors.values["b_D"] = torch.zeros(width, dtype=next(iter(tensors.values.values())).dtype)
    parts = assemble(tensors, _NAMES, _LINEAR if "encoder.weight" in tensors else _DIRECT)
    agree("d_model", config.get("d_model"), parts.d_in, where)
    agree("d_sae", _width(config), parts.d_sae, where)
    if config.get("apply_decoder_bias_to_pre_encoder", False):
        parts.fold_input_bias()
    _activate(config, tensors, parts, norms)
    tensors.finish()
    hook, hook_out = config.get("hook_point_in"), config.get("hook_point_out")
    return build_foreign(
        parts,
        source,
        NAME if old else "openmoss",
        hook=hook,
        hook_out=None if hook_out == hook else hook_out,
        model=config.get("model_name"),
    )


def _weights(source: Source) -> Path:
    """Llama Scope's weights: the file that was named, which may be an earlier step's, or a folder's final ones."""
    if source.path.is_file():
        return source.path
    beside = source.file(Path(FINAL).name)  # where checkpoints/ itself was named
    return source.file(FINAL) or beside or source.folder / FINAL


def _k(config: dict[str, Any], where: str) -> int:
    k = config.get("top_k")
    if not isinstance(k, int) or k < 1:
        raise UnweaveError("the configuration must say top_k", where=where, remedy="restore the file")
    return k


def _width(config: dict[str, Any]) -> int | None:
    if config.get("d_sae") is not None:
        return int(config["d_sae"])
    if "expansion_factor" in config and "d_model" in config:
        return round(config["d_model"] * config["expansion_factor"])
    return None


def _refuse(config: dict[str, Any], where: str) -> None:
    kind = config.get("sae_type") or "sae"
    if kind not in ("sae", "transcoder"):
        raise UnweaveError(f"{kind!r} is no SAE that is understood", where=where, remedy="known: sae, transcoder")
    if config.get("use_glu_encoder", False):
        raise UnweaveError("encoders with a gated linear unit are not understood", where=where)
    scaling = config.get("norm_activation", "dataset-wise")
    if scaling not in ("dataset-wise", "token-wise", "inference"):
        raise UnweaveError(
            f"inputs scaled {scaling!r} cannot be encoded one token at a time", where=where,
            remedy="fold the scale into the weights before saving",
        )  # fmt: skip


def _norms(config: dict[str, Any], tensors: Tensors) -> dict[str, float]:
    """Average norms of the data's activations: "in" and "out", from the tensors or the configuration."""
    said = config.get(_NORM) or {}
    known: dict[Any, Any] = {"in": said} if isinstance(said, (int, float)) else dict(said)
    for name in [name for name in tensors.values if name.startswith(f"{_NORM}.")]:
        known[name.removeprefix(f"{_NORM}.")] = tensors.number(name)
    found: dict[str, float] = {}
    for side in ("in", "out"):
        value = known.get(side, known.get(config.get(f"hook_point_{side}")))
        if value is not None:
            found[side] = float(value)
    return found


def _activate(config: dict[str, Any], tensors: Tensors, parts: Parts, norms: dict[str, float]) -> None:
    """Activation and input scale. The order matters: decoder norms are those of the scaled decoder."""
    function = str(config.get("act_fn", "jumprelu")).lower()
    by_norm = bool(config.get("sparsity_include_decoder_norm", False))
    transcodes = config.get("hook_point_out") not in (None, config.get("hook_point_in"))
    s_in, s_out = _scales(config, parts, norms, transcodes, tensors.where)
    if function == "jumprelu":
        parts.threshold = _threshold(config, tensors, parts, s_out if by_norm else s_in)
        if by_norm:
            parts.fold_jump_by_norm()
    elif function == "topk":
        parts.k = _k(config, tensors.where)
        if by_norm:
            parts.fold_rank_by_norm()
    elif function != "relu":
        raise UnweaveError(
            f"the activation {function!r} is not understood", where=tensors.where, remedy="known: relu, jumprelu, topk"
        )
    if s_in != 1.0 or s_out != 1.0:
        parts.fold_input_scale(s_in, s_out)


def _scales(
    config: dict[str, Any], parts: Parts, norms: dict[str, float], transcodes: bool, where: str
) -> tuple[float, float]:
    scaling = config.get("norm_activation", "dataset-wise")
    if scaling == "token-wise":
        parts.input_norm = "constant_norm"
    if scaling != "dataset-wise":
        return 1.0, 1.0
    missing = [name for name in (("in", "out") if transcodes else ("in",)) if not norms.get(name, 0.0) > 0]
    if missing:
        raise UnweaveError(
            f"this SAE wants its inputs scaled by the data's average norm ({_NORM}), and the file does not hold it",
            where=where,
            remedy=f'add "{_NORM}": {{"in": NUMBER, "out": NUMBER}} to the configuration',
        )
    root = math.sqrt(parts.d_in)
    s_in = root / norms["in"]
    return s_in, (root / norms["out"] if transcodes else s_in)


def _threshold(config: dict[str, Any], tensors: Tensors, parts: Parts, unit: float) -> torch.Tensor:
    """Thresholds of scaled pre-activations (times |d|, where those count); ``unit`` turns raw ones into those."""
    stored = tensors.maybe(*_THRESHOLDS)
    if stored is not None:
        return vector(stored.float(), _THRESHOLDS[0], tensors.where, parts.d_sae).exp()
    scalar = config.get("jump_relu_threshold")
    if not isinstance(scalar, (int, float)):
        raise UnweaveError(
            "a JumpReLU SAE needs its threshold", where=tensors.where, remedy="restore the configuration"
        )
    parts.widen()
    return torch.full_like(parts.b_enc, float(scalar) * unit)
