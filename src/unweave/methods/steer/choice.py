"""Which latent to steer with: one that has a theme, and that brings the theme out when it is turned up.

1. In a small model's early layers a high output score (``sae/output_score.py``) finds latents that promote function
   words. So ``choose_latents`` begins from the latents with the clearest themes (``themes``) and asks for their
   expression: what the theme's words add to the divergence of the next token's distribution, at neutral prompts, when
   the latent is turned up as it will be in use.
2. The strongest of them often write nothing but their words. So those that express their theme most write a few words
   each, and the ones that come to their theme in text that neither repeats itself nor falls apart are best
   (``trials``).

All candidates are rows of a few batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from unweave.core.errors import UnweaveError
from unweave.latents.records import Records
from unweave.lm.model import LM
from unweave.methods.steer.result import Candidate
from unweave.methods.steer.themes import Theme, themes
from unweave.sae.edits import Change
from unweave.sae.module import SAE
from unweave.sae.output_score import output_scores, raised, written_site
from unweave.sae.steered import distinct, generate_sweep, measures, prompt_tokens

PROMPTS = ("I would like to tell you about the", "My favourite thing is the", "It was all about")
"""beginnings that a word of almost any theme may follow"""
TRIAL = "Tell me about something you like."

_TINY = 1e-12


def expressions(
    lm: LM,
    sae: SAE,
    selected: Sequence[Theme],
    maxima: Sequence[float],
    *,
    strength: float = 2.0,
    max_tokens: int = 1024,
) -> list[float]:
    """How much turning each latent up brings out its theme, in nats: sum p' log(p' / p) over the theme's tokens, mean
    over neutral prompts. p is the next-token distribution, p' the one with ``strength`` times the latent's largest
    activation added on all tokens that the SAE was trained on; a rare word that becomes likely counts most."""
    write = written_site(lm, sae)
    shift = strength * torch.as_tensor(maxima, dtype=sae.W_dec.dtype, device=sae.W_dec.device).unsqueeze(1)
    shift = shift * sae.subset([theme.latent for theme in selected]).directions
    total = [0.0] * len(selected)
    for prompt in PROMPTS:
        row = lm.tokenize(prompt)
        reads = sae.read or write
        with lm.taps(read=[reads]) as seen:
            logits = lm(row, keep_logits=1)
        assert logits is not None
        before = torch.softmax(logits[0, -1].float(), -1).clamp(min=_TINY)
        keep = sae.policy.keep(seen[reads], row.ids.to(lm.device), row.mask.to(lm.device)).unsqueeze(-1)
        for part, p in raised(lm, write, row, shift.unsqueeze(1), keep, max_tokens):
            for place, after in zip(range(part.start, part.stop), p, strict=True):
                ids = torch.tensor(selected[place].token_ids, device=p.device)
                now = after[ids].clamp(min=_TINY)
                total[place] += float((now * (now / before[ids]).log()).sum()) / len(PROMPTS)
    return total


def trials(
    lm: LM,
    sae: SAE,
    selected: Sequence[Theme],
    maxima: Sequence[float],
    *,
    strengths: Sequence[float] = (1.0, 2.0),
    prompt: str = TRIAL,
    max_new_tokens: int = 24,
) -> list[float]:
    """How well each latent shows its theme in text, [n] in [0, 1]: mean over strengths of theme x variety x sense.

    theme: 1 with two or more of the theme's tokens, 0.5 with one. variety: distinct 3-grams over all. sense: 1 while
    the perplexity under the unedited model is at most twice that of unedited text, else 1 over the number of doublings.
    """
    cells = [(i, strength) for i in range(len(selected)) for strength in strengths]
    changes = [[], *([Change(sae, selected[i].latent, strength * maxima[i], "add")] for i, strength in cells)]
    rows = prompt_tokens(lm, [prompt] * len(changes), None)
    written = generate_sweep(lm, rows, changes, max_new_tokens=max_new_tokens)
    perplexities = [one.perplexity for one in measures(lm, rows, written, None)]
    usual = perplexities[0] or 1.0
    values = [0.0] * len(selected)
    for (i, _), row, n, p in zip(cells, written.ids[1:], written.lengths.tolist()[1:], perplexities[1:], strict=True):
        if p is not None:
            new = row[:n]
            theme = min(1.0, sum(int(token) in selected[i].token_ids for token in new) / 2)
            values[i] += theme * distinct(new) / max(1.0, math.log2(p / usual)) / len(strengths)
    return values


def choose_latents(
    lm: LM, sae: SAE, records: Records, *, n: int = 10, candidates: int = 192, tried: int = 12
) -> list[Candidate]:
    """The ``n`` best latents to steer with, best first.

    Of the ``candidates`` clearest themes the ``tried`` that are expressed most are tried in text, and come first in the
    order of their trials; the others follow by expression. Raises UnweaveError where no latent has a theme, as in
    records of very little text.
    """
    clearest = themes(lm, records)[:candidates]
    if not clearest:
        what = "no latent has a theme: words that its contexts share and others lack"
        remedy = "name the latent to steer with, or collect records on more text"
        raise UnweaveError(what, where=str(sae.write), remedy=remedy)
    maxima = [float(records.maximum[theme.latent]) for theme in clearest]
    values = expressions(lm, sae, clearest, maxima)
    order = sorted(range(len(clearest)), key=lambda i: (-values[i], clearest[i].latent))
    best = order[:tried]
    shown = dict(zip(best, trials(lm, sae, [clearest[i] for i in best], [maxima[i] for i in best]), strict=True))
    order = sorted(order[: max(n, tried)], key=lambda i: (i not in shown, -shown.get(i, 0.0), -values[i]))[:n]
    scores = output_scores(lm, sae, [clearest[i].latent for i in order])
    return [
        Candidate(clearest[i].latent, clearest[i].words, values[i], shown.get(i, 0.0), score.score, score.tokens)
        for i, score in zip(order, scores, strict=True)
    ]
