"""What SAELens's ``cfg.json`` of versions 3 to 6 says, in one form; refused where it cannot be honoured."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from unweave.core.errors import UnweaveError
from unweave.core.fields import Fields
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
    d_in: int | None
    d_sae: int | None
    d_out: int | None
    k: int | None
    rescale: bool
    """TopK ranks by z |d|, and a batch's threshold is one of z |d|"""
    input_bias: bool
    """b_dec is taken off the input"""
    input_scale: float | None
    """one number for all tokens"""
    input_norm: InputNorm | None
    finetuned: bool
    metadata: Fields


def modern(raw: Fields) -> Config:
    """``cfg.json`` of any version. Raises UnweaveError for what is not understood, naming the field."""
    where, metadata = raw.where, raw.mapping("metadata")
    version = metadata.text("sae_lens_version") or raw.text("sae_lens_version") or ""
    old = not re.match(r"([6-9]|\d\d)\.", version)
    config = _renamed(raw)
    if old:
        flat = {name: value for name, value in config.values.items() if name != "metadata"}
        metadata = Fields(flat | dict(metadata.values), where, "metadata")
    architecture = config.text("architecture") or ("standard" if old else "")
    arguments = config.mapping("activation_fn_kwargs")
    if set(arguments) - {"k"}:
        unknown = ", ".join(sorted(set(arguments) - {"k"}))
        raise UnweaveError(f"activation_fn_kwargs {unknown} are not understood", where=where)
    function = config.choice("activation_fn_str", ("relu", "topk"), "relu")
    if architecture == "standard" and function == "topk":  # trap 19, loaded as another kind: ReLU in place of TopK
        architecture = "topk"
    if architecture == "standard" and ("k" in config or "k" in arguments):
        raise raw.error(
            "the configuration says k, and an activation that has none",
            "restore architecture or activation_fn_str, or remove k",
        )
    if architecture not in TENSORS:
        known = f"known: {', '.join(TENSORS)}"
        raise raw.error(f"SAEs of architecture {architecture[:80]!r} cannot be loaded", known)
    config.choice("reshape_activations", ("none", "hook_z"), "none")  # trap 17; hook_z flattens heads, as our sites do
    scale, norm = _scaling(config)
    return Config(
        architecture=architecture,
        tensors=TENSORS[architecture],
        d_in=config.integer("d_in", least=1),
        d_sae=config.integer("d_sae", least=1),
        d_out=config.integer("d_out", least=1),
        k=_k(architecture, config, arguments),
        rescale=config.flag("rescale_acts_by_decoder_norm"),
        input_bias=_input_bias(architecture, config, old),
        input_scale=scale,
        input_norm=norm,
        finetuned=config.flag("finetuning_scaling_factor"),
        metadata=metadata,
    )


def _renamed(raw: Fields) -> Fields:
    """The fields under their newer names; one that stands under both must say the same."""
    renamed: dict[str, Any] = {}
    for name, value in raw.values.items():
        new = _OLD_NAMES.get(name, name)
        if new in renamed and renamed[new] != value:
            old = next(older for older, newer in _OLD_NAMES.items() if newer == new)
            raise raw.error(f"{new} and {old} are one field and differ", "remove one of them")
        renamed[new] = value
    return Fields(renamed, raw.where)


def _k(architecture: str, config: Fields, arguments: Fields) -> int | None:
    if not architecture.startswith("topk"):
        return None
    k, argument = config.integer("k", least=1), arguments.integer("k", least=1)
    if k is None and argument is None:
        says = "the activation 'topk'" if config.text("architecture") != architecture else "a TopK SAE's configuration"
        raise config.error(f"{says} must say k", 'add "k": a whole number')
    if k is not None and argument is not None and k != argument:
        raise config.error(f"k is {k} and also {argument}", "remove one of them")
    return argument if k is None else k


def _input_bias(architecture: str, config: Fields, old: bool) -> bool:
    """Whether b_dec is taken off the input: version 6 says it, older ones did it by default (trap 21)."""
    stated = config.boolean("apply_b_dec_to_input")
    if architecture.endswith("transcoder"):
        if stated:
            raise config.error("a transcoder cannot take b_dec off its input (apply_b_dec_to_input)", "")
        return False
    if stated is None and not (old and ("hook_name" in config or "activation_fn_str" in config)):
        what = "the configuration does not say whether b_dec is taken off the input (apply_b_dec_to_input)"
        raise config.error(what, "add it: true or false")
    return True if stated is None else stated


def _scaling(config: Fields) -> tuple[float | None, InputNorm | None]:
    if config.holds("normalize_activations", bool):
        scaling = "expected_average_only_in" if config.flag("normalize_activations") else "none"
    else:
        scaling = config.text("normalize_activations") or "none"
    if scaling == "none":
        return None, None
    if scaling in _INPUT_NORMS:
        return None, _INPUT_NORMS[scaling]
    if scaling == "expected_average_only_in":
        factor = config.number("norm_scaling_factor", above=0)
        if factor is not None:
            return factor, None
        raise config.error(
            f"this SAE wants its inputs scaled by one number ({scaling}), and the file does not hold it",
            'add it to cfg.json as "norm_scaling_factor" (SAELens lists it with the release), or fold it before saving '
            "(SAELens: fold_activation_norm_scaling_factor)",
        )
    what = f"this SAE wants its inputs scaled by {scaling[:80]!r}, which the file does not hold"
    raise config.error(what, "fold the scaling into the weights before saving")
