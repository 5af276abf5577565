"""One latent at several strengths: what the model writes, and what that does to the writing.

1. Each prompt is answered unedited, then with the latent set to (``clamp``) or moved by (``add``) a multiple of its
   largest activation; greedy, so that the same call gives the same text.
2. Beside every text stand three numbers: how much of it is among the tokens that the latent's direction promotes (does
   it steer?), how many of its 3-grams are distinct, and its perplexity under the unedited model (does it still write?).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from unweave.core.errors import UnweaveError
from unweave.core.progress import task
from unweave.lm.chat import Role
from unweave.lm.model import LM, Tokens
from unweave.lm.unembed import top_tokens
from unweave.sae.edits import Edit, Where, finite
from unweave.sae.module import SAE

Mode = Literal["clamp", "add"]

_GRAM = 3
_THEME = 20


@dataclass(frozen=True)
class SteeredText:
    """One prompt's continuation at one strength."""

    prompt: str
    strength: float | None
    """multiples of the latent's largest activation; None: unedited"""
    value: float | None
    """the latent's value (clamp) or what was added to it (add)"""
    text: str
    n_tokens: int
    """new tokens before the end token"""
    on_theme: float | None
    """share of the new tokens that are among the 20 the latent's direction promotes most; None for an empty text, or
    where the SAE does not write to the residual stream"""
    distinct: float
    """distinct 3-grams of new tokens over all of them; 1 where nothing repeats, near 0 in a loop"""
    perplexity: float | None
    """of the new tokens after the prompt, under the unedited model; None for an empty text"""


def sweep(
    lm: LM,
    sae: SAE,
    latent: int,
    prompts: Sequence[str],
    strengths: Sequence[float] = (1.0, 2.0, 4.0),
    *,
    maximum: float,
    mode: Mode = "clamp",
    where: Where = "policy",
    max_new_tokens: int = 60,
    chat: bool | None = None,
) -> list[SteeredText]:
    """Every prompt unedited and at every strength, in that order, prompt by prompt.

    ``maximum`` is the latent's largest activation (its record has it); a strength of 1 means that much. ``chat`` puts
    prompts in the model's chat template; None does so where it has one. Raises UnweaveError for a latent that never
    fires, and for invalid strengths or modes.
    """
    if not prompts:
        raise UnweaveError("there are no prompts", remedy="give at least one")
    for index, prompt in enumerate(prompts):
        if not prompt.strip():
            raise UnweaveError(f"prompt {index} holds no words", where=repr(prompt), remedy="write it or leave it out")
    if not (finite(maximum) or 0.0) > 0:
        raise UnweaveError(
            f"latent {latent} has no largest activation to measure strengths by ({maximum})",
            remedy="choose a latent that fires, or collect records on more text",
        )
    if any(finite(strength) is None for strength in strengths):
        raise UnweaveError(f"strengths must be numbers, not {list(strengths)}", remedy="for example 1 2 4")
    edits = [_edit(sae, latent, strength * maximum, mode, where) for strength in strengths]
    theme = lens_tokens(lm, sae, [latent])[0] if sae.d_out == lm.d_model else None
    tokens = prompt_tokens(lm, prompts, chat)
    texts: list[list[SteeredText]] = [[] for _ in prompts]
    with task(f"steer latent {latent}", total=1 + len(strengths), unit="strengths") as shown:
        for strength, edit in zip([None, *strengths], [None, *edits], strict=True):
            ids = lm.generate_ids(tokens, edit, max_new_tokens=max_new_tokens)
            written = until_end(lm, ids)
            perplexities = perplexity(lm, tokens, ids, written)
            for row, prompt in enumerate(prompts):
                new = ids[row, : int(written[row])]
                on_theme = None if theme is None or len(new) == 0 else float(torch.isin(new, theme).float().mean())
                value = None if strength is None else strength * maximum
                texts[row].append(
                    SteeredText(
                        prompt, strength, value, lm.decode(new), len(new), on_theme, distinct(new), perplexities[row]
                    )
                )
            shown.advance()
    return [text for row in texts for text in row]


def _edit(sae: SAE, latent: int, value: float, mode: Mode, where: Where) -> Edit:
    if mode == "clamp":
        return sae.clamp({latent: value}, where=where)
    if mode == "add":
        return sae.add({latent: value}, where=where)
    raise UnweaveError(f"unknown way to steer {mode!r}", remedy="use clamp or add")


def prompt_tokens(lm: LM, prompts: Sequence[str], chat: bool | None) -> Tokens:
    """Prompts padded on the left; in the model's chat template if ``chat``, or None and it has one."""
    if chat if chat is not None else getattr(lm.tokenizer, "chat_template", None) is not None:
        talks = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return lm.chat(talks, side="left", add_generation_prompt=True)
    return lm.tokenize(prompts, side="left")


def until_end(lm: LM, ids: Tensor) -> Tensor:
    """How many of the new tokens [B, N] of each row come before an end token, int64 [B]."""
    ended = torch.isin(ids, torch.tensor(lm.end_ids, dtype=ids.dtype, device=ids.device)).int()
    return torch.where(ended.any(1), ended.argmax(1), ids.shape[1])


def distinct(ids: Tensor, n: int = _GRAM) -> float:
    """Distinct n-grams of token ids [N] over all n-grams; 1 for a text too short to have any."""
    if len(ids) < n:
        return 1.0
    grams = ids.unfold(0, n, 1)
    return len({tuple(gram) for gram in grams.tolist()}) / len(grams)


def perplexity(lm: LM, prompt: Tokens, ids: Tensor, written: Tensor) -> list[float | None]:
    """exp of the mean cross-entropy, in nats, of each row's first ``written`` [B] new tokens ``ids`` [B, N] after its
    left-padded prompt; None where there are none. Taps that are open are in force."""
    prompt = prompt.to(ids.device)
    counted = torch.arange(ids.shape[1], device=ids.device) < written.unsqueeze(1)
    roles = torch.where(counted, int(Role.ASSISTANT), int(Role.PAD)).to(torch.uint8)
    whole = Tokens(
        torch.cat([prompt.ids, ids], 1), torch.cat([prompt.mask, counted], 1), torch.cat([prompt.roles, roles], 1)
    )
    logits = lm(whole, keep_logits=ids.shape[1] + 1)
    if logits is None:
        raise UnweaveError("the forward pass was stopped before its logits", remedy="measure outside taps(stop=...)")
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids, reduction="none")
    totals = torch.where(counted, losses, 0.0).double().sum(1).tolist()
    return [math.exp(min(total / n, 700.0)) if n else None for total, n in zip(totals, written.tolist(), strict=True)]


def lens_tokens(lm: LM, sae: SAE, latents: Sequence[int], k: int = _THEME) -> Tensor:
    """The tokens whose logits the latents' directions raise most, int64 [n, k], strongest first."""
    if sae.d_out != lm.d_model:
        raise UnweaveError(
            f"directions of width {sae.d_out} do not lie in the residual stream ({lm.d_model})",
            where=str(sae.write),
            remedy="use an SAE whose site adds to the residual stream",
        )
    directions = sae.subset(latents).directions
    parts = [top_tokens(lm, lm.logit_lens(part), k)[1] for part in directions.split(256)]
    return torch.cat(parts)
