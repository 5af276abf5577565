"""sparsify (eai-sparsify): ``cfg.json`` and ``sae.safetensors`` in a folder named after the module that is read.

    z = (x - b_dec) encoder.weight^T + encoder.bias      (a transcoder leaves b_dec alone)
    x_hat = topk(relu z) W_dec + b_dec (+ x W_skip^T)

encoder.weight and W_dec are both [F, d]. An SAE reads the module's output; a transcoder goes from its input to that.
"""

from __future__ import annotations

import math
from pathlib import Path

from unweave.core.errors import UnweaveError
from unweave.core.fields import Fields
from unweave.core.writing import atomic_write, write_json
from unweave.sae.activations import TopK
from unweave.sae.formats.about import build_foreign, build_own, check_written, own_block, sites_of_module
from unweave.sae.formats.parts import agree, assemble, with_input_bias
from unweave.sae.formats.source import Source
from unweave.sae.formats.tensors import read_safetensors
from unweave.sae.module import SAE

NAME = "sparsify"
CONFIG, WEIGHTS, OWN = "cfg.json", "sae.safetensors", "unweave.json"
_NAMES = {"W_enc": ("encoder.weight",), "b_enc": ("encoder.bias",), "W_dec": ("W_dec",), "b_dec": ("b_dec",)}
_STATED = {"W_enc": "transposed", "W_dec": "as is"}


def recognise(source: Source) -> bool:
    """A folder with ``sae.safetensors``, or that file."""
    return source.file(WEIGHTS) is not None


def load(source: Source) -> SAE:
    """Reads a folder. Raises UnweaveError for signed or grouped latents and whatever does not fit."""
    path = source.file(WEIGHTS)
    assert path is not None
    config = source.config(CONFIG)
    where = str(path.parent / CONFIG)
    if not config:
        raise UnweaveError("the configuration is missing, and with it k", where=where, remedy="restore the file")
    k, transcodes, skips = _settings(config)
    own, tensors = source.config(OWN), read_safetensors(path)
    check_written(own, config, tensors)
    parts = assemble(tensors, _NAMES, _STATED)
    if skips != ("W_skip" in tensors):
        actual = "no W_skip" if skips else "a W_skip"
        raise UnweaveError(f"the tensors hold {actual}, against skip_connection in the configuration", where=where)
    parts.take_skip(tensors)
    tensors.finish()
    agree("d_in", config.integer("d_in"), parts.d_in, where)
    agree("num_latents", config.integer("num_latents") or _product(config), parts.d_sae, where)
    parts.k = k
    if not transcodes:
        parts.fold_input_bias()
    if own:
        return build_own(parts, own)
    module, model = path.parent.name, source.config("../config.json").text("model")
    return build_foreign(parts, source, NAME, hook=module, sites=sites_of_module(module, transcodes), model=model)


def _product(config: Fields) -> int | None:
    width, factor = config.integer("d_in"), config.integer("expansion_factor")
    return None if width is None or factor is None else width * factor


def _settings(config: Fields) -> tuple[int, bool, bool]:
    """k, whether it is a transcoder, and whether it has a skip."""
    k = config.integer("k", least=1)
    if k is None:
        raise config.error("the configuration must say k", "restore the file")
    config.choice("activation", ("topk",), "topk")
    if config.flag("signed"):
        raise config.error(
            "signed latents are not understood: a latent here is never below 0",
            "use an SAE whose latents are not signed",
        )
    return k, config.flag("transcode"), config.flag("skip_connection")


def save(sae: SAE, folder: Path) -> Path:
    """Writes a folder that sparsify reads. Raises UnweaveError for anything but TopK without per-token scaling."""
    from safetensors.torch import save_file

    sae.require_decoder()
    if not isinstance(sae.activation, TopK):
        what = f"sparsify has TopK only, and this SAE's activation is {sae.kind}"
        raise UnweaveError(what, where=repr(sae), remedy="convert it to saelens or dictionary_learning")
    if sae.d_in != sae.d_out:
        raise UnweaveError(f"sparsify has one width, and this SAE has {sae.d_in} and {sae.d_out}", where=repr(sae))
    if sae.input_norm is not None:
        what = f"sparsify has no inputs normalised token by token ({sae.input_norm})"
        raise UnweaveError(what, where=repr(sae), remedy="convert it to saelens")
    transcodes = sae.read != sae.write
    tensors = {"encoder.weight": sae.W_enc.T, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip.T
    if not transcodes:
        tensors = with_input_bias(tensors, "encoder.bias", sae)
    config = {
        "activation": "topk",
        "expansion_factor": math.ceil(sae.d_sae / sae.d_in),
        "normalize_decoder": False,
        "num_latents": sae.d_sae,
        "k": sae.activation.k,
        "multi_topk": False,
        "skip_connection": sae.W_skip is not None,
        "transcode": transcodes,
        "d_in": sae.d_in,
    }
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    with atomic_write(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary)
    write_json(folder / OWN, own_block(sae, config, tensors))
    write_json(folder / CONFIG, config)
    return folder
