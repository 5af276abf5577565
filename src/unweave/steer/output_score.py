"""Which latent to steer with: one whose direction names a theme, and that brings the theme out when it is turned up.

1. The logit lens of a latent's direction gives its 20 tokens. A theme is clear where they are words, not variants of
   one word, and alike: their embeddings point in similar directions.
2. The output score (Arad et al. 2025) asks whether the model then says them. At the last token of a neutral prompt the
   latent is raised by 10 times the largest activation of any latent there; with p the next-token distribution,
   S_out = (1 - r / |V|) p_max, p_max the largest probability among the 20 tokens and r that token's rank (0 is best).
   All candidates are rows of a few batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from unweave.core.errors import UnweaveError
from unweave.lm.model import LM, Tokens
from unweave.sae.module import SAE
from unweave.sae.records import Records
from unweave.steer.sweep import lens_tokens

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
    lm: LM,
    sae: SAE,
    latents: Sequence[int],
    *,
    prompt: str = NEUTRAL,
    amount: float = 10.0,
    max_tokens: int = 1024,
) -> list[OutputScore]:
    """The output score of each latent, in the order given; see the module. The SAE's error is kept.

    Raises UnweaveError when no latent fires at the prompt's last token, since strengths are measured by that.
    """
    if sae.write is None:
        raise UnweaveError("this SAE's file named no site", remedy='name it: sae.at("resid_post.9")')
    sae.verify(lm)
    row = lm.tokenize(prompt)
    reads = [sae.read or sae.write]
    with lm.taps(read=reads, stop=reads[0]) as seen:
        lm(row)
    strongest = float(sae.encode(seen[reads[0]][0, -1]).max())
    if not strongest > 0:
        raise UnweaveError(
            "no latent fires at the prompt's last token", where=repr(prompt), remedy="use another prompt"
        )
    themes = lens_tokens(lm, sae, latents)
    shift = amount * strongest * sae.subset(latents).directions
    step = max(1, max_tokens // row.ids.shape[1])
    found = []
    for start in range(0, len(themes), step):
        part = slice(start, start + step)
        n = len(themes[part])

        def raised(x: Tensor, _at: object, part: slice = part) -> Tensor:
            return torch.cat([x[:, :-1], (x[:, -1] + shift[part].to(x.dtype)).unsqueeze(1)], 1)

        rows = Tokens(row.ids.expand(n, -1), row.mask.expand(n, -1), row.roles.expand(n, -1))
        with lm.taps(edit={sae.write: raised}):
            logits = lm(rows, keep_logits=1)
        assert logits is not None
        p = torch.softmax(logits[:, -1].float(), -1)
        best = p.gather(1, themes[part]).max(1).values
        ranks = (p > best.unsqueeze(1)).sum(1)
        found += list(zip(best.tolist(), ranks.tolist(), strict=True))
    return [
        OutputScore(int(latent), (1 - rank / lm.vocab_size) * best, best, rank, tuple(lm.token_strings(theme[:_SHOWN])))
        for latent, (best, rank), theme in zip(latents, found, themes, strict=True)
    ]


def theme_clarity(lm: LM, sae: SAE, latents: Sequence[int], *, tokens: int = _SHOWN) -> Tensor:
    """How clear each latent's theme is, [n]: the mean cosine between the centred embeddings of its first lens tokens.

    0 where fewer than two thirds of these tokens are words of at least three letters that begin differently: a theme
    whose tokens are endings, symbols, or variants of one word is no theme.
    """
    embedding = lm.model.get_input_embeddings().weight.detach()
    centre = embedding.float().mean(0)
    clarity = torch.zeros(len(latents))
    lens = lens_tokens(lm, sae, latents, tokens)
    words = [_words(lm.token_strings(row)) for row in lens]
    good = torch.tensor([3 * n >= 2 * tokens for n in words], device=lens.device)
    if bool(good.any()):
        rows = F.normalize(embedding[lens[good]].float() - centre, dim=-1)
        cosines = rows @ rows.transpose(1, 2)
        mean = (cosines.sum((1, 2)) - tokens) / (tokens * (tokens - 1))
        clarity[good.cpu()] = mean.cpu()
    return clarity


def _words(texts: Sequence[str]) -> int:
    """How many different words of at least three letters; those that share their first four letters count once."""
    bare = [text.strip().lower() for text in texts]
    return len({text[:4] for text in bare if len(text) >= 3 and text.isascii() and text.isalpha()})


def choose_latents(
    lm: LM,
    sae: SAE,
    records: Records,
    *,
    n: int = 10,
    min_count: int = 20,
    max_rate: float = 0.02,
    candidates: int = 128,
) -> list[OutputScore]:
    """The ``n`` best latents to steer with, best output score first, of the ``candidates`` with the clearest themes.

    Only latents that fire on at least ``min_count`` tokens and at most on ``max_rate`` of them are looked at: rarer
    ones are badly known, commoner ones are about form rather than theme.
    """
    count = torch.as_tensor(records.count)
    usual = ((count >= min_count) & (count <= max_rate * records.n_tokens)).nonzero()[:, 0]
    clarity = theme_clarity(lm, sae, usual.tolist()) if len(usual) else torch.zeros(0)
    clear = usual[clarity > 0]
    if len(clear) == 0:
        raise UnweaveError(
            f"none of {len(usual)} latents that fire often enough has a theme in the logit lens",
            where=str(sae.write),
            remedy="name the latent to steer with, or collect records on more text",
        )
    order = clarity[clarity > 0].argsort(descending=True)[:candidates]
    scores = output_scores(lm, sae, clear[order].tolist())
    return sorted(scores, key=lambda found: (-found.score, found.latent))[:n]
