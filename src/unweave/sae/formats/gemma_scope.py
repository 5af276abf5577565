"""Gemma Scope (``params.npz``) and Gemma Scope 2 (``params.safetensors`` with ``config.json``): JumpReLU.

    f = relu(z) 1[z > threshold],  z = x W_enc + b_enc        x_hat = f W_dec + b_dec (+ x affine_skip_connection)

W_enc is [d_in, F]. The site is only in the folder's name, which a copy must keep: ``gemma-scope-2b-pt-res/layer_20/``.
Embedding SAEs were trained on embeddings before Gemma multiplies them by sqrt(d). Here they read what the model goes on
with, resid_pre.0: W_enc / sqrt(d), W_dec sqrt(d), b_dec sqrt(d).
Transcoders of the first series read the MLP's norm before its weight, where we have no site; they encode and decode.
"""

from __future__ import annotations

import re
from pathlib import Path

from unweave.core.site import Site
from unweave.sae.formats.about import build_foreign, site_of_hf_hook
from unweave.sae.formats.parts import Parts, assemble
from unweave.sae.formats.source import Source
from unweave.sae.formats.tensors import Tensors, read_npz, read_safetensors
from unweave.sae.module import SAE

NAME = "gemma_scope"
ARRAYS, WEIGHTS = "params.npz", "params.safetensors"
_NAMES = {"W_enc": ("W_enc", "w_enc"), "b_enc": ("b_enc",), "W_dec": ("W_dec", "w_dec"), "b_dec": ("b_dec",)}
_STATED = {"W_enc": "as is", "W_dec": "as is"}


def recognise(source: Source) -> bool:
    """A folder with ``params.npz`` or ``params.safetensors``, an npz file, or a safetensors file that holds w_enc."""
    path = source.file(ARRAYS) or source.the_file(".npz") or source.file(WEIGHTS)
    return path is not None or ("w_enc" in source.names and "threshold" in source.names)


def load(source: Source) -> SAE:
    """Reads an SAE, transcoder, or (encoding only) one layer of a cross-layer transcoder."""
    path = source.file(ARRAYS) or source.the_file(".npz")
    if path is not None:
        return _first(source, path)
    return _second(source, source.file(WEIGHTS) or source.path)


def _first(source: Source, path: Path) -> SAE:
    tensors = read_npz(path)
    parts = assemble(tensors, _NAMES, _STATED)
    parts.threshold = tensors.vector("threshold", length=parts.d_sae)
    tensors.finish()
    hook, hook_out, site = _place(source.hint)
    if _is_embedding(source.hint):
        root = parts.d_in**0.5
        parts.fold_input_scale(1 / root)
        site = Site("resid_pre", 0)
    match = re.search(r"gemma-scope-(\d+b)-(pt|it)", source.hint)
    model = None if match is None else f"google/gemma-2-{match[1]}{'-it' if match[2] == 'it' else ''}"
    return build_foreign(parts, source, NAME, hook=hook, hook_out=hook_out, sites=(site, site), model=model)


def _is_embedding(hint: str) -> bool:
    return re.search(r"(?:^|/)embedding/width_", hint) is not None


def _place(hint: str) -> tuple[str | None, str | None, Site | None]:
    """(hook, hook written to, site) by the folder's name."""
    layers = re.findall(r"layer_(\d+)", hint)
    if not layers or _is_embedding(hint):
        return ("hook_embed" if _is_embedding(hint) else None), None, None
    layer = int(layers[-1])
    kind = re.search(r"gemma-scope-\w+-(?:pt|it)-(res|mlp|att|transcoders)\b", hint)
    if kind is not None and kind[1] == "transcoders":
        return f"blocks.{layer}.ln2.hook_normalized", f"blocks.{layer}.hook_mlp_out", None
    point = {"res": "resid_post", "mlp": "mlp_add", "att": "attn_heads"}.get(kind[1]) if kind else None
    if point is None:
        return None, None, None
    site = Site(point, layer)
    return site.to_transformer_lens(), None, site


def _second(source: Source, path: Path) -> SAE:
    config = source.config("config.json")
    config.choice("architecture", ("jump_relu",), "jump_relu")
    tensors = read_safetensors(path)
    cross_layer = "w_dec" in tensors and tensors.values["w_dec"].ndim == 3
    if cross_layer:
        parts = _encoder_of_many(tensors)
        tensors.drop("w_dec", "b_dec", "affine_skip_connection")
    else:
        parts = assemble(tensors, _NAMES, _STATED)
        parts.take_skip(tensors, "affine_skip_connection", "as is")
    parts.threshold = tensors.vector("threshold", length=parts.d_sae)
    tensors.finish()
    hook, hook_out = config.text("hf_hook_point_in"), config.text("hf_hook_point_out")
    read, write = site_of_hf_hook(hook), site_of_hf_hook(hook_out or hook)
    if cross_layer:
        write = read
    sites, model = (read, write) if read and write else (None, None), config.text("model_name")
    return build_foreign(parts, source, "gemma_scope_2", hook=hook, hook_out=hook_out, sites=sites, model=model)


def _encoder_of_many(tensors: Tensors) -> Parts:
    b_enc = tensors.vector("b_enc")
    W_enc = tensors.matrix("w_enc", rows=None, columns=len(b_enc), stated="as is")
    return Parts(
        W_enc, b_enc, b_enc.new_zeros(len(b_enc), 0), b_enc.new_zeros(0),
        encode_only="it is one layer of a cross-layer transcoder, which writes to many layers",
    )  # fmt: skip
