"""SAELens folders: ``cfg.json`` and ``sae_weights.safetensors``. What we save, and what SAELens 6 saves.

Saving writes the simplest inference form (architecture standard, jumprelu or topk). Loading is strict: a tensor that is
missing or unused, a shape that does not fit, or an option that is not understood is an error (trap 19), and everything
that can be folded is:

    input bias      relu((x - b_dec) W_enc + b_enc)         -> b_enc - b_dec W_enc
    gated           1[g > 0] relu(e^r g' ...)               -> JumpReLU with threshold max(0, b_mag - e^r b_gate)
    rescaled TopK   ranks f |d|, decodes f |d| / |d|        -> W_enc |d|, b_enc |d|, W_dec / |d|; zero rows left alone
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.run import atomic_write, read_json, write_json
from unweave.core.site import Site
from unweave.data.policy import TokenPolicy
from unweave.sae.activations import Activation, JumpReLU, ReLU, TopK
from unweave.sae.module import SAE

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_FORMAT_VERSION = "6.0.0"
_ARCHITECTURE = {"relu": "standard", "jumprelu": "jumprelu", "topk": "topk"}
_TENSORS = {
    "standard": {"W_enc", "b_enc", "W_dec", "b_dec"},
    "jumprelu": {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"},
    "topk": {"W_enc", "b_enc", "W_dec", "b_dec"},
    "gated": {"W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"},
}


def save(sae: SAE, folder: Path) -> Path:
    """Writes ``folder``; the configuration last, so that a folder with one is whole. Returns the folder."""
    from safetensors.torch import save_file

    if sae.W_skip is not None or sae.read != sae.write:
        raise UnweaveError(
            "a transcoder cannot be saved in this format", remedy="save SAEs that read and write one site"
        )
    tensors = {name: getattr(sae, name).contiguous().cpu() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    config: dict[str, Any] = {
        "architecture": _ARCHITECTURE[sae.kind],
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if isinstance(sae.activation, TopK):
        config |= {"k": sae.activation.k, "rescale_acts_by_decoder_norm": False}
    if isinstance(sae.activation, JumpReLU):
        tensors["threshold"] = sae.activation.threshold.contiguous().cpu()
    config["metadata"] = _metadata(sae)
    with atomic_write(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary)
    write_json(folder / CONFIG, config)
    return folder


def _metadata(sae: SAE) -> dict[str, Any]:
    model = sae.provenance.get("model", {})
    data = sae.provenance.get("data", {})
    own = {
        "read": str(sae.read) if sae.read else None,
        "policy": sae.policy.to_dict(),
        "provenance": sae.provenance,
    }
    return {
        "sae_lens_version": _FORMAT_VERSION,  # without it SAELens takes the file for an older one and drops the rest
        "model_name": model.get("name", ""),
        "hook_name": _hook_name(sae.read),
        "hook_head_index": None,
        "prepend_bos": data.get("begins_with_bos", False),
        "context_size": data.get("context"),
        "unweave": own,
    }


def _hook_name(site: Site | None) -> str:
    if site is None:
        return ""
    try:
        return site.to_transformer_lens()
    except UnweaveError:  # a site that TransformerLens cannot name keeps its own name
        return str(site)


def load(folder: Path) -> SAE:
    """Reads ``folder``. Raises UnweaveError for whatever is missing, unused, mis-shaped, damaged or not understood."""
    if not folder.is_dir():
        raise UnweaveError("no such SAE folder", where=str(folder), remedy=f"give a folder that holds {CONFIG}")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise UnweaveError("the configuration does not hold named fields", where=str(folder / CONFIG))
    architecture = config.get("architecture", "standard")
    if architecture not in _TENSORS:
        raise UnweaveError(
            f"SAEs of architecture {architecture!r} cannot be loaded",
            where=str(folder),
            remedy=f"known: {', '.join(_TENSORS)}",
        )
    _refuse_options(config, folder)
    tensors = _read_tensors(folder / WEIGHTS, _TENSORS[architecture])
    _check_sizes(config, tensors, folder)
    activation = _fold(architecture, config, tensors)
    metadata = config.get("metadata") or {}
    own = metadata.get("unweave") or {}
    return SAE(
        tensors["W_enc"],
        tensors["b_enc"],
        tensors["W_dec"],
        tensors["b_dec"],
        activation,
        read=_site(own.get("read"), metadata.get("hook_name")),
        policy=TokenPolicy.from_dict(own.get("policy", {})),
        provenance=own.get("provenance", {}),
    )


def _refuse_options(config: dict[str, Any], folder: Path) -> None:
    scaling = config.get("normalize_activations", "none")
    if scaling not in (None, "none"):
        raise UnweaveError(
            f"this SAE wants its inputs scaled ({scaling!r}), and the file does not hold the factor",
            where=str(folder),
            remedy="fold the scaling into the weights before saving (SAELens: fold_activation_norm_scaling_factor)",
        )
    architecture = config.get("architecture", "standard")
    function = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    if architecture == "standard" and function not in (None, "relu"):  # trap 19: older TopK files say it here
        raise UnweaveError(
            f"a standard SAE with the activation {function!r} is not understood", where=str(folder),
            remedy="save it again with a SAELens of version 6, which names its architecture",
        )  # fmt: skip
    if config.get("reshape_activations", "none") not in (None, "none", "hook_z"):  # trap 17
        raise UnweaveError(
            f"activations reshaped by {config['reshape_activations']!r} are not understood", where=str(folder)
        )
    if architecture == "topk" and not isinstance(config.get("k"), int):
        raise UnweaveError("a TopK SAE's configuration must say k", where=str(folder / CONFIG))
    if "apply_b_dec_to_input" not in config:
        raise UnweaveError(
            "the configuration does not say whether b_dec is taken off the input (apply_b_dec_to_input)",
            where=str(folder / CONFIG), remedy="add it: true or false",
        )  # fmt: skip


def _read_tensors(path: Path, wanted: set[str]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UnweaveError("the SAE's weights are missing", where=str(path), remedy="restore the file")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UnweaveError(
            f"the weights are damaged: {error}", where=str(path), remedy="restore the file or train the SAE again"
        ) from error
    missing, unused = wanted - set(tensors), set(tensors) - wanted
    if missing or unused:
        problem = "; ".join(
            f"{word} {', '.join(sorted(names))}" for word, names in (("missing", missing), ("unused", unused)) if names
        )
        raise UnweaveError(
            f"the tensors do not fit the architecture: {problem}",
            where=str(path),
            remedy="check cfg.json's architecture",
        )
    return tensors


def _check_sizes(config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> None:
    d_in, d_sae = config.get("d_in"), config.get("d_sae")
    expected = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    for name, tensor in tensors.items():
        shape = expected.get(name, (d_sae,))
        if tuple(tensor.shape) != shape:
            raise UnweaveError(
                f"{name} has shape {list(tensor.shape)}, not {list(shape)}", where=str(folder), remedy="check cfg.json"
            )


def _fold(architecture: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> Activation:
    """Changes ``tensors`` to the plain parametrisation and returns its activation."""
    activation: Activation
    if architecture == "gated":
        gain = tensors.pop("r_mag").exp()
        gate, magnitude = tensors.pop("b_gate"), tensors.pop("b_mag")
        tensors["W_enc"] = tensors["W_enc"] * gain
        tensors["b_enc"] = magnitude
        activation = JumpReLU((magnitude - gain * gate).clamp(min=0))
    elif architecture == "jumprelu":
        activation = JumpReLU(tensors.pop("threshold"))
    elif architecture == "topk":
        activation = TopK(int(config["k"]))
        if config.get("rescale_acts_by_decoder_norm", False):
            norms = tensors["W_dec"].norm(dim=1)
            norms = torch.where(norms > 0, norms, torch.ones_like(norms))
            tensors["W_enc"], tensors["b_enc"] = tensors["W_enc"] * norms, tensors["b_enc"] * norms
            tensors["W_dec"] = tensors["W_dec"] / norms.unsqueeze(1)
    else:
        activation = ReLU()
    if config.get("apply_b_dec_to_input", False):
        shift = tensors["b_dec"] @ tensors["W_enc"]
        tensors["b_enc"] = tensors["b_enc"] - shift
    return activation


def _site(own: str | None, hook_name: str | None) -> Site | None:
    """The site; None where the hook is none of ours, so that using the SAE in a model asks for one."""
    if own:
        return Site.parse(own)
    if not hook_name:
        return None
    for read in (Site.from_transformer_lens, Site.parse):
        try:
            return read(hook_name)
        except UnweaveError:
            continue
    return None
