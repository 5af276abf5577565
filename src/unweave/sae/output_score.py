"""The output score: whether the model says what a latent's direction promotes (Arad et al. 2025).

At the last token of a neutral prompt the latent is raised by 10 times the largest activation of any latent there; with
p the next-token distribution, S_out = (1 - r / |V|) p_max, p_max the largest probability among the 20 tokens of the
direction's logit lens and r that token's rank (0 is best). Tokens are the |V| ids that the tokenizer has; p is the
model's own distribution, over all rows of its unembedding. All latents are rows of a few batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.lm.model import LM, Tokens
from unweave.sae.module import SAE
from unweave.sae.steered import lens_tokens

NEUTRAL = "From my experience,"
"""the paper's prompt"""
_SHOWN = 10


@dataclass(frozen=True)
class OutputScore:
    """How well one latent brings out what its direction promotes."""

    latent: int
    score: float
    """S_out in [0, 1]"""
    probability: float
    """p_max"""
    rank: int
    """r"""
    tokens: tuple[str, ...]
    """its first ten lens tokens, as text"""


def output_scores(
    lm: LM, sae: SAE, latents: Sequence[int], *, prompt: str = NEUTRAL, amount: float = 10.0, max_tokens: int = 1024
) -> list[OutputScore]:
    """The output score of each latent, in the order given; see the module. The SAE's error is kept.

    Raises UnweaveError when no latent fires at the prompt's last token, since strengths are measured by that.
    """
    write = written_site(lm, sae)
    row = lm.tokenize(prompt)
    reads = [sae.read or write]
    with lm.taps(read=reads, stop=reads[0]) as seen:
        lm(row)
    strongest = float(sae.encode(seen[reads[0]][0, -1]).max())
    if not strongest > 0:
        raise UnweaveError(
            "no latent fires at the prompt's last token", where=repr(prompt), remedy="use another prompt"
        )
    lens = lens_tokens(lm, sae, latents)
    directions = amount * strongest * sae.subset(latents).directions
    last = torch.zeros(row.ids.shape[1], 1, dtype=directions.dtype, device=lm.device)
    last[-1] = 1
    scores: list[OutputScore] = []
    vocabulary = lm.known_ids.to(lm.device)
    for part, p in raised(lm, write, row, directions.unsqueeze(1), last, max_tokens):
        best = p.gather(1, lens[part]).max(1).values
        ranks = (p[:, vocabulary] > best.unsqueeze(1)).sum(1).tolist()
        for latent, theme, high, rank in zip(latents[part], lens[part], best.tolist(), ranks, strict=True):
            tokens = tuple(lm.token_strings(theme[:_SHOWN]))
            scores.append(OutputScore(int(latent), (1 - rank / len(vocabulary)) * high, high, rank, tokens))
    return scores


def written_site(lm: LM, sae: SAE) -> Site:
    """Where an SAE writes. UnweaveError where its file does not say, and for another model's SAE."""
    if sae.write is None:
        raise UnweaveError("this SAE's file named no site", remedy='name it: sae.at("resid_post.9")')
    sae.verify(lm)
    return sae.write


def raised(
    lm: LM, site: Site, row: Tokens, shifts: Tensor, where: Tensor, max_tokens: int
) -> Iterator[tuple[slice, Tensor]]:
    """Next-token probabilities [R, V] after one prompt of P tokens, with ``shifts`` [N, 1, D] added at a site, times
    ``where`` [..., P, 1]; so many rows at a time that they hold ``max_tokens``. Blocks below the site run once."""
    below = site if site.layer is None else Site("resid_pre", site.layer)
    with lm.taps(read=[below], stop=below) as seen:
        lm(row)
    step = max(1, max_tokens // row.ids.shape[1])
    for start in range(0, len(shifts), step):
        part = slice(start, min(start + step, len(shifts)))
        here = shifts[part] * where
        rows = Tokens(*(column.expand(len(here), -1) for column in (row.ids, row.mask, row.roles)))
        edit = {site: lambda x, _at, here=here: x + here.to(x.dtype)}
        with lm.taps(edit=edit, start=(below, seen[below].expand(len(here), -1, -1))):
            logits = lm(rows, keep_logits=1)
        assert logits is not None
        yield part, torch.softmax(logits[:, -1].float(), -1)
