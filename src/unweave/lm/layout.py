"""Where each model family keeps each site.

1. ``FAMILIES`` says, for each supported ``model_type``, which module's input or output is which point.
2. ``Layout`` resolves a Site to that module in a given model, or refuses with what exists.
3. Loading runs a few tokens and confirms ``resid_pre + attn_add + mlp_add == resid_post`` in every block
   (``admission.py``), so that a model whose code differs from the table is refused instead of read wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from unweave.core.errors import UnweaveError
from unweave.core.site import LAYER_POINTS, Site


@dataclass(frozen=True)
class Family:
    """Module paths of one family: the first three from the model, the others from a block."""

    blocks: str
    final_norm: str
    attn: str
    heads: str
    """the output projection of attention, whose input is the concatenated heads"""
    mlp: str
    act: str
    """the down projection of the MLP, whose input is its hidden activation; empty for mixtures, where every expert has
    its own"""
    attn_add: str
    """the module whose output attention adds to the residual stream: a post-norm where there is one"""
    mlp_add: str
    mid: str
    """the module whose input is the residual stream between attention and MLP"""
    positions: str = ""
    """from the model: the table of position embeddings, whose end no row may pass; rotary families have none"""


_LLAMA = Family(
    blocks="model.layers", final_norm="model.norm", attn="self_attn", heads="self_attn.o_proj", mlp="mlp",
    act="mlp.down_proj", attn_add="self_attn", mlp_add="mlp", mid="post_attention_layernorm",
)  # fmt: skip
_GEMMA2 = replace(
    _LLAMA, attn_add="post_attention_layernorm", mlp_add="post_feedforward_layernorm", mid="pre_feedforward_layernorm"
)

_MIXTURE = replace(_LLAMA, act="")

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "gemma"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA2),
    **dict.fromkeys(("mixtral", "olmoe", "qwen2_moe", "qwen3_moe"), _MIXTURE),
    "olmo2": replace(_GEMMA2, mid="mlp"),
    "gpt2": Family(
        blocks="transformer.h", final_norm="transformer.ln_f", attn="attn", heads="attn.c_proj", mlp="mlp",
        act="mlp.c_proj", attn_add="attn", mlp_add="mlp", mid="ln_2", positions="transformer.wpe",
    ),
    "gpt_neox": Family(
        blocks="gpt_neox.layers", final_norm="gpt_neox.final_layer_norm", attn="attention", heads="attention.dense",
        mlp="mlp", act="mlp.dense_4h_to_h", attn_add="attention", mlp_add="mlp", mid="post_attention_layernorm",
    ),
}  # fmt: skip
"""By ``config.model_type``."""


def family_of(model_type: str) -> Family:
    """The layout of a ``model_type``. Raises UnweaveError where none is known."""
    if model_type not in FAMILIES:
        remedy = f"known families: {', '.join(FAMILIES)}; add one to FAMILIES in lm/layout.py"
        raise UnweaveError(f"no layout is known for the model family {model_type!r}", remedy=remedy)
    return FAMILIES[model_type]


@dataclass(frozen=True)
class Tap:
    """The input or the output of one module."""

    module: nn.Module
    side: Literal["in", "out"]


class Layout:
    """Resolves sites in one model. Raises UnweaveError for a family that is not known."""

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        family = family_of(config.model_type)
        self.model, self.family = model, family
        self.blocks = list(model.get_submodule(family.blocks).children())
        self.parallel = bool(getattr(config, "use_parallel_residual", False))
        self.wrapped = [False] * len(self.blocks)
        """whether each block returns a tuple; loading finds out, since it varies with the version of transformers"""

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def n_positions(self) -> int | None:
        """How long a row may be; None where positions are computed and not looked up."""
        path = self.family.positions
        return self.model.get_submodule(path).weight.shape[0] if path else None  # type: ignore[union-attr, return-value]

    def points(self) -> list[str]:
        """The points that each block of this model has."""
        absent = {"resid_mid": self.parallel, "mlp_act": not self.family.act}
        return [point for point in LAYER_POINTS if not absent.get(point)]

    def sites(self) -> Iterator[Site]:
        """Every named site in execution order; module paths exist besides."""
        yield Site("embed")
        for layer in range(self.n_layers):
            for point in self.points():
                yield Site(point, layer)
        yield Site("final_norm")
        yield Site("logits")

    def tap(self, site: Site) -> Tap:
        """The module and side that hold a site. Raises UnweaveError when this model has no such site."""
        family = self.family
        if site.point == "path":
            return self._path(site)
        if site.point == "embed":
            return Tap(self.model.get_input_embeddings(), "out")  # type: ignore[operator]
        if site.point == "final_norm":
            return Tap(self.model.get_submodule(family.final_norm), "out")
        if site.point == "logits":
            return Tap(self.model.get_output_embeddings(), "out")  # type: ignore[operator]
        if site.layer is None or site.layer >= self.n_layers:
            raise UnweaveError(
                f"site {site} does not exist in this model", remedy=f"its layers are 0 to {self.n_layers - 1}"
            )
        if site.point not in self.points():
            raise UnweaveError(
                f"site {site} does not exist in this model: its "
                + ("MLPs are mixtures" if site.point == "mlp_act" else "blocks add attention and MLP in parallel"),
                remedy=f"use one of {', '.join(self.points())}",
            )
        block = self.blocks[site.layer]
        where: dict[str, tuple[str, Literal["in", "out"]]] = {
            "resid_pre": ("", "in"),
            "attn_in": (family.attn, "in"),
            "attn_heads": (family.heads, "in"),
            "attn_out": (family.attn, "out"),
            "attn_add": (family.attn_add, "out"),
            "resid_mid": (family.mid, "in"),
            "mlp_in": (family.mlp, "in"),
            "mlp_act": (family.act, "in"),
            "mlp_out": (family.mlp, "out"),
            "mlp_add": (family.mlp_add, "out"),
            "resid_post": ("", "out"),
        }
        path, side = where[site.point]
        return Tap(block.get_submodule(path) if path else block, side)

    def _path(self, site: Site) -> Tap:
        path, _, side = site.path.partition("@")
        try:
            return Tap(self.model.get_submodule(path), "in" if side else "out")
        except AttributeError:
            remedy = "see [name for name, _ in lm.model.named_modules()]"
            raise UnweaveError(f"site {site} does not exist: the model has no module {path!r}", remedy=remedy) from None
