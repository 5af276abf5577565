"""dictionary_learning: ``ae.pt`` (a state dictionary, read with ``weights_only``) and ``config.json``.

    AutoEncoder       relu((x - b) E + b_e) D + b
    AutoEncoderNew    relu(x E + b_e) D + b
    Gated             1[(x - b) E + b_gate > 0] relu(e^r (x - b) E + b_mag) D + b
    TopK              the k largest of relu((x - b) E + b_e)
    BatchTopK, Matryoshka BatchTopK    relu((x - b) E + b_e) where it is above one stored threshold
    JumpReLU          relu(x E + b_e) where x E + b_e > threshold

Which one a file is, its tensors' names say; TopK and BatchTopK share theirs, so the configuration must. Two linear
layers without a configuration are taken for ReLU, with a warning: the names fit, but any autoencoder may have
them. Files of plain weights by others (Goodfire, qresearch, Qwen Scope, attention SAEs of GPT-2) are read here too.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch

from unweave.core.errors import UnweaveError, UnweaveWarning
from unweave.core.fields import Fields
from unweave.core.site import Site
from unweave.core.writing import atomic_write, write_json
from unweave.sae.activations import JumpReLU, TopK
from unweave.sae.formats.about import build_foreign, build_own, check_written, own_block, site_of
from unweave.sae.formats.parts import Parts, agree, assemble, with_input_bias
from unweave.sae.formats.source import Source
from unweave.sae.formats.tensors import Tensors, read_torch
from unweave.sae.module import SAE

NAME = "dictionary_learning"
WEIGHTS, CONFIG = "ae.pt", "config.json"

_NAMES: dict[str, tuple[str, ...]] = {
    "W_enc": ("encoder.weight", "encoder_linear.weight", "W_enc"),
    "b_enc": ("encoder.bias", "encoder_linear.bias", "b_enc", "mag_bias"),
    "W_dec": ("decoder.weight", "decoder_linear.weight", "W_dec"),
    "b_dec": ("bias", "decoder.bias", "decoder_linear.bias", "b_dec", "decoder_bias"),
}
_LINEAR, _DIRECT = {"W_enc": "transposed", "W_dec": "transposed"}, {"W_enc": "as is", "W_dec": "as is"}
_PAIRS = {"AutoEncoderTopK", "BatchTopKSAE"}


def recognise(source: Source) -> bool:
    """A folder with ``ae.pt``, or any PyTorch file."""
    return source.file(WEIGHTS) is not None or bool(source.the_file(".pt") or source.the_file(".pth"))


def load(source: Source) -> SAE:
    """Reads a dictionary. Raises UnweaveError for kinds that are not known and whatever does not fit."""
    path = source.file(WEIGHTS) or source.path
    config = source.config(CONFIG, f"../{CONFIG}")  # checkpoints/ae_N.pt lie one folder deeper
    trainer, own = config.mapping("trainer"), config.mapping("unweave")
    tensors = read_torch(path)
    check_written(own, config, tensors)
    where = str(path)
    kind = _kind(tensors, trainer.text("dict_class"))
    parts = _parts(kind, tensors, trainer, source)
    tensors.finish()
    agree("activation_dim", trainer.integer("activation_dim"), parts.d_in, where)
    agree("dict_size", trainer.integer("dict_size"), parts.d_sae, where)
    if own:
        return build_own(parts, own)
    about = {"dict_class": kind, "taken_for": _taken_for(kind, trainer, where)}
    about["context"] = config.mapping("buffer").integer("ctx_len")
    site, hook, model = _site(config, source), trainer.text("submodule_name"), trainer.text("lm_name")
    return build_foreign(parts, source, NAME, hook=hook, sites=(site, site), model=model, about=about)


def _kind(tensors: Tensors, stated: str | None) -> str:
    """The class whose tensors these are; UnweaveError when the configuration says another, or must say and does not."""
    if "r_mag" in tensors:
        classes = {"GatedAutoEncoder"}
    elif "group_sizes" in tensors:
        classes = {"MatryoshkaBatchTopKSAE"}
    elif "threshold" in tensors and "W_enc" in tensors:
        classes = {"JumpReluAutoEncoder"}
    elif "encoder.weight" in tensors and "b_dec" in tensors:
        classes = _PAIRS
    elif "encoder.weight" in tensors and "bias" in tensors:
        classes = {"AutoEncoder"}
    elif "decoder.bias" in tensors or "decoder_linear.bias" in tensors:
        classes = {"AutoEncoderNew"}
    elif "W_enc" in tensors and "b_dec" in tensors:
        classes = {"plain"}
    else:
        raise tensors.error(
            f"tensors {', '.join(sorted(tensors.values)[:8])} match no known kind of SAE",
            "known: AutoEncoder, AutoEncoderNew, GatedAutoEncoder, AutoEncoderTopK, BatchTopKSAE, "
            "MatryoshkaBatchTopKSAE, JumpReluAutoEncoder",
        )
    if stated is None and len(classes) > 1:
        raise tensors.error(
            "TopK and BatchTopK dictionaries hold the same tensors, and no configuration says which of them this is",
            f"put {CONFIG} with trainer.dict_class beside it",
        )
    if stated is not None and stated not in classes:
        raise tensors.error(
            f"the configuration says {stated}, but the tensors are those of {' or '.join(sorted(classes))}",
            "configuration and weights do not belong together: restore them",
        )
    return stated or classes.pop()


def _taken_for(kind: str, trainer: Fields, where: str) -> str | None:
    """What a file is read as although nothing but its tensors' names says so, which is also warned of; else None."""
    if kind not in ("AutoEncoder", "AutoEncoderNew") or "dict_class" in trainer:
        return None
    bias = "b_dec is taken off the input" if kind == "AutoEncoder" else "nothing is taken off the input"
    taken_for = f"{kind}: ReLU, {bias}"
    warnings.warn(
        f"{where}: two linear layers, and no configuration says what is between them; taken for {taken_for}. Put "
        f"{CONFIG} with trainer.dict_class beside it, or measure before you trust it",
        UnweaveWarning,
        stacklevel=2,
    )
    return taken_for


