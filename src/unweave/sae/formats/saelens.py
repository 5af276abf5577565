"""SAELens folders: ``cfg.json`` and ``sae_weights.safetensors``. What we save, and what SAELens 3 to 6 saves.

Saving writes the simplest inference form. Loading is strict: a tensor that is missing or unused, a shape that does not
fit, or an option that is not understood is an error (trap 19), and everything that can be folded is (``parts.py``).
Input bias, input scale, Gated, BatchTopK, vectors of finetuning scales and rescaled TopK fold; inputs normalised token
by token stay a field.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unweave.core.errors import UnweaveError, UnweaveWarning
from unweave.core.site import Site
from unweave.core.writing import atomic_write, write_json
from unweave.sae.activations import JumpReLU, TopK
from unweave.sae.formats.about import build_foreign, build_own, check_written, own_block
from unweave.sae.formats.parts import Parts, agree, assemble
from unweave.sae.formats.saelens_config import Config, modern
from unweave.sae.formats.source import Source
from unweave.sae.formats.tensors import Tensors, read_safetensors
from unweave.sae.module import SAE

if TYPE_CHECKING:
    from torch import Tensor

NAME = "saelens"
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_FORMAT_VERSION = "6.0.0"
_NAMES = {name: (name,) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_STATED = {"W_enc": "as is", "W_dec": "as is"}
_FINETUNING = ("finetuning_scaling_factor", "scaling_factor")


def recognise(source: Source) -> bool:
    """A folder with ``cfg.json`` (and no sparsify weights), or its weights file."""
    if source.path.is_file() and source.path.name != WEIGHTS:
        return False
    folder = source.folder
    return (folder / CONFIG).is_file() and not (folder / "sae.safetensors").is_file()


# -- writing -----------------------------------------------------------------------------------------------------------


def save(sae: SAE, folder: Path) -> Path:
    """Writes a folder that SAELens reads. Raises UnweaveError for what it has no architecture for."""
    if sae.kind == "topk" and sae.is_transcoder:
        remedy = 'save it with format="unweave": the same files, which only Unweave reads; or as sparsify'
        raise UnweaveError("SAELens has no TopK transcoders", where=repr(sae), remedy=remedy)
    return save_own(sae, folder)


def save_own(sae: SAE, folder: Path) -> Path:
    """Writes ``folder``; the configuration last, so that a folder with one is whole. Returns the folder.

    The same as ``save``, and TopK transcoders as architecture topk_transcoder or topk_skip_transcoder.
    """
    return write(sae, folder / WEIGHTS, *inference_form(sae))


def write(sae: SAE, path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    """Writes tensors to ``path`` and the configuration with our own block beside it, last. Returns the folder."""
    from safetensors.torch import save_file

    config["metadata"] = _metadata(sae) | {"unweave": own_block(sae, config, tensors)}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary)
    write_json(path.with_name(CONFIG), config)
    return path.parent


def inference_form(sae: SAE) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the configuration of an SAE, without metadata."""
    sae.require_decoder()
    tensors = {name: getattr(sae, name).contiguous().cpu() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    config: dict[str, Any] = {
        "architecture": _architecture(sae),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": _SCALINGS[sae.input_norm],
        "reshape_activations": "none",
    }
    if sae.is_transcoder:
        config["d_out"] = sae.d_out
    if isinstance(sae.activation, TopK):
        config |= {"k": sae.activation.k, "rescale_acts_by_decoder_norm": False}
    if isinstance(sae.activation, JumpReLU):
        tensors["threshold"] = sae.activation.threshold.contiguous().cpu()
    if sae.W_skip is not None:  # SAELens adds x W_skip^T
        tensors["W_skip"] = sae.W_skip.T.contiguous().cpu()
    return tensors, config


_SCALINGS = {None: "none", "layer_norm": "layer_norm", "constant_norm": "constant_norm_rescale"}


def _architecture(sae: SAE) -> str:
    if not sae.is_transcoder:
        return {"relu": "standard", "jumprelu": "jumprelu", "topk": "topk"}[sae.kind]
    kind = {"relu": "", "jumprelu": "jumprelu_", "topk": "topk_"}[sae.kind]
    return f"{kind}{'skip_' if sae.W_skip is not None else ''}transcoder"


def _metadata(sae: SAE) -> dict[str, Any]:
    model = sae.provenance.get("model", {})
    data = sae.provenance.get("data", {})
    source = sae.provenance.get("source", {})
    metadata = {
        "sae_lens_version": _FORMAT_VERSION,  # without it SAELens takes the file for an older one and drops the rest
        "model_name": model.get("name", ""),
        "hook_name": _hook_name(sae.read) or source.get("hook_name", ""),
        "hook_head_index": None,
        "prepend_bos": data.get("begins_with_bos", False),
        "context_size": data.get("context"),
    }
    if sae.is_transcoder:
        metadata["hook_name_out"] = _hook_name(sae.write) or source.get("hook_name_out", "")
    return metadata


def _hook_name(site: Site | None) -> str:
    if site is None:
        return ""
    try:
        return site.to_transformer_lens()
    except UnweaveError:  # a site that TransformerLens cannot name keeps its own name
        return str(site)


# -- reading -----------------------------------------------------------------------------------------------------------


def load(source: Source) -> SAE:
    """Reads a folder. Raises UnweaveError for whatever is missing, unused, mis-shaped, damaged or not understood."""
    folder = source.folder
    raw = source.config(CONFIG)
    config = modern(raw)
    own = config.metadata.mapping("unweave")
    tensors = read_safetensors(folder / WEIGHTS)
    check_written(own, raw, tensors)
    parts = parts_of(config, tensors)
    tensors.finish()
    if own:
        return build_own(parts, own)
    _warn_of_processed_models(config, str(folder))
    metadata = config.metadata
    about = {"hook_head_index": metadata.integer("hook_head_index"), "prepend_bos": metadata.boolean("prepend_bos")}
    about["context"] = metadata.integer("context_size")
    sites = None if about["hook_head_index"] is None else (None, None)  # one head alone is no site of ours
    hook, hook_out, model = (metadata.text(name) or None for name in ("hook_name", "hook_name_out", "model_name"))
    return build_foreign(parts, source, NAME, hook=hook, hook_out=hook_out, sites=sites, model=model, about=about)


def parts_of(config: Config, tensors: Tensors) -> Parts:
    """What the tensors are by the configuration, folded. UnweaveError for what is missing or does not fit."""
    where = tensors.where
    if "log_threshold" in tensors and "threshold" in config.tensors:  # as older files have it
        tensors.values["threshold"] = tensors.take("log_threshold").exp()
    finetuned = {name for name in _FINETUNING if name in tensors}
    gated = config.architecture == "gated"
    tensors.require(config.tensors | finetuned, f"check the architecture in {CONFIG}")
    names = _NAMES | ({"b_enc": ("b_mag",)} if gated else {})
    parts = assemble(tensors, names, _STATED)
    agree("d_in", config.d_in, parts.d_in, where)
    agree("d_sae", config.d_sae, parts.d_sae, where)
    agree("d_out", config.d_in if config.d_out is None else config.d_out, len(parts.b_dec), where)
    if gated:
        gate, gain = (tensors.vector(name, length=parts.d_sae) for name in ("b_gate", "r_mag"))
        parts.fold_gate(gate, parts.b_enc, gain)
    elif "threshold" in config.tensors:
        parts.threshold = tensors.vector("threshold", length=parts.d_sae)
    elif "topk_threshold" in config.tensors:
        _batch_threshold(config, tensors, parts)
    elif config.k is not None:
        parts.k = config.k
        if config.rescale:
            parts.fold_rank_by_norm()
    parts.take_skip(tensors)
    if finetuned:
        _fold_finetuning(config, tensors, parts)
    if config.input_bias:
        parts.fold_input_bias()
    if config.input_scale is not None:
        parts.fold_input_scale(config.input_scale)
    parts.input_norm = config.input_norm
    return parts


def _batch_threshold(config: Config, tensors: Tensors, parts: Parts) -> None:
    """A BatchTopK checkpoint of training: its running threshold makes it a JumpReLU, as SAELens itself saves it."""
    threshold = tensors.number("topk_threshold")
    if threshold is None or not threshold > 0:
        raise tensors.error(
            "this BatchTopK checkpoint has no threshold yet",
            "save the inference model (SAELens: save_inference_model) after some training",
        )
    if config.rescale:
        parts.fold_rank_by_norm()
    parts.one_threshold(threshold)


def _fold_finetuning(config: Config, tensors: Tensors, parts: Parts) -> None:
    """Older files may hold factors that finetuning gave the latents."""
    scaling = tensors.vector(*_FINETUNING, length=parts.d_sae)
    if bool((scaling == 1).all()):
        return
    if not config.finetuned:
        raise tensors.error(
            "the file holds scaling factors for its latents, but its configuration says they are not in use",
            f"set finetuning_scaling_factor in {CONFIG} to true if decoding multiplies by them",
        )
    parts.fold_decoder_scale(scaling)


_PROCESSING = (
    "center_writing_weights", "fold_ln", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices",
)  # fmt: skip


def _warn_of_processed_models(config: Config, where: str) -> None:
    kwargs = config.metadata.mapping("model_from_pretrained_kwargs")
    changes = [name for name in _PROCESSING if kwargs.boolean(name)]
    if changes:  # trap 12: weights that a tool has changed
        warnings.warn(
            f"{where}: this SAE was trained on a model whose weights TransformerLens had changed "
            f"({', '.join(changes)}); the model as published gives other activations: measure before you trust it",
            UnweaveWarning,
            stacklevel=2,
        )
