"""What SAELens's ``cfg.json`` of versions 3 to 6 says, in one form; refused where it cannot be honoured."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from unweave.core.errors import UnweaveError
from unweave.sae.input_norm import InputNorm

_WEIGHTS = {"W_enc", "b_enc", "W_dec", "b_dec"}
TENSORS: dict[str, set[str]] = {
    "standard": _WEIGHTS,
    "jumprelu": _WEIGHTS | {"threshold"},
    "topk": _WEIGHTS,
    "gated": {"W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"},
    "batchtopk": _WEIGHTS | {"topk_threshold"},
    "matryoshka_batchtopk": _WEIGHTS | {"topk_threshold"},
    "transcoder": _WEIGHTS,
    "skip_transcoder": _WEIGHTS | {"W_skip"},
    "jumprelu_transcoder": _WEIGHTS | {"threshold"},
    "jumprelu_skip_transcoder": _WEIGHTS | {"threshold", "W_skip"},
    "topk_transcoder": _WEIGHTS,  # ours: SAELens has none
    "topk_skip_transcoder": _WEIGHTS | {"W_skip"},
}
"""The tensors of each architecture."""

_OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn": "activation_fn_str",
    "activation_fn_kwargs": "activation_fn_kwargs",
}
_INPUT_NORMS: dict[str, InputNorm] = {"layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}


@dataclass(frozen=True)
class Config:
    """One SAE's configuration, whatever version wrote it."""

    architecture: str
    tensors: set[str]
    d_in: Any
    d_sae: Any
    d_out: Any
    k: int | None
    rescale: bool
    """TopK ranks by z |d|, and a batch's threshold is one of z |d|"""
    input_bias: bool
    """b_dec is taken off the input"""
    input_scale: float | None
    """one number for all tokens"""
    input_norm: InputNorm | None
    finetuned: bool
    metadata: dict[str, Any]


def modern(raw: dict[str, Any], where: str) -> Config:
    """``cfg.json`` of any version. Raises UnweaveError for what is not understood, naming the field."""
    metadata = dict(raw.get("metadata") or {})
    version = str(metadata.get("sae_lens_version") or raw.get("sae_lens_version") or "")
    old = not re.match(r"([6-9]|\d\d)\.", version)
    config = {_OLD_NAMES.get(name, name): value for name, value in raw.items()}
    if old:
        metadata = {k: v for k, v in config.items() if k != "metadata"} | metadata
    architecture = config.get("architecture") or "standard"
    function = config.get("activation_fn_str") or "relu"
    arguments = dict(config.get("activation_fn_kwargs") or {})
    if architecture == "standard" and function == "topk":  # trap 19
        architecture = "topk"
        config.setdefault("k", arguments.get("k"))
    elif function not in ("relu", "topk"):
        raise UnweaveError(f"an SAE with the activation {function!r} is not understood", where=where)
    if architecture not in TENSORS:
        raise UnweaveError(
            f"SAEs of architecture {architecture!r} cannot be loaded",
            where=where,
            remedy=f"known: {', '.join(TENSORS)}",
        )
    if set(arguments) - {"k"}:
        raise UnweaveError(
            f"activation_fn_kwargs {', '.join(sorted(set(arguments) - {'k'}))} are not understood", where=where
        )
    reshaped = config.get("reshape_activations") or "none"
    if reshaped not in ("none", "hook_z"):  # trap 17; hook_z only flattens heads, as our sites have them
        raise UnweaveError(f"activations reshaped by {reshaped!r} are not understood", where=where)
    scale, norm = _scaling(config, where)
    return Config(
        architecture=architecture,
        tensors=TENSORS[architecture],
        d_in=config.get("d_in"),
        d_sae=config.get("d_sae"),
        d_out=config.get("d_out"),
        k=_k(architecture, config, where),
        rescale=bool(config.get("rescale_acts_by_decoder_norm", False)),
        input_bias=_input_bias(architecture, config, old, where),
        input_scale=scale,
        input_norm=norm,
        finetuned=bool(config.get("finetuning_scaling_factor", False)),
        metadata=metadata,
    )


def _k(architecture: str, config: dict[str, Any], where: str) -> int | None:
    if not architecture.startswith("topk"):
        return None
    k = config.get("k")
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        says = "the activation 'topk'" if config.get("architecture") != architecture else "a TopK SAE's configuration"
        raise UnweaveError(f"{says} must say k", where=where, remedy='add "k": a whole number')
    return k


def _input_bias(architecture: str, config: dict[str, Any], old: bool, where: str) -> bool:
    """Whether b_dec is taken off the input: version 6 says it, older ones did it unless told otherwise (trap 21)."""
    said = config.get("apply_b_dec_to_input")
    if architecture.endswith("transcoder"):
        if said:
            raise UnweaveError("a transcoder cannot take b_dec off its input (apply_b_dec_to_input)", where=where)
        return False
    if said is None and not (old and ("hook_name" in config or "activation_fn_str" in config)):
        raise UnweaveError(
            "the configuration does not say whether b_dec is taken off the input (apply_b_dec_to_input)",
            where=where,
            remedy="add it: true or false",
        )
    return True if said is None else bool(said)


def _scaling(config: dict[str, Any], where: str) -> tuple[float | None, InputNorm | None]:
    said = config.get("normalize_activations")
    if said is True:
        said = "expected_average_only_in"
    if said in (None, False, "none"):
        return None, None
    if said in _INPUT_NORMS:
        return None, _INPUT_NORMS[said]
    if said == "expected_average_only_in":
        factor = config.get("norm_scaling_factor")
        if isinstance(factor, (int, float)) and factor > 0:
            return float(factor), None
        raise UnweaveError(
            f"this SAE wants its inputs scaled by one number ({said}), and the file does not hold it",
            where=where,
            remedy='add it to cfg.json as "norm_scaling_factor" (SAELens lists it with the release), or fold it before '
            "saving (SAELens: fold_activation_norm_scaling_factor)",
        )
    raise UnweaveError(
        f"this SAE wants its inputs scaled by {said!r}, which the file does not hold",
        where=where,
        remedy="fold the scaling into the weights before saving",
    )
