"""Which tokens a latent's direction makes the model say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unweave.core.progress import task
from unweave.core.site import Site
from unweave.latents.contexts import Array
from unweave.lm.unembed import top_tokens

if TYPE_CHECKING:
    from unweave.lm.model import LM
    from unweave.sae.module import SAE

_LENS_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Written:
    """Tokens whose logit latents change most: ids int64 [F, k] and scores float32 [F, k], strongest first."""

    promoted: Array
    promoted_scores: Array
    suppressed: Array
    suppressed_scores: Array


def logit_effects(lm: LM, sae: SAE, k: int = 8, latents: Tensor | None = None) -> Written:
    """The k tokens that each latent's direction promotes and suppresses most, through final norm and unembedding.

    Tokens are the ids that the tokenizer has. Of all latents, or of those numbered in ``latents`` [n]. Only some
    directions at a time, so that at most 16 million logits are held.
    """
    rows = sae.W_dec if latents is None else sae.W_dec[latents.to(sae.W_dec.device)]
    step = max(1, _LENS_ELEMENTS // lm.vocab_size)
    found: list[list[Tensor]] = [[], [], [], []]
    with task("logit lens", total=len(rows), unit="latents") as progress:
        for directions in rows.split(step):
            logits = lm.logit_lens(directions).float()
            (up, raised), (down, lowered) = (top_tokens(lm, logits, k, largest=way) for way in (True, False))
            for column, values in zip(found, (raised, up, lowered, down), strict=True):
                column.append(values.cpu())
            progress.advance(len(directions))
    return Written(*(torch.cat(column).numpy() for column in found))


def writes_into_stream(lm: LM, site: Site | None, width: int) -> bool:
    """Whether a site's directions are directions of the residual stream, which the final norm and unembedding read."""
    if site is None or width != lm.d_model:
        return False
    if site.point in ("attn_out", "mlp_out"):  # unless a post-norm comes between
        added = Site(site.point.replace("_out", "_add"), site.layer)
        return lm.layout.tap(site).module is lm.layout.tap(added).module
    return site.point == "embed" or site.point.startswith("resid") or site.point.endswith("_add")
