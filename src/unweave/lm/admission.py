"""Checks before anything runs: the model is a whole causal language model, and the tokens fit it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.lm.layout import FAMILIES, family_of
from unweave.lm.taps import what_blocks_return

if TYPE_CHECKING:
    from unweave.lm.layout import Layout
    from unweave.lm.model import LM, Tokens

_RESIDUAL_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
_REMEDY = "load it with AutoModelForCausalLM.from_pretrained, or with LM.load"
_OTHER_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")


def check_model(model: nn.Module) -> None:
    """Raises UnweaveError for other than a causal language model, and for a missing head or missing weights."""
    name = type(model).__name__
    if not hasattr(getattr(model, "config", None), "model_type"):
        raise UnweaveError(f"{name} is not a transformers model: it has no config with a model_type", remedy=_REMEDY)
    _check_decoder(model.config, name)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    missing = [key for key, tensor in tensors if tensor.is_meta]
    if missing:
        what = f"{len(missing)} of the {len(tensors)} tensors of {name} are on the meta device, which holds no values"
        remedy = "load the weights into memory: without torch.device('meta'), and without offloading to disk"
        raise UnweaveError(what, where=missing[0], remedy=remedy)
    if _head(model) is None:
        raise UnweaveError(f"{name} has no language-model head: it gives no logits over tokens", remedy=_REMEDY)


def check_config(config: Any, name: str) -> None:
    """Raises UnweaveError where the weights beside a configuration are not those of a causal language model."""
    _check_decoder(config, name)
    text = config.get_text_config()
    family_of((text if text.model_type in FAMILIES else config).model_type)
    built = getattr(config, "architectures", None) or ()
    if built and all(architecture.endswith(_OTHER_HEADS) for architecture in built):
        raise UnweaveError(
            f"{name} holds a {built[0]}, which has no language-model head", remedy="give a causal language model"
        )


def _check_decoder(config: Any, name: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        remedy = "use a causal language model: only these have the sites that are read and edited"
        raise UnweaveError(f"{name} is an encoder with a decoder ({config.model_type})", remedy=remedy)


def _head(model: Any) -> Any:
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def confirm_layout(lm: LM) -> None:
    """Runs a few tokens and raises UnweaveError where a block's parts do not add up to what it does to the stream."""
    layers = range(lm.n_layers)
    points = ("resid_pre", "attn_add", "mlp_add", "resid_post")
    reads = [Site(p, layer) for p in points for layer in layers]
    with lm.taps(read=reads) as seen, what_blocks_return(lm) as lm.layout.wrapped:
        lm(lm.probe(8))
    tolerance = _RESIDUAL_TOLERANCE.get(lm.dtype, 2e-2)
    for layer in layers:
        before, attention, mlp, after = (seen[Site(p, layer)].double() for p in points)
        error = float((before + attention + mlp - after).norm() / after.norm())
        if not error <= tolerance:  # also refuses NaN
            what = f"resid_pre + attn_add + mlp_add differs from resid_post by {error:.1e} relative"
            remedy = "this model's code does not follow its family's layout, or its weights hold NaN"
            raise UnweaveError(what, where=f"{lm.name}, block {layer}, {lm.dtype}", remedy=remedy)


def check_tokens(model: Any, layout: Layout, tokens: Tokens, new: int = 0) -> None:
    """Raises UnweaveError for ids without an embedding, and for rows longer than the model's table of positions.

    ``new`` tokens are going to be generated; the last of them is never read.
    """
    n_ids = model.get_input_embeddings().weight.shape[0]
    lowest, highest = tokens.ids.aminmax()
    if int(lowest) < 0 or int(highest) >= n_ids:
        wrong = int(lowest) if int(lowest) < 0 else int(highest)
        remedy = "use the tokenizer that belongs to the model"
        raise UnweaveError(f"there is no token {wrong}: the model's ids are 0 to {n_ids - 1}", remedy=remedy)
    if layout.n_positions is None:
        return
    longest = int(tokens.mask.sum(1).max())
    if longest + max(0, new - 1) > layout.n_positions:
        more = f" and {new} new tokens" if new else ""
        what = f"a row of {longest} tokens{more} does not fit: the model has a table of {layout.n_positions} positions"
        raise UnweaveError(what, remedy="use shorter rows, or generate fewer tokens")


def known_ids(tokenizer: Any, n_ids: int) -> Tensor:
    """The ids below ``n_ids`` that a tokenizer has, int64 [n], ascending; all where there is no tokenizer."""
    every = range(n_ids)
    ids = every if tokenizer is None else set(tokenizer.get_vocab().values()).intersection(every)
    return torch.tensor(sorted(ids), dtype=torch.int64)
