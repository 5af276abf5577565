"""circuit-tracer: one safetensors file per layer's transcoder, and cross-layer transcoders, of which a layer encodes.

    f = relu(x W_enc^T + b_enc), or JumpReLU, or TopK        y = f W_dec + b_dec (+ x W_skip^T)

Published files disagree on how W_dec lies, so shapes decide; where it is square, W_dec is [F, d]. Hooks come from
``config.yaml`` beside the files, the layer from the file's name. Four bare tensors are also what other tools write for
other activations, so something must say that a file is of this format. A cross-layer transcoder's layer writes to many
layers: its ``W_enc_N.safetensors`` gives an SAE that encodes and refuses to decode (trap 24).
"""

from __future__ import annotations

import re

from torch import Tensor

from unweave.core.fields import Fields
from unweave.sae.formats.about import build_foreign
from unweave.sae.formats.parts import Parts, assemble
from unweave.sae.formats.source import Source
from unweave.sae.formats.tensors import Tensors, read_safetensors
from unweave.sae.module import SAE

NAME = "circuit_tracer"
_NAMES = {name: (name,) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_STATED = {"W_enc": "transposed", "W_dec": "as is"}
_THRESHOLD = "activation_function.threshold"
_CONFIGS = ("config.yaml", "config.yml")
_SAELENS = "sae_weights.safetensors"
"""Another tool's file, whose tensors have the same names: a W_skip does not tell them apart."""


def recognise(source: Source) -> bool:
    """A safetensors file with W_enc, W_dec, b_enc and b_dec, or with a cross-layer transcoder's W_enc_N."""
    return set(_NAMES) <= source.names or any(re.fullmatch(r"W_enc_\d+", name) for name in source.names)


def load(source: Source) -> SAE:
    """Reads one layer's transcoder. Raises UnweaveError for what does not fit."""
    config = source.config(*_CONFIGS)
    tensors = read_safetensors(source.path)
    cross_layer = next((name for name in tensors.values if re.fullmatch(r"W_enc_\d+", name)), None)
    if cross_layer is not None:
        return _cross_layer(source, config, tensors, int(cross_layer.rsplit("_", 1)[-1]))
    parts = assemble(tensors, _NAMES, _STATED)
    parts.take_skip(tensors)
    skips = parts.W_skip is not None and source.path.name != _SAELENS
    if not (config or "k" in tensors or _THRESHOLD in tensors or skips):
        raise tensors.error(
            "nothing says which activation these weights go with",
            "restore what lay beside them: config.yaml of circuit-tracer, or cfg.json of SAELens",
        )
    _activation(config, tensors, parts)
    tensors.finish()
    return _build(source, config, parts, _layer(source.path.stem))


def _layer(name: str) -> int | None:
    """The number after ``layer_``, or else the first number of the name, which may begin with a model's size."""
    match = re.search(r"layer_(\d+)", name) or re.search(r"(\d+)", name)
    return None if match is None else int(match[1])


def _activation(config: Fields, tensors: Tensors, parts: Parts) -> None:
    activation = config.text("activation")
    k = tensors.integer("k")
    parts.threshold = _thresholds(tensors, _THRESHOLD, parts.d_sae)
    if parts.threshold is not None and bool((parts.threshold < 0).any()):
        raise tensors.error("thresholds below 0 let negative latents through, which is not understood", "")
    if k is not None or activation == "topk":
        k = config.integer("k", least=1) if k is None else k
        if k is None or parts.threshold is not None:
            raise tensors.error("a TopK transcoder needs k, and no threshold", "restore config.yaml")
        parts.k = k
    elif "k" in config:
        raise config.error(
            "the configuration says k, and an activation that has none", "restore its activation, or remove k"
        )
    elif activation not in (None, "relu", "jump_relu", "jumprelu"):
        raise tensors.error(f"the activation {activation!r} is not understood", "known: relu, jump_relu, topk")
    elif activation in ("jump_relu", "jumprelu") and parts.threshold is None:
        raise tensors.error(f"missing {_THRESHOLD}", "the file is incomplete: restore it")


def _thresholds(tensors: Tensors, name: str, length: int) -> Tensor | None:
    """Thresholds [F], of any shape in the file; None where it has none."""
    if name not in tensors:
        return None
    tensors.values[name] = tensors.values[name].flatten()
    return tensors.vector(name, length=length)


def _cross_layer(source: Source, config: Fields, tensors: Tensors, layer: int) -> SAE:
    b_enc, b_dec = tensors.vector(f"b_enc_{layer}"), tensors.vector(f"b_dec_{layer}")
    W_enc = tensors.matrix(f"W_enc_{layer}", rows=len(b_dec), columns=len(b_enc), stated="transposed")
    threshold = _thresholds(tensors, f"threshold_{layer}", len(b_enc))
    tensors.drop(f"W_skip_{layer}")
    tensors.finish()
    parts = Parts(
        W_enc, b_enc, b_enc.new_zeros(len(b_enc), 0), b_enc.new_zeros(0), threshold=threshold,
        encode_only=f"it is layer {layer} of a cross-layer transcoder, which writes to many layers",
    )  # fmt: skip
    return _build(source, config, parts, layer)


def _build(source: Source, config: Fields, parts: Parts, layer: int | None) -> SAE:
    hooks = [
        f"blocks.{layer}.{hook}" if layer is not None and hook else None
        for hook in (config.text("feature_input_hook"), config.text("feature_output_hook"))
    ]
    sites = (None, None) if None in hooks else None
    model = config.text("model_name")
    return build_foreign(parts, source, NAME, hook=hooks[0], hook_out=hooks[1], sites=sites, model=model)
