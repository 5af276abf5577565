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

import torch

from unweave.core.errors import UnweaveError
from unweave.core.fields import Fields
from unweave.sae.formats.about import build_foreign
from unweave.sae.formats.headers import tensor_names
from unweave.sae.formats.parts import Parts, agree, assemble
from unweave.sae.formats.source import Source
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
_DATASET = "dataset-wise"
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
    if path is None or not config:
        raise UnweaveError("the configuration is empty", where=config.where, remedy="restore the file")
    where = str(path)
    _refuse(config)
    tensors = read_safetensors(path)
    norms = _norms(config, tensors)
    if "decoder.bias" not in tensors and "b_D" not in tensors and not config.flag("use_decoder_bias", True):
        tensors.values["b_D"] = _no_bias(config, tensors)
    parts = assemble(tensors, _NAMES, _LINEAR if "encoder.weight" in tensors else _DIRECT)
    agree("d_model", config.integer("d_model"), parts.d_in, where)
    agree("d_sae", _width(config), parts.d_sae, where)
    if config.flag("apply_decoder_bias_to_pre_encoder"):
        parts.fold_input_bias()
    _activate(config, tensors, parts, norms)
    tensors.finish()
    hook, hook_out, model = (config.text(name) for name in ("hook_point_in", "hook_point_out", "model_name"))
    name, hook_out = NAME if old else "openmoss", None if hook_out == hook else hook_out
    return build_foreign(parts, source, name, hook=hook, hook_out=hook_out, model=model)


def _weights(source: Source) -> Path:
    """Llama Scope's weights: the file that was named, which may be an earlier step's, or a folder's final ones."""
    if source.path.is_file():
        return source.path
    beside = source.file(Path(FINAL).name)  # where checkpoints/ itself was named
    return source.file(FINAL) or beside or source.folder / FINAL


def _k(config: Fields) -> int:
    k = config.integer("top_k", least=1)
    if k is None:
        raise config.error("the configuration must say top_k", "restore the file")
    return k


def _width(config: Fields) -> int | None:
    width, model = config.integer("d_sae", least=1), config.integer("d_model", least=1)
    factor = config.number("expansion_factor", above=0, most=1e6)
    if width is not None:
        return width
    return None if model is None or factor is None else round(model * factor)


def _no_bias(config: Fields, tensors: Tensors) -> torch.Tensor:
    """Zeros in place of a decoder's bias, as long as the decoder is wide."""
    width = config.integer("d_model", least=1)
    decoder = next((tensors.values[name] for name in _NAMES["W_dec"] if name in tensors), None)
    if width is None or decoder is None or width not in decoder.shape:
        raise config.error(
            f"the configuration says d_model {width}, which no side of the decoder has",
            "configuration and weights do not belong together: restore them",
        )
    return decoder.new_zeros(width)


def _refuse(config: Fields) -> None:
    if "sae_type" in config:
        config.choice("sae_type", ("sae", "transcoder"), "sae")
    if config.flag("use_glu_encoder"):
        raise config.error("encoders with a gated linear unit are not understood", "use another SAE")
    scaling = config.text("norm_activation") or _DATASET
    if scaling not in (_DATASET, "token-wise", "inference"):
        what = f"inputs scaled {scaling[:80]!r} cannot be encoded one token at a time"
        raise config.error(what, "fold the scale into the weights before saving")


def _norms(config: Fields, tensors: Tensors) -> dict[str, float]:
    """Average norms of the data's activations: "in" and "out", from the tensors or the configuration."""
    if config.holds(_NORM, (int, float)):
        both = config.number(_NORM, above=0)
        by_name = {} if both is None else {"in": both}
    else:
        inner = config.mapping(_NORM)
        by_name = {name: value for name in inner if (value := inner.number(name, above=0)) is not None}
    for name in [name for name in tensors.values if name.startswith(f"{_NORM}.")]:
        value = tensors.number(name)
        if value is not None:
            by_name[name.removeprefix(f"{_NORM}.")] = value
    sides = {side: by_name.get(side, by_name.get(config.text(f"hook_point_{side}") or "")) for side in ("in", "out")}
    return {side: norm for side, norm in sides.items() if norm is not None}


def _activate(config: Fields, tensors: Tensors, parts: Parts, norms: dict[str, float]) -> None:
    """Activation and input scale. The order matters: decoder norms are those of the scaled decoder."""
    function = (config.text("act_fn") or "jumprelu").lower()
    by_norm = config.flag("sparsity_include_decoder_norm")
    transcodes = config.text("hook_point_out") not in (None, config.text("hook_point_in"))
    s_in, s_out = _scales(config, tensors, parts, norms, transcodes)
    if function == "jumprelu":
        _set_threshold(config, tensors, parts, s_out if by_norm else s_in)
        if by_norm:
            parts.fold_jump_by_norm()
    elif function == "topk":
        parts.k = _k(config)
        if by_norm:
            parts.fold_rank_by_norm()
    elif function != "relu":
        raise tensors.error(f"the activation {function!r} is not understood", "known: relu, jumprelu, topk")
    if s_in != 1.0 or s_out != 1.0:
        parts.fold_input_scale(s_in, s_out)


def _scales(
    config: Fields, tensors: Tensors, parts: Parts, norms: dict[str, float], transcodes: bool
) -> tuple[float, float]:
    scaling = config.text("norm_activation") or _DATASET
    if scaling == "token-wise":
        parts.input_norm = "constant_norm"
    if scaling != _DATASET:
        return 1.0, 1.0
    if not all(norms.get(name, 0.0) > 0 for name in (("in", "out") if transcodes else ("in",))):
        raise tensors.error(
            f"this SAE wants its inputs scaled by the data's average norm ({_NORM}), and the file does not hold it",
            f'add "{_NORM}": {{"in": NUMBER, "out": NUMBER}} to the configuration',
        )
    root = math.sqrt(parts.d_in)
    s_in = root / norms["in"]
    return s_in, (root / norms["out"] if transcodes else s_in)


def _set_threshold(config: Fields, tensors: Tensors, parts: Parts, unit: float) -> None:
    """Thresholds of scaled pre-activations (times |d|, where those count); ``unit`` turns raw ones into those."""
    scalar = config.number("jump_relu_threshold")
    if any(name in tensors for name in _THRESHOLDS):
        parts.threshold = tensors.vector(*_THRESHOLDS, length=parts.d_sae).float().exp()
    elif scalar is not None:
        parts.one_threshold(scalar * unit)
    else:
        raise tensors.error("a JumpReLU SAE needs its threshold", "restore the configuration")