def _parts(kind: str, tensors: Tensors, trainer: Fields, source: Source) -> Parts:
    if kind == "plain":
        return _plain(tensors, source)
    # Of AutoEncoder a decoder.bias beside bias would be another class: it stays, and is refused.
    names = _NAMES | ({"b_dec": ("bias",)} if kind == "AutoEncoder" else {})
    linear = kind not in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE")
    parts = assemble(tensors, names, _LINEAR if linear else _DIRECT)
    if kind == "GatedAutoEncoder":
        gate, gain = (tensors.vector(name, length=parts.d_sae) for name in ("gate_bias", "r_mag"))
        parts.fold_gate(gate, parts.b_enc, gain)
    elif kind == "JumpReluAutoEncoder":
        parts.threshold = tensors.vector("threshold", length=parts.d_sae)
    elif kind == "AutoEncoderTopK":
        parts.k = _k(tensors, trainer)
        tensors.drop("threshold")  # an estimate for another way of encoding, which is not the class's own
    elif kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        _k(tensors, trainer)
        groups = tensors.integers("group_sizes")
        if groups is not None:
            agree("group_sizes that sum to", sum(groups), parts.d_sae, tensors.where)
        threshold = tensors.number("threshold")
        if threshold is None or threshold < 0:
            raise tensors.error(
                "this BatchTopK dictionary has no threshold, so a single token cannot be encoded",
                "train it past threshold_start_step, where the threshold is first estimated",
            )
        parts.one_threshold(threshold)
    if kind not in ("AutoEncoderNew", "JumpReluAutoEncoder"):
        parts.fold_input_bias()
    return parts


def _plain(tensors: Tensors, source: Source) -> Parts:
    """Two publishers' bare weights: attention SAEs of GPT-2 (configuration beside them), and Qwen Scope's TopK."""
    config = source.config(source.path.with_suffix("").name + "_cfg.json")
    if config:
        parts = assemble(tensors, _NAMES, _DIRECT)
        agree("act_size", config.integer("act_size"), parts.d_in, tensors.where)
        agree("dict_size", config.integer("dict_size"), parts.d_sae, tensors.where)
        parts.fold_input_bias()
        return parts
    match = re.search(r"L0_(\d+)", source.hint)
    if match is None:
        raise tensors.error(
            "this file holds bare weights, and nothing says which activation they go with",
            "keep what lies beside it (NAME_cfg.json), or, for Qwen Scope, the repository's name as a folder: "
            "SAE-Res-Qwen3-8B-Base-W64K-L0_50/",
        )
    parts = assemble(tensors, _NAMES, _LINEAR)
    parts.k = int(match[1])
    return parts


def _k(tensors: Tensors, trainer: Fields) -> int:
    stored, stated = tensors.integer("k"), trainer.integer("k", least=1)
    if stored is not None:
        agree("k", stated, stored, tensors.where)
        return stored
    if stated is None:
        raise tensors.error("neither the file nor its configuration says k", f"restore {CONFIG}")
    return stated


_SITES = re.compile(r"(resid_post|resid_out|resid|attn_out|mlp_out)_?layer_?([0-9]{1,4})(?![0-9])")


def _site(config: Fields, source: Source) -> Site | None:
    """Where it reads, by the trainer's submodule name or the folder's: outputs of the model's own modules."""
    if (config.mapping("buffer").text("io") or "out") != "out":
        return None
    hook = source.config(source.path.with_suffix("").name + "_cfg.json").text("act_name")
    if hook is not None:
        return site_of(hook)
    name = config.mapping("trainer").text("submodule_name") or source.hint
    match = next(reversed(list(_SITES.finditer(name))), None)
    layer = re.search(r"layer(\d+)\.sae\.pt$|[-_]l(\d+)(?:\.pth?)?$", source.path.name)
    if match is None and layer is not None:
        return Site("resid_post", int(layer[1] or layer[2]))
    if match is None:
        return None
    return Site({"attn_out": "attn_out", "mlp_out": "mlp_out"}.get(match[1], "resid_post"), int(match[2]))


def save(sae: SAE, folder: Path) -> Path:
    """Writes a folder that dictionary_learning reads: AutoEncoderNew, AutoEncoderTopK or JumpReluAutoEncoder.

    Raises UnweaveError for transcoders and for inputs normalised token by token.
    """
    sae.require_decoder()
    if sae.is_transcoder:
        raise UnweaveError("dictionary_learning has no transcoders", where=repr(sae), remedy="convert it to saelens")
    if sae.input_norm is not None:
        what = f"dictionary_learning has no inputs normalised token by token ({sae.input_norm})"
        raise UnweaveError(what, where=repr(sae), remedy="convert it to saelens")
    linear = {"encoder.weight": sae.W_enc.T, "decoder.weight": sae.W_dec.T}
    if isinstance(sae.activation, TopK):
        kind, trainer = "AutoEncoderTopK", "TopKTrainer"
        tensors = with_input_bias(linear | {"encoder.bias": sae.b_enc, "b_dec": sae.b_dec}, "encoder.bias", sae) | {
            "k": torch.tensor(sae.activation.k, dtype=torch.int),
            "threshold": torch.tensor(-1.0),  # its word for "not estimated"
        }
    elif isinstance(sae.activation, JumpReLU):
        kind, trainer = "JumpReluAutoEncoder", "JumpReluTrainer"
        tensors = {name: getattr(sae, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        tensors["threshold"] = sae.activation.threshold
    else:
        kind, trainer = "AutoEncoderNew", "StandardTrainer"
        tensors = linear | {"encoder.bias": sae.b_enc, "decoder.bias": sae.b_dec}
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    with atomic_write(folder / WEIGHTS) as temporary:
        torch.save(tensors, temporary)
    config = _config(sae, kind, trainer)
    write_json(folder / CONFIG, config | {"unweave": own_block(sae, config, tensors)})
    return folder


def _config(sae: SAE, kind: str, trainer: str) -> dict[str, Any]:
    site = sae.read
    place = None if site is None else f"{site.point}_layer_{site.layer}"
    about: dict[str, Any] = {
        "dict_class": kind,
        "trainer_class": trainer,
        "activation_dim": sae.d_in,
        "dict_size": sae.d_sae,
        "layer": None if site is None else site.layer,
        "lm_name": sae.provenance.get("model", {}).get("name", ""),
        "submodule_name": place if site and site.point in ("resid_post", "mlp_out", "attn_out") else None,
    }
    if isinstance(sae.activation, TopK):
        about["k"] = sae.activation.k
    context = sae.provenance.get("data", {}).get("context")
    return {"trainer": about, "buffer": {"ctx_len": context, "io": "out"}}
